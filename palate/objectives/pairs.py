"""Objectives of preference pairs: pure functions of what was measured, one number per pair.

A function that names `reference` costs a pass of the reference model; one that names `label` takes soft labels: the probability
that w is the better one, 1 for a plain vote, 0.5 for a tie. Errors are means over elements, and DPO's factor 1/2 is kept: beta
5000 here is 2500 in code that writes no half.

One noun throughout: `beta` is the slope of the logit, u = beta / 2 * margin, where the margin is Ll - Lw if there is no
reference. Whatever else a paper calls beta has another name here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError
from palate.diffusion.denoising import Fit, Pair

__all__ = ["cdpo", "cpo", "dpo", "dspo", "hinge", "ipo", "mapo", "orpo", "sdpo"]  # what a recipe may name


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


def cdpo(
    policy: Pair[Fit], reference: Pair[Fit], label: Float[Tensor, " p"], *, beta: float = 5000.0, label_smoothing: float = 0.1
) -> Float[Tensor, " p"]:
    """Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3), (p,).

    DPO on votes that are wrong with probability label_smoothing, 0 <= label_smoothing < 0.5: a label q becomes
    (1 - label_smoothing) q + label_smoothing (1 - q). The loss is least at u = log((1 - s) / s), not at infinity.
    """
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing is {label_smoothing}; expected the share of wrong votes, from 0 to below 0.5")
    return dpo(policy, reference, label + label_smoothing * (1 - 2 * label), beta=beta)


def ipo(policy: Pair[Fit], reference: Pair[Fit], label: Float[Tensor, " p"], *, beta: float = 5000.0) -> Float[Tensor, " p"]:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17): (u - 1/2)^2 with u = beta / 2 * margin, (p,).

    That is tau^2 times the paper's (h - 1 / (2 tau))^2, where tau = beta and h = margin / 2: the same minimum, but of order one
    for any beta. The pull ends where the margin is 1 / beta, so votes without doubt do not push for ever.
    """
    return _either(beta / 2 * margin(policy, reference), label, lambda u: (u - 0.5).square())


def hinge(policy: Pair[Fit], reference: Pair[Fit], label: Float[Tensor, " p"], *, beta: float = 5000.0) -> Float[Tensor, " p"]:
    """Hinge loss max(0, 1 - u), u = beta / 2 * margin, (p,): SLiC (arXiv 2305.10425) in DPO's terms (RSO, arXiv 2309.06657).

    Pairs with u > 1, a margin above 2 / beta, push no more.
    """
    return _either(beta / 2 * margin(policy, reference), label, lambda u: F.relu(1 - u))


def sdpo(
    policy: Pair[Fit], reference: Pair[Fit], label: Float[Tensor, " p"], *, beta: float = 5000.0, mu: float = 0.9
) -> Float[Tensor, " p"]:
    """Diffusion-SDPO (arXiv 2511.03317): DPO whose push on the loser never undoes the winner, (p,).

    The gradient of Ll is scaled by lambda = clip((1 - mu) |gw|^2 / <gw, gl>, 0, 1) if <gw, gl> > 0, else by 1, where gw and gl
    are the gradients of Lw and Ll by the output in the space of the errors: to first order the step then lowers Lw by a share
    mu at least, 0 <= mu <= 1, of what the winner alone would. Values are DPO's. lambda is of each pair, where the authors' code
    takes one of each local batch: so it does not depend on how a batch is cut.
    """
    if not 0 <= mu <= 1:
        raise UserError(f"mu is {mu}; expected 0 (DPO wherever the two agree) to 1 (no push on losers that resemble winners)")
    w, l = (fit.residual.detach().flatten(1) for fit in (policy.w, policy.l))
    product = (w * l).sum(1)  # gradients are 2 / n times residuals
    scale = torch.where(product > 0, (1 - mu) * w.square().sum(1) / product, 1.0).clamp(0, 1)
    residual, fixed = policy.l.residual, policy.l.residual.detach()
    scaled = Fit(fixed + _per_item(scale, fixed) * (residual - fixed))
    return dpo(Pair(policy.w, scaled), reference, label, beta=beta)


