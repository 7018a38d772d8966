"""Noise-Conditioned Perception (arXiv 2406.17636): errors in the embedding space of the network's frozen first half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError, nearest
from palate.diffusion.denoising import TARGET_TIME, Conditioning, Noised, upcast
from palate.diffusion.schedule import RectifiedFlow, Schedule, Times
from palate.diffusion.steps import ddim_step
from palate.spaces.space import Embed

LAYERS = ("last_down", "mid", "quarter", "half", "all")
TARGET_TIMES = ("previous", "uniform")
LEAST_REACH = 1e-3
"""Of a step by which errors are divided; a random time may be the item's own, to which there is no step."""


# The frozen first half of a network: x (b, c, h, w), times (b,), conditioning and layers -> one tensor per layer, finest first;
# float32 both ways. "last_down" and "mid" are one layer each; "all" is conv_in, every down block and the mid block. Of a
# transformer "quarter" and "half" are one layer each, "all" three. Gradients reach x; the weights require none.
Features = Callable[[Tensor, Tensor, Conditioning, str], list[Tensor]]


@dataclass(frozen=True, eq=False)
class Perceptual:
    """The space that `perceptual` describes."""

    features: Features
    schedule: Schedule
    layers: str
    normalise: bool
    target_time: str
    steps_back: int

    @property
    def t_min(self) -> int:
        """The first time from which all steps are of one length; at t = 0 a step back does not exist and the error is 0."""
        return self.steps_back if self.target_time == "previous" else 0

    @property
    def draws_noise(self) -> bool:
        """Whether its step adds ``step_noise``."""
        return self.target_time == "previous"

    def __call__(self, noised: Noised) -> Embed:
        xt = upcast(noised.xt)
        if self.draws_noise:
            s = (noised.t - self.steps_back).clamp(min=0)
            z = noised.with_step_noise().step_noise
            assert z is not None
            eta = 1.0
        else:
            s = self.schedule.uniform(noised.seeds, 0, self.schedule.num_train_timesteps - 1, TARGET_TIME, xt.device)
            z = torch.zeros_like(xt)
            eta = 0.0

        reach = self._reach(noised.t, s, eta)

        def embed(output: Float[Tensor, " b *d"]) -> Float[Tensor, "b n"]:
            # In float32: a step moves the latents by about 0.005 of the output, and two models differ by a hundredth of
            # that; half precision would round it away.
            mean, std = ddim_step(self.schedule, upcast(output), xt, noised.t, s, eta)
            return self._join(self.features(mean + std * z, s, noised.cond, self.layers)) / reach

        return embed

    def _reach(self, t: Times, s: Times, eta: float) -> Float[Tensor, "b 1"] | float:
        """How far the step of a rectified flow moves with the output; 1 for all others, whose step weighs as published."""
        if not isinstance(self.schedule, RectifiedFlow):
            return 1.0
        one = torch.ones(len(t), 1, device=t.device)
        moved, _ = ddim_step(self.schedule, one, torch.zeros_like(one), t, s, eta)
        return moved.abs().clamp(min=LEAST_REACH)

    def _join(self, parts: Sequence[Tensor]) -> Float[Tensor, "b n"]:
        # The authors view every layer as (b, -1, h_min, w_min) and concatenate channels. A mean over elements does not see
        # the shape, so flat vectors are the same; channel counts at the smallest resolution are to each other as sizes.
        sizes = [part[0].numel() for part in parts]
        scales = [sizes[-1] / size if self.normalise else 1.0 for size in sizes]
        return torch.cat([scale * upcast(part).flatten(1) for scale, part in zip(scales, parts, strict=True)], dim=1)


def perceptual(
    features: Features,
    schedule: Schedule,
    *,
    layers: str = "last_down",
    normalise: bool = False,
    target_time: str = "previous",
    steps_back: int = 1,
) -> Perceptual:
    """Noise-Conditioned Perception (arXiv 2406.17636, eqs. 12 to 15): embed(output) = features one step later.

    An output is embedded by the step it leads to from xt, with noise that policy, reference, target, winner and loser share;
    the frozen encoder sees the result at its own time, with the item's own conditioning. To first order the error is c_t^2
    |J (output - target)|^2 with c_t = beta_t / (sqrt(alpha_t) sqrt(1 - abar_t)), 0.004 to 0.02 for Stable Diffusion: a beta
    of the latent space does not carry over. Of a rectified flow, in our extension, errors are divided by c_t^2: they
    are those of the latent space where features move as the latents do. c_t is 0.002 for one step back: take 20 or more.

    layers: "last_down" (the released SDXL weights), "mid", or "all", joined as in the authors' code; of a transformer, in our
    extension, "quarter", "half" or "all" of the blocks up to the middle.
    normalise: scale each of several layers by the channel count of the last over its own, as in the authors' code.
    target_time: "previous": `steps_back` times earlier, but not before 0, by the reverse step of DDPM. "uniform": x0 and noise
    mixed anew at a random time (Lin and Yang, arXiv 2401.00110), without further noise.
    Raises UserError for names that do not exist and for steps_back below 1.
    """
    if layers not in LAYERS:
        raise UserError(f"layers {layers!r} of the perceptual space do not exist{nearest(layers, LAYERS)}")
    if target_time not in TARGET_TIMES:
        raise UserError(
            f"target_time {target_time!r} of the perceptual space does not exist{nearest(target_time, TARGET_TIMES)}"
        )
    if not 1 <= steps_back < schedule.num_train_timesteps:
        raise UserError(f"steps_back is {steps_back}; choose 1 to {schedule.num_train_timesteps - 1}")
    return Perceptual(features, schedule, layers, normalise, target_time, steps_back)
