"""Rewards without a model: how well a picture compresses (Black et al. 2023, "Training Diffusion Models with RL", sec. 5.1)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def jpeg_incompressibility(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """Size as JPEG of quality 95 in kB of 1,000 bytes. Not differentiable."""
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


def jpeg_compressibility(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """Minus :func:`jpeg_incompressibility`."""
    return -jpeg_incompressibility(images, prompts)


def check(kind: str, place: None) -> None:
    """Nothing can be missing."""


def load(kind: str, place: None, device: Any = "cpu") -> Callable[..., Tensor]:
    return jpeg_compressibility if kind == "jpeg_compressibility" else jpeg_incompressibility
