"""Objectives of single pictures: pure functions of what was measured, one number per picture.

A function that names `reference` costs a pass of the reference model. One that names `label` learns from liked and disliked
pictures: the probability that a picture is liked, 1 or 0 for a plain vote; without it there are only the liked ones. One that
names `reference_point` gets the running mean of R - L, the same number for a whole batch. One that names `old` costs a pass of
the policy that drew the pictures, which lags behind; `gain` and `sigma` are numbers of the item's time.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError
from palate.diffusion.denoising import Fit, upcast

__all__ = ["awm", "kto", "nft", "sft"]  # what a recipe may name


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


def nft(
    policy: Fit,
    reference: Fit,
    old: Fit,
    label: Float[Tensor, " b"],
    gain: Float[Tensor, " b"],
    *,
    mix: float = 1.0,
    scale: float = 5.0,
    reference_weight: float = 1e-4,
) -> Float[Tensor, " b"]:
    """DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117), as in the authors' code, (b,).

    Two models are implied by the policy and the old one that drew the picture: a better one with the residual e+ = mix p +
    (1 - mix) o, and a worse one with e- = (1 + mix) o - mix p. The better one is to be right where the picture is good, the
    worse one where it is bad: scale / mix (label E(e+) + (1 - label) E(e-)) + reference_weight mean (p - r)^2. E(e) is the mean
    square error of x0 over its mean size, gain mean(e^2) / mean|e|, the size without gradients. p, o, r: residuals of policy,
    old and reference. In terms of residuals the target is gone, so this holds for whatever a model predicts.
    """
    if not 0 < mix <= 1:
        raise UserError(f"objective nft: mix is {mix}; expected more than 0 and at most 1")
    p, o, r = (upcast(fit.residual).flatten(1) for fit in (policy, old, reference))

    def error(e: Tensor) -> Tensor:
        size = (gain * e.detach().abs().mean(1)).clamp(min=1e-5)
        return (gain[:, None] * e).square().mean(1) / size

    both = label * error(mix * p + (1 - mix) * o) + (1 - label) * error((1 + mix) * o - mix * p)
    return scale / mix * both + reference_weight * (p - r).square().mean(1)


def awm(
    policy: Fit,
    reference: Fit,
    old: Fit,
    label: Float[Tensor, " b"],
    sigma: Float[Tensor, " b"],
    *,
    clip_range: float = 1.0,
    power: float = 0.25,
    old_weight: float = 1.0,
    reference_weight: float = 1e-4,
) -> Float[Tensor, " b"]:
    """Advantage-weighted matching (Xue et al. 2025, arXiv 2509.25050), as in the authors' code, (b,).

    Of the log-likelihood of a picture stands l = -sigma ((L + e)^power - e^power) / power, L the error, e = 1e-10; so rho =
    exp(l - l_old), and with the advantage A = 2 label - 1 the loss is max(-A rho, -A clip(rho, 1 +- clip_range)) + old_weight
    mean (p - o)^2 + reference_weight mean (p - r)^2. p, o, r: residuals of policy, old and reference.
    """
    if not 0 < power <= 1:
        raise UserError(f"objective awm: power is {power}; expected more than 0 and at most 1")
    p, o, r = (upcast(fit.residual).flatten(1) for fit in (policy, old, reference))
    least = 1e-10

    def likelihood(fit: Fit) -> Tensor:
        return -sigma * ((fit.error + least) ** power - least**power) / power

    rho, advantage = (likelihood(policy) - likelihood(old)).exp(), 2 * label - 1
    pushed = torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - clip_range, 1 + clip_range))
    return pushed + old_weight * (p - o).square().mean(1) + reference_weight * (p - r).square().mean(1)
