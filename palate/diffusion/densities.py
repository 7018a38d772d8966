"""At which times training looks: densities over the time axis.

A density draws a time for each item between two bounds; row i depends on (seeds[i], stream) alone. Those with a formula are
given by their distribution function F over the share of the axis, 0 (data) to 1 (noise), and its inverse: F takes the bounds to
an interval, one uniform number of the item picks a place in it, and the inverse leads back. So the bounds cut the density off
and leave its shape.
"""

# torch types the special functions in part only.
# pyright: reportUnknownMemberType=false, reportUnknownLambdaType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float64, Num
from torch import Tensor

from palate.base.errors import UserError
from palate.base.seeds import integers
from palate.base.seeds import uniform as uniform_numbers
from palate.diffusion.schedule import Path, Schedule, Times
from palate.diffusion.schedule import shifted as shifted_levels

Density = Callable[[Schedule, Tensor, int, int, int, "torch.device | str"], Times]
"""(schedule, seeds (b,), low, high, stream, device) -> times (b,) of low .. high, both inclusive."""
Share = Float64[Tensor, " b"]
"""Of the time axis."""


def uniform(
    schedule: Schedule, seeds: Num[Tensor, " b"], low: int, high: int, stream: int, device: torch.device | str
) -> Times:
    """All times alike."""
    return schedule.uniform(seeds, low, high, stream, device)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Density:
    """The share's logit is normal (arXiv 2403.03206, sec. 3.1): most draws fall in the middle of the axis.

    A static shift of the axis adds log(shift) to the mean.
    """
    return _from_formula(
        lambda share: torch.special.ndtr((torch.logit(share) - mean) / std),
        lambda p: torch.sigmoid(mean + std * torch.special.ndtri(p)),
    )


def shifted(shift: float) -> Density:
    """Uniform, then shifted as times of sampling are: shift u / (1 + (shift - 1) u) (arXiv 2403.03206, sec. 5.3.2)."""
    return _from_formula(
        lambda share: share / (shift - (shift - 1) * share),
        lambda u: shifted_levels(u, shift),
    )


def grid(path: Path) -> Density:
    """The times that sampling visits, each as often. Raises UserError: none of them lies within the bounds."""

    def drawn(
        schedule: Schedule, seeds: Num[Tensor, " b"], low: int, high: int, stream: int, device: torch.device | str
    ) -> Times:
        times = path.t[(path.t >= low) & (path.t <= high)]
        if not len(times):
            raise UserError(f"none of the {len(path)} times of sampling lies in {low} .. {high}: widen t_min and t_max")
        return times[integers(seeds, 0, len(times) - 1, stream, "cpu")].to(device)

    return drawn


def _from_formula(cumulative: Callable[[Share], Share], quantile: Callable[[Share], Share]) -> Density:
    def drawn(
        schedule: Schedule, seeds: Num[Tensor, " b"], low: int, high: int, stream: int, device: torch.device | str
    ) -> Times:
        first, last = cumulative(torch.tensor(schedule.span(low, high), dtype=torch.float64))
        shares = quantile(first + (last - first) * uniform_numbers(seeds, stream, "cpu"))
        return schedule.at_share(shares).clamp(low, high).to(device)  # rounding may pass a bound

    return drawn
