"""The schedule against diffusers' schedulers, which compute in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from palate.diffusion.schedule import FLOW, RectifiedFlow, from_config
from palate.diffusion.steps import ddim_step

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS = {
    "sd": SD,
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.1, 0.2, 0.3, 0.25], "num_train_timesteps": 4},
    "zero_snr": {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "short": {**SD, "num_train_timesteps": 50},
}
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


def latents(seed: int, b: int = 1) -> torch.Tensor:
    return torch.randn(b, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("name", CONFIGS)
def test_alphas_cumprod(name: str, kind: type):
    theirs = kind(**CONFIGS[name])
    ours = from_config(theirs.config)
    # float32 products of a thousand factors are right to about 1e-5; towards zero SNR a difference makes that absolute.
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-7)
    assert ours.num_train_timesteps == theirs.config.num_train_timesteps
    assert ours.prediction_type == theirs.config.prediction_type


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_process(name: str):
    theirs = DDPMScheduler(**CONFIGS[name])
    ours = from_config({**theirs.config, "prediction_type": "v_prediction"})
    t = torch.arange(0, ours.num_train_timesteps, max(1, ours.num_train_timesteps // 20))
    x0, noise = latents(1, len(t)), latents(2, len(t))
    torch.testing.assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours.target(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [999, 500, 100, 2, 1, 0])
def test_posterior_of_ddpm(t: int, prediction_type: str):
    theirs = DDPMScheduler(**SD, prediction_type=prediction_type, variance_type="fixed_small", clip_sample=False)
    ours = from_config(theirs.config)
    xt, output, t_ = latents(1), latents(2), torch.tensor([t])
    mean, std = ddim_step(ours, output, xt, t_, t_ - 1)
    # Diffusers draws the noise of a step itself; the same seed gives it to us. At t = 0 it draws none.
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)) if t > 0 else torch.zeros_like(output)
    expected = theirs.step(output, t, xt, generator=torch.Generator().manual_seed(7)).prev_sample
    torch.testing.assert_close(mean + std * noise, expected, rtol=1e-4, atol=1e-4 if t < 999 else 2e-3)
    # beta_t from a difference of nearly equal float32 products is right to 1e-3; the variance is floored at 1e-20 there.
    assert std.item() == pytest.approx(theirs._get_variance(t).sqrt().item(), rel=2e-3, abs=2e-10)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_steps_of_ddim(prediction_type: str, eta: float, set_alpha_to_one: bool):
    theirs = DDIMScheduler(**SD, prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one, clip_sample=False)
    theirs.set_timesteps(10)
    ours = from_config(theirs.config)
    assert theirs.timesteps[-1] == 0  # the last step is the one to the end
    for t in theirs.timesteps.tolist():
        xt, output, z = latents(t), latents(t + 1), latents(t + 2)
        mean, std = ddim_step(ours, output, xt, torch.tensor([t]), torch.tensor([max(t - 100, -1)]), eta)
        expected = theirs.step(output, t, xt, eta=eta, variance_noise=z if eta else None).prev_sample
        torch.testing.assert_close(mean + std * z, expected, rtol=1e-4, atol=1e-4)


def test_sampling_with_zero_terminal_snr():
    theirs = DDIMScheduler(**CONFIGS["zero_snr"], timestep_spacing="trailing", clip_sample=False)
    theirs.set_timesteps(10)
    ours = from_config(theirs.config)
    assert theirs.timesteps[0] == 999
    xt, output = latents(1), latents(2)
    mean, _ = ddim_step(ours, output, xt, torch.tensor([999]), torch.tensor([899]), eta=0.0)
    torch.testing.assert_close(mean, theirs.step(output, 999, xt).prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
def test_samplers_of_released_models_are_read(kind: type):
    theirs = kind(**SD, steps_offset=1)
    ours = from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=0)
    # PNDM ends at abar_0 unless told otherwise.
    assert ours.final_alpha_cumprod == (pytest.approx(1 - 0.00085) if kind is PNDMScheduler else 1)


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
FLOWS = {
    "unshifted": {},
    "sd3": {"shift": 3.0},
    "terminal": {"shift": 2.0, "shift_terminal": 0.02},
    "flux": {**DYNAMIC, "shift": 3.0},
    "qwen": {**DYNAMIC, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
    "linear": {**DYNAMIC, "time_shift_type": "linear"},
}


@pytest.mark.parametrize("n", [2, 10, 28])
@pytest.mark.parametrize("given", [False, True], ids=["by_itself", "given"])
@pytest.mark.parametrize("name", FLOWS)
def test_the_grids_of_flow_matching(name: str, given: bool, n: int):
    """By itself, as the pipeline of SD3 uses it, and with the noise levels that pipelines such as that of FLUX give it."""
    theirs = FlowMatchEulerDiscreteScheduler(**FLOWS[name])
    ours = from_config({**theirs.config, "_class_name": FLOW})
    assert isinstance(ours, RectifiedFlow)
    shape = (16, 64, 96)  # 32 x 48 tokens
    mu = calculate_shift(
        32 * 48,
        theirs.config.base_image_seq_len,
        theirs.config.max_image_seq_len,
        theirs.config.base_shift,
        theirs.config.max_shift,
    )
    options = {"mu": mu} if theirs.config.use_dynamic_shifting else {}
    if given:
        ours = replace(ours, last=None)
        options["sigmas"] = np.linspace(1.0, 1 / n, n)
    theirs.set_timesteps(n, **options)
    way = ours.path(n, shape=shape)
    torch.testing.assert_close(way.t.float(), theirs.timesteps, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((way.s / 1000).float(), theirs.sigmas[1:], rtol=1e-5, atol=1e-7)
    assert torch.equal(way.s[:-1], way.t[1:])


def test_the_least_sigma_is_shifted_twice():
    # 3 * 0.001 / 1.002 = 0.002994, and 3 * 0.002994 / (1 + 2 * 0.002994) = 0.008929.
    ours = from_config({"_class_name": FLOW, "shift": 3.0})
    assert ours.path(10).t[-1].item() == pytest.approx(8.9286, abs=1e-4)