def dspo(
    policy: Pair[Fit], reference: Pair[Fit], label: Float[Tensor, " p"], *, beta: float = 5000.0, weight: float = 1.0
) -> Float[Tensor, " p"]:
    """DSPO, direct score preference optimisation (Zhu et al., ICLR 2025), (p,).

    mean |(pw - y) - weight (1 - sigmoid(u)) (pw - qw)|^2 with u = beta / 2 * margin: the winner is fitted to its target y,
    shifted by the score of "w is preferred"; p and q are outputs of policy and reference. The gradient passes through u. The
    authors' code for Stable Diffusion 1.5 has beta = weight = 0.001, which is SFT to four digits. 0 <= weight <= 1: where
    weight (1 - sigmoid(u)) is above one, the loss would push the winner away.
    """
    if not 0 <= weight <= 1:
        raise UserError(f"weight is {weight}; expected 0 (plain SFT) to 1: above, wrongly ordered pairs push winners away")

    def side(policy: Pair[Fit], reference: Pair[Fit]) -> Float[Tensor, " p"]:
        p, q = policy.w.residual, reference.w.residual
        doubt = weight * torch.sigmoid(-beta / 2 * margin(policy, reference))
        return Fit(p - _per_item(doubt, p) * (p - q)).error

    return label * side(policy, reference) + (1 - label) * side(_swapped(policy), _swapped(reference))


def mapo(
    policy: Pair[Fit], label: Float[Tensor, " p"], *, beta: float = 500.0, weight: float = 0.1, s: float = 0.5
) -> Float[Tensor, " p"]:
    """MaPO, margin-aware preference optimisation (arXiv 2406.06424), without a reference, (p,).

    Lw - weight log sigmoid(beta / s (f(Lw) - f(Ll))) with f(L) = sL / (exp(sL) - 1), which falls from 1 at L = 0 with slope
    -s / 2. So near 0 the logit is beta / 2 (Ll - Lw), as in CPO. The paper's T = 1000 is beta / s, its beta is weight.
    """
    if not s > 0:
        raise UserError(f"s is {s}; expected a positive number")
    Lw, Ll = policy.w.error, policy.l.error
    u = beta / s * (_amplitude(s * Lw) - _amplitude(s * Ll))
    return label * Lw + (1 - label) * Ll + weight * _cross_entropy(u, label)


def orpo(policy: Pair[Fit], label: Float[Tensor, " p"], *, weight: float = 0.1) -> Float[Tensor, " p"]:
    """ORPO, odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691, eqs. 6 and 7), without a reference, (p,).

    Lw - weight log sigmoid(log(odds_w / odds_l)), odds = p / (1 - p), where exp(-L) stands for the likelihood p of an element:
    log odds = -log(exp(L) - 1). The ratio is above one where the *winner's* error is the smaller. Where errors are small it is
    Ll / Lw, whatever the unit in which they are measured.
    """
    Lw, Ll = policy.w.error, policy.l.error
    u = _log_expm1(Ll) - _log_expm1(Lw)
    return label * Lw + (1 - label) * Ll + weight * _cross_entropy(u, label)


def _cross_entropy(logit: Float[Tensor, " p"], label: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """Cross-entropy of "w is better" under Bradley-Terry: -(label log sigmoid(u) + (1 - label) log sigmoid(-u))."""
    return -(label * F.logsigmoid(logit) + (1 - label) * F.logsigmoid(-logit))


def _either(logit: Float[Tensor, " p"], label: Float[Tensor, " p"], loss: Callable[[Tensor], Tensor]) -> Float[Tensor, " p"]:
    """The loss of "w is better" and that of "l is better", each as often as the label says."""
    return label * loss(logit) + (1 - label) * loss(-logit)


def _swapped(pair: Pair[Fit]) -> Pair[Fit]:
    return Pair(pair.l, pair.w)


def _per_item(numbers: Float[Tensor, " p"], like: Float[Tensor, " p *d"]) -> Float[Tensor, " p *ones"]:
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def _amplitude(x: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """x / (exp(x) - 1) for x >= 0, with an exact gradient from 0 on.

    Below 1/4 by its series, whose next term is x^6 / 30240 < 1e-8: even of expm1 the quotient's gradient cancels there.
    """
    small = x < 0.25
    series = 1 - x / 2 + x.square() / 12 - x.pow(4) / 720
    x = torch.where(small, 1.0, x)
    return torch.where(small, series, x * torch.exp(-x) / -torch.expm1(-x))  # exp(x) would overflow


def _log_expm1(x: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """log(exp(x) - 1) for x >= 0, kept finite at 0: errors there are below what float32 resolves."""
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    return x + torch.log(-torch.expm1(-x))
