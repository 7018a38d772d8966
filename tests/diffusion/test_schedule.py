from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implied import to_noise, to_x0

from palate.base.errors import UserError
from palate.diffusion.schedule import RectifiedFlow, VariancePreserving, from_config
from palate.diffusion.steps import ddim_step

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
schedule = from_config(SD)
zero_snr = from_config({**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
times = st.integers(0, 999)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def to_v(s, output, xt, t):
    """The v that an output implies."""
    return replace(s, prediction_type="v_prediction").target(to_x0(s, output, xt, t), to_noise(s, output, xt, t), t)


def latents(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_golden():
    # betas 1/2, 1/2: abar = 1/2, 1/4. At t = 1: alpha = 1/2, sigma = sqrt(3)/2, snr = (1/4) / (3/4) = 1/3.
    s = from_config({"trained_betas": [0.5, 0.5], "num_train_timesteps": 2})
    t, one = torch.tensor([1]), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert s.alphas_cumprod.tolist() == [0.5, 0.25]
    assert s.num_train_timesteps == 2
    assert s.snr(t).item() == pytest.approx(1 / 3, rel=1e-12)
    # x0 = 1, noise = 2: xt = 1/2 + sqrt(3), v = 1/2 * 2 - sqrt(3)/2 * 1.
    assert s.add_noise(one, 2 * one, t).item() == pytest.approx(0.5 + math.sqrt(3), rel=1e-12)
    assert replace(s, prediction_type="v_prediction").target(one, 2 * one, t).item() == pytest.approx(
        1 - math.sqrt(3) / 2, rel=1e-12
    )
    # Posterior of DDPM from t = 1 to 0 at xt = 1, noise 0: x0 = 2.
    # Variance = beta_1 (1 - abar_0) / (1 - abar_1) = 1/2 * (1/2) / (3/4) = 1/3.
    # Mean = sqrt(abar_0) beta_1 / (1 - abar_1) x0 + sqrt(alpha_1) (1 - abar_0) / (1 - abar_1) xt
    # = sqrt(1/2) (2/3) 2 + sqrt(1/2) (2/3) 1 = sqrt(1/2) * 2 = sqrt(2).
    mean, std = ddim_step(s, 0 * one, one, t, t - 1)
    assert mean.item() == pytest.approx(math.sqrt(2), rel=1e-12)
    assert std.item() == pytest.approx(math.sqrt(1 / 3), rel=1e-12)


def test_min_snr_weights_golden():
    # abar 4/5, 1/2, 1/5: snr 4, 1, 1/4. gamma 2: min = 2, 1, 1/4; over snr 1/2, 1, 1; over snr + 1: 2/5, 1/2, 1/5.
    s = VariancePreserving(torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64), "epsilon")
    t = torch.arange(3)
    assert s.min_snr_weight(t, 2.0).tolist() == pytest.approx([0.5, 1, 1], rel=1e-6)
    assert replace(s, prediction_type="v_prediction").min_snr_weight(t, 2.0).tolist() == pytest.approx(
        [0.4, 0.5, 0.2], rel=1e-6
    )
    assert replace(s, prediction_type="sample").min_snr_weight(t, 2.0).tolist() == pytest.approx([2, 1, 0.25], rel=1e-6)
    # Zero terminal SNR: v weighs 0 there, noise (which cannot be told from xt then) 1.
    last = torch.tensor([999])
    assert zero_snr.min_snr_weight(last, 5.0).item() == 0
    assert replace(zero_snr, prediction_type="epsilon").min_snr_weight(last, 5.0).item() == 1


@settings(max_examples=25)
@given(t=times, prediction_type=st.sampled_from((*PREDICTION_TYPES, "flow")))
def test_gain_is_how_far_x0_moves_with_the_output(t: int, prediction_type: str):
    s = RectifiedFlow() if prediction_type == "flow" else replace(schedule, prediction_type=prediction_type)
    t_, xt, output = torch.tensor([t]), latents(1), latents(2)
    moved = to_x0(s, output + 1, xt, t_) - to_x0(s, output, xt, t_)
    torch.testing.assert_close(moved.abs(), s.gain(t_).view(-1, 1, 1, 1).expand_as(moved), rtol=1e-6, atol=1e-12)


@settings(max_examples=25)
@given(t=times, gamma=st.floats(0.1, 20), prediction_type=st.sampled_from(PREDICTION_TYPES))
def test_min_snr_weighs_the_error_of_x0_alike_for_all_predictions(t: int, gamma: float, prediction_type: str):
    s, t_, x0, noise = replace(schedule, prediction_type=prediction_type), torch.tensor([t]), latents(t), latents(t + 1000)
    xt, target = s.add_noise(x0, noise, t_), s.target(x0, noise, t_)
    output = target + 0.1 * latents(t + 2000)
    error = (output - target).square().mean() * s.min_snr_weight(t_, gamma).double()
    of_x0 = (to_x0(s, output, xt, t_) - x0).square().mean() * s.snr(t_).clamp(max=gamma)
    torch.testing.assert_close(error, of_x0, rtol=1e-5, atol=1e-12)


@settings(max_examples=25)
@given(t=times, prediction_type=st.sampled_from(PREDICTION_TYPES))
def test_round_trips(t: int, prediction_type: str):
    s, t_ = replace(schedule, prediction_type=prediction_type), torch.tensor([t])
    x0, noise = latents(t), latents(t + 1000)
    xt, output = s.add_noise(x0, noise, t_), s.target(x0, noise, t_)
    v = replace(schedule, prediction_type="v_prediction").target(x0, noise, t_)
    # Dividing by alpha (0.07 at the last time) or sigma (0.03 at the first) costs two digits of sixteen.
    torch.testing.assert_close(to_x0(s, output, xt, t_), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(to_noise(s, output, xt, t_), noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(to_v(s, output, xt, t_), v, rtol=0, atol=1e-12)
    # An output that is wrong means the same thing in all three languages.
    wrong = output + latents(t + 2000)
    for other in PREDICTION_TYPES:
        to = {
            "epsilon": functools.partial(to_noise, s),
            "v_prediction": functools.partial(to_v, s),
            "sample": functools.partial(to_x0, s),
        }[other]
        translated = to_noise(replace(schedule, prediction_type=other), to(wrong, xt, t_), xt, t_)
        torch.testing.assert_close(translated, to_noise(s, wrong, xt, t_), rtol=1e-9, atol=1e-9)


@settings(max_examples=25)
@given(t=times, s=st.integers(-1, 999), prediction_type=st.sampled_from(PREDICTION_TYPES))
def test_true_output_steps_along_the_forward_process(t: int, s: int, prediction_type: str):
    # Without noise the step of a perfect model lands on the same line x0, noise at time s, be it earlier or later.
    this, t_, s_ = replace(schedule, prediction_type=prediction_type), torch.tensor([t]), torch.tensor([s])
    x0, noise = latents(1), latents(2)
    mean, std = ddim_step(this, this.target(x0, noise, t_), this.add_noise(x0, noise, t_), t_, s_, eta=0.0)
    expected = x0 if s == -1 else this.add_noise(x0, noise, s_)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
    assert std.shape == (1, 1, 1, 1)
    assert std.item() == 0


def test_step_to_the_same_time_stays():
    xt, t = latents(1, torch.float32), torch.tensor([0])
    mean, std = ddim_step(schedule, latents(2, torch.float32), xt, t, t)
    torch.testing.assert_close(mean, xt, rtol=1e-6, atol=1e-7)
    assert std.item() == 0


def test_a_batch_of_times_equals_its_items():
    t, xt, output = torch.tensor([3, 500, 999]), latents(1).expand(3, -1, -1, -1), latents(2).expand(3, -1, -1, -1)
    mean, std = ddim_step(schedule, output, xt, t, t - 2)
    for i in range(3):
        one_mean, one_std = ddim_step(schedule, output[:1], xt[:1], t[i : i + 1], t[i : i + 1] - 2)
        assert torch.equal(mean[i : i + 1], one_mean)
        assert torch.equal(std[i : i + 1], one_std)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction_type: str):
    s, last = replace(zero_snr, prediction_type=prediction_type), torch.tensor([999])
    assert s.alphas_cumprod[-1] == 0
    assert s.snr(last).item() == 0
    x0, noise = latents(1), latents(2)
    xt, output = s.add_noise(x0, noise, last), s.target(x0, noise, last)
    assert torch.equal(xt, noise)
    torch.testing.assert_close(to_noise(s, output, xt, last), noise)
    torch.testing.assert_close(to_x0(s, output, xt, last), x0)
    torch.testing.assert_close(to_v(s, output, xt, last), -x0)
    for to in (998, 999, -1):  # one back, nowhere, and all the way
        for eta in (0.0, 1.0):
            mean, std = ddim_step(s, output, xt, last, torch.tensor([to]), eta)
            assert mean.isfinite().all()
            assert std.isfinite().all()
    assert torch.equal(to_noise(replace(s, prediction_type="epsilon"), noise, xt, last), noise)


def test_dtypes_follow_the_latents():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x, t = latents(1).to(dtype), torch.tensor([500])
        mean, std = ddim_step(schedule, x, x, t, t - 1)
        found = [mean, std, schedule.add_noise(x, x, t), to_x0(schedule, x, x, t), *schedule.alpha_sigma(t, x)]
        assert {tensor.dtype for tensor in found} == {dtype}
    # A half-precision output does not pull float32 latents down.
    assert (
        ddim_step(schedule, latents(1).half(), latents(1).float(), torch.tensor([5]), torch.tensor([4]))[0].dtype
        == torch.float32
    )


def test_final_alpha():
    assert schedule.final_alpha_cumprod == 1
    kept = from_config({**SD, "set_alpha_to_one": False})
    assert kept.final_alpha_cumprod == kept.alphas_cumprod[0].item() == pytest.approx(1 - 0.00085)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0},
            ["FlowMatchHeunDiscreteScheduler", "scaled_linear", "or a FlowMatchEulerDiscreteScheduler"],
        ),
        ({**FLOW, "use_karras_sigmas": True, "invert_sigmas": True}, ["with use_karras_sigmas, invert_sigmas"]),
        ({**FLOW, "use_beta_sigmas": True}, ["use_beta_sigmas", "times"]),
        ({**FLOW, "use_exponential_sigmas": True}, ["use_exponential_sigmas"]),
        ({**FLOW, "num_train_timesteps": 500}, ["num_train_timesteps 500"]),
        ({**FLOW, "time_shift_type": "cosine"}, ["time_shift_type cosine"]),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "prediction_type": "epsilon"}, ["EDMEulerScheduler", "DDPM"]),
        (
            {**SD, "_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            ["UniPCMultistepScheduler", "use_flow_sigmas"],
        ),
        ({**SD, "_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, ["continuous"]),
        ({**SD, "_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}, ["snr_shift_scale"]),
        ({**SD, "beta_schedule": "sigmoid"}, ["'sigmoid'", "squaredcos_cap_v2"]),
        ({"beta_schedule": "linear"}, ["beta_start"]),
        ({**SD, "prediction_type": "flow_prediction"}, ["'flow_prediction'", "v_prediction"]),
        ({**SD, "timestep_spacing": "whatever"}, ["timestep_spacing is 'whatever'", "trailing"]),
        ({**SD, "rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr", "prediction_type epsilon", "v_prediction"]),
        ({**SD, "beta_end": float("nan")}, ["beta_end is nan", "scheduler/scheduler_config.json"]),
        ({**SD, "beta_start": -0.1}, ["beta_start is -0.1"]),
        ({**SD, "beta_start": "0.1"}, ["beta_start is '0.1'; expected a number from 0 to 1"]),
        ({**SD, "beta_end": 1.0}, ["its betas go from", "to 1; expected numbers between 0 and 1"]),
        ({**SD, "beta_start": 0.0}, ["its betas go from 0"]),
        ({**SD, "beta_end": 1.5}, ["beta_end is 1.5"]),
        ({**SD, "num_train_timesteps": 0}, ["num_train_timesteps is 0; expected a whole number from 2"]),
        ({**SD, "num_train_timesteps": "1000"}, ["num_train_timesteps is '1000'"]),
        ({**SD, "num_train_timesteps": 1e12}, ["num_train_timesteps is 1000000000000.0"]),
        ({**SD, "num_train_timesteps": None}, ["num_train_timesteps is None"]),
        ({**SD, "trained_betas": [0.1] * 10}, ["trained_betas", "expected 1000 numbers"]),
        ({**SD, "trained_betas": "many"}, ["trained_betas is 'many'"]),
        ({**SD, "trained_betas": [*[0.1] * 9, 2.0], "num_train_timesteps": 10}, ["to 2; expected"]),
        ({**SD, "steps_offset": -5}, ["steps_offset is -5"]),
        ({**SD, "steps_offset": 1000}, ["steps_offset is 1000"]),
        ({**FLOW, "shift": "3"}, ["shift is '3'"]),
        ({**FLOW, "shift": 0}, ["shift is 0"]),
        (
            {**FLOW, "use_dynamic_shifting": True, "base_image_seq_len": 0.5},
            ["base_image_seq_len is 0.5; expected a whole number"],
        ),
    ],
)
def test_what_cannot_be_done_is_said(config: dict[str, object], words: list[str]):
    with pytest.raises(UserError) as caught:
        from_config(config)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_sdxl_config_is_read():
    # The Euler sampler of SDXL differs from DDPM in sampling only.
    euler = {**SD, "_class_name": "EulerDiscreteScheduler", "timestep_type": "discrete", "use_karras_sigmas": False}
    assert torch.equal(from_config(euler).alphas_cumprod, schedule.alphas_cumprod)
