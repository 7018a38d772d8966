"""From a batch of pairs or single pictures to one loss per item: the one path on which every method measures its errors.

An objective gets what its signature names. Beside hyperparameters, which have a value by then, it may name

- ``policy``, ``reference``, ``old``: the fits of the model in training, of the one before training, and of one that lags behind
  (``Policy.track_old``). Each costs a pass; only the policy's has gradients.
- ``label``: that of the pair or picture.
- ``gain``, of single pictures: how far x0 moves with the model's output at the item's time, ``Schedule.gain``; ``sigma``: how
  much noise there is.
- ``reference_point``, of single pictures: the running mean of the advantage R - L over all earlier updates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from palate.base.errors import UserError
from palate.base.seeds import mix
from palate.diffusion.batches import Batch, PairBatch, SampleBatch, TrajectoryBatch
from palate.diffusion.denoising import Fit, Noised, Pair
from palate.spaces import Space
from palate.training.fits import (
    MODELS,
    PLAIN,
    Draws,
    MeasuredPolicy,
    device_of,
    lagging,
    measured_fits,
    noise_batch,
    outside_autocast,
)
from palate.training.measures import automatic_beta, ordered_right, pair_metrics, singles_metrics
from palate.training.references import Known, References
from palate.training.source import Source


@dataclass(frozen=True, eq=False)
class Drawn:
    """A batch with all that is random about it, on the CPU.

    Args:
        noised: its rows, winners first.
        label, weight: of its items.
        pairs: how many pairs it was made of; 0 for single pictures.
        known: what is kept of it from earlier draws.
    """

    noised: Noised
    label: Tensor
    weight: Tensor
    pairs: int
    known: Known | None

    def pinned(self) -> Drawn:
        """In memory that a GPU reads by itself while it computes."""
        known = None if self.known is None else self.known.pinned()
        return Drawn(self.noised.pinned(), self.label.pin_memory(), self.weight.pin_memory(), self.pairs, known)


Ready = Drawn | TrajectoryBatch
"""What a step measures."""
Measured = tuple[Tensor, dict[str, Tensor]]
"""Losses ``(p,)`` with gradients, one per pair or single picture, and detached metrics ``(p,)`` by name."""

MOMENTUM = 0.9
"""Of the running means in a step's state: they look back about ten updates."""


@dataclass(eq=False)
class Step:
    """Measures a batch, knowing the few numbers that a run finds out as it goes: its ``state``, which checkpoints keep.

    It does so in two parts: ``draw`` needs the CPU alone and may run ahead in a thread, ``measure`` the policy.

    What enters the state is a mean over a whole effective batch, found after its update and used from the next one on: so
    losses never depend on how a batch was cut up, and a resumed run goes on with the same numbers.

    Args:
        draw: a batch -> what is measured of it.
        measure: that and the state -> losses and metrics.
        follows: number in the state -> metric whose running mean it is, 0 at the start.
        prepare: training data -> numbers in the state that are found before the first update.
        after: called after every update.
    """

    draw: Callable[[Batch], Ready]
    measure: Callable[[Ready, Mapping[str, float]], Measured]
    follows: Mapping[str, str] = field(default_factory=dict[str, str])
    prepare: Callable[[Source], dict[str, float]] | None = None
    after: Sequence[Callable[[], None]] = ()
    state: dict[str, float] = field(default_factory=dict[str, float])

    def __call__(self, batch: Batch) -> Measured:
        return self.measure(self.draw(batch), self.state)

    def begin(self, data: Source) -> None:
        """Find what must be known before the first update, unless a checkpoint has told or it was found already."""
        if self.prepare is not None and not self.state:
            self.state.update(self.prepare(data))

    def observe(self, means: Mapping[str, float]) -> None:
        """Take in the metrics of an update, each a mean over its effective batch."""
        for name, metric in self.follows.items():
            self.state[name] = MOMENTUM * self.state.get(name, 0.0) + (1 - MOMENTUM) * means[metric]
        for call in self.after:
            call()


def pair_step(
    policy: MeasuredPolicy,
    space: Space,
    objective: Callable[..., Tensor],
    draws: Draws = PLAIN,
    *,
    auto_beta: bool = False,
    references: References | None = None,
) -> Step:
    """A step on pairs: winner and loser share time and noise (Diffusion-DPO, eq. 14; Noise-Conditioned Perception, eq. 15).

    Args:
        policy: the model in training.
        space: where errors are measured.
        objective: of ``palate.objectives.pairs``, hyperparameters bound with ``functools.partial``.
        draws: which times and prompts are drawn.
        auto_beta: the objective's ``beta`` is chosen before the first update, see :func:`automatic_beta`.
        references: what the frozen weights said of the same draws before; they are asked for the rest alone.

    Returns:
        Step whose metrics are ``winner_error`` (Lw), ``loser_error`` (Ll), ``margin`` m = -((Lw - Ll) - (Rw - Rl)), without a
        reference Ll - Lw, ``implicit_accuracy`` (1 where m > 0, 0.5 where it is 0); with a reference ``winner_advantage``
        (Rw - Lw) and ``loser_advantage`` (Rl - Ll); if the objective has a ``beta``, ``logit`` u = (beta/2) m and
        ``gradient_factor`` sigmoid(-u): what is left of the push on a pair already ordered right.

    Raises:
        UserError: the objective names what it cannot get.
    """
    named = _named(objective, (*MODELS, "label"))

    def drawn(batch: Batch) -> Drawn:
        if not isinstance(batch, PairBatch):
            raise UserError("this objective compares two pictures, but the data holds single ones: use kto or sft")
        noised = noise_batch(policy, space, batch, draws, shared=2)
        known = references.of(noised, 2) if references else None
        return Drawn(noised, batch.label, batch.weight, len(batch.label), known)

    def measure(ready: Ready, state: Mapping[str, float]) -> Measured:
        assert isinstance(ready, Drawn)
        device, beta = device_of(policy), _beta(named, state)
        fits = measured_fits(policy, space, ready.noised, named, draws.snr_gamma, ready.known)
        pairs = {name: fit.halves() for name, fit in fits.items()}
        given = dict[str, Pair[Fit] | Tensor](pairs)
        if "label" in named:
            given["label"] = ready.label.to(device, non_blocking=True)
        losses = outside_autocast(objective, device, **given, **beta) * ready.weight.to(device, non_blocking=True)
        return losses, pair_metrics(pairs["policy"], pairs.get("reference"), beta.get("beta"))

    prepare = _prepare(policy, space, draws) if auto_beta else None
    return Step(drawn, measure, {}, prepare, _after(policy, named, references))


