"""Objectives of sampled trajectories: pure functions of one step's log-probabilities and an advantage, one number per step.

log_prob and old_log_prob are means over the elements of a step (`palate.diffusion.sampling.Transition.log_prob`), now and
when it was sampled; advantage is that of the whole picture. A function that names `moved` gets the exact KL divergence of the
step as it was sampled from the step as it is now, mean over elements, without gradients; it costs memory for the old means.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["ddpo_is", "ddpo_sf", "ddpo_tr"]  # what a recipe may name


def ddpo_sf(
    log_prob: Float[Tensor, " b"], old_log_prob: Float[Tensor, " b"], advantage: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """DDPO with the score function, REINFORCE (arXiv 2305.13301, eq. DDPO_SF): -advantage * log_prob, (b,).

    Unbiased only for the weights that sampled: one update per round. The constant old_log_prob is subtracted, so that the
    loss is 0 there instead of some large number; gradients do not see it.
    """
    return -advantage * (log_prob - old_log_prob)


def ddpo_is(
    log_prob: Float[Tensor, " b"],
    old_log_prob: Float[Tensor, " b"],
    advantage: Float[Tensor, " b"],
    *,
    clip_range: float = 1e-4,
) -> Float[Tensor, " b"]:
    """DDPO with importance sampling (arXiv 2305.13301, eq. DDPO_IS), clipped as PPO (arXiv 1707.06347, eq. 7), (b,).

    With rho = exp(log_prob - old_log_prob): max(-advantage rho, -advantage clip(rho, 1 - clip_range, 1 + clip_range)).
    The ratio is that of a mean over D elements: a clip range of 1e-4 is 1e-4 D nats, 1.6 for the 16,384 of Stable Diffusion.
    """
    rho = (log_prob - old_log_prob).exp()
    return torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - clip_range, 1 + clip_range))


def ddpo_tr(
    log_prob: Float[Tensor, " b"],
    old_log_prob: Float[Tensor, " b"],
    advantage: Float[Tensor, " b"],
    moved: Float[Tensor, " b"],
    *,
    trust_region: float = 1e-5,
) -> Float[Tensor, " b"]:
    """DDPO with importance sampling in a trust region, (b,): -advantage rho, but 0 for a step that would be pushed farther out.

    That is a step with moved > trust_region whose ratio has already gone where its advantage pulls. One ratio is a noisy
    measure of how far a step has moved, and its scale depends on the step's noise; the KL divergence is neither (DPPO's mask,
    as verl-omni has it for flow models).
    """
    rho = (log_prob - old_log_prob).exp()
    outward = (moved > trust_region) & (advantage * (rho.detach() - 1) > 0)
    return torch.where(outward, torch.zeros_like(rho), -advantage * rho)
