"""The perceptual path in float32 against the same written in float64, and against half precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from encoders import SD, Encoder, batch, output_near
from torch import Tensor

from palate import spaces
from palate.base.seeds import normal
from palate.diffusion.denoising import STEP_NOISE, Noised, fit
from palate.diffusion.schedule import from_config

schedule = from_config(SD)
T = 200  # where the step is smallest: c_t = 0.0041


def reference_error(noised: Noised, output: Tensor, store: torch.dtype) -> Tensor:
    """The NCP error in float64, transcribed from the paper's equations 12 to 14, but for latents rounded to `store`."""
    beta = (torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)[T]
    abar, before = schedule.alphas_cumprod[T], schedule.alphas_cumprod[T - 1]
    sigma = (beta * (1 - before) / (1 - abar)).sqrt()
    z = normal(noised.seeds, noised.xt.shape[1:], STEP_NOISE, "cpu", torch.float32).double()

    def latent(noise: Tensor) -> Tensor:
        mean = (noised.xt.double() - beta / (1 - abar).sqrt() * noise.double()) / (1 - beta).sqrt()
        return (mean + sigma * z).to(store).double()

    encoder, t = Encoder(torch.float64), noised.t - 1
    of_output, of_target = (encoder(latent(noise), t, noised.cond, "last_down")[0] for noise in (output, noised.noise))
    return (of_output - of_target).pow(2).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("rms", [0.1, 0.3])
@pytest.mark.parametrize(("gap", "float32", "half"), [("toward the target", 1e-3, 0.1), ("anywhere", 2e-2, 1.0)])
def test_the_gap_of_policy_and_reference_survives(gap: str, rms: float, float32: float, half: float):
    # The reference is off by rms and the policy is rms 0.01 from it, as early in training: the latents then differ by 4e-5, of
    # which float32 keeps three digits per element. A policy that learned has a clear difference of errors. If it only moved
    # somewhere, the elements' differences have both signs and all but cancel in the mean, so a hundredth is what can be had.
    noised = batch(schedule, 8, size=32, dtype=torch.float32, t_min=T, t_max=T)
    reference = output_near(noised, rms)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(9))
    policy = reference + 0.01 * ((noised.target - reference) / rms if gap == "toward the target" else noise)

    embed = spaces.perceptual(Encoder(torch.float32), schedule)(noised)
    target = embed(noised.target)
    found = fit(embed, policy, target).error.double() - fit(embed, reference, target).error.double()

    def difference(store: torch.dtype) -> Tensor:
        return reference_error(noised, policy, store) - reference_error(noised, reference, store)

    def distance(other: Tensor) -> float:
        return ((other - exact).norm() / exact.norm()).item()

    exact = difference(torch.float64)
    assert distance(found) < float32
    # Latents that are merely stored in half precision lose it.
    assert distance(difference(torch.float16)) > half
    assert distance(difference(torch.bfloat16)) > half


@pytest.mark.parametrize(("rms", "tolerance"), [(0.01, 2e-3), (0.1, 2e-4)])
def test_error_and_gradient_are_right(rms: float, tolerance: float):
    noised = batch(schedule, 8, size=32, dtype=torch.float32, t_min=T, t_max=T)
    output = output_near(noised, rms).requires_grad_()
    embed = spaces.perceptual(Encoder(torch.float32), schedule)(noised)
    found = fit(embed, output, embed(noised.target)).error
    exact = reference_error(noised, output, torch.float64)
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0)
    gradients = [torch.autograd.grad(error.sum(), output)[0] for error in (found, exact)]
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() < 10 * tolerance


def test_half_precision_latents_cost_nothing_more_than_their_own_rounding():
    # A batch that arrives in float16 takes the step in float32 all the same.
    noised = batch(schedule, 8, size=32, dtype=torch.float32, t_min=T, t_max=T)
    rounded = replace(noised, xt=noised.xt.half().float())
    output = output_near(noised, 0.1)
    space = spaces.perceptual(Encoder(torch.float32), schedule)
    half = replace(noised, **{name: getattr(noised, name).half() for name in ("x0", "noise", "xt", "target")})
    embed, embed_half = space(rounded), space(half)
    found = fit(embed_half, output, embed_half(noised.target)).error
    torch.testing.assert_close(found, fit(embed, output, embed(noised.target)).error, rtol=1e-6, atol=0)
