"""From a batch to errors: the one path on which every method measures them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from palate.base.seeds import integers
from palate.diffusion.batches import PairBatch, SampleBatch
from palate.diffusion.denoising import CAPTION, Conditioning, Fit, Noised, draw
from palate.diffusion.densities import Density, uniform
from palate.diffusion.schedule import Schedule
from palate.spaces import Space, draws_noise
from palate.training.references import REFERENCE, TARGET, Known


@dataclass(frozen=True, eq=False)
class Draws:
    """What a step draws for each item, and how times weigh.

    Args:
        t_min, t_max: bounds of the times drawn, as in ``draw``; never below the least time at which the space carries signal.
        snr_gamma: errors are weighted by ``Schedule.min_snr_weight``; None for all times alike.
        caption_dropout: share of items whose prompt is left out.
        no_prompt: what stands for no prompt, one row (``Denoiser.unconditional``); what it lacks, such as a framing, stays.
        density: of the times between their bounds.
    """

    t_min: int = 0
    t_max: int | None = None
    snr_gamma: float | None = None
    caption_dropout: float = 0.0
    no_prompt: Conditioning | None = None
    density: Density = uniform

    def captions(self, cond: Mapping[str, Tensor], seeds: Tensor) -> Conditioning:
        """The conditioning of a batch, its rows ``n len(seeds)``, without the prompts that are dropped.

        An item's own seed decides, so both pictures of a pair keep or lose their prompt together.
        """
        if not self.caption_dropout:
            return Conditioning(dict(cond))
        if self.no_prompt is None:
            raise ValueError("caption_dropout needs no_prompt")
        nothing = self.no_prompt.tensors
        dropped = integers(seeds, 0, 2**24 - 1, CAPTION, "cpu") < self.caption_dropout * 2**24

        def without(name: str, rows: Tensor) -> Tensor:
            here = dropped.repeat(len(rows) // len(seeds)).reshape(-1, *[1] * (rows.ndim - 1))
            return torch.where(here, nothing[name].to(rows), rows) if name in nothing else rows

        return Conditioning({name: without(name, rows) for name, rows in cond.items()})


PLAIN = Draws()

MODELS = ("policy", "reference", "old")
"""What errors are measured of: the model in training, the one before training, and one that lags behind."""


@runtime_checkable
class MeasuredPolicy(Protocol):
    """What measuring errors needs of a model and its reference."""

    @property
    def schedule(self) -> Schedule: ...
    def __call__(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...
    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...


@runtime_checkable
class TrainablePolicy(MeasuredPolicy, Protocol):
    """What training needs of ``palate.models.policy.Policy``."""

    @property
    def trainable_module(self) -> nn.Module: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> object: ...


@runtime_checkable
class LaggingPolicy(MeasuredPolicy, Protocol):
    """One that also keeps how it was some updates ago (``palate.models.policy.Policy.track_old``)."""

    def old(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...
    def advance_old(self, decay: float | None = None) -> None: ...


def lagging(policy: MeasuredPolicy) -> LaggingPolicy:
    """Raises ValueError: the policy is none."""
    if not isinstance(policy, LaggingPolicy):
        raise ValueError(f"the objective names old, but {type(policy).__name__} keeps no old policy")
    return policy


def noise_batch(policy: MeasuredPolicy, space: Space, batch: PairBatch | SampleBatch, draws: Draws, *, shared: int) -> Noised:
    """On the CPU: all that is random about a batch. Pairs with ``shared=2``, single pictures with 1."""
    latents, cond = batch.latents.float(), draws.captions(batch.cond, batch.seeds)
    t_min, t_max = max(draws.t_min, space.t_min), draws.t_max
    noised = draw(policy.schedule, latents, cond, batch.seeds, t_min=t_min, t_max=t_max, shared=shared, density=draws.density)
    return noised.with_step_noise() if draws_noise(space) else noised


def device_of(policy: MeasuredPolicy) -> torch.device:
    """Where it computes."""
    return next(iter(policy.parameters())).device


def measured_fits(
    policy: MeasuredPolicy,
    space: Space,
    noised: Noised,
    models: Collection[str] = ("policy",),
    snr_gamma: float | None = None,
    known: Known | None = None,
) -> dict[str, Fit]:
    """What was measured of the policy and of those others of ``MODELS`` that ``models`` names.

    Args:
        noised: on the CPU.
        known: what is kept of this batch; it is not computed again, and what it lacks is told to it.
    """
    device = device_of(policy)
    # Residuals carry the root of the weight, so that errors, and all that is made of them, carry the weight itself.
    scale = None if snr_gamma is None else policy.schedule.min_snr_weight(noised.t, snr_gamma).sqrt()
    noised = noised.to(device)
    embed = space(noised)

    def embedded(output: Tensor) -> Tensor:
        return outside_autocast(embed, device, output.float())

    def fit(output: Tensor, target: Tensor) -> Fit:
        residual: Tensor = embedded(output) - target
        return Fit(residual if scale is None else residual * scale.to(device).reshape(-1, *[1] * (residual.ndim - 1)))

    def reference() -> Fit:
        return fit(policy.reference(noised.xt, noised.t, noised.cond), target)

    fits: dict[str, Fit] = {}
    # The policy last: activations of the others are gone before its own are kept for the backward pass.
    with torch.no_grad():
        target = embedded(noised.target) if known is None else known.once(TARGET, device, lambda: embedded(noised.target))
        if "reference" in models:
            fits["reference"] = (
                reference() if known is None else Fit(error=known.once(REFERENCE, device, lambda: reference().error))
            )
        if "old" in models:
            fits["old"] = fit(lagging(policy).old(noised.xt, noised.t, noised.cond), target)
    fits["policy"] = fit(policy(noised.xt, noised.t, noised.cond), target)
    return fits


def outside_autocast(function: Callable[..., Tensor], device: torch.device, *args: Any, **kwargs: Any) -> Tensor:
    """Call outside autocast: errors of policy and reference are differences of nearly equal numbers, and half precision
    would leave noise in their place."""
    with torch.autocast(device.type, enabled=False):
        return function(*args, **kwargs)
