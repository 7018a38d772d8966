"""What errors tell: metrics of a step, automatic beta, implicit rewards."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from palate.base.errors import UserError
from palate.base.seeds import mix
from palate.base.shapes import one_shape_each
from palate.diffusion.batches import PairBatch, SampleBatch
from palate.diffusion.denoising import Fit, Pair
from palate.objectives.pairs import margin
from palate.spaces import Space
from palate.training.fits import PLAIN, Draws, MeasuredPolicy, measured_fits, noise_batch
from palate.training.source import Source

SPREAD = 3.0
"""The logit that automatic beta gives to a margin as large as the natural spread of errors."""


REACH = "reach"
"""Metric of a pair: the logit of a margin as large as the difference of its own errors. It is for alarms, not for the log."""

PROBED = 128
"""Pairs from which the natural spread is measured."""


@torch.no_grad()
def automatic_beta(
    policy: MeasuredPolicy, space: Space, data: Source, draws: Draws = PLAIN, *, pairs: int = PROBED, batch_size: int = 8
) -> float:
    """beta at which a margin of the errors' natural spread has the logit ``SPREAD``: 2 SPREAD / std(Ll - Lw).

    The spread is that of the untrained policy over ``pairs`` pairs, at the times and noises that training draws. It carries
    the unit in which the space measures errors, which is why one beta serves so differently in two spaces. Single pictures are
    taken two by two. The same policy, data and draws give the same beta.

    Raises:
        UserError: fewer than two pairs, or errors that do not differ.
    """
    order, count = data.order(0, 0), min(pairs, len(data))
    differences: list[Tensor] = []
    for places in one_shape_each([data.shape_of(index) for index in order[:count]], batch_size):
        indices = [order[place] for place in places]
        batch = data.batch(indices, torch.tensor([mix(PROBED, index) for index in indices]))
        if isinstance(batch, SampleBatch):
            half = len(indices) // 2
            cond = {name: rows[: 2 * half] for name, rows in batch.cond.items()}
            batch = PairBatch(batch.latents[: 2 * half], cond, batch.label[:half], batch.weight[:half], batch.seeds[:half])
        assert isinstance(batch, PairBatch)
        if not len(batch.label):
            continue
        noised = noise_batch(policy, space, batch, draws, shared=2)
        fit = measured_fits(policy, space, noised, snr_gamma=draws.snr_gamma)["policy"].halves()
        differences.append(fit.l.error - fit.w.error)
    spread = float(torch.cat(differences).double().std()) if sum(map(len, differences)) > 1 else 0.0
    if not spread > 0:
        raise UserError("beta auto needs two pairs or more whose pictures differ: give objective.beta a number")
    return float(f"{2 * SPREAD / spread:.3g}")  # as many digits as it is worth, and as it is shown


def singles_metrics(fits: Mapping[str, Fit], p: int, beta: float | None) -> dict[str, Tensor]:
    """Metrics of the pictures of p pairs, winners first, with or without the losers."""
    policy, reference = fits["policy"], fits.get("reference")
    if len(policy.residual) == 2 * p:
        metrics = pair_metrics(policy.halves(), reference.halves() if reference else None, beta)
    else:
        metrics = {"winner_error": policy.error.detach()}
        if reference:
            metrics["winner_advantage"] = reference.error - metrics["winner_error"]
    if reference:
        metrics["advantage"] = (reference.error - policy.error.detach()).reshape(-1, p).mean(0)
    return metrics


@torch.no_grad()
def implicit_margins(
    policy: MeasuredPolicy,
    space: Space,
    data: Source,
    *,
    seed: int = 0,
    timesteps: int = 5,
    batch_size: int = 8,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """By how much the policy orders each pair better than its reference does, winner first; and the pairs' labels; ``(n,)``.

    The implicit reward is a mean over times and noise (Diffusion-DPO, eq. 14, inside the sigmoid), so the margins of a pair
    are averaged over ``timesteps`` draws, one in each of as many equal parts of the time axis, whichever times training draws.
    Times and noise depend on ``seed`` and the pair's index alone: calls at different stages of training, or of different
    policies, compare.

    Raises:
        UserError: errors that are not finite.
    """
    first, last = space.t_min, policy.schedule.num_train_timesteps
    # Both ends of a part are inclusive, as in draw.
    bounds = [first + (last - first) * k // timesteps for k in range(timesteps + 1)]
    parts = [(low, high - 1) for low, high in itertools.pairwise(bounds)]
    found, labels = torch.zeros(len(data)), torch.zeros(len(data))
    batches = one_shape_each([data.shape_of(index) for index in range(len(data))], batch_size)
    for indices in tqdm(batches, desc="implicit reward", unit=" batches", disable=not progress):
        margins: list[Tensor] = []
        for part, (t_min, t_max) in enumerate(parts):
            batch = data.batch(indices, torch.tensor([mix(seed, part, index) for index in indices]))
            assert isinstance(batch, PairBatch)
            noised = noise_batch(policy, space, batch, Draws(t_min, t_max), shared=2)
            fits = measured_fits(policy, space, noised, ("policy", "reference"))
            margins.append(margin(fits["policy"].halves(), fits["reference"].halves()))
            if part == 0:
                labels[indices] = batch.label
        found[indices] = torch.stack(margins).mean(0).cpu()
    if wrong := int((~found.isfinite()).sum()):
        raise UserError(
            f"the errors of the model on {wrong} of {len(data)} labelled pairs are not finite: it is damaged, was trained at "
            "too high a rate, or overflows: lower learning_rate, or use mixed_precision bf16 or no"
        )
    return found, labels


def pair_metrics(policy: Pair[Fit], reference: Pair[Fit] | None, beta: float | None) -> dict[str, Tensor]:
    Lw, Ll = policy.w.error.detach(), policy.l.error.detach()
    metrics = {"winner_error": Lw, "loser_error": Ll}
    if reference is None:
        m = Ll - Lw
    else:
        m = margin(policy, reference).detach()
        metrics |= {"winner_advantage": reference.w.error - Lw, "loser_advantage": reference.l.error - Ll}
    metrics |= {"margin": m, "implicit_accuracy": ordered_right(m)}
    if isinstance(beta, int | float):
        logit = beta / 2 * m
        metrics |= {"logit": logit, "gradient_factor": torch.sigmoid(-logit), REACH: beta / 2 * (Ll - Lw).abs()}
    return metrics


def ordered_right(margin: Tensor) -> Tensor:
    """1 where positive, 0.5 where zero, else 0."""
    return (torch.sign(margin) + 1) / 2
