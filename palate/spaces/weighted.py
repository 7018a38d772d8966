"""Sums of spaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError
from palate.diffusion.denoising import Noised
from palate.spaces.space import Embed, Space, draws_noise


@dataclass(frozen=True)
class Weighted:
    """The space that `weighted` describes."""

    parts: tuple[tuple[Space, float], ...]

    @property
    def t_min(self) -> int:
        """The latest of the parts' own."""
        return max(space.t_min for space, _ in self.parts)

    @property
    def draws_noise(self) -> bool:
        """Whether any part does."""
        return any(draws_noise(space) for space, _ in self.parts)

    def __call__(self, noised: Noised) -> Embed:
        embeds = [space(noised) for space, _ in self.parts]

        def embed(output: Float[Tensor, " b *d"]) -> Float[Tensor, "b n"]:
            vectors = [one(output).flatten(1) for one in embeds]
            n = sum(vector.shape[1] for vector in vectors)
            # The mean is over the n elements of all parts: n / n_i undoes the share of part i.
            scales = [math.sqrt(weight * n / vector.shape[1]) for (_, weight), vector in zip(self.parts, vectors, strict=True)]
            return torch.cat([scale * vector for scale, vector in zip(scales, vectors, strict=True)], dim=1)

        return embed


def weighted(parts: Sequence[tuple[Space, float]]) -> Weighted:
    """The space whose error is the sum of weight * error over its parts. Raises UserError unless all weights are positive."""
    if not parts or any(weight <= 0 for _, weight in parts):
        raise UserError(f"weights of spaces must be positive; got {[weight for _, weight in parts]}")
    return Weighted(tuple(parts))
