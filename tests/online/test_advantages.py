from __future__ import annotations

import math

import pytest
import torch

from palate.online.advantages import (
    PromptTracker,
    best,
    effective_sample_size,
    group_advantages,
    percentile,
    ranked_pairs,
    softmax_weights,
)


def t(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def test_tracker_by_hand():
    tracker = PromptTracker(buffer_size=3, min_count=2)
    # First round: a has 2 rewards, mean 2, std 1; b has one and is measured against 1, 3, 8: mean 4, std sqrt(26/3) = 2.943920.
    first = tracker.advantages(["a", "a", "b"], t(1, 3, 8))
    assert first.tolist() == pytest.approx([-1, 1, 4 / math.sqrt(26 / 3)], rel=1e-5)
    # Second: a holds the latest three, 3, 5, 7 (1 has gone): mean 5, std sqrt(8/3).
    second = tracker.advantages(["a", "a"], t(5, 7))
    assert second.tolist() == pytest.approx([0, 2 / math.sqrt(8 / 3)], rel=1e-5, abs=1e-7)


def test_tracker_with_the_std_of_the_round():
    tracker = PromptTracker(min_count=2)
    found = tracker.advantages(["a", "a", "b", "b"], t(1, 3, 5, 7), global_std=True)
    assert found.tolist() == pytest.approx([-1 / math.sqrt(5), 1 / math.sqrt(5)] * 2, rel=1e-5)


def test_tracker_goes_on_from_its_state():
    one, other = PromptTracker(4, 2), PromptTracker(4, 2)
    one.advantages(["a", "b", "a"], t(1, 2, 5))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.advantages(["a"], t(2)), other.advantages(["a"], t(2)))


def test_groups_by_hand():
    assert group_advantages(["a", "b", "a", "b"], t(1, 10, 3, 30)).tolist() == pytest.approx([-1, -1, 1, 1], rel=1e-5)
    # The std of 1, 10, 3, 30 is sqrt((100 + 1 + 64 + 361) / 4) = sqrt(131.5) around 11.
    found = group_advantages(["a", "b", "a", "b"], t(1, 10, 3, 30), global_std=True)
    assert found.tolist() == pytest.approx([x / math.sqrt(131.5) for x in (-1, -10, 1, 10)], rel=1e-5)


def test_softmax_by_hand():
    # Temperature 2: exp(0), exp(ln 3) = 1, 3: weights 2 (1/4, 3/4) = 0.5, 1.5.
    rewards = t(0, 2 * math.log(3))
    assert softmax_weights(["a", "b"], rewards, temperature=2.0).tolist() == pytest.approx([0.5, 1.5])
    assert softmax_weights(["a", "b"], rewards, temperature=2.0, per_prompt=True).tolist() == [1.0, 1.0]
    four = softmax_weights(["a", "b", "a", "b"], t(0, 50, 2 * math.log(3), 50), temperature=2.0, per_prompt=True)
    assert four.tolist() == pytest.approx([0.5, 1.0, 1.5, 1.0])


def test_standardised_softmax_does_not_know_units():
    rewards = t(1, 2, 4, 7)
    one, other = (softmax_weights(list("abcd"), r, temperature=1.0, standardise=True) for r in (rewards, 1000 * rewards + 5))
    torch.testing.assert_close(one, other)
    assert one.mean() == pytest.approx(1)


def test_effective_sample_size():
    assert effective_sample_size(torch.ones(5)) == 5
    assert effective_sample_size(t(1, 0, 0)) == 1
    assert effective_sample_size(t(0.5, 1.5)) == pytest.approx(4 / 2.5)


def test_the_best():
    rewards = t(1, 5, 3, 4, 2)
    assert percentile(rewards, 75.0) == 4  # of 5 rewards the fourth: place 0.75 (5 - 1) = 3 from 0
    assert best(rewards, 4.0).tolist() == [False, True, False, True, False]
    assert best(rewards, 9.0).tolist() == [False, True, False, False, False]  # none is good enough: the best one


def test_pairs_by_rank():
    prompts = ["a", "b", "a", "a", "b", "a", "a"]
    assert ranked_pairs(prompts, t(1, 9, 5, 3, 7, 4, 2)) == [(2, 0), (5, 6), (1, 4)]
