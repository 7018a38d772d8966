"""How steps are taken: one formula for both schedules, the rules by hand, and what they do to a distribution that is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from implied import to_noise, to_x0

from palate.base.errors import UserError
from palate.base.seeds import normal
from palate.diffusion.denoising import Conditioning, draw
from palate.diffusion.sampling import sample, transition
from palate.diffusion.schedule import PREDICTIONS, DynamicShift, RectifiedFlow, from_config
from palate.diffusion.steps import LEAST_STD, cps, ddim, ddim_step, flow_sde

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
preserving, flow = from_config(SD), RectifiedFlow()


def latents(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def time(t: float) -> torch.Tensor:
    return torch.tensor([t], dtype=torch.float64)


@settings(max_examples=60)
@given(
    t=st.integers(0, 999),
    back=st.integers(1, 400),
    eta=st.floats(0, 1),
    kind=st.sampled_from(sorted({*PREDICTIONS} - {"flow"})),
)
def test_the_general_step_is_that_of_ddim_in_abar(t: int, back: int, eta: float, kind: str):
    # arXiv 2010.02502, eqs. 12 and 16, as written there.
    this, s = replace(preserving, prediction_type=kind), max(t - back, -1)
    xt, output, t_, s_ = latents(t), latents(t + 1), torch.tensor([t]), torch.tensor([s])
    abar_t, abar_s = (
        preserving.alphas_cumprod[t],
        preserving.alphas_cumprod[s] if s >= 0 else torch.ones((), dtype=torch.float64),
    )
    variance = eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    x0, noise = to_x0(this, output, xt, t_), to_noise(this, output, xt, t_)
    mean, std = ddim_step(this, output, xt, t_, s_, eta)
    torch.testing.assert_close(mean, abar_s.sqrt() * x0 + (1 - abar_s - variance).sqrt() * noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std.flatten()[0], variance.sqrt(), rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(t=st.floats(0.1, 1000), s=st.floats(0, 1000), eta=st.floats(0, 1))
def test_flow_round_trips_and_steps_along_its_path(t: float, s: float, eta: float):
    x0, noise, t_, s_ = latents(1), latents(2), time(t), time(s)
    xt, output = flow.add_noise(x0, noise, t_), flow.target(x0, noise, t_)
    torch.testing.assert_close(output, noise - x0)
    torch.testing.assert_close(to_x0(flow, output, xt, t_), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(to_noise(flow, output, xt, t_), noise, rtol=0, atol=1e-12)
    mean, std = ddim_step(flow, output, xt, t_, s_, eta=0.0)
    torch.testing.assert_close(mean, flow.add_noise(x0, noise, s_), rtol=0, atol=1e-12)
    assert std.item() == 0
    if s <= t:  # what is drawn replaces noise, so that the noise level of s is kept
        mean, std = ddim_step(flow, output, xt, t_, s_, eta)
        kept = (mean - (1 - s / 1000) * x0) / noise
        torch.testing.assert_close(kept.square() + std.square(), torch.full_like(kept, s / 1000).square(), rtol=1e-9, atol=1e-9)


def test_flow_by_hand():
    # sigma 1/4 at t = 250: alpha 3/4, snr 9. x0 = 1, noise = 5: xt = 3/4 + 5/4 = 2, v = 4. Min-SNR 5: 5 / 16.
    t, one = time(250), torch.ones(1, 1, dtype=torch.float64)
    assert flow.add_noise(one, 5 * one, t).item() == 2
    assert flow.target(one, 5 * one, t).item() == 4
    assert flow.snr(t).item() == pytest.approx(9)
    assert flow.min_snr_weight(t, 5.0).item() == pytest.approx(5 / 16)
    # To sigma 1/8 at eta 1: ratio (3/4 1/8) / (7/8 1/4) = 3/7, std = 1/8 sqrt(1 - 9/49) = 0.112938.
    mean, std = ddim_step(flow, 4 * one, 2 * one, t, time(125), 1.0)
    assert std.item() == pytest.approx(math.sqrt(40) / 56)
    assert mean.item() == pytest.approx(7 / 8 + 5 * math.sqrt(1 / 64 - 40 / 3136))
    # CPS at 0.8: std = 1/8 sin(0.4 pi) = 0.118882, whatever t was.
    mean, std = cps(0.8)(flow, 4 * one, 2 * one, t, time(125))
    assert std.item() == pytest.approx(0.118882, abs=1e-6)
    assert mean.item() == pytest.approx(7 / 8 + 5 * math.sqrt(1 / 64 - 0.118882**2), abs=1e-5)
    # Flow-SDE at 0.7, d = -1/8: g^2 = 0.49 / 3, std = sqrt(0.49 / 24), mean = 2 (1 - g^2 / 4) - 4/8 (1 + g^2 3/2).
    mean, std = flow_sde(0.7)(flow, 4 * one, 2 * one, t, time(125))
    assert std.item() == pytest.approx(math.sqrt(0.49 / 24))
    assert mean.item() == pytest.approx(2 * (1 - 0.49 / 12) - 0.5 * (1 + 0.49 / 2))
    # From pure noise 1 - sigma_s = 1/8 stands in the root of g: g^2 = 0.49 * 8.
    assert flow_sde(0.7)(flow, 4 * one, 2 * one, time(1000), time(875))[1].item() == pytest.approx(0.7)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_without_noise_is_the_sampler_of_diffusers(shift):
    theirs, ours = FlowMatchEulerDiscreteScheduler(shift=shift), RectifiedFlow(shift=shift)
    theirs.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    way = ours.path(10)
    torch.testing.assert_close(way.t.float(), theirs.timesteps, rtol=1e-5, atol=0)
    torch.testing.assert_close((way.s / 1000).float(), theirs.sigmas[1:], rtol=1e-5, atol=1e-7)
    x = latents(3).float()
    for k, t in enumerate(theirs.timesteps):
        output = 0.3 * x + k / 10
        mean, std = ddim(0.0)(ours, output, x, *way.at(k, 1, "cpu"))
        expected = theirs.step(output, t, x).prev_sample
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
        assert std.item() == 0
        x = expected


def test_the_shifted_grid_by_hand():
    # sigma' = 3 sigma / (1 + 2 sigma) of 1, 0.75, 0.5, 0.25, 0.
    assert RectifiedFlow(shift=3.0).path(4).t.tolist() == pytest.approx([1000, 900, 750, 500])
    assert RectifiedFlow(shift=3.0).path(4).s.tolist() == pytest.approx([900, 750, 500, 0])


@pytest.mark.parametrize(
    ("rule", "n", "least", "greatest"),
    [
        # x0 of std 0.3, and what an exact model makes of it in a hundred steps. CPS draws the same share of the noise anew
        # however short a step is, so its pictures stay less spread.
        (ddim(0.0), 100, 0.28, 0.32),
        (ddim(1.0), 100, 0.27, 0.31),
        (cps(0.8), 100, 0.21, 0.26),
        (flow_sde(0.7), 100, 0.28, 0.32),
    ],
)
def test_a_model_that_knows_the_data_draws_the_data(rule, n, least, greatest):
    m, q, b = 1.5, 0.3, 1200

    def exact(xt, t, cond):
        """The velocity noise - x0 that is expected of x0 ~ N(m, q^2)."""
        sigma = (t / 1000).view(-1, 1).float()
        d = (xt - (1 - sigma) * m) / ((1 - sigma) ** 2 * q**2 + sigma**2)
        return sigma * d - m - (1 - sigma) * q**2 * d

    cond = Conditioning({"text": torch.zeros(b, 1)})
    with torch.no_grad():
        drawn = sample(exact, flow, flow.path(n), cond, torch.arange(b), (1,), guidance_scale=1.0, rule=rule)
    last = drawn.latents[:, -1]
    assert float(last.mean()) == pytest.approx(m, abs=0.02)
    assert least < float(last.std()) < greatest


@pytest.mark.parametrize("rule", [ddim(1.0), cps(0.8)])
def test_the_last_step_has_a_density(rule):
    way = flow.path(4)
    step = transition(
        lambda xt, t, cond: xt, flow, latents(1), *way.at(3, 1, "cpu"), Conditioning({"a": latents(1)}), rule=rule
    )
    assert step.std.item() == pytest.approx(LEAST_STD)
    assert step.log_prob(latents(2)).isfinite().all()


def test_times_of_flow_are_drawn_per_item_and_stop_short_of_pure_noise():
    seeds, x0 = torch.arange(64), normal(torch.arange(64), (2, 2), 9, "cpu", torch.float32)
    cond = Conditioning({"a": torch.zeros(64, 1)})
    whole = draw(flow, x0, cond, seeds)
    assert whole.t.dtype == torch.float64
    assert 0 <= whole.t.min() < 100
    assert 900 < whole.t.max() <= 999
    part = draw(flow, x0[7:9], cond.rows([7, 8]), seeds[7:9])
    assert torch.equal(part.t, whole.t[7:9])
    torch.testing.assert_close(part.xt, whole.xt[7:9])
    bounded = draw(flow, x0, cond, seeds, t_min=500, t_max=600).t
    assert 500 <= bounded.min() <= bounded.max() <= 600


def test_what_a_flow_cannot_do_is_said():
    with pytest.raises(UserError, match="takes one step or more"):
        flow.path(0)
    with pytest.raises(UserError, match="its own shift"):
        flow.path(4, "trailing")
    with pytest.raises(UserError, match="takes two steps or more"):
        RectifiedFlow(terminal=0.02).path(1)
    with pytest.raises(ValueError, match="shape of its latents"):
        RectifiedFlow(DynamicShift()).path(4)


def test_the_shift_of_a_picture_by_hand():
    # mu = 0.5 + (4096 - 256) * 0.65 / 3840 = 1.15 at 1024 pixels: 64 x 64 tokens of 2 x 2 latents.
    way = RectifiedFlow(DynamicShift()).path(2, shape=(16, 128, 128))
    assert way.t.tolist() == pytest.approx([1000, 1000 * math.exp(1.15) / (math.exp(1.15) + 1)])
    # The same tokens, of one latent each; and a shift that asks for the number of steps.
    whole = RectifiedFlow(lambda tokens, n: tokens / n, patch=1).path(2, shape=(128, 2, 3))
    assert whole.t.tolist() == pytest.approx([1000, 1000 * 3 * 0.5 / 2])
