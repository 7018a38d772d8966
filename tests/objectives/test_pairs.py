from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palate.base.errors import UserError
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
    assert pairs.margin(policy, reference).item() == pytest.approx(0.03, rel=1e-12)


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
    assert pairs.margin(of(a, b), of(c, d)).item() == -pairs.margin(of(b, a), of(d, c)).item()
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


def test_cdpo_golden():
    # u = 1.5. A vote with 10 % doubt is a label of 0.9: 0.2014133 + 0.1 * 1.5 = 0.3514133.
    assert pairs.cdpo(policy, reference, label(), beta=100.0, label_smoothing=0.1).item() == pytest.approx(0.3514133, abs=1e-7)
    # Label 0.8 becomes 0.9 * 0.8 + 0.1 * 0.2 = 0.74: 0.2014133 + 0.26 * 1.5 = 0.5914133.
    found = pairs.cdpo(policy, reference, label(0.8), beta=100.0, label_smoothing=0.1)
    assert found.item() == pytest.approx(0.5914133, abs=1e-7)
    with pytest.raises(UserError, match=r"label_smoothing is 0\.5"):
        pairs.cdpo(policy, reference, label(), label_smoothing=0.5)


def test_cdpo_is_least_where_the_odds_are_those_of_the_votes():
    u = torch.tensor(math.log(0.9 / 0.1), dtype=torch.float64, requires_grad=True)
    zero = Fit(torch.zeros(1, 1, dtype=torch.float64))
    # beta = 2 and reference errors of 0: u = Ll - Lw. residual^2 = error, so the loser's residual is sqrt(u).
    pairs.cdpo(Pair(zero, Fit(u.sqrt().reshape(1, 1))), Pair(zero, zero), label(), beta=2.0).sum().backward()
    assert u.grad is not None
    assert u.grad.item() == pytest.approx(0, abs=1e-12)


def test_ipo_golden():
    # u = 1.5: (1.5 - 0.5)^2 = 1; a loser preferred: (-1.5 - 0.5)^2 = 4; label 0.8: 0.8 + 0.2 * 4 = 1.6.
    assert pairs.ipo(policy, reference, label(), beta=100.0).item() == pytest.approx(1, rel=1e-9)
    assert pairs.ipo(policy, reference, label(0.8), beta=100.0).item() == pytest.approx(1.6, rel=1e-9)
    # The paper's own form, tau = 100, h = 0.03 / 2: (0.015 - 1 / 200)^2 = 1e-4, times tau^2 = 1.
    assert pytest.approx(1, rel=1e-9) == 100.0**2 * (0.015 - 1 / 200) ** 2


def test_hinge_golden():
    # u = 100 / 2 * 0.03 = 1.5 > 1: no push; beta 40: u = 0.6, 1 - 0.6 = 0.4; label 0.8: 0.8 * 0.4 + 0.2 * 1.6 = 0.64.
    assert pairs.hinge(policy, reference, label(), beta=100.0).item() == 0
    assert pairs.hinge(policy, reference, label(), beta=40.0).item() == pytest.approx(0.4, rel=1e-9)
    assert pairs.hinge(policy, reference, label(0.8), beta=40.0).item() == pytest.approx(0.64, rel=1e-9)


def test_mapo_golden():
    # f(0.10) = 0.05 / (e^0.05 - 1) = 0.05 / 0.05127110 = 0.97520832; f(0.20) = 0.1 / 0.10517092 = 0.95083319.
    # u = 500 / 0.5 * 0.02437513 = 24.37513 (near 250 * 0.1 = 25); beta 20: u = 40 * 0.02437513 = 0.9750051,
    # log(1 + e^-0.9750051) = log 1.3771903 = 0.3200454; Lw + 0.1 * that = 0.1320045.
    assert pairs.mapo(policy, label(), beta=20.0).item() == pytest.approx(0.1320045, abs=1e-7)
    # A tie: 0.15 + 0.1 * (0.3200454 + 0.9750051 / 2) = 0.15 + 0.0807548.
    assert pairs.mapo(policy, label(0.5), beta=20.0).item() == pytest.approx(0.2307548, abs=1e-7)


