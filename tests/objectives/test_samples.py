from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palate.diffusion.denoising import Fit
from palate.objectives import samples


def test_sft_is_the_error():
    # (1 + 9) / 2 = 5, (4 + 0) / 2 = 2.
    assert samples.sft(Fit(torch.tensor([[1.0, 3.0], [2.0, 0.0]]))).tolist() == [5, 2]


def of(error: float) -> Fit:
    return Fit(torch.tensor([[math.sqrt(error)]], dtype=torch.float64))


def kto(L: float, R: float, liked: float, point: float, **options: float) -> float:
    label = torch.tensor([liked], dtype=torch.float64)
    return samples.kto(of(L), of(R), label, torch.tensor(point, dtype=torch.float64), **options).item()


def test_kto_golden():
    # R - L = 0.02, K = 0.005: u = 200 / 2 * 0.015 = 1.5; 1 - sigmoid(1.5) = 0.1824255, 1 - sigmoid(-1.5) = 0.8175745.
    assert kto(0.10, 0.12, 1.0, 0.005, beta=200.0) == pytest.approx(0.1824255, abs=1e-7)
    assert kto(0.10, 0.12, 0.0, 0.005, beta=200.0) == pytest.approx(0.8175745, abs=1e-7)
    # Weights, and a label of 0.75: 0.75 * 2 * 0.1824255 + 0.25 * 3 * 0.8175745 = 0.2736383 + 0.6131809.
    weights = {"liked_weight": 2.0, "disliked_weight": 3.0}
    assert kto(0.10, 0.12, 0.75, 0.005, beta=200.0, **weights) == pytest.approx(0.8868191, abs=1e-7)


@given(L=st.floats(0, 1), R=st.floats(0, 1), point=st.floats(-1, 1))
def test_laws_of_kto(L: float, R: float, point: float):
    liked, disliked = (kto(L, R, label, point, beta=20.0) for label in (1.0, 0.0))
    assert liked + disliked == pytest.approx(1)
    assert kto(R, R, 1.0, min(point, 0), beta=20.0) == 0.5  # a reference point below 0 counts as 0
    assert kto(R, R, 1.0, abs(point), beta=20.0) >= 0.5


def test_kto_pulls_to_liked_pictures_and_away_from_disliked_ones():
    residual = torch.tensor([[0.3], [0.3]], dtype=torch.float64, requires_grad=True)
    point = torch.zeros((), dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64)
    samples.kto(Fit(residual), Fit(residual.detach()), labels, point, beta=8.0).sum().backward()
    # d / dL of sigmoid(-beta / 2 (R - L)) at 0 is beta / 8 = 1; d L / d residual = 0.6.
    torch.testing.assert_close(residual.grad, torch.tensor([[0.6], [-0.6]], dtype=torch.float64))
