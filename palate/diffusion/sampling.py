"""Sampling with likelihoods: DDIM as a policy whose every step is a Gaussian, for sampling and for training alike.

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

from palate.base.errors import UserError, nearest
from palate.diffusion.denoising import Conditioning, normal, upcast
from palate.diffusion.schedule import Schedule

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(xt (b, ...), t (b,), cond of b rows) -> the model's output (b, ...)."""

SPACINGS = ("leading", "trailing", "linspace")
START, FIRST_STEP = 10, 1000
"""Streams of random numbers: the noise that a picture begins with, and that of its step k (FIRST_STEP + k)."""
LEAST_STD = 0.01
"""Floor of a step's standard deviation where eta > 0. Schedules that end in abar = 1 end without noise: the density would be
infinite. The last step of Stable Diffusion (0.0206) lies above it."""
NEGATIVE = "negative/"
"""Tensors of a Conditioning whose names begin so condition the other half of a guided pass."""


@dataclass(frozen=True)
class Path:
    """The times that sampling visits: step k goes from t[k] to s[k], and s[k] = t[k + 1]; the last s is -1, the end."""

    t: tuple[int, ...]
    s: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.t)


def path(num_train_timesteps: int, num_inference_steps: int, *, spacing: str = "leading", steps_offset: int = 0) -> Path:
    """The times of `num_inference_steps` steps, as the schedulers of diffusers space them (arXiv 2305.08891, table 2).

    A step ends where the next one begins; diffusers' DDIM subtracts T // steps instead, which is the same for leading spacing,
    and for trailing spacing where the number of steps divides T. Raises UserError for an unknown spacing or too many steps.
    """
    T, n = num_train_timesteps, num_inference_steps
    if spacing not in SPACINGS:
        raise UserError(f"timestep_spacing is {spacing!r}{nearest(spacing, SPACINGS)}")
    if not 1 <= n <= T:
        raise UserError(f"num_inference_steps is {n}; expected 1 to {T}, the times of this model")
    if spacing == "leading":
        t = [k * (T // n) + steps_offset for k in reversed(range(n))]
    elif spacing == "trailing":
        t = [round(T - k * T / n) - 1 for k in range(n)]
    else:
        t = [round(k * (T - 1) / max(1, n - 1)) for k in reversed(range(n))]
    if t[0] >= T:
        raise UserError(f"{n} steps with steps_offset {steps_offset} begin after the last time {T - 1}; use fewer steps")
    return Path(tuple(t), (*t[1:], -1))


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
    t: Int[Tensor, " b"],
    s: Int[Tensor, " b"],
    cond: Conditioning,
    *,
    eta: float,
) -> Transition:
    """The step from times t to s as the model of `predict` (see `guided`) takes it: DDIM (arXiv 2010.02502, eq. 12), float32.

    Sampling and training both call this. With eta > 0 the std is at least LEAST_STD.
    """
    xt = upcast(xt)
    output = predict(xt, t, cond)
    with torch.autocast(xt.device.type, enabled=False):
        mean, std = schedule.step(upcast(output), xt, t, s, eta)
        return Transition(mean, std.clamp(min=LEAST_STD) if eta > 0 else std)


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
    """b pictures on their way: `latents` (b, n + 1, ...) before each of n steps and after the last; `log_prob` (b, n).

    mean: (b, n, ...) of the steps' Gaussians, if it was to be kept.
    """

    latents: Float[Tensor, " b n1 *d"]
    log_prob: Float[Tensor, " b n"]
    mean: Float[Tensor, " b n *d"] | None = None


@torch.no_grad()
def sample(
    predict: Predict,
    schedule: Schedule,
    path: Path,
    cond: Conditioning,
    seeds: Int[Tensor, " b"],
    shape: Sequence[int],
    *,
    guidance_scale: float,
    eta: float,
    judged_scale: float | None = None,
    keep_means: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, Tensor, Transition], None] | None = None,
) -> Trajectory:
    """Draw b trajectories of latents of `shape`; all noise of item i derives from seeds[i]. Everything is float32.

    judged_scale: the guidance under which the log-probabilities are told; `guidance_scale` unless given. With 1 they are those
    of the model without guidance, at one more pass a step: what training without guidance compares with.
    on_step: called with k, the latents before step k and its transition.
    """
    b = len(seeds)
    x = normal(seeds, shape, START, device, torch.float32)
    cond = cond.to(device)
    act = guided(predict, guidance_scale)
    judge = act if judged_scale in (None, guidance_scale) else guided(predict, judged_scale)  # type: ignore[arg-type]
    latents: list[Tensor] = [x]
    log_probs: list[Tensor] = []
    means: list[Tensor] = []
    for k, (t, s) in enumerate(zip(path.t, path.s, strict=True)):
        times = torch.full((b,), t, device=device), torch.full((b,), s, device=device)
        step = transition(act, schedule, x, *times, cond, eta=eta)
        after = step.mean + step.std * normal(seeds, shape, FIRST_STEP + k, device, torch.float32)
        judged = step if judge is act else transition(judge, schedule, x, *times, cond, eta=eta)
        log_probs.append(judged.log_prob(after))
        if keep_means:
            means.append(judged.mean)
        if on_step is not None:
            on_step(k, x, judged)
        x = after
        latents.append(x)
    return Trajectory(torch.stack(latents, 1), torch.stack(log_probs, 1), torch.stack(means, 1) if means else None)