def sample_step(
    policy: MeasuredPolicy,
    space: Space,
    objective: Callable[..., Tensor],
    draws: Draws = PLAIN,
    *,
    auto_beta: bool = False,
    references: References | None = None,
) -> Step:
    """A step on single pictures, for objectives of ``palate.objectives.samples`` such as SFT and KTO.

    An objective that names ``label`` gets liked and disliked pictures: those of single votes, and of a pair its winner as
    liked and its loser as disliked, each at a time and with noise of its own. One that does not gets the liked ones alone: of
    pairs the winners, and single pictures weighted by their label.

    Arguments as in ``pair_step``.

    Returns:
        Step with one loss per pair (the mean of its two pictures, if both are used) or single picture. Metrics of pairs: those
        of ``pair_step`` if both pictures are used, else ``winner_error`` and, with a reference, ``winner_advantage``. Of single
        pictures: ``error`` and, with a reference, ``agreement`` (1 where the advantage's sign is the vote's, 0.5 where it is
        0). Of both, with a reference: ``advantage``.
    """
    named = _named(objective, (*MODELS, "label", "reference_point", "gain", "sigma"))
    with_label = "label" in named
    follows = {"reference_point": "advantage"} if "reference_point" in named else {}

    def drawn(batch: Batch) -> Drawn:
        assert isinstance(batch, PairBatch | SampleBatch)  # steps of trajectories have a step of their own
        items = batch if isinstance(batch, SampleBatch) else _singles(batch, both=with_label)
        noised = noise_batch(policy, space, items, draws, shared=1)
        known = references.of(noised, 1) if references else None
        return Drawn(noised, items.label, items.weight, len(batch.label) if isinstance(batch, PairBatch) else 0, known)

    def measure(ready: Ready, state: Mapping[str, float]) -> Measured:
        assert isinstance(ready, Drawn)
        noised, device, beta = ready.noised, device_of(policy), _beta(named, state)
        fits = measured_fits(policy, space, noised, named, draws.snr_gamma, ready.known)
        label, given = ready.label.to(device, non_blocking=True), dict[str, Fit | Tensor](fits)
        if with_label:
            given["label"] = label
        if "gain" in named:
            given["gain"] = policy.schedule.gain(noised.t).float().to(device)
        if "sigma" in named:
            given["sigma"] = policy.schedule.marginals(noised.t)[1].float().to(device)
        given |= {name: torch.full((), state.get(name, 0.0), device=device) for name in follows}
        losses = outside_autocast(objective, device, **given, **beta) * ready.weight.to(device, non_blocking=True)
        losses = losses if with_label else losses * label
        if p := ready.pairs:
            return losses.reshape(-1, p).mean(0), singles_metrics(fits, p, beta.get("beta"))
        metrics = {"error": fits["policy"].error.detach()}
        if "reference" in fits:
            metrics["advantage"] = fits["reference"].error - metrics["error"]
            metrics["agreement"] = ordered_right((2 * label - 1) * metrics["advantage"])
        return losses, metrics

    prepare = _prepare(policy, space, draws) if auto_beta else None
    return Step(drawn, measure, follows, prepare, _after(policy, named, references))


def _named(objective: Callable[..., Tensor], known: Collection[str]) -> Mapping[str, inspect.Parameter]:
    """What the objective's signature names: any of ``known``, and what has a value. Raises UserError: anything else."""
    named = inspect.signature(objective).parameters
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if lacking := [n for n, p in named.items() if n not in known and p.kind in plain and p.default is p.empty]:
        raise UserError(f"the objective names {', '.join(lacking)}; it may name {', '.join(known)}, and what is given a value")
    return named


def _after(policy: MeasuredPolicy, named: Collection[str], references: References | None) -> list[Callable[[], None]]:
    """What follows an update."""
    return [*([lagging(policy).advance_old] if "old" in named else []), *([references.flush] if references else [])]


def _beta(named: Mapping[str, inspect.Parameter], state: Mapping[str, float]) -> dict[str, float]:
    """The objective's beta, if it has one: the state's if that was chosen, else its own."""
    return {"beta": state.get("beta", named["beta"].default)} if "beta" in named else {}


def _prepare(policy: MeasuredPolicy, space: Space, draws: Draws) -> Callable[[Source], dict[str, float]]:
    return lambda data: {"beta": automatic_beta(policy, space, data, draws)}


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
