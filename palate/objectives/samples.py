"""Objectives of single pictures: pure functions of what was measured, one number per picture.

A function that names `reference` costs a pass of the reference model. One that names `label` learns from liked and disliked
pictures: the probability that a picture is liked, 1 or 0 for a plain vote; without it there are only the liked ones. One that
names `reference_point` gets the running mean of R - L, the same number for a whole batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from palate.diffusion.denoising import Fit

__all__ = ["kto", "sft"]  # what a recipe may name


def sft(policy: Fit) -> Float[Tensor, " b"]:
    """Supervised fine-tuning: the denoising error itself (DDPM, arXiv 2006.11239, eq. 14), (b,)."""
    return policy.error


def kto(
    policy: Fit,
    reference: Fit,
    label: Float[Tensor, " b"],
    reference_point: Float[Tensor, ""],
    *,
    beta: float = 2000.0,
    liked_weight: float = 1.0,
    disliked_weight: float = 1.0,
) -> Float[Tensor, " b"]:
    """Diffusion-KTO (arXiv 2404.04465) with KTO's own utility (Ethayarajh et al. 2024, arXiv 2402.01306, eqs. 7 and 8), (b,).

    A liked picture costs liked_weight (1 - sigmoid(u)), a disliked one disliked_weight (1 - sigmoid(-u)), where
    u = beta / 2 (R - L - K): what the policy gained on the picture beyond the reference point K = max(0, reference_point), the
    gain that is usual. L is the policy's error, R the reference's. beta 2000 is 1000 in the authors' code.
    """
    u = beta / 2 * (reference.error - policy.error - reference_point.clamp(min=0))
    return liked_weight * label * torch.sigmoid(-u) + disliked_weight * (1 - label) * torch.sigmoid(u)
