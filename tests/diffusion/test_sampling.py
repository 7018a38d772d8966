"""Sampling with likelihoods: laws, values worked by hand, and diffusers' own DDIM."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from palate.base.errors import UserError
from palate.base.seeds import normal
from palate.diffusion.denoising import Conditioning
from palate.diffusion.sampling import (
    FIRST_STEP,
    START,
    Transition,
    guided,
    join,
    sample,
    split,
    transition,
)
from palate.diffusion.schedule import Schedule, from_config
from palate.diffusion.steps import LEAST_STD, ddim, ddim_step

CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (2, 4, 4)


def schedule(**config) -> Schedule:
    return from_config(CONFIG | {"set_alpha_to_one": False, "steps_offset": 1} | config)


def predict(xt, t, cond):
    """A model that looks at everything it is given."""
    return 0.3 * xt + cond.tensors["text"][:, :, None, None] * (t.view(-1, 1, 1, 1) / 1000) + 0.1 * xt.roll(1, -1)


def conditions(b: int) -> Conditioning:
    text = normal(torch.arange(b), (2,), 7, "cpu", torch.float32)
    return join(Conditioning({"text": text}), Conditioning({"text": torch.zeros(b, 2)}))


def drawn(b: int = 3, n: int = 6, eta: float = 1.0, scale: float = 3.0, **options):
    return sample(
        predict, schedule(), schedule().path(n), conditions(b), torch.arange(b), SHAPE,
        guidance_scale=scale, rule=ddim(eta), **options,
    )  # fmt: skip


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [1, 8, 10, 50])
def test_times_are_those_of_diffusers(spacing, n):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=1, num_train_timesteps=1000)
    theirs.set_timesteps(n)
    assert schedule().path(n, spacing).t.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_steps_are_those_of_diffusers_to_the_last(prediction_type, spacing, eta, set_alpha_to_one):
    from diffusers import DDIMScheduler

    config = CONFIG | {"prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one}
    theirs = DDIMScheduler(**config, clip_sample=False, timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(10)
    ours, way = from_config(config), from_config(config | {"steps_offset": 1}).path(10, spacing)
    x, cond = normal(torch.arange(3), SHAPE, 9, "cpu", torch.float64), conditions(3)
    for t, s in zip(way.t.tolist(), way.s.tolist(), strict=True):
        times = torch.full((3,), t), torch.full((3,), s)
        mean, std = ddim_step(ours, predict(x, times[0], cond), x, *times, eta)
        noise = normal(torch.arange(3), SHAPE, t, "cpu", torch.float64)
        expected = theirs.step(predict(x, times[0], cond), t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean + std * noise, expected, rtol=0, atol=2e-5)
        x = expected.double()


def test_log_prob_is_the_mean_of_the_normal_density():
    mean, x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 4)
    std = torch.tensor([0.02, 1.5]).view(2, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2))
    torch.testing.assert_close(Transition(mean, std).log_prob(x), expected)


def test_log_prob_and_kl_by_hand():
    # One element, mean 1, std 2, at 2: z = 1/2, so -1/8 - ln 2 - ln(2 pi) / 2 = -0.125 - 0.6931472 - 0.9189385.
    step = Transition(torch.ones(1, 1), torch.full((1, 1), 2.0))
    assert float(step.log_prob(torch.full((1, 1), 2.0))) == pytest.approx(-1.7370857)
    # KL of N(1, 4) from N(4, 4): 3^2 / (2 * 4) = 1.125, and that of torch.
    other = Transition(torch.full((1, 1), 4.0), step.std)
    assert float(step.kl(other)) == pytest.approx(1.125)
    normals = [torch.distributions.Normal(x.mean, x.std) for x in (step, other)]
    assert float(torch.distributions.kl_divergence(*normals)) == pytest.approx(1.125)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_training_computes_the_very_log_probs_of_sampling(scale):
    found, way, cond = drawn(scale=scale), schedule().path(6), conditions(3)
    for k in range(len(way)):
        times = way.at(k, 3, "cpu")
        again = transition(guided(predict, scale), schedule(), found.latents[:, k], *times, cond, rule=ddim(1.0))
        assert torch.equal(again.log_prob(found.latents[:, k + 1]), found.log_prob[:, k])


def test_a_picture_does_not_depend_on_its_batch():
    whole, cond = drawn(4), conditions(4)
    for row in range(4):
        alone = sample(
            predict, schedule(), schedule().path(6), cond.rows([row]), torch.tensor([row]), SHAPE,
            guidance_scale=3.0, rule=ddim(1.0),
        )  # fmt: skip
        torch.testing.assert_close(alone.latents[0], whole.latents[row])
        torch.testing.assert_close(alone.log_prob[0], whole.log_prob[row])


def test_noise_is_that_of_the_seed():
    found = drawn(n=1)
    start = normal(torch.arange(3), SHAPE, START, "cpu", torch.float32)
    assert torch.equal(found.latents[:, 0], start)
    times = torch.full((3,), 1), torch.full((3,), -1)
    step = transition(guided(predict, 3.0), schedule(), start, *times, conditions(3), rule=ddim(1.0))
    expected = step.mean + step.std * normal(torch.arange(3), SHAPE, FIRST_STEP, "cpu", torch.float32)
    assert torch.equal(found.latents[:, 1], expected)


def test_eta_0_draws_nothing():
    way, seen = schedule().path(6), []
    sample(
        predict, schedule(), way, conditions(2), torch.arange(2), SHAPE, guidance_scale=1.0, rule=ddim(0.0),
        on_step=lambda k, x, step: seen.append(step.std.max().item()),
    )  # fmt: skip
    assert seen == [0.0] * 6


def test_a_last_step_without_variance_is_floored():
    found = sample(
        predict, schedule(set_alpha_to_one=True), schedule().path(5), conditions(2), torch.arange(2), SHAPE,
        guidance_scale=1.0, rule=ddim(1.0),
    )  # fmt: skip
    assert found.log_prob.isfinite().all()
    # An expected log density of -1/2 - ln std - ln(2 pi) / 2, to which 32 elements come within a third or so.
    expected = -0.5 - math.log(LEAST_STD) - 0.5 * math.log(2 * math.pi)
    assert found.log_prob[:, -1].tolist() == pytest.approx([expected] * 2, abs=0.5)


def test_the_published_path_is_above_the_floor():
    # Stable Diffusion with 50 leading steps: the std of its last steps, 0.040 and 0.021, as published code has them.
    ours = schedule()
    way = ours.path(50)
    x = torch.zeros(1, 1)
    last = [float(ddim_step(ours, x, x, *way.at(k, 1, "cpu"))[1]) for k in (-2, -1)]
    assert last == pytest.approx([0.040, 0.0206], abs=6e-4)
    assert min(last) > LEAST_STD


def test_guidance_is_one_forward_of_both():
    calls = []

    def counted(xt, t, cond):
        calls.append(len(xt))
        return predict(xt, t, cond)

    cond, x, t = conditions(3), torch.ones(3, *SHAPE), torch.full((3,), 500)
    prompt, negative = split(cond)
    assert negative is not None
    u, c = predict(x, t, negative), predict(x, t, prompt)
    torch.testing.assert_close(guided(counted, 3.0)(x, t, cond), u + 3 * (c - u))
    torch.testing.assert_close(guided(counted, 1.0)(x, t, cond), c)
    assert calls == [6, 3]


def test_steps_that_are_not_judged_take_no_pass_of_their_own():
    rows = []

    def counted(xt, t, cond):
        rows.append(len(xt))
        return predict(xt, t, cond)

    whole = drawn(judged_scale=1.0, keep_means=True)
    for judged in (range(1, 3), range(0)):
        rows.clear()
        seen: list[bool] = []
        told = functools.partial(lambda seen, k, x, step: seen.append(step is not None), seen)
        part = sample(
            counted, schedule(), schedule().path(6), conditions(3), torch.arange(3), SHAPE, guidance_scale=3.0, rule=ddim(1.0),
            judged=judged, judged_scale=1.0, keep_means=True, on_step=told,
        )  # fmt: skip
        assert torch.equal(part.latents, whole.latents)
        assert torch.equal(part.log_prob, whole.log_prob[:, judged.start : judged.stop])
        assert part.mean is None if not judged else torch.equal(part.mean, whole.mean[:, 1:3])
        assert seen == [k in judged for k in range(6)]
        assert sum(rows) == 6 * 6 + 3 * len(judged)


def test_judged_without_guidance():
    found, way = drawn(judged_scale=1.0), schedule().path(6)
    assert torch.equal(found.latents, drawn().latents)
    times = way.at(2, 3, "cpu")
    plain = transition(guided(predict, 1.0), schedule(), found.latents[:, 2], *times, conditions(3), rule=ddim(1.0))
    torch.testing.assert_close(plain.log_prob(found.latents[:, 3]), found.log_prob[:, 2])


def test_half_precision_inputs_are_computed_in_float32():
    times = torch.full((2,), 500), torch.full((2,), 400)
    step = transition(predict, schedule(), torch.ones(2, *SHAPE).half(), *times, conditions(2), rule=ddim(1.0))
    assert step.mean.dtype == step.std.dtype == torch.float32


def test_bad_paths_are_refused():
    with pytest.raises(UserError, match="did you mean 'trailing'"):
        schedule().path(10, "trailling")
    with pytest.raises(UserError, match="expected 1 to 1000"):
        schedule().path(1001)
