"""From a batch of pairs to one loss per pair: the one path on which every method measures its errors."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from palate.base.errors import UserError
from palate.data.encode import PairBatch, SampleBatch
from palate.diffusion.denoising import CAPTION, Conditioning, Fit, Noised, Pair, draw, integers
from palate.diffusion.sampling import TrajectoryBatch
from palate.objectives import margin
from palate.spaces import Space

Batch = PairBatch | SampleBatch | TrajectoryBatch
Measured = tuple[Tensor, dict[str, Tensor]]
"""Losses ``(p,)`` with gradients, one per pair or single picture, and detached metrics ``(p,)`` by name."""

MOMENTUM = 0.9
"""Of the running means in a step's state: they look back about ten updates."""

SPREAD = 3.0
"""The logit that automatic beta gives to a margin as large as the natural spread of errors."""
PROBED = 128
"""Pairs from which the natural spread is measured."""


@dataclass(frozen=True, eq=False)
class Draws:
    """What a step draws for each item, and how times weigh.

    Args:
        t_min, t_max: bounds of the times drawn, as in ``draw``; never below the least time at which the space carries signal.
        snr_gamma: errors are weighted by ``Schedule.min_snr_weight``; None for all times alike.
        caption_dropout: share of items whose prompt is left out.
        no_prompt: what stands for no prompt, one row (``Denoiser.unconditional``); what it lacks, such as a framing, stays.
    """

    t_min: int = 0
    t_max: int | None = None
    snr_gamma: float | None = None
    caption_dropout: float = 0.0
    no_prompt: Conditioning | None = None

    def captions(self, cond: Mapping[str, Tensor], seeds: Tensor) -> Conditioning:
        """The conditioning of a batch, its rows ``n len(seeds)``, without the prompts that are dropped.

        An item's own seed decides, so both pictures of a pair keep or lose their prompt together.
        """
        if not self.caption_dropout:
            return Conditioning(dict(cond))
        if self.no_prompt is None:
            raise ValueError("caption_dropout needs no_prompt")
        nothing = self.no_prompt.tensors
        dropped = integers(seeds, 0, 2**24 - 1, CAPTION, "cpu") < self.caption_dropout * 2**24

        def without(name: str, rows: Tensor) -> Tensor:
            here = dropped.repeat(len(rows) // len(seeds)).reshape(-1, *[1] * (rows.ndim - 1))
            return torch.where(here, nothing[name].to(rows), rows) if name in nothing else rows

        return Conditioning({name: without(name, rows) for name, rows in cond.items()})


PLAIN = Draws()


@dataclass(eq=False)
class Step:
    """Measures a batch, knowing the few numbers that a run finds out as it goes: its ``state``, which checkpoints keep.

    What enters the state is a mean over a whole effective batch, found after its update and used from the next one on: so
    losses never depend on how a batch was cut up, and a resumed run goes on with the same numbers.

    Args:
        measure: a batch and the state -> losses and metrics.
        follows: number in the state -> metric whose running mean it is, 0 at the start.
        prepare: training data -> numbers in the state that are found before the first update.
    """

    measure: Callable[[Batch, Mapping[str, float]], Measured]
    follows: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[PairSource], dict[str, float]] | None = None
    state: dict[str, float] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> Measured:
        return self.measure(batch, self.state)

    def begin(self, data: PairSource) -> None:
        """Find what must be known before the first update, unless a checkpoint has told or it was found already."""
        if self.prepare is not None and not self.state:
            self.state.update(self.prepare(data))

    def observe(self, means: Mapping[str, float]) -> None:
        """Take in the metrics of an update, each a mean over its effective batch."""
        for name, metric in self.follows.items():
            self.state[name] = MOMENTUM * self.state.get(name, 0.0) + (1 - MOMENTUM) * means[metric]


