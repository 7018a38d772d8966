"""Rewards without a model: how well a picture compresses (Black et al. 2023, "Training Diffusion Models with RL", sec. 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from palate.data.images import encoded

if TYPE_CHECKING:
    from palate.judges import Judge


def jpeg_incompressibility(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """Size as JPEG of quality 95 in kB of 1,000 bytes. Not differentiable."""
    return torch.tensor([len(file) / 1000 for file in encoded(images, "JPEG", quality=95)], dtype=torch.float32)


def jpeg_compressibility(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """Minus :func:`jpeg_incompressibility`."""
    return -jpeg_incompressibility(images, prompts)


@dataclass(frozen=True, kw_only=True)
class Options:
    """There are none."""


def prepare(kind: str, place: None, options: Options) -> Callable[[str | torch.device], Judge]:
    """Nothing can be missing."""
    return lambda _: jpeg_compressibility if kind == "jpeg_compressibility" else jpeg_incompressibility
