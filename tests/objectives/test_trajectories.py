from __future__ import annotations

import math

import pytest
import torch

from palate.objectives.trajectories import ddpo_is, ddpo_sf, ddpo_tr


def t(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_ddpo_is_by_hand():
    # rho = exp(0.1) = 1.105171, clipped to [0.95, 1.05]. A = 2: max(-2.210342, -2.1) = -2.1; A = -2: max(2.210342, 2.1).
    # rho = exp(-0.1) = 0.904837. A = 2: max(-1.809675, -1.9) = -1.809675; A = -2: max(1.809675, 1.9) = 1.9.
    found = ddpo_is(t(0.1, 0.1, -0.1, -0.1), t(0, 0, 0, 0), t(2, -2, 2, -2), clip_range=0.05)
    assert found.tolist() == pytest.approx([-2.1, 2.2103418, -1.8096748, 1.9], abs=1e-6)


def test_a_clipped_step_has_no_gradient():
    log_prob = t(0.1, 0.1, 0.01).requires_grad_()
    ddpo_is(log_prob, t(0, 0, 0), t(2, -2, 2), clip_range=0.05).sum().backward()
    assert log_prob.grad is not None
    # Pushed far enough up already; pushed up where it should go down; within the range: -A rho.
    assert log_prob.grad.tolist() == pytest.approx([0, 2 * math.exp(0.1), -2 * math.exp(0.01)])


def test_sf_by_hand():
    assert ddpo_sf(t(-1.0, 0.5), t(-1.5, 0.5), t(3, -2)).tolist() == [-1.5, 0.0]


def test_on_policy_all_have_one_gradient():
    gradients = []
    for objective in (ddpo_is, ddpo_sf, lambda *given: ddpo_tr(*given, torch.zeros_like(given[0]))):
        log_prob, advantage = t(-1.3, 0.7, 2.0).requires_grad_(), t(1.5, -0.5, 0.0)
        objective(log_prob, log_prob.detach(), advantage).sum().backward()
        assert log_prob.grad is not None
        gradients.append(log_prob.grad)
        torch.testing.assert_close(log_prob.grad, -advantage)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_a_trust_region_drops_what_goes_farther_out():
    # rho = e^0.1 = 1.105171 or e^-0.1 = 0.904837. Outside the region: A = 2 with rho > 1 and A = -2 with rho < 1 are dropped;
    # those that come back are not. Inside, none is.
    log_prob, advantage = t(0.1, 0.1, -0.1, -0.1, 0.1).requires_grad_(), t(2, -2, 2, -2, 2)
    found = ddpo_tr(log_prob, t(0, 0, 0, 0, 0), advantage, t(1, 1, 1, 1, 0.001), trust_region=0.01)
    assert found.tolist() == pytest.approx([0, 2.2103418, -1.8096748, 0, -2.2103418], abs=1e-6)
    found.sum().backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx(found.tolist())