@runtime_checkable
class MeasuredPolicy(Protocol):
    """What measuring errors needs of a model and its reference."""

    @property
    def schedule(self) -> Any: ...
    def __call__(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...
    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...
    def parameters(self) -> Iterable[nn.Parameter]: ...


@runtime_checkable
class TrainablePolicy(MeasuredPolicy, Protocol):
    """What training needs of ``palate.models.policy.Policy``."""

    @property
    def trainable_module(self) -> nn.Module: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> Any: ...


@runtime_checkable
class PairSource(Protocol):
    """What training needs of ``palate.data.encode.EncodedPairs``."""

    def __len__(self) -> int: ...
    def order(self, seed: int, epoch: int) -> list[int]:
        """The indices of one epoch, each once; the same for the same arguments."""
        ...

    def batch(self, indices: Sequence[int], seeds: Tensor) -> Any:
        """The pairs (``PairBatch``) or single pictures (``SampleBatch``) at ``indices``.

        ``seeds[i]`` decides all that is random about the i-th.
        """
        ...


def pair_step(
    policy: TrainablePolicy,
    space: Space,
    objective: Callable[..., Tensor],
    draws: Draws = PLAIN,
    *,
    auto_beta: bool = False,
) -> Step:
    """A step on pairs: winner and loser share time and noise (Diffusion-DPO, eq. 14; Noise-Conditioned Perception, eq. 15).

    Args:
        policy: the model in training; its reference is run only if ``objective`` names ``reference``.
        space: where errors are measured.
        objective: of ``palate.objectives.pairs``, hyperparameters bound with ``functools.partial``; gets those of
            ``policy``, ``reference`` and ``label`` that its signature names.
        draws: which times and prompts are drawn.
        auto_beta: the objective's ``beta`` is chosen before the first update, see :func:`automatic_beta`.

    Returns:
        Step whose metrics are ``winner_error`` (Lw), ``loser_error`` (Ll), ``margin`` m = -((Lw - Ll) - (Rw - Rl)), without a
        reference Ll - Lw, ``implicit_accuracy`` (1 where m > 0, 0.5 where it is 0); with a reference ``winner_advantage``
        (Rw - Lw) and ``loser_advantage`` (Rl - Ll); if the objective has a ``beta``, ``logit`` u = (beta/2) m and
        ``gradient_factor`` sigmoid(-u): what is left of the push on a pair already ordered right.
    """
    named = inspect.signature(objective).parameters
    with_reference, with_label = "reference" in named, "label" in named

    def measure(batch: Batch, state: Mapping[str, float]) -> Measured:
        if not isinstance(batch, PairBatch):
            raise UserError("this objective compares two pictures, but the data holds single ones: use kto or sft")
        noised = _noised(policy, space, batch, draws, shared=2)
        arguments, device = _fits(policy, space, noised, with_reference, draws.snr_gamma), noised.xt.device
        given: dict[str, Any] = {name: _pair(fit) for name, fit in arguments.items()}
        if with_label:
            given["label"] = batch.label.to(device)
        beta = _beta(named, state)
        losses = _float32(objective, device, **given, **beta) * batch.weight.to(device)
        return losses, _pair_metrics(given["policy"], given.get("reference"), beta.get("beta"))

    return Step(measure, prepare=_prepare(policy, space, draws) if auto_beta else None)


def sample_step(
    policy: TrainablePolicy,
    space: Space,
    objective: Callable[..., Tensor],
    draws: Draws = PLAIN,
    *,
    auto_beta: bool = False,
) -> Step:
    """A step on single pictures, for objectives of ``palate.objectives.samples`` such as SFT and KTO.

    An objective that names ``label`` gets liked and disliked pictures: those of single votes, and of a pair its winner as
    liked and its loser as disliked, each at a time and with noise of its own. One that does not gets the liked ones alone: of
    pairs the winners, and single pictures weighted by their label. One that names ``reference_point`` gets the running mean
    of the advantage R - L over all earlier updates.

    Arguments as in ``pair_step``.

    Returns:
        Step with one loss per pair (the mean of its two pictures, if both are used) or single picture. Metrics of pairs: those
        of ``pair_step`` if both pictures are used, else ``winner_error`` and, with a reference, ``winner_advantage``. Of single
        pictures: ``error`` and, with a reference, ``agreement`` (1 where the advantage's sign is the vote's, 0.5 where it is
        0). Of both, with a reference: ``advantage``.
    """
    named = inspect.signature(objective).parameters
    with_reference, with_label = "reference" in named, "label" in named
    follows = {"reference_point": "advantage"} if "reference_point" in named else {}

    def measure(batch: Batch, state: Mapping[str, float]) -> Measured:
        items = batch if isinstance(batch, SampleBatch) else _singles(batch, both=with_label)
        noised = _noised(policy, space, items, draws, shared=1)
        device, beta = noised.xt.device, _beta(named, state)
        fits = _fits(policy, space, noised, with_reference, draws.snr_gamma)
        label, given = items.label.to(device), dict[str, Any](fits)
        if with_label:
            given["label"] = label
        given |= {name: torch.tensor(state.get(name, 0.0), device=device) for name in follows}
        losses = _float32(objective, device, **given, **beta) * items.weight.to(device) * (1 if with_label else label)
        if isinstance(batch, PairBatch):
            p = len(batch.label)
            return losses.reshape(-1, p).mean(0), _singles_metrics(fits, p, beta.get("beta"))
        metrics = {"error": fits["policy"].error.detach()}
        if with_reference:
            metrics["advantage"] = fits["reference"].error - metrics["error"]
            metrics["agreement"] = _order((2 * label - 1) * metrics["advantage"])
        return losses, metrics

    return Step(measure, follows, _prepare(policy, space, draws) if auto_beta else None)


def _beta(named: Mapping[str, inspect.Parameter], state: Mapping[str, float]) -> dict[str, float]:
    """The objective's beta, if it has one: the state's if that was chosen, else its own."""
    return {"beta": state.get("beta", named["beta"].default)} if "beta" in named else {}


def _prepare(policy: TrainablePolicy, space: Space, draws: Draws) -> Callable[[PairSource], dict[str, float]]:
    return lambda data: {"beta": automatic_beta(policy, space, data, draws)}


@torch.no_grad()
def automatic_beta(
    policy: TrainablePolicy, space: Space, data: PairSource, draws: Draws = PLAIN, *, pairs: int = PROBED, batch_size: int = 8
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
    for start in range(0, count, batch_size):
        indices = order[start : min(start + batch_size, count)]
        batch = data.batch(indices, torch.tensor([mix(PROBED, index) for index in indices]))
        if not isinstance(batch, PairBatch):
            half = len(indices) // 2
            cond = {name: rows[: 2 * half] for name, rows in batch.cond.items()}
            batch = PairBatch(batch.latents[: 2 * half], cond, batch.label[:half], batch.weight[:half], batch.seeds[:half])
        if not len(batch.label):
            continue
        noised = _noised(policy, space, batch, draws, shared=2)
        fit = _pair(_fits(policy, space, noised, False, draws.snr_gamma)["policy"])
        differences.append(fit.l.error - fit.w.error)
    spread = float(torch.cat(differences).double().std()) if sum(map(len, differences)) > 1 else 0.0
    if not spread > 0:
        raise UserError("beta auto needs two pairs or more whose pictures differ: give objective.beta a number")
    return float(f"{2 * SPREAD / spread:.3g}")  # as many digits as it is worth, and as it is shown


def _singles(batch: PairBatch, *, both: bool) -> SampleBatch:
    """The winners as liked pictures and, if asked for, the losers as disliked ones, with noise of their own."""
    label, seeds = batch.label, batch.seeds
    if not both:
        rows, label = slice(len(label)), torch.ones_like(label)
    else:
        rows = slice(2 * len(label))
        label = torch.cat([label, 1 - label])
        seeds = torch.cat([seeds, torch.tensor([mix(int(seed), 1) for seed in seeds])])
    cond = {name: tensor[rows] for name, tensor in batch.cond.items()}
    return SampleBatch(batch.latents[rows], cond, label, batch.weight.repeat(len(label) // len(batch.weight)), seeds)


def _singles_metrics(fits: Mapping[str, Fit], p: int, beta: float | None) -> dict[str, Tensor]:
    """Metrics of the pictures of p pairs, winners first, with or without the losers."""
    policy, reference = fits["policy"], fits.get("reference")
    if len(policy.residual) == 2 * p:
        metrics = _pair_metrics(_pair(policy), _pair(reference) if reference else None, beta)
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
    data: PairSource,
    *,
    seed: int = 0,
    timesteps: int = 5,
    batch_size: int = 8,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """By how much the policy orders each pair better than its reference does, winner first; and the pairs' labels; ``(n,)``.

    The implicit reward is a mean over times and noise (Diffusion-DPO, eq. 14, inside the sigmoid), so the margins of a pair
    are averaged over ``timesteps`` draws, one in each of as many equal parts of the time axis.
    Times and noise depend on ``seed`` and the pair's index alone: calls at different stages of training, or of different
    policies, compare.
    """
    first, last = space.t_min, policy.schedule.num_train_timesteps
    # Both ends of a part are inclusive, as in draw.
    bounds = [first + (last - first) * k // timesteps for k in range(timesteps + 1)]
    parts = [(low, high - 1) for low, high in itertools.pairwise(bounds)]
    found: list[Tensor] = []
    labels: list[Tensor] = []
    for start in tqdm(range(0, len(data), batch_size), desc="implicit reward", unit=" batches", disable=not progress):
        indices = list(range(start, min(start + batch_size, len(data))))
        margins: list[Tensor] = []
        for part, (t_min, t_max) in enumerate(parts):
            batch = data.batch(indices, torch.tensor([mix(seed, part, index) for index in indices]))
            noised = _noised(policy, space, batch, Draws(t_min, t_max), shared=2)
            fits = {name: _pair(fit) for name, fit in _fits(policy, space, noised, True).items()}
            margins.append(margin(fits["policy"], fits["reference"]))
            if part == 0:
                labels.append(batch.label)
        found.append(torch.stack(margins).mean(0).cpu())
    nothing = [torch.zeros(0)]
    return torch.cat(found or nothing), torch.cat(labels or nothing)


def mix(*numbers: int) -> int:
    """63 well-mixed bits of some integers (the finaliser of SplitMix64, chained): the seed of one item."""
    full = 2**64 - 1
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & full
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & full
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & full
        state ^= state >> 31
    return state >> 1


def _noised(policy: MeasuredPolicy, space: Space, batch: Batch, draws: Draws, *, shared: int) -> Noised:
    """Pairs with ``shared=2``, single pictures with 1."""
    device = next(iter(policy.parameters())).device
    latents, cond = batch.latents.to(device, torch.float32), draws.captions(batch.cond, batch.seeds).to(device)
    t_min = max(draws.t_min, space.t_min)
    return draw(policy.schedule, latents, cond, batch.seeds, t_min=t_min, t_max=draws.t_max, shared=shared)


def _fits(
    policy: MeasuredPolicy, space: Space, noised: Noised, with_reference: bool, snr_gamma: float | None = None
) -> dict[str, Fit]:
    """What was measured of the policy and, if asked for, the reference."""
    device = noised.xt.device
    # Residuals carry the root of the weight, so that errors, and all that is made of them, carry the weight itself.
    scale = torch.ones(()) if snr_gamma is None else policy.schedule.min_snr_weight(noised.t, snr_gamma).sqrt().to(device)
    outputs: dict[str, Tensor] = {}
    # The reference first: its activations are gone before those of the policy are kept for the backward pass.
    if with_reference:
        with torch.no_grad():
            outputs["reference"] = policy.reference(noised.xt, noised.t, noised.cond)
    outputs["policy"] = policy(noised.xt, noised.t, noised.cond)
    embed = space(noised)
    with torch.no_grad():
        target = _float32(embed, device, noised.target.float())
    fits: dict[str, Fit] = {}
    for name, output in outputs.items():
        with torch.set_grad_enabled(torch.is_grad_enabled() and name == "policy"):
            residual = _float32(embed, device, output.float()) - target
            fits[name] = Fit(residual if snr_gamma is None else residual * scale.reshape(-1, *[1] * (residual.ndim - 1)))
    return fits


def _float32(function: Callable[..., Tensor], device: torch.device, *args: Any, **kwargs: Any) -> Tensor:
    """Call outside autocast: errors of policy and reference are differences of nearly equal numbers, and half precision
    would leave noise in their place."""
    with torch.autocast(device.type, enabled=False):
        return function(*args, **kwargs)


def _pair(fit: Fit) -> Pair[Fit]:
    """Winners are the first half of the rows."""
    w, l = fit.residual.chunk(2)
    return Pair(Fit(w), Fit(l))


def _pair_metrics(policy: Pair[Fit], reference: Pair[Fit] | None, beta: float | None) -> dict[str, Tensor]:
    Lw, Ll = policy.w.error.detach(), policy.l.error.detach()
    metrics = {"winner_error": Lw, "loser_error": Ll}
    if reference is None:
        m = Ll - Lw
    else:
        m = margin(policy, reference).detach()
        metrics |= {"winner_advantage": reference.w.error - Lw, "loser_advantage": reference.l.error - Ll}
    metrics |= {"margin": m, "implicit_accuracy": _order(m)}
    if isinstance(beta, int | float):
        logit = beta / 2 * m
        metrics |= {"logit": logit, "gradient_factor": torch.sigmoid(-logit)}
    return metrics


def _order(margin: Tensor) -> Tensor:
    """1 where positive, 0.5 where zero, else 0."""
    return (torch.sign(margin) + 1) / 2