@given(error=st.one_of(st.floats(0, 1e-3), st.floats(0, 300)))
def test_the_gradient_of_mapos_amplitude_is_exact_in_float32(error: float):
    x = torch.tensor([error], dtype=torch.float32, requires_grad=True)
    f = pairs._amplitude(x)
    f.sum().backward()
    exact = torch.tensor([x.item()], dtype=torch.float64).clamp(min=1e-300)
    e = torch.special.expm1(exact)
    value = torch.where(exact < 1e-12, 1.0, exact / e)
    # f' = (e - x (e + 1)) / e^2, by series below 1e-3 where float64 cancels too: -1/2 + x / 6.
    slope = torch.where(exact < 1e-3, -0.5 + exact / 6, 1 / e - exact / e * (1 + 1 / e))
    assert x.grad is not None
    torch.testing.assert_close(f.double(), value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(x.grad.double(), slope, rtol=1e-5, atol=2e-6)


def test_orpo_golden():
    # odds of exp(-0.1): 1 / (e^0.1 - 1) = 9.5083319, of exp(-0.2): 1 / 0.22140276 = 4.5166556.
    # log ratio = log 2.1051710 = 0.7443967; log(1 + 1 / 2.1051710) = log 1.4750207 = 0.3886719; 0.1 + 0.1 * that = 0.1388672.
    assert pairs.orpo(policy, label()).item() == pytest.approx(0.1388672, abs=1e-7)
    # A tie: 0.15 + 0.1 * (0.3886719 + 0.7443967 / 2) = 0.15 + 0.0760870.
    assert pairs.orpo(policy, label(0.5)).item() == pytest.approx(0.2260870, abs=1e-7)


def test_orpo_pushes_the_loser_away():
    # The published scripts have the sign the other way round and fit the loser too.
    w, l = (torch.tensor([[r]], dtype=torch.float64, requires_grad=True) for r in (0.3, 0.4))
    pairs.orpo(Pair(Fit(w), Fit(l)), label(), weight=0.1).sum().backward()
    assert w.grad is not None
    assert l.grad is not None
    assert w.grad.item() > 0 > l.grad.item()
    zero = Fit(torch.zeros(1, 1, requires_grad=True))
    loss = pairs.orpo(Pair(zero, zero), torch.ones(1))
    loss.sum().backward()
    assert loss.isfinite().all()


def test_orpo_without_odds_is_cpo():
    # Peers leave the odds out: Lw - 0.1 log sigmoid(Ll - Lw) = 0.1 + 0.1 log(1 + e^-0.1) = 0.1 + 0.1 * 0.6443967.
    assert 0.1 * pairs.cpo(policy, label(), beta=2.0, bc_weight=10.0).item() == pytest.approx(0.1644397, abs=1e-7)


def vectors(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor([row], dtype=torch.float64, requires_grad=True) for row in rows]


def test_sdpo_golden():
    # rw = (1, 0), rl = (2, 1): <rw, rl> = 2 > 0, lambda = (1 - 0.5) * 1 / 2 = 0.25.
    w, l = vectors([1, 0], [2, 1])
    same = Pair(Fit(w.detach()), Fit(l.detach()))
    loss = pairs.sdpo(Pair(Fit(w), Fit(l)), same, label(), beta=8.0, mu=0.5)
    assert loss.item() == pytest.approx(math.log(2))
    loss.sum().backward()
    # dpo: d loss / d Lw = beta / 4 = 2, d Lw / d rw = 2 / 2 * rw: 2 * (1, 0); loser -2 * 0.25 * (2, 1).
    torch.testing.assert_close(w.grad, torch.tensor([[2.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(l.grad, torch.tensor([[-1.0, -0.5]], dtype=torch.float64))
    # Residuals that point apart: the loser's push helps the winner, and is left whole: -2 * (-2, 1).
    w, l = vectors([1, 0], [-2, 1])
    same = Pair(Fit(w.detach()), Fit(l.detach()))
    pairs.sdpo(Pair(Fit(w), Fit(l)), same, label(), beta=8.0, mu=0.5).sum().backward()
    torch.testing.assert_close(l.grad, torch.tensor([[4.0, -2.0]], dtype=torch.float64))


@given(mu=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_sdpo_keeps_a_share_mu_of_the_winners_progress(mu: float, seed: int):
    # If winner and loser had the same input, a gradient step would move their common output by -(gw - lambda gl).
    g = torch.Generator().manual_seed(seed)
    w, l = (torch.randn(1, 6, dtype=torch.float64, generator=g).requires_grad_() for _ in range(2))
    same = Pair(Fit(w.detach()), Fit(l.detach()))
    pairs.sdpo(Pair(Fit(w), Fit(l)), same, label(), beta=4.0, mu=mu).sum().backward()
    assert w.grad is not None
    assert l.grad is not None
    assert float((w.grad * (w.grad + l.grad)).sum()) >= mu * float(w.grad.square().sum()) - 1e-9


def test_dspo_golden():
    # Winner: p residual (1, 0), q residual (0, 0), loser: both 0. Lw = 0.5, Rw = 0: margin -0.5, beta 4: u = -1,
    # 1 - sigmoid(-1) = 0.7310586. (1 - 0.5 * 0.7310586)^2 / 2 = 0.6344707^2 / 2 = 0.2012765.
    zero = Fit(torch.zeros(1, 2, dtype=torch.float64))
    moved = Pair(Fit(torch.tensor([[1.0, 0.0]], dtype=torch.float64)), zero)
    assert pairs.dspo(moved, Pair(zero, zero), label(), beta=4.0, weight=0.5).item() == pytest.approx(0.2012765, abs=1e-7)
    # The published constants are SFT to four digits.
    published = pairs.dspo(policy, reference, label(), beta=0.001, weight=0.001)
    assert published.item() == pytest.approx(policy.w.error.item(), rel=1e-3)


def test_dspo_at_the_reference_is_sft_of_the_winner():
    assert pairs.dspo(policy, policy, label()).item() == pytest.approx(0.10, rel=1e-12)
    assert pairs.dspo(policy, policy, label(0.5)).item() == pytest.approx(0.15, rel=1e-12)


SETTINGS = {"cpo": {"beta": 10.0, "bc_weight": 0.3}, "orpo": {}} | {
    name: {"beta": 10.0} for name in ("cdpo", "dpo", "dspo", "hinge", "ipo", "mapo", "sdpo")
}


def call(name: str, policy: Pair[Fit], reference: Pair[Fit], label: torch.Tensor) -> torch.Tensor:
    objective = getattr(pairs, name)
    given = {"reference": reference} if "reference" in inspect.signature(objective).parameters else {}
    return objective(policy, label=label, **given, **SETTINGS[name])


@pytest.mark.parametrize("name", pairs.__all__)
@given(a=errors, b=errors, c=errors, d=errors, p=st.floats(0, 1))
def test_laws_of_all_pair_objectives(name: str, a: float, b: float, c: float, d: float, p: float):
    one, other = call(name, of(a, b), of(c, d), label(p)), call(name, of(b, a), of(d, c), label(1 - p))
    # Swapping the pictures and the label changes nothing; every value is finite; a soft label lies between the plain ones.
    if name != "sdpo":  # whose values are DPO's, but whose gradients look at the winner
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert one.isfinite().all()
    plain = [float(call(name, of(a, b), of(c, d), label(q))) for q in (0.0, 1.0)]
    assert min(plain) - 1e-9 <= float(one) <= max(plain) + 1e-9


@pytest.mark.parametrize("name", pairs.__all__)
def test_the_push_prefers_the_winner(name: str):
    w, l = (torch.tensor([[0.3, r]], dtype=torch.float64, requires_grad=True) for r in (0.2, -0.25))
    same = Pair(Fit(w.detach()), Fit(l.detach()))
    call(name, Pair(Fit(w), Fit(l)), same, label()).sum().backward()
    assert w.grad is not None
    assert (w.grad * w).sum().item() > 0  # a step down lowers the winner's error,
    assert (l.grad * l).sum().item() < 0 if name != "dspo" else l.grad is None or not l.grad.any()  # and raises the loser's


def test_the_published_settings_survive_float32_and_large_errors():
    for size in (0.0, 1e-8, 1e-3, 1.0, 50.0):
        w, l = (torch.full((2, 3), size * k).requires_grad_() for k in (1.0, 1.01))
        for name in pairs.__all__:
            if name == "cpo":
                continue
            objective = getattr(pairs, name)
            named = inspect.signature(objective).parameters
            given = {"reference": Pair(Fit(l.detach()), Fit(w.detach()))} if "reference" in named else {}
            loss = objective(Pair(Fit(w), Fit(l)), label=torch.ones(2), **given)
            gradients = torch.autograd.grad(loss.sum(), (w, l), allow_unused=True)
            assert loss.isfinite().all(), (name, size)
            assert all(g is None or g.isfinite().all() for g in gradients), (name, size)


def test_what_recipes_may_name():
    assert set(pairs.__all__) == set(SETTINGS)
