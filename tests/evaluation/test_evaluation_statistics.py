"""Laws and golden values of the paired statistics."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from palate.errors import UserError
from palate.evaluation.statistics import mean_difference, prompt_differences, sign_flip_test, wilson, win_rate

rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(rows)
def test_swapping_sides_mirrors(data):
    base, tuned, prompts = (list(column) for column in zip(*data, strict=True))
    base, tuned = [float(b) for b in base], [float(t) for t in tuned]
    a, b = win_rate(base, tuned, prompts, draws=200), win_rate(tuned, base, prompts, draws=200)
    assert b.rate == pytest.approx(1 - a.rate)
    assert (b.low, b.high) == pytest.approx((1 - a.high, 1 - a.low))
    assert (b.wins, b.ties, b.losses) == (a.losses, a.ties, a.wins)
    assert a.low <= a.rate + 1e-12
    assert a.rate <= a.high + 1e-12
    assert a.wins + a.ties + a.losses == a.n == len(data)
    assert mean_difference(tuned, base, prompts, draws=200).difference == pytest.approx(
        -mean_difference(base, tuned, prompts, draws=200).difference
    )
    differences = prompt_differences(base, tuned, prompts)
    assert sign_flip_test(differences) == sign_flip_test(-differences)


def test_a_set_against_itself_is_one_half():
    x = np.random.default_rng(0).normal(size=50)
    w = win_rate(x, x, list(range(50)))
    assert w.rate == 0.5
    assert (w.wins, w.ties, w.losses) == (0, 50, 0)
    assert not w.clear
    assert sign_flip_test(np.zeros(50)) == 1.0


def test_win_rate_by_hand():
    # Prompt a: win, tie; prompt b: loss, win, win. Points 1 + 0.5 + 0 + 1 + 1 = 3.5 of 5.
    w = win_rate([1.0, 2.0, 5.0, 0.0, 0.0], [2.0, 2.0, 4.0, 1.0, 3.0], ["a", "a", "b", "b", "b"], draws=2000)
    assert (w.rate, w.wins, w.ties, w.losses, w.prompts, w.n) == (0.7, 3, 1, 1, 2, 5)
    # Drawing two of two prompts gives a, a (1.5 of 2 = 0.75), a, b (0.7) or b, b (2 of 3 = 0.667).
    assert (w.low, w.high) == pytest.approx((2 / 3, 0.75))


def test_mean_difference_by_hand():
    # Differences 1, 3 (prompt a) and -1 (prompt b): mean 1. Draws: a, a -> 2; a, b -> (4 - 1) / 3 = 1; b, b -> -1.
    d = mean_difference([0.0, 0.0, 0.0], [1.0, 3.0, -1.0], ["a", "a", "b"], draws=2000)
    assert (d.difference, d.low, d.high) == pytest.approx((1.0, -1.0, 2.0))


def test_prompts_are_drawn_whole():
    """Ten equal votes of a prompt tell no more than one."""
    rng = np.random.default_rng(1)
    tuned = rng.normal(0.3, 1, size=60)
    one = win_rate(np.zeros(60), tuned, np.arange(60))
    ten = win_rate(np.zeros(600), np.repeat(tuned, 10), np.repeat(np.arange(60), 10))
    assert (ten.low, ten.high) == (one.low, one.high)
    free = win_rate(np.zeros(600), np.repeat(tuned, 10), np.arange(600))
    assert (free.high - free.low) < 0.5 * (ten.high - ten.low)


def test_wilson_is_scipy_s_and_the_bootstrap_is_close():
    for wins, n in ((0, 5), (7, 9), (260, 400), (400, 400)):
        expected = stats.binomtest(wins, n).proportion_ci(method="wilson")
        assert wilson(wins / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    w = win_rate(np.zeros(400), np.where(np.arange(400) < 260, 1.0, -1.0), np.arange(400))
    assert (w.low, w.high) == pytest.approx(wilson(0.65, 400), abs=0.01)


def test_no_certainty_from_a_few_prompts():
    w = win_rate([0.0] * 3, [1.0] * 3, [0, 1, 2])
    assert w.rate == 1
    assert w.low < 0.5  # three wins of three are no proof
    assert win_rate([0.0], [1.0], ["only"]).clear is False


def test_interval_covers_at_the_stated_rate():
    """Prompts differ in how easily they are won; four votes of a prompt share that chance. 300 repetitions: 0.95 +- 0.04."""
    rng = np.random.default_rng(2)
    chance, covered, repetitions = 0.6, 0, 300
    prompts = np.repeat(np.arange(80), 4)
    for number in range(repetitions):
        # Beta(1.8, 1.2) has mean 0.6.
        easy = np.repeat(rng.beta(1.8, 1.2, size=80), 4)
        w = win_rate(np.full(320, 0.5), (rng.uniform(size=320) < easy).astype(float), prompts, draws=400, seed=number)
        covered += w.low <= chance <= w.high
    assert 0.91 <= covered / repetitions <= 0.99


def test_sign_flip_by_hand_and_against_scipy():
    # Differences 1, 2, 3: only all plus and all minus reach |6|, 2 of 8 patterns.
    assert sign_flip_test([1.0, 2.0, 3.0]) == 0.25
    # 1, 1, -1: the sum is 1; every one of the 8 patterns has a sum of at least 1 in size.
    assert sign_flip_test([1.0, 1.0, -1.0]) == 1.0
    d = np.random.default_rng(3).normal(0.35, 1, size=40)
    theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0).pvalue
    assert sign_flip_test(d, draws=20_000) == pytest.approx(theirs, abs=0.01)
    assert sign_flip_test(np.ones(100)) == pytest.approx(1 / 10_001)


def test_three_thousand_prompts_are_quick():
    rng = np.random.default_rng(4)
    begun = time.process_time()
    w = win_rate(rng.normal(size=3200), rng.normal(0.1, 1, size=3200), np.arange(3200))
    assert w.high - w.low < 0.04
    assert time.process_time() - begun < 5


def test_same_seed_same_interval():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=30), rng.normal(size=30)
    assert win_rate(x, y, np.arange(30)) == win_rate(x, y, np.arange(30))


@pytest.mark.parametrize(
    ("base", "tuned", "prompts", "match"),
    [([], [], [], "nothing"), ([1.0], [1.0, 2.0], [0], "pair up"), ([1.0, float("nan")], [1.0, 2.0], [0, 1], "score 1")],
)
def test_mistakes_are_named(base, tuned, prompts, match):
    with pytest.raises(UserError, match=match):
        win_rate(base, tuned, prompts)
