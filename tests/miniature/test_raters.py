"""Simulated people."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palate.miniature.captions import ATTRIBUTES, Scene
from tools.miniature.raters import QUESTIONS, TIE_MARGIN, Eye, Rater, crowd


def test_votes_without_ties_follow_bradley_terry() -> None:
    rater, rng = Rater("r", looks=2.0, prompt=4.0, noise=0.2), np.random.default_rng(0)
    votes = np.array([rater.vote(0.3, 0.0, rng) for _ in range(6000)])
    # felt = 0.3 + 0.2 L with L logistic: P(felt > m) = sigmoid((0.3 - m) / 0.2), P(felt < -m) = sigmoid(-(0.3 + m) / 0.2)
    better = 1 / (1 + np.exp(-(0.3 - TIE_MARGIN) / 0.2))
    worse = 1 / (1 + np.exp((0.3 + TIE_MARGIN) / 0.2))
    assert np.mean(votes == 1) == pytest.approx(better, abs=0.02)
    assert np.mean(votes == 0) == pytest.approx(worse, abs=0.02)


def test_the_three_questions_weigh_looks_and_prompt_differently() -> None:
    rater = Rater("r", looks=1.5, prompt=3.0, noise=0.1)
    appeal, following = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert rater.worth(appeal, following, "appeal").tolist() == [2.0, 0.0]
    assert rater.worth(appeal, following, "following").tolist() == [0.0, 4.0]
    assert rater.worth(appeal, following, "general").tolist() == [1.5, 3.0]
    assert set(QUESTIONS) == {"general", "appeal", "following"}


def test_a_crowd_is_the_same_for_the_same_seed_and_of_different_taste() -> None:
    assert crowd(5, 3) == crowd(5, 3)
    assert crowd(5, 3) != crowd(5, 4)
    assert len({rater.looks for rater in crowd(12)}) == 12


def test_the_eye_reads_attributes_in_their_order() -> None:
    eye, scene = Eye().eval(), Scene("night", "snow", "tower", "blue", "right", "plain", "moon")
    logits, looks = eye(torch.rand(2, 3, 64, 64))
    assert [p.shape[1] for p in eye.split(logits).values()] == [len(v) for v in ATTRIBUTES.values()]
    appeal, following, hits = eye.look(torch.rand(2, 3, 64, 64), [scene, scene])
    assert appeal.shape == following.shape == looks.shape == (2,)
    assert hits.shape == (2, 7)
    assert 0 <= float(following.min()) <= float(following.max()) <= 1
