"""Sampling with likelihoods: a policy whose every step is a Gaussian, for sampling and for training alike.

One function, `transition`, computes the Gaussian of a step, guidance included; a trajectory that was sampled by it has ratio 1
until the weights change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palate.base.seeds import normal
from palate.diffusion.denoising import Conditioning, upcast
from palate.diffusion.schedule import Path, Schedule, Times
from palate.diffusion.steps import Rule, ddim

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(xt (b, ...), t (b,), cond of b rows) -> the model's output (b, ...)."""

START, FIRST_STEP = 10, 1000
"""Streams of random numbers: the noise that a picture begins with, and that of its step k (FIRST_STEP + k)."""
NEGATIVE = "negative/"
"""Tensors of a Conditioning whose names begin so condition the other half of a guided pass."""


@dataclass(frozen=True, eq=False)
class Transition:
    """The Gaussian from which the next latents are drawn: mean (b, ...) and std (b, 1, ..., 1), float32 at least."""

    mean: Float[Tensor, " b *d"]
    std: Float[Tensor, " b *ones"]

    def log_prob(self, x: Float[Tensor, " b *d"]) -> Float[Tensor, " b"]:
        """Log-density of `x`, (b,): the *mean* over the elements of an item, not their sum.

        As in the code of DDPO (arXiv 2305.13301): a sum over 16,384 elements would leave no room for a ratio, and clip ranges
        of 1e-4 are meant for the mean. Times the number of elements it is the log-density in nats.
        """
        z = (x.detach() - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)

    def kl(self, other: Transition) -> Float[Tensor, " b"]:
        """KL(self || other) of two steps of the same std, exact, mean over elements, (b,): |mean - mean'|^2 / (2 std^2)."""
        return (((self.mean - other.mean) / self.std).square() / 2).flatten(1).mean(1)


def transition(
    predict: Predict,
    schedule: Schedule,
    xt: Float[Tensor, " b *d"],
    t: Times,
    s: Times,
    cond: Conditioning,
    *,
    rule: Rule,
) -> Transition:
    """The step from times t to s as the model of `predict` (see `guided`) takes it by a rule of `steps`, float32.

    Sampling and training both call this.
    """
    xt = upcast(xt)
    output = predict(xt, t, cond)
    with torch.autocast(xt.device.type, enabled=False):
        return Transition(*rule(schedule, upcast(output), xt, t, s))


def guided(predict: Predict, guidance_scale: float) -> Predict:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6) as a `Predict`: output = u + scale (c - u), from one batched forward.

    u is conditioned on those tensors of `cond` whose names begin with ``negative/``. At scale 1 there is nothing to guide, and
    the prompt alone is passed on.
    """

    def run(xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        prompt, negative = split(cond)
        if guidance_scale == 1 or negative is None:
            return predict(xt, t, prompt)
        both = predict(torch.cat([xt, xt]), torch.cat([t, t]), Conditioning.cat([negative, prompt]))
        u, c = upcast(both).chunk(2)
        return u + guidance_scale * (c - u)

    return run


def split(cond: Conditioning) -> tuple[Conditioning, Conditioning | None]:
    """What the prompt says, and what the negative prompt says if it is there."""
    own = {name: x for name, x in cond.tensors.items() if not name.startswith(NEGATIVE)}
    other = {name.removeprefix(NEGATIVE): x for name, x in cond.tensors.items() if name.startswith(NEGATIVE)}
    return Conditioning(own), Conditioning(other) if other else None


def join(prompt: Conditioning, negative: Conditioning) -> Conditioning:
    """Prompt and negative prompt in one, as `guided` reads them."""
    return Conditioning(prompt.tensors | {NEGATIVE + name: x for name, x in negative.tensors.items()})


@dataclass(frozen=True, eq=False)
class Trajectory:
    """b pictures on their way: `latents` (b, n + 1, ...) before each of n steps and after the last; `log_prob` (b, judged).

    mean: (b, judged, ...) of the judged steps' Gaussians, if it was to be kept.
    """

    latents: Float[Tensor, " b n1 *d"]
    log_prob: Float[Tensor, " b judged"]
    mean: Float[Tensor, " b judged *d"] | None = None


def sample(
    predict: Predict,
    schedule: Schedule,
    path: Path,
    cond: Conditioning,
    seeds: Int[Tensor, " b"],
    shape: Sequence[int],
    *,
    guidance_scale: float,
    rule: Rule,
    noisy: range | None = None,
    judged: range | None = None,
    judged_scale: float | None = None,
    keep_means: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, Tensor, Transition | None], None] | None = None,
) -> Trajectory:
    """Draw b trajectories of latents of `shape`; all noise of item i derives from seeds[i]. Everything is float32.

    noisy: the steps that are taken by the rule; all others by DDIM without noise. All unless given.
    judged: the steps whose log-probabilities are told; all unless given.
    judged_scale: the guidance under which they are told; `guidance_scale` unless given. With 1 they are those of the model
    without guidance, at one more pass a judged step: what training without guidance compares with.
    on_step: called with k, the latents before step k and its transition under judged_scale, None where that was not computed.
    """
    b = len(seeds)
    x = normal(seeds, shape, START, device, torch.float32)
    cond = cond.to(device)
    act = guided(predict, guidance_scale)
    judge = act if judged_scale in (None, guidance_scale) else guided(predict, judged_scale)  # type: ignore[arg-type]
    told = range(len(path)) if judged is None else judged
    latents: list[Tensor] = [x]
    log_probs: list[Tensor] = []
    means: list[Tensor] = []
    for k in range(len(path)):
        times, taken = path.at(k, b, device), rule if noisy is None or k in noisy else ddim(0.0)
        step = transition(act, schedule, x, *times, cond, rule=taken)
        after = step.mean + step.std * normal(seeds, shape, FIRST_STEP + k, device, torch.float32)
        seen = step if judge is act else transition(judge, schedule, x, *times, cond, rule=taken) if k in told else None
        if seen is not None and k in told:
            log_probs.append(seen.log_prob(after))
            if keep_means:
                means.append(seen.mean)
        if on_step is not None:
            on_step(k, x, seen)
        x = after
        latents.append(x)
    log_prob = torch.stack(log_probs, 1) if log_probs else x.new_zeros(b, 0)
    return Trajectory(torch.stack(latents, 1), log_prob, torch.stack(means, 1) if means else None)
