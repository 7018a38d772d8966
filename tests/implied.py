"""What a model's output says of the picture and of the noise, by the algebra that the steps use."""

from __future__ import annotations

from torch import Tensor

from palate.diffusion.schedule import Schedule, Times, combine


def to_x0(schedule: Schedule, output: Tensor, xt: Tensor, t: Times) -> Tensor:
    """Not finite for epsilon where alpha = 0: there xt says nothing about x0."""
    return combine(schedule.inverse(t, xt)[0], xt, output)


def to_noise(schedule: Schedule, output: Tensor, xt: Tensor, t: Times) -> Tensor:
    return combine(schedule.inverse(t, xt)[1], xt, output)
