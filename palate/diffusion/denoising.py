"""Noised batches, and how far a model's output is from the right one.

Every random number of an item derives from the item's own seed, never from the batch that it is in. So accumulation, several
processes and resuming give the numbers of one uninterrupted process with a large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palate.base.errors import UserError
from palate.base.seeds import normal
from palate.diffusion.densities import Density, uniform
from palate.diffusion.schedule import Schedule, Times

T = TypeVar("T")

# What is drawn for an item; each is independent of the others.
TIME, NOISE, STEP_NOISE, TARGET_TIME, CAPTION = 0, 1, 2, 3, 4


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a denoiser is conditioned on, opaque to all but the models: tensors by name whose rows are the items."""

    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        rows = {name: tensor.shape[0] for name, tensor in self.tensors.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"tensors of a Conditioning must have the same number of rows; got {rows}")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def repeat(self, n: int) -> Conditioning:
        """The whole batch n times: [a, b] -> [a, b, a, b]."""
        return self._map(lambda tensor: torch.cat([tensor] * n))

    def rows(self, index: Tensor | slice | Sequence[int]) -> Conditioning:
        """The rows that index (a slice, a list or a tensor of numbers) picks, in its order."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """On the device; tensors of floating point also in dtype, if given."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows, one part after the other; the parts must have the same names."""
        names = [set(part.tensors) for part in parts]
        if any(name != names[0] for name in names):
            raise ValueError(f"parts of a Conditioning must have the same names; got {[sorted(name) for name in names]}")
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning({name: change(tensor) for name, tensor in self.tensors.items()})


@dataclass(frozen=True, eq=False)
class Noised:
    """A batch of latents at random times. target: what a perfect model outputs. seeds: all that is random about an item."""

    x0: Float[Tensor, " b *d"]
    noise: Float[Tensor, " b *d"]
    xt: Float[Tensor, " b *d"]
    t: Times
    cond: Conditioning
    target: Float[Tensor, " b *d"]
    seeds: Int[Tensor, " b"]
    step_noise: Float[Tensor, " b *d"] | None = None  # of the step that a space may take, drawn beforehand

    def to(self, device: torch.device | str) -> Noised:
        """On the device; what is pinned is copied while the device computes."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Noised:
        """In memory that a GPU reads by itself."""
        return self._map(lambda tensor: tensor.pin_memory())

    def with_step_noise(self) -> Noised:
        """With ``step_noise``, if it has not been drawn."""
        if self.step_noise is not None:
            return self
        xt = upcast(self.xt)
        return replace(self, step_noise=normal(self.seeds, tuple(xt.shape[1:]), STEP_NOISE, xt.device, xt.dtype))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Noised:
        cond = Conditioning({name: change(tensor) for name, tensor in self.cond.tensors.items()})
        step_noise = None if self.step_noise is None else change(self.step_noise)
        x0, noise, xt, t, target = (change(x) for x in (self.x0, self.noise, self.xt, self.t, self.target))
        return Noised(x0, noise, xt, t, cond, target, self.seeds, step_noise)  # seeds are read on the CPU


@dataclass(frozen=True)
class Pair(Generic[T]):
    """Winner and loser."""

    w: T
    l: T


class Fit:
    """How a model's output differs from the target, in some space: residual = embed(output) - embed(target), (b, ...).

    Of a reference whose errors were kept from an earlier draw there is the error alone.
    """

    def __init__(self, residual: Float[Tensor, " b *d"] | None = None, *, error: Float[Tensor, " b"] | None = None) -> None:
        if (residual is None) == (error is None):
            raise ValueError("a Fit is made of either a residual or an error")
        self._residual, self._error = residual, error

    @property
    def residual(self) -> Float[Tensor, " b *d"]:
        """Raises UserError where only the error was kept."""
        if self._residual is None:
            raise UserError(
                "the objective reads the residual of the reference, but draws_per_pair keeps its error alone: leave it out"
            )
        return self._residual

    @property
    def error(self) -> Float[Tensor, " b"]:
        """Mean square over all elements of each item, (b,), in float32 at least. Papers' sums are absorbed in beta."""
        return upcast(self.residual).square().flatten(1).mean(1) if self._error is None else self._error

    def halves(self) -> Pair[Fit]:
        """Winners are the first half of the rows."""
        if self._error is None:
            w, l = self.residual.chunk(2)
            return Pair(Fit(w), Fit(l))
        w, l = self._error.chunk(2)
        return Pair(Fit(error=w), Fit(error=l))


def fit(embed: Callable[[Tensor], Tensor], output: Float[Tensor, " b *d"], embedded_target: Float[Tensor, " b *e"]) -> Fit:
    """The Fit of an output; embedded_target = embed(noised.target) is computed once for policy and reference."""
    return Fit(embed(output) - embedded_target)


def upcast(x: Float[Tensor, " *d"]) -> Float[Tensor, " *d"]:
    """x in float32; float64 stays. Differences between two models drown in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def last_time(schedule: Schedule, t_min: int, t_max: int | None) -> int:
    """The last of the times from t_min on; the schedule's own where t_max is None. Raises UserError: outside the schedule."""
    last = schedule.num_train_timesteps - 1
    t_max = last if t_max is None else t_max
    if not 0 <= t_min <= t_max <= last:
        raise UserError(f"times {t_min} to {t_max} are outside the schedule; choose 0 <= t_min <= t_max <= {last}")
    return t_max


def draw(
    schedule: Schedule,
    x0: Float[Tensor, " b *d"],
    cond: Conditioning,
    seeds: Int[Tensor, " p"],
    *,
    t_min: int = 0,
    t_max: int | None = None,
    shared: int = 1,
    density: Density = uniform,
) -> Noised:
    """Noise a batch, each item at a time of t_min .. t_max (inclusive; None means the last time), drawn by the density.

    x0 (b, ...) and cond with b rows; seeds (b // shared,) int64. With shared = 2 the rows i and i + b / 2 (winners first, then
    losers) share time, noise and seed, as in Diffusion-DPO (arXiv 2311.12908, supplement S9). Raises UserError as
    :func:`last_time`.
    """
    b, t_max = x0.shape[0], last_time(schedule, t_min, t_max)
    if len(cond) != b or seeds.shape[0] * shared != b:
        raise ValueError(f"{b} items need {b} rows of conditioning and {b} / {shared} seeds; got {len(cond)} and {len(seeds)}")
    seeds = seeds.repeat(shared)
    t = density(schedule, seeds, t_min, t_max, TIME, x0.device)
    noise = normal(seeds, tuple(x0.shape[1:]), NOISE, x0.device, x0.dtype)
    xt = schedule.add_noise(x0, noise, t)
    return Noised(x0, noise, xt, t, cond, schedule.target(x0, noise, t), seeds)
