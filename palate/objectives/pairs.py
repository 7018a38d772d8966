"""Objectives of preference pairs: pure functions of what was measured, one number per pair.

A function that names `reference` costs a pass of the reference model; one that names `label` takes soft labels: the probability
that w is the better one, 1 for a plain vote, 0.5 for a tie. Errors are means over elements, and DPO's factor 1/2 is kept: beta
5000 here is 2500 in code that writes no half.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from palate.diffusion.denoising import Fit, Pair

__all__ = ["cpo", "dpo"]  # what a recipe may name


def margin(policy: Pair[Fit], reference: Pair[Fit]) -> Float[Tensor, " p"]:
    """-((Lw - Ll) - (Rw - Rl)), (p,): positive if the policy orders the pair better than the reference does.

    L are errors of the policy, R of the reference. The implicit reward difference of Diffusion-DPO (arXiv 2311.12908, eq. 46)
    without beta / 2.
    """
    return (reference.w.error - reference.l.error) - (policy.w.error - policy.l.error)


def dpo(policy: Pair[Fit], reference: Pair[Fit], label: Float[Tensor, " p"], *, beta: float = 5000.0) -> Float[Tensor, " p"]:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14 with the beta / 2 of eq. 46): -log sigmoid(beta / 2 * margin), (p,).

    In the space of the U-Net's embeddings this is NCP-DPO (arXiv 2406.17636, eq. 15).
    """
    return _cross_entropy(beta / 2 * margin(policy, reference), label)


def cpo(policy: Pair[Fit], label: Float[Tensor, " p"], *, beta: float, bc_weight: float) -> Float[Tensor, " p"]:
    """CPO (Xu et al. 2024, arXiv 2401.08417; arXiv 2406.17636, eqs. 11 and 16), without a reference, (p,).

    -log sigmoid(-beta / 2 * (Lw - Ll)) + bc_weight * Lw. The second term, cloning of the winner, is lambda in the papers; with
    a soft label it takes the two errors in that proportion.
    """
    Lw, Ll = policy.w.error, policy.l.error
    return _cross_entropy(beta / 2 * (Ll - Lw), label) + bc_weight * (label * Lw + (1 - label) * Ll)


def _cross_entropy(logit: Float[Tensor, " p"], label: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """Cross-entropy of "w is better" under Bradley-Terry: -(label log sigmoid(u) + (1 - label) log sigmoid(-u))."""
    return -(label * F.logsigmoid(logit) + (1 - label) * F.logsigmoid(-logit))
