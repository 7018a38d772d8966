"""Rewards without a model: how well a picture compresses (Black et al. 2023, "Training Diffusion Models with RL", sec. 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from palate.data.images import encoded


def jpeg_incompressibility(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """Size as JPEG of quality 95 in kB of 1,000 bytes. Not differentiable."""
    return torch.tensor([len(file) / 1000 for file in encoded(images, "JPEG", quality=95)], dtype=torch.float32)


def jpeg_compressibility(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """Minus :func:`jpeg_incompressibility`."""
    return -jpeg_incompressibility(images, prompts)


def check(kind: str, place: None) -> None:
    """Nothing can be missing."""


def load(kind: str, place: None, device: Any = "cpu") -> Callable[..., Tensor]:
    return jpeg_compressibility if kind == "jpeg_compressibility" else jpeg_incompressibility
