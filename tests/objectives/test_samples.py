from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from implied import to_x0

from palate.base.errors import UserError
from palate.diffusion.denoising import Conditioning, Fit, draw
from palate.diffusion.schedule import RectifiedFlow, from_config
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


# Objectives that compare with the policy that drew --------------------------------------------------------------------------


def rows(*values: float) -> Fit:
    return Fit(torch.tensor([values], dtype=torch.float64))


def number(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64)


def test_nft_golden():
    # mix 0.5, p (0.2, -0.4), o (0.4, 0): e+ = (0.3, -0.2), e- = 1.5 o - 0.5 p = (0.5, 0.2).
    # mean e+^2 = 0.065, mean |e+| = 0.25; mean e-^2 = 0.145, mean |e-| = 0.35.
    # gain 2: E+ = 2 * 0.065 / 0.25 = 0.52, E- = 2 * 0.145 / 0.35 = 0.8285714.
    # label 0.7: 0.7 * 0.52 + 0.3 * 0.8285714 = 0.6125714; times 5 / 0.5 = 6.1257143.
    # r (0.2, 0): mean (p - r)^2 = 0.08, times 0.1.
    policy, old, reference = rows(0.2, -0.4), rows(0.4, 0.0), rows(0.2, 0.0)
    found = samples.nft(policy, reference, old, number(0.7), number(2.0), mix=0.5, reference_weight=0.1)
    assert found.item() == pytest.approx(6.1257143 + 0.008, abs=1e-6)
    # The size of an error is not below 1e-5, in units of x0: 4 * 1e-16 / 1e-5 for an error of 1e-8 at gain 2.
    nothing = rows(1e-8)
    tiny = samples.nft(nothing, nothing, nothing, number(1.0), number(2.0), scale=1.0)
    assert tiny.item() == pytest.approx(4e-16 / 1e-5, rel=1e-9)
    for mix in (0.0, 1.5):
        with pytest.raises(UserError, match=r"mix is .*; expected"):
            samples.nft(policy, reference, old, number(0.7), number(2.0), mix=mix)


def of_x0(schedule, outputs, noised, label, mix):
    """The authors' own form: x0 as the better and the worse model predict it."""
    policy, old, reference = outputs
    better, worse = mix * policy + (1 - mix) * old, (1 + mix) * old - mix * policy
    found = 0.0
    for weight, output in ((label, better), (1 - label, worse)):
        error = to_x0(schedule, output, noised.xt, noised.t) - noised.x0
        found += weight * error.square().flatten(1).mean(1) / error.abs().flatten(1).mean(1).clamp(min=1e-5)
    return 5.0 / mix * found + 1e-4 * (policy - reference).square().flatten(1).mean(1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("mix", [0.1, 1.0])
def test_nft_is_that_of_the_authors_whatever_the_model_predicts(kind: str, mix: float):
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    schedule = RectifiedFlow() if kind == "flow" else from_config({**betas, "prediction_type": kind})
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
    noised = draw(schedule, x0, Conditioning({"a": torch.zeros(6, 1)}), torch.arange(6), t_min=5)
    outputs = [noised.target + 0.1 * torch.randn(x0.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    label = torch.linspace(0, 1, 6, dtype=torch.float64)
    policy, old, reference = (Fit(output - noised.target) for output in outputs)
    found = samples.nft(policy, reference, old, label, schedule.gain(noised.t), mix=mix)
    torch.testing.assert_close(found, of_x0(schedule, outputs, noised, label, mix), rtol=1e-9, atol=1e-12)


def test_nft_pulls_to_good_pictures_and_away_from_bad_ones():
    """On the policy that drew, where both implied models are the same, the gradients of label 1 and 0 are opposite."""
    start = torch.tensor([[0.3, -0.1]], dtype=torch.float64)
    gradients = []
    for label in (1.0, 0.5, 0.0):
        residual = start.clone().requires_grad_()
        samples.nft(Fit(residual), Fit(start), Fit(start), number(label), number(1.0), mix=0.7).sum().backward()
        gradients.append(residual.grad)
    good, neither, bad = gradients
    torch.testing.assert_close(good, -bad)
    torch.testing.assert_close(neither, torch.zeros_like(neither))
    # 5 / mix * mix * 2 p / 2 / mean|p| = 5 p / 0.2
    torch.testing.assert_close(good, 5 * start / 0.2)


def test_awm_golden():
    # power 0.5, sigma 0.8: l = -1.6 (sqrt(L + 1e-10) - 1e-5). p (0.3, 0.4): sqrt(0.125) = 0.3535534; o (0.5, 0.5): 0.5.
    # rho = exp(1.6 * 0.1464466) = exp(0.2343146) = 1.2640419. label 0.9: A = 0.8: -A rho = -1.0112335.
    # Clipped at 1.1: -0.88, which is the larger. mean (p - o)^2 = (0.04 + 0.01) / 2 = 0.025.
    # r (0.3, 0): mean (p - r)^2 = 0.08.
    policy, old, reference = rows(0.3, 0.4), rows(0.5, 0.5), rows(0.3, 0.0)
    weights = {"power": 0.5, "old_weight": 2.0, "reference_weight": 0.5}

    def found(label: float, clip_range: float) -> float:
        given = (policy, reference, old, number(label), number(0.8))
        return samples.awm(*given, clip_range=clip_range, **weights).item()

    assert found(0.9, 1.0) == pytest.approx(-1.0112335 + 0.05 + 0.04, abs=1e-6)
    assert found(0.9, 0.1) == pytest.approx(-0.88 + 0.05 + 0.04, abs=1e-6)
    # A bad picture, A = -0.8: 1.0112335 beats the clipped 0.88.
    assert found(0.1, 0.1) == pytest.approx(1.0112335 + 0.05 + 0.04, abs=1e-6)
    with pytest.raises(UserError, match=r"power is 0.0; expected"):
        samples.awm(policy, reference, old, number(0.5), number(1.0), power=0.0)


def test_awm_on_the_policy_that_drew_is_weighted_matching():
    """There rho is 1, and its gradient that of A sigma ((L + e)^p) / p: errors of good pictures fall, of bad ones rise."""
    start = torch.tensor([[0.3, -0.1]], dtype=torch.float64)
    for label in (1.0, 0.5, 0.25, 0.0):
        residual = start.clone().requires_grad_()
        samples.awm(Fit(residual), Fit(start), Fit(start), number(label), number(0.6)).sum().backward()
        # d/dp_i of A sigma L^(1/4) / (1/4) = A sigma L^(-3/4) 2 p_i / 2, L = 0.05
        expected = (2 * label - 1) * 0.6 * 0.05**-0.75 * start
        torch.testing.assert_close(residual.grad, expected, rtol=1e-6, atol=1e-12)


@given(scale=st.floats(0, 2), label=st.floats(0, 1))
def test_awm_keeps_near_the_policy_that_drew(scale: float, label: float):
    old, policy = rows(0.5, -0.2), rows(0.5 + scale, -0.2)
    near, far = (samples.awm(policy, old, old, number(label), number(0.5), old_weight=w).item() for w in (0.0, 3.0))
    assert far - near == pytest.approx(3 * scale**2 / 2, abs=1e-9)
