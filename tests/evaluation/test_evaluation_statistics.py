"""Laws and golden values of the paired statistics."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import astuple
from pathlib import Path

import choix
import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from palate.base.errors import UserError
from palate.evaluation.statistics import (
    bradley_terry,
    krippendorff_alpha,
    mean_difference,
    paired,
    sign_flip_test,
    wilson,
    win_rate,
)

DATA = Path(__file__).parents[3] / "shared" / "data"

rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=30)


@settings(max_examples=40)
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
    differences = np.subtract(tuned, base)
    assert sign_flip_test(differences, prompts, draws=200) == sign_flip_test(-differences, prompts, draws=200)


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


def test_prompts_flip_together():
    # Prompt a: 1 + 3, prompt b: 2, prompt c: 1. Sums 4, 2, 1: only all plus and all minus reach 7, 2 of 8 patterns.
    assert sign_flip_test([1.0, 2.0, 3.0, 1.0], ["a", "b", "a", "c"]) == 0.25
    # Each by itself: 2 of 16.
    assert sign_flip_test([1.0, 2.0, 3.0, 1.0]) == 0.125
    with pytest.raises(UserError, match="one prompt per difference"):
        sign_flip_test([1.0, 2.0], ["a"])


def test_several_judges_are_as_each_alone():
    rng = np.random.default_rng(6)
    base, tuned, prompts = rng.normal(size=(60, 3)), rng.normal(0.3, 1, size=(60, 3)), np.repeat(np.arange(20), 3)
    rates, differences, macro = paired(base, tuned, prompts, draws=500)
    for j in range(3):
        assert astuple(rates[j]) == pytest.approx(astuple(win_rate(base[:, j], tuned[:, j], prompts, draws=500)))
        alone = mean_difference(base[:, j], tuned[:, j], prompts, draws=500)
        assert astuple(differences[j]) == pytest.approx(astuple(alone))
    assert macro.rate == pytest.approx(np.mean([r.rate for r in rates]))
    assert macro.low < macro.rate < macro.high
    # Judges that err independently are surer together.
    assert macro.high - macro.low < max(r.high - r.low for r in rates)


def test_difference_covers_at_the_stated_rate():
    """As above for means: prompts of unequal size, differences that share a prompt's own. 300 repetitions."""
    rng = np.random.default_rng(7)
    prompts = np.repeat(np.arange(60), np.tile([1, 3], 30))
    covered = 0
    for number in range(300):
        tuned = 0.2 + rng.normal(size=60)[prompts] + 0.5 * rng.normal(size=len(prompts))
        d = mean_difference(np.zeros(len(prompts)), tuned, prompts, draws=300, seed=number)
        covered += d.low <= 0.2 <= d.high
    assert 0.90 <= covered / 300 <= 0.98


