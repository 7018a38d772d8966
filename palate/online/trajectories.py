"""From steps of sampled trajectories to one loss per step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from palate.base.errors import UserError, short
from palate.diffusion.batches import Batch, TrajectoryBatch
from palate.diffusion.denoising import Conditioning
from palate.diffusion.sampling import Transition, guided, transition
from palate.diffusion.schedule import Schedule
from palate.diffusion.steps import Rule
from palate.training.fits import MeasuredPolicy, lagging
from palate.training.steps import Measured, Ready, Step


class Guided:
    """A policy and its reference as they act under classifier-free guidance, for steps that know nothing of it."""

    def __init__(self, policy: MeasuredPolicy, guidance_scale: float):
        self.policy, self.guidance_scale = policy, guidance_scale
        self.act, self.refer = guided(policy, guidance_scale), guided(policy.reference, guidance_scale)

    def __call__(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.act(xt, t, cond)

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with torch.no_grad():
            return self.refer(xt, t, cond)

    def old(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with torch.no_grad():
            return guided(lagging(self.policy).old, self.guidance_scale)(xt, t, cond)

    def advance_old(self, decay: float | None = None) -> None:
        lagging(self.policy).advance_old(decay)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.policy.parameters()

    @property
    def schedule(self) -> Schedule:
        return self.policy.schedule


def trajectory_step(
    policy: MeasuredPolicy,
    objective: Callable[..., Tensor],
    *,
    rule: Rule,
    guidance_scale: float,
    clip_range: float | None = None,
    kl_weight: float = 0.0,
    measure_kl: bool = False,
) -> Step:
    """A step on sampled steps (arXiv 2305.13301, section 4.3).

    Args:
        objective: of ``palate.objectives.trajectories``, hyperparameters bound.
        rule, guidance_scale: as in sampling; guidance 1 where training goes without.
        clip_range: of the objective, for ``clip_fraction``.
        kl_weight: adds this times the exact KL divergence of the step from the reference's, mean over elements.
        measure_kl: log it even at weight 0; costs a pass of the reference.

    Returns:
        Step whose metrics are ``log_ratio`` L - L_old (its square in ``approx_kl`` = (L - L_old)^2 / 2), ``clip_fraction``
        (1 where the ratio is outside the clip range), ``moved`` if the objective names it, and with a reference ``kl``.

    Raises:
        UserError: a log-probability that is not finite; names time and prompt.
    """
    act, refer = guided(policy, guidance_scale), guided(policy.reference, guidance_scale)
    named = inspect.signature(objective).parameters
    clip_range = named["clip_range"].default if clip_range is None and "clip_range" in named else clip_range

    def as_is(batch: Batch) -> TrajectoryBatch:
        assert isinstance(batch, TrajectoryBatch)  # rollouts make no others for trajectories
        return batch

    def measure(batch: Ready, state: Mapping[str, float]) -> Measured:
        assert isinstance(batch, TrajectoryBatch)
        device = next(iter(policy.parameters())).device
        xt, after, t, s = (x.to(device) for x in (batch.xt, batch.after, batch.t, batch.s))
        old, advantage = batch.old_log_prob.to(device), batch.advantage.to(device)
        cond = Conditioning(batch.cond).to(device)
        reference = None
        if kl_weight or measure_kl:
            with torch.no_grad():
                reference = transition(refer, policy.schedule, xt, t, s, cond, rule=rule)
        now = transition(act, policy.schedule, xt, t, s, cond, rule=rule)
        log_prob = now.log_prob(after)
        if not bool(log_prob.isfinite().all()):
            row = int(log_prob.isfinite().int().argmin())
            raise UserError(
                f"the log-probability of the step from time {t[row]:g} to {s[row]:g} of a picture of "
                f"{short(batch.prompts[row])} is {float(log_prob.detach()[row])}; "
                "lower learning_rate, or use mixed_precision bf16 or no"
            )
        given: dict[str, Tensor] = {}
        if "moved" in named:
            if batch.old_mean is None:
                raise ValueError("an objective that names moved needs rollouts that keep means")
            given["moved"] = Transition(batch.old_mean.to(device), now.std).kl(now).detach()
        losses = objective(log_prob, old, advantage, **given)
        log_ratio = (log_prob - old).detach()
        metrics = {"log_ratio": log_ratio, "approx_kl": log_ratio.square() / 2, **given}
        if clip_range is not None:
            metrics["clip_fraction"] = ((log_ratio.exp() - 1).abs() > clip_range).float()
        if reference is not None:
            kl = now.kl(reference)
            metrics["kl"] = kl.detach()
            losses = losses + kl_weight * kl if kl_weight else losses
        return losses, metrics

    return Step(as_is, measure)
