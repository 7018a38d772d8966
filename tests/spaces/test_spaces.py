from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from encoders import SD, Encoder, batch, output_near
from hypothesis import given
from hypothesis import strategies as st
from implied import to_noise, to_x0
from torch import Tensor

from palate import spaces
from palate.base.errors import UserError
from palate.diffusion.denoising import Conditioning, Noised, fit
from palate.diffusion.schedule import RectifiedFlow, from_config
from palate.diffusion.steps import ddim_step
from palate.spaces.perceptual import TARGET_TIMES

schedule = from_config(SD)


def identity(x: Tensor, t: Tensor, cond: Conditioning, layers: str) -> list[Tensor]:
    return [x]


class Recording:
    """The latents as their own features, and the times they were asked at."""

    def __init__(self) -> None:
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, layers: str) -> list[Tensor]:
        self.times.append(t)
        return [x]


def error(space: spaces.Space, noised: Noised, output: Tensor) -> Tensor:
    embed = space(noised)
    return fit(embed, output, embed(noised.target)).error


def c_squared(t: Tensor) -> Tensor:
    """c_t^2 = beta_t^2 / (alpha_t (1 - abar_t)), from the betas themselves."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - beta, 0)
    return (beta**2 / ((1 - beta) * (1 - abar)))[t]


ALL = {
    "latent": lambda s: spaces.latent(),
    "previous": lambda s: spaces.perceptual(Encoder(), s),
    "uniform": lambda s: spaces.perceptual(Encoder(), s, target_time="uniform", layers="mid"),
    "all": lambda s: spaces.perceptual(Encoder(), s, layers="all", normalise=True, steps_back=7),
    "weighted": lambda s: spaces.weighted([(spaces.latent(), 1.0), (spaces.perceptual(Encoder(), s), 3.0)]),
}


@pytest.mark.parametrize(("name", "prediction_type"), product(ALL, ["epsilon", "v_prediction", "sample"]))
def test_laws_of_every_space(name: str, prediction_type: str):
    this = replace(schedule, prediction_type=prediction_type)
    noised = batch(this, t_min=20, t_max=900)
    space = ALL[name](this)
    # The residual of the target is 0, bit for bit; another output has one.
    embed = space(noised)
    assert not fit(embed, noised.target.clone(), embed(noised.target)).residual.any()
    output = output_near(noised, 0.1).requires_grad_()
    found = fit(embed, output, embed(noised.target)).error
    assert (found > 0).all()
    # A space is a function of the batch: what is random repeats.
    assert torch.equal(found, error(space, noised, output))
    # Every item's error has a gradient in its own output only.
    (gradient,) = torch.autograd.grad(found[0], output)
    assert gradient[0].any()
    assert not gradient[1:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identity_gives_c_squared_times_the_latent_error(dtype: torch.dtype):
    noised = batch(schedule, 8, size=32, dtype=dtype)
    output = output_near(noised, 1.0)
    expected = c_squared(noised.t) * error(spaces.latent(), noised, output).double()
    found = error(spaces.perceptual(identity, schedule), noised, output)
    torch.testing.assert_close(found.double(), expected, rtol=1e-9 if dtype == torch.float64 else 1e-6, atol=0)


def test_identity_at_a_uniform_time():
    # x_s - xhat_s = k (noise - output), k = sigma_s - alpha_s sigma_t / alpha_t.
    encoder = Encoder()
    noised = batch(schedule)
    output = output_near(noised, 0.5)
    error(spaces.perceptual(encoder, schedule, target_time="uniform"), noised, output)
    s = encoder.seen[0][1]
    abar_t, abar_s = schedule.alphas_cumprod[noised.t], schedule.alphas_cumprod[s]
    k = (1 - abar_s).sqrt() - (abar_s / abar_t).sqrt() * (1 - abar_t).sqrt()
    expected = k**2 * error(spaces.latent(), noised, output)
    torch.testing.assert_close(error(spaces.perceptual(identity, schedule, target_time="uniform"), noised, output), expected)
    # The target is the true latent at s; winner and loser share the time.
    torch.testing.assert_close(encoder.seen[0][0], schedule.add_noise(noised.x0, noised.noise, s))
    assert torch.equal(s[:2], s[2:])
    assert s[0] != s[1]


@given(st.integers(0, 1000), st.sampled_from([1, 20, 300]), st.sampled_from(TARGET_TIMES), st.floats(0.01, 3))
def test_identity_gives_the_latent_error_of_a_flow(seed: int, back: int, target_time: str, size: float):
    """However far the step: so the beta of the latent space is near in this one, and stays as it is when steps_back changes."""
    flow, encoder = RectifiedFlow(), Recording()
    noised = batch(flow, t_min=back, seed=seed)
    output = output_near(noised, size)
    space = spaces.perceptual(encoder, flow, steps_back=back, target_time=target_time)
    found, s = error(space, noised, output), encoder.times[0]
    apart = (s - noised.t).abs() >= 1  # to a time as near as that there is hardly a step
    assert target_time == "uniform" or apart.all()
    expected = error(spaces.latent(), noised, output)
    torch.testing.assert_close(found[apart], expected[apart], rtol=1e-4, atol=0)
    assert (found[~apart] <= expected[~apart] * (1 + 1e-4)).all()


def test_first_order_is_the_jacobian_of_the_encoder():
    encoder = Encoder()
    noised = batch(schedule)
    output = output_near(noised, 0.5)
    space = spaces.perceptual(encoder, schedule)
    found = error(space, noised, output)
    space(noised)(noised.target)
    x, t = encoder.seen[-1]
    c = c_squared(noised.t).sqrt().view(-1, 1, 1, 1)
    _, moved = torch.func.jvp(lambda x: encoder(x, t, noised.cond, "last_down")[0], (x,), (-c * (output - noised.target),))
    torch.testing.assert_close(found, moved.square().flatten(1).mean(1), rtol=1e-2, atol=0)


def test_the_encoder_sees_the_step_of_ddpm():
    encoder = Encoder()
    noised = batch(schedule)
    output = output_near(noised, 0.5)
    embed = spaces.perceptual(encoder, schedule, steps_back=1)(noised)
    embed(noised.target)
    embed(output)
    (x_target, s), (x, _) = encoder.seen
    assert torch.equal(s, noised.t - 1)
    # Policy and target share the step's noise: their difference is -c_t (output - noise), eq. 13 minus eq. 14 of NCP.
    c = c_squared(noised.t).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(x - x_target, -c * (output - noised.target), rtol=1e-9, atol=1e-12)
    # So do winner and loser, and the noise has the posterior's variance.
    mean, std = ddim_step(schedule, noised.target, noised.xt, noised.t, s)
    z = (x_target - mean) / std
    torch.testing.assert_close(z[:2], z[2:])
    assert z.std().item() == pytest.approx(1, abs=0.1)
    assert not torch.allclose(z, noised.noise)


def test_times_before_zero_are_zero():
    encoder = Encoder()
    noised = batch(schedule, t_min=3, t_max=3)
    assert (error(spaces.perceptual(encoder, schedule, steps_back=5), noised, output_near(noised, 0.1)) > 0).all()
    assert not encoder.seen[0][1].any()
    start = batch(schedule, t_min=0, t_max=0)
    assert not error(spaces.perceptual(encoder, schedule), start, output_near(start, 0.1)).any()


def test_t_min():
    far = spaces.perceptual(Encoder(), schedule, steps_back=7)
    assert spaces.latent().t_min == 0
    assert spaces.perceptual(Encoder(), schedule).t_min == 1
    assert far.t_min == 7
    assert spaces.perceptual(Encoder(), schedule, target_time="uniform").t_min == 0
    assert spaces.weighted([(spaces.latent(), 1.0), (far, 0.1)]).t_min == 7


@pytest.mark.parametrize("normalise", [False, True])
def test_all_layers_are_joined_as_published(normalise: bool):
    encoder = Encoder()
    noised = batch(schedule)
    output = output_near(noised, 0.5)
    found = error(spaces.perceptual(encoder, schedule, layers="all", normalise=normalise), noised, output)
    joined = []
    for x, s in encoder.seen[:2]:
        parts = [part.reshape(4, -1, 2, 2) for part in encoder(x, s, noised.cond, "all")]
        # 8 x 8 x 6, 4 x 4 x 8 and 2 x 2 x 10 numbers: 96, 32 and 10 channels at 2 x 2.
        assert [part.shape[1] for part in parts] == [96, 32, 10]
        scales = [10 / 96, 10 / 32, 1.0] if normalise else [1.0, 1.0, 1.0]
        joined.append(torch.cat([scale * part for scale, part in zip(scales, parts, strict=True)], dim=1))
    torch.testing.assert_close(found, (joined[0] - joined[1]).pow(2).mean(dim=(1, 2, 3)))


def test_gradient_passes_the_encoder_but_leaves_its_weights():
    encoder = Encoder()
    noised = batch(schedule)
    output = output_near(noised, 0.5).requires_grad_()
    error(spaces.perceptual(encoder, schedule), noised, output).sum().backward()
    assert output.grad is not None
    assert output.grad.any()
    assert all(weight.grad is None for weight in encoder.parameters())


@pytest.mark.parametrize("other", ["v_prediction", "sample"])
@pytest.mark.parametrize("target_time", ["previous", "uniform"])
def test_the_error_does_not_depend_on_the_prediction_type(other: str, target_time: str):
    # The space sees the latent that an output leads to, so equivalent outputs of two kinds of models have one error.
    epsilon = batch(schedule)
    output = output_near(epsilon, 0.3)
    native = replace(schedule, prediction_type=other)

    def convert(output, xt, t):
        return native.target(to_x0(schedule, output, xt, t), to_noise(schedule, output, xt, t), t)

    theirs = replace(epsilon, target=convert(epsilon.target, epsilon.xt, epsilon.t))
    expected = error(spaces.perceptual(Encoder(), schedule, target_time=target_time), epsilon, output)
    found = error(spaces.perceptual(Encoder(), native, target_time=target_time), theirs, convert(output, epsilon.xt, epsilon.t))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_weighted_is_the_sum_of_errors():
    noised = batch(schedule)
    output = output_near(noised, 0.5)
    parts = [(spaces.latent(), 0.25), (spaces.perceptual(Encoder(), schedule), 40.0), (ALL["uniform"](schedule), 2.0)]
    expected = sum(weight * error(space, noised, output) for space, weight in parts)
    torch.testing.assert_close(error(spaces.weighted(parts), noised, output), expected, rtol=1e-10, atol=0)


def test_half_precision_outputs_are_embedded_in_float32():
    encoder = Encoder(torch.float32)
    noised = batch(schedule, dtype=torch.float32)
    half = output_near(noised, 0.5).half()
    assert spaces.latent()(noised)(half).dtype == torch.float32
    embed = spaces.perceptual(encoder, schedule)(replace(noised, xt=noised.xt))
    assert embed(half).dtype == torch.float32
    assert encoder.seen[-1][0].dtype == torch.float32


def test_an_item_does_not_depend_on_its_batch():
    noised = batch(schedule)
    output = output_near(noised, 0.5)
    pick = [1, 3]
    names = ("x0", "noise", "xt", "t", "target", "seeds")
    part = Noised(cond=noised.cond.rows(pick), **{name: getattr(noised, name)[pick] for name in names})
    for name in ALL:
        space = ALL[name](schedule)
        torch.testing.assert_close(error(space, part, output[pick]), error(space, noised, output)[pick], rtol=1e-9, atol=0)


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"'middle'.*last_down"):
        spaces.perceptual(identity, schedule, layers="middle")
    with pytest.raises(UserError, match=r"'previos'.*did you mean 'previous'"):
        spaces.perceptual(identity, schedule, target_time="previos")
    with pytest.raises(UserError, match="steps_back is 0"):
        spaces.perceptual(identity, schedule, steps_back=0)
    with pytest.raises(UserError, match="positive"):
        spaces.weighted([(spaces.latent(), 0.0)])
    with pytest.raises(UserError, match="positive"):
        spaces.weighted([])