def test_sign_flip_is_uniform_without_a_difference():
    rng = np.random.default_rng(8)
    p = [sign_flip_test(rng.normal(size=20), draws=300, seed=i) for i in range(400)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_bradley_terry_of_two_by_hand():
    # 3 of 4: odds of 3, log 3 apart; in Elo 400 log10(3) = 190.8.
    found = bradley_terry(np.array([[0.0, 3.0], [1.0, 0.0]]), prior=0.0, draws=500)
    assert found.strengths == pytest.approx([np.log(3) / 2, -np.log(3) / 2])
    elo = found.elo()
    assert elo[0, 0] - elo[0, 1] == pytest.approx(190.8, abs=0.1)
    assert (found.low < found.strengths).all()
    assert (found.strengths < found.high).all()


def test_bradley_terry_is_choix_s():
    rng = np.random.default_rng(9)
    truth = rng.normal(size=6)
    chance = 1 / (1 + np.exp(truth[None] - truth[:, None]))
    wins = np.triu(rng.binomial(12, chance), 1).astype(float)
    wins += np.tril(12 - wins.T, -1)
    wins += 0.5 * (1 - np.eye(6))  # a tie of each pair
    ours = bradley_terry(wins, prior=0.0, draws=100).strengths
    theirs = choix.ilsr_pairwise_dense(wins, alpha=0, max_iter=1000, tol=1e-12)
    assert ours == pytest.approx(theirs - theirs.mean(), abs=1e-6)
    assert bradley_terry(wins, draws=10).strengths == pytest.approx(ours, abs=0.1)  # the prior hardly matters


def test_bradley_terry_bears_a_clean_sweep():
    wins = np.array([[0.0, 5.0, 5.0], [0.0, 0.0, 3.0], [0.0, 2.0, 0.0]])
    found = bradley_terry(wins, draws=200)
    assert found.strengths[0] > found.strengths[1] > found.strengths[2]
    assert np.isfinite([found.strengths, found.low, found.high]).all()
    with pytest.raises(UserError, match="never lost"):
        bradley_terry(wins, prior=0.0)
    # A model that was never compared lies in the middle.
    idle = bradley_terry(np.pad(wins, (0, 1)), draws=50).strengths
    assert idle[0] > idle[3] > idle[2]
    assert idle.sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("clustered", [False, True])
def test_bradley_terry_covers_at_the_stated_rate(clustered):
    """True log strengths 0.5, 0, -0.5; 40 prompts of one vote a pair, which share the prompt's own taste if clustered."""
    rng, truth, covered = np.random.default_rng(10), np.array([0.5, 0.0, -0.5]), 0
    for number in range(100):
        own = rng.normal(size=(40, 3)) * (0.7 if clustered else 0)
        gap = (truth + own)[:, :, None] - (truth + own)[:, None, :]
        tables = np.zeros((40, 3, 3))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            tables[:, i, j] = rng.uniform(size=40) < 1 / (1 + np.exp(-gap[:, i, j]))
            tables[:, j, i] = 1 - tables[:, i, j]
        found = bradley_terry(tables if clustered else tables.sum(axis=0), draws=150, seed=number)
        # Averaging over tastes draws chances towards one half, so the strengths to be found are a little closer together.
        shrunk = truth / np.sqrt(1 + 0.35 * (0.98 if clustered else 0))
        covered += ((found.low <= shrunk) & (shrunk <= found.high)).mean()
    assert 0.88 <= covered / 100 <= 0.99


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_is_krippendorff_s(level):
    rng = np.random.default_rng(11)
    ratings = np.clip(rng.integers(0, 5, 40) + rng.integers(-1, 2, (4, 40)), 0, 4).astype(float)
    ratings[rng.uniform(size=ratings.shape) < 0.2] = np.nan
    expected = krippendorff.alpha(reliability_data=ratings, level_of_measurement=level)
    assert krippendorff_alpha(ratings, level) == pytest.approx(expected, abs=1e-12)
    assert krippendorff_alpha(np.repeat(ratings[:1], 3, axis=0), level) == 1


def test_alpha_by_hand():
    # Units (0, 0), (0, 1), (1, 1), (1, 1): coincidences 00: 2, 01 and 10: 1 each, 11: 4; n = 3 and 5 of 8.
    # Observed disagreement 2 / 8; expected 2 * 3 * 5 / (8 * 7) = 30 / 56. alpha = 1 - (1/4) / (15/28) = 8 / 15.
    assert krippendorff_alpha(np.array([[0.0, 0, 1, 1], [0, 1, 1, 1]])) == pytest.approx(8 / 15)
    assert np.isnan(krippendorff_alpha(np.ones((2, 3))))
    with pytest.raises(UserError, match="rated by two"):
        krippendorff_alpha(np.array([[1.0, np.nan], [np.nan, 2.0]]))
    with pytest.raises(UserError, match="did you mean 'nominal'"):
        krippendorff_alpha(np.ones((2, 2)), "nominel")


@pytest.mark.skipif(not DATA.is_dir(), reason="real ratings: put them into ../shared/data")
def test_real_ratings():
    """Figures measured once with other code: choix and krippendorff on the same files."""
    rows = [json.loads(line) for line in (DATA / "preferences/hpdv2-gallery/rankings.jsonl").read_text().splitlines()]
    ranks = np.array([row["rankings"] for row in rows], dtype=float)  # (40 prompts, 10 raters, 9 generators)
    tables = (ranks[..., :, None] < ranks[..., None, :]).sum(axis=1).astype(float)
    found = bradley_terry(tables, prior=0.0, draws=300)
    elo = found.elo()
    assert elo[0] == pytest.approx([891, 1284, 1218, 902, 767, 612, 1206, 877, 1243], abs=1)
    # Ten votes of one prompt are not ten prompts.
    free = bradley_terry(tables.sum(axis=0), draws=300).elo()
    assert (elo[2] - elo[1]).mean() > 1.3 * (free[2] - free[1]).mean()
    upper = np.triu_indices(9, 1)
    votes = (ranks[..., upper[0]] < ranks[..., upper[1]]).transpose(1, 0, 2).reshape(10, -1).astype(float)
    assert votes.shape == (10, 1440)
    assert krippendorff_alpha(votes) == pytest.approx(0.588, abs=5e-4)
    by_rank = ranks.transpose(1, 0, 2).reshape(10, -1)
    assert krippendorff_alpha(by_rank, "ordinal") == pytest.approx(0.719, abs=5e-4)
    raters = []
    for number in (1, 2, 3):
        with (DATA / f"ratings/imagenhub_t2i_rater{number}.tsv").open(newline="") as file:
            cells = [cell for row in list(csv.reader(file, delimiter="\t"))[1:] for cell in row[1:]]
        raters.append([json.loads(cell) for cell in cells])
    ratings = np.array(raters, dtype=float)  # (3, units, 2)
    assert krippendorff_alpha(ratings[..., 0], "ordinal") == pytest.approx(0.601, abs=5e-4)
    assert krippendorff_alpha(ratings[..., 1], "ordinal") == pytest.approx(0.442, abs=5e-4)


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
