"""Objectives of single pictures: pure functions of what was measured, one number per picture."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from palate.diffusion.denoising import Fit

__all__ = ["sft"]  # what a recipe may name


def sft(policy: Fit) -> Float[Tensor, " b"]:
    """Supervised fine-tuning: the denoising error itself (DDPM, arXiv 2006.11239, eq. 14), (b,)."""
    return policy.error
