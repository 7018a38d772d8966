"""The model's own output space: noise, v or x0 of the latents."""

from __future__ import annotations

from dataclasses import dataclass

from palate.diffusion.denoising import Noised, upcast
from palate.spaces.space import Embed


@dataclass(frozen=True)
class Latent:
    """The output as it is, in float32."""

    t_min: int = 0

    def __call__(self, noised: Noised) -> Embed:
        return upcast


def latent() -> Latent:
    """Errors between the model's output and its target: the space of Diffusion-DPO (arXiv 2311.12908)."""
    return Latent()
