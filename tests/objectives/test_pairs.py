from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palate import objectives
from palate.diffusion.denoising import Fit, Pair
from palate.objectives import pairs

errors = st.floats(0, 4)


def of(w: float, l: float) -> Pair[Fit]:
    """A pair of one with the given errors."""
    return Pair(*(Fit(torch.tensor([[math.sqrt(error)]], dtype=torch.float64)) for error in (w, l)))


def label(p: float = 1.0) -> torch.Tensor:
    return torch.tensor([p], dtype=torch.float64)


policy, reference = of(0.10, 0.20), of(0.12, 0.19)
# D = (0.10 - 0.20) - (0.12 - 0.19) = -0.03; margin = 0.03.


def test_margin():
    assert objectives.margin(policy, reference).item() == pytest.approx(0.03, rel=1e-12)


def test_dpo_golden():
    # u = 100 / 2 * 0.03 = 1.5; -log sigmoid(1.5) = log(1 + e^-1.5) = log 1.2231302 = 0.2014133.
    assert pairs.dpo(policy, reference, label(), beta=100.0).item() == pytest.approx(0.2014133, abs=1e-7)
    # The published beta: u = 75, log(1 + e^-75) = e^-75 = 2.7e-33.
    assert pairs.dpo(policy, reference, label()).item() == pytest.approx(math.exp(-75), rel=1e-9)
    # Label 0.8: 0.8 * 0.2014133 + 0.2 * (0.2014133 + 1.5) = 0.2014133 + 0.3 = 0.5014133,
    # as -log sigmoid(-u) = -log sigmoid(u) + u.
    assert pairs.dpo(policy, reference, label(0.8), beta=100.0).item() == pytest.approx(0.5014133, abs=1e-7)


def test_cpo_golden():
    # u = -(20 / 2) (0.10 - 0.20) = 1; log(1 + e^-1) = log 1.3678794 = 0.3132617; plus 0.5 * Lw = 0.05.
    assert pairs.cpo(policy, label(), beta=20.0, bc_weight=0.5).item() == pytest.approx(0.3632617, abs=1e-7)
    # A tie: 0.5 * 0.3132617 + 0.5 * 1.3132617 = 0.8132617; plus 0.5 * (0.05 + 0.10) = 0.075.
    assert pairs.cpo(policy, label(0.5), beta=20.0, bc_weight=0.5).item() == pytest.approx(0.8882617, abs=1e-7)


@given(w=errors, l=errors, p=st.floats(0, 1))
def test_a_policy_that_is_its_reference_costs_ln_2(w: float, l: float, p: float):
    assert pairs.dpo(of(w, l), of(w, l), label(p)).item() == pytest.approx(math.log(2), rel=1e-12)


@given(a=errors, b=errors, c=errors, d=errors, p=st.floats(0, 1))
def test_swapping_winner_and_loser(a: float, b: float, c: float, d: float, p: float):
    assert objectives.margin(of(a, b), of(c, d)).item() == -objectives.margin(of(b, a), of(d, c)).item()
    # So does swapping the label; the cloning term of CPO follows the winner.
    torch.testing.assert_close(
        pairs.dpo(of(a, b), of(c, d), label(p), beta=10.0), pairs.dpo(of(b, a), of(d, c), label(1 - p), beta=10.0)
    )
    torch.testing.assert_close(
        pairs.cpo(of(a, b), label(p), beta=10.0, bc_weight=0.3), pairs.cpo(of(b, a), label(1 - p), beta=10.0, bc_weight=0.3)
    )


def test_gradient_prefers_the_winner():
    # d loss / d Lw = (beta / 2) sigmoid(-u): at policy = reference a quarter of beta, and its negative for the loser.
    residual = torch.tensor([[0.3]], dtype=torch.float64)
    w, l = (residual.clone().requires_grad_() for _ in range(2))
    pairs.dpo(Pair(Fit(w), Fit(l)), Pair(Fit(residual), Fit(residual)), label(), beta=8.0).sum().backward()
    # d Lw / d residual = 2 * 0.3.
    assert w.grad is not None
    assert l.grad is not None
    assert w.grad.item() == pytest.approx(8 / 4 * 0.6, rel=1e-12)
    assert l.grad.item() == pytest.approx(-8 / 4 * 0.6, rel=1e-12)


def test_logits_of_any_size_are_finite():
    for sign in (1, -1):
        big = Pair(Fit(torch.full((1, 1), 100.0)), Fit(torch.zeros(1, 1)))
        loss = pairs.dpo(big if sign > 0 else Pair(big.l, big.w), Pair(big.l, big.l), torch.ones(1))
        assert loss.isfinite().all()


def test_what_recipes_may_name():
    assert set(pairs.__all__) == {"cpo", "dpo"}
