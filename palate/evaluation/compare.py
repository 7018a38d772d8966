"""Two models, the same prompts, the same seeds: what each judge says about the pictures, in numbers and in one sentence."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
from torch import Tensor

from palate.base.errors import UserError, nearest
from palate.evaluation.diversity import Diversity
from palate.evaluation.statistics import (
    Average,
    MeanDifference,
    WinRate,
    bradley_terry,
    paired,
    sign_flip_test,
    win_rate,
)

Scores = Sequence[float] | np.ndarray | Tensor
HELD_OUT, LABELS = "held out", "labels"
FOLLOWING = ("clipscore", "vqascore", "vlm_bertscore", "vlm_strict")
"""Kinds of judges that tell whether a picture follows its prompt."""


@dataclass(frozen=True)
class Group:
    """The same judge on a part of the prompts, such as those of category Animals."""

    field: str
    value: str
    win_rate: WinRate
    difference: MeanDifference


@dataclass(frozen=True)
class Comparison:
    """What one judge says. Higher scores are better; differences are tuned - base.

    ``kind``: the judge's part in the run: "held out" (never seen by training), "labels" (its votes or rewards were trained
    on), or any other word such as "alignment". ``contaminated``: training has seen this judge's taste, so its verdict shows
    that training worked, not that pictures got better. ``p``: sign-flip test over prompts.
    """

    judge: str
    kind: str
    contaminated: bool
    win_rate: WinRate
    mean_base: float
    mean_tuned: float
    difference: MeanDifference
    p: float
    confidence: float = 0.95
    groups: tuple[Group, ...] = ()


def compare(
    scores: Mapping[str, tuple[Scores, Scores]],
    prompts: Sequence[str],
    *,
    kinds: Mapping[str, str] | None = None,
    contaminated: Collection[str] = (),
    groups: Mapping[str, Sequence[str | None]] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[Comparison]:
    """Compare by every judge: ``scores[judge] = (base (n,), tuned (n,))``, row i of both from prompt i and one seed.

    ``kinds`` names the judges' parts ("held out" where unnamed); those of kind "labels" are contaminated, and so are those
    listed. ``groups``: by field, such as "category", the value of each row, None where it has none. Held-out judges come
    first, contaminated ones last.
    """
    kinds = dict(kinds or {})
    unknown = sorted((set(kinds) | set(contaminated)) - set(scores))
    if unknown:
        raise UserError(f"no scores of judge {unknown[0]!r}; there are scores of {', '.join(sorted(scores))}")
    if not scores:
        return []
    judges = list(scores)
    base, tuned = (_columns([scores[judge][side] for judge in judges], len(prompts)) for side in (0, 1))
    rates, differences, _ = paired(base, tuned, prompts, draws=draws, seed=seed, confidence=confidence)
    parts: list[list[Group]] = [[] for _ in judges]
    for field, values in (groups or {}).items():
        for value in sorted({v for v in values if v is not None}):
            rows = np.array([v == value for v in values])
            ids = [prompt for prompt, inside in zip(prompts, rows, strict=True) if inside]
            inner = paired(base[rows], tuned[rows], ids, draws=draws, seed=seed, confidence=confidence)
            for j in range(len(judges)):
                parts[j].append(Group(field, value, inner[0][j], inner[1][j]))
    found = [
        Comparison(
            judge=judge,
            kind=kinds.get(judge, HELD_OUT),
            contaminated=kinds.get(judge) == LABELS or judge in contaminated,
            win_rate=rates[j],
            mean_base=float(base[:, j].mean()),
            mean_tuned=float(tuned[:, j].mean()),
            difference=differences[j],
            p=sign_flip_test(tuned[:, j] - base[:, j], prompts, draws=draws, seed=seed),
            confidence=confidence,
            groups=tuple(parts[j]),
        )
        for j, judge in enumerate(judges)
    ]
    return by_weight(found)


def _columns(scores: Sequence[Scores], rows: int) -> np.ndarray:
    """``(rows, judges)`` float64."""
    columns = [np.asarray(s, dtype=np.float64) for s in scores]
    for column in columns:
        if column.shape != (rows,):
            raise UserError(f"scores of shape {column.shape} came with {rows} prompts; give one score per prompt")
    return np.column_stack(columns)


def by_weight(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Held-out judges first, then other untouched ones, contaminated ones last."""
    return sorted(comparisons, key=lambda c: (c.contaminated, c.kind != HELD_OUT))


def headline(comparisons: Sequence[Comparison], *, unseen: bool = True, who: str = "the aligned model") -> str:
    """The result in one sentence, by the most independent judge; says so when nothing or harm was found.

    ``unseen``: the prompts were in none of the training pairs. ``who``: what to call the model that is not the base.
    """
    if not comparisons:
        raise UserError("there is no comparison to tell of; score the pictures by at least one judge")
    best = by_weight(comparisons)[0]
    w = best.win_rate
    judge = "the judge it was trained on" if best.contaminated else "an independent judge"
    prompts = f"{'unseen ' if unseen else ''}prompt{'s' if w.prompts > 1 else ''}"
    among = f"{w.prompts} {prompts}" if w.n == w.prompts else f"{w.n} pairs of pictures from {w.prompts} {prompts}"
    ties = f", {w.ties} tie{'s' if w.ties > 1 else ''} counted as half" if w.ties else ""
    interval = f"{percent(best.confidence)} % interval {percent(w.low)}-{percent(w.high)} %{ties}"
    if not w.clear:
        return (
            f"No clear difference: {judge} prefers {who}'s picture in {percent(w.rate)} % of {among}, "
            f"and 50 % lies inside the uncertainty ({interval})."
        )
    if w.rate < 0.5:
        share = f"{percent(w.rate)} % of {among} ({interval})"
        first = f"T{who[1:]}" if who.startswith("the ") else who  # a model's own name keeps its letters
        return f"{first} is worse here: {judge} prefers its picture in only {share}."
    return f"{judge[0].upper()}{judge[1:]} prefers {who}'s picture in {percent(w.rate)} % of {among} ({interval})."


def percent(share: float) -> str:
    """A share as whole percent; with one decimal where rounding would claim 0, 50 or 100 % wrongly."""
    whole = f"{100 * share:.0f}"
    return f"{100 * share:.1f}" if whole in ("0", "50", "100") and abs(100 * share - float(whole)) > 1e-9 else whole


def warnings(comparisons: Sequence[Comparison]) -> list[str]:
    """What the table of judges hides in its rows: pictures that please more and follow their prompts less."""
    found = []
    for c in comparisons:
        if follows_prompts(c) and c.difference.high < 0:
            found.append(
                f"{c.judge} says that pictures follow their prompts less ({c.difference.difference:+.3g} on average, "
                f"{percent(c.confidence)} % interval {c.difference.low:.3g} to {c.difference.high:.3g})."
            )
    if comparisons and not any(map(follows_prompts, comparisons)):
        found.append("No judge looked at whether pictures follow their prompts; add one of kind clipscore.")
    if comparisons and all(c.contaminated for c in comparisons):
        found.append("Every judge here was part of training: add one that was not before believing any of them.")
    return found


def follows_prompts(c: Comparison) -> bool:
    """Whether a judge tells how well pictures follow their prompts: such may not silently drop."""
    return c.kind == "prompt following" or re.split("[:?]", c.judge)[0] in FOLLOWING


@dataclass(frozen=True)
class Versus:
    """One model against the base: all that is told of the two."""

    base: str
    model: str
    headline: str
    comparisons: list[Comparison]
    macro: Average | None
    """Mean of the win rates of the judges that took no part in training; None unless there are two."""
    diversity: Diversity
    flags: list[str]


class Parts(TypedDict, total=False):
    """What :func:`compare` is told of judges and prompts."""

    kinds: Mapping[str, str]
    contaminated: Collection[str]
    groups: Mapping[str, Sequence[str | None]]


def versus(
    base: str,
    model: str,
    scores: Mapping[str, tuple[Scores, Scores]],
    prompts: Sequence[str],
    variety: Diversity,
    *,
    unseen: bool = False,
    who: str = "the aligned model",
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    **parts: Unpack[Parts],
) -> Versus:
    """:func:`compare` with its headline, macro average and flags."""
    found = compare(scores, prompts, draws=draws, seed=seed, confidence=confidence, **parts)
    fair = [c.judge for c in found if not c.contaminated]
    macro = None
    if len(fair) > 1:
        before, after = (_columns([scores[judge][side] for judge in fair], len(prompts)) for side in (0, 1))
        macro = paired(before, after, prompts, draws=draws, seed=seed, confidence=confidence)[2]
    sentence = headline(found, unseen=unseen, who=who)
    return Versus(base, model, sentence, found, macro, variety, [*warnings(found), *variety.flags()])


@dataclass(frozen=True)
class Ranking:
    """More than two models by one judge, or by votes: Bradley-Terry strengths on the scale of chess, mean 1000."""

    judge: str
    contaminated: bool
    models: list[str]
    elo: list[float]
    low: list[float]
    high: list[float]
    shares: list[list[float | None]]
    """``shares[i][j]``: how often i was preferred to j, ties as half; None where they never met."""
    comparisons: int

    @property
    def order(self) -> list[int]:
        """The models by their number, the strongest first."""
        return sorted(range(len(self.models)), key=lambda i: -self.elo[i])


def rank(judge: str, models: Sequence[str], wins: np.ndarray, *, contaminated: bool = False, seed: int = 0) -> Ranking:
    """Rank by ``wins``: ``(m, m)``, or ``(prompts, m, m)`` so that intervals are over prompts (:func:`bradley_terry`)."""
    wins = np.asarray(wins, dtype=np.float64)
    total = wins if wins.ndim == 2 else wins.sum(axis=0)
    elo, low, high = (row.tolist() for row in bradley_terry(wins, seed=seed).elo())
    games = total + total.T
    shares = [
        [float(total[i, j] / games[i, j]) if i != j and games[i, j] else None for j in range(len(models))]
        for i in range(len(models))
    ]
    return Ranking(judge, contaminated, list(models), elo, low, high, shares, round(float(np.triu(games, 1).sum())))


@dataclass(frozen=True)
class Votes:
    """What people said: every pair of models that met, as (model, base, win rate of model), and the ranking of several."""

    pairs: list[tuple[str, str, WinRate]]
    ranking: Ranking | None


def count_votes(
    models: Sequence[str], votes: Iterable[tuple[str, str, str, float]], *, draws: int = 10_000, seed: int = 0
) -> Votes:
    """The numbers of ``palate compare`` from votes instead of scores.

    Args:
        models: their names; the first is the base.
        votes: ``(prompt, a, b, share)``; share 1 says that a's picture is better, 0 that b's is, 0.5 a tie.

    Raises:
        UserError: a model that is not named, a share outside [0, 1], or no vote.
    """
    place = {name: i for i, name in enumerate(models)}
    rows = list(votes)
    if not rows:
        raise UserError("there are no votes yet")
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(row[0] for row in rows))}
    wins = np.zeros((len(prompts), len(models), len(models)))
    met: dict[tuple[int, int], tuple[list[str], list[float]]] = {}
    for prompt, a, b, share in rows:
        for name in (a, b):
            if name not in place:
                raise UserError(f"a vote names the model {name!r}{nearest(name, place)}")
        if a == b or not 0 <= share <= 1:
            raise UserError(f"a vote says {share} for {a!r} against {b!r}; expected two models and a share from 0 to 1")
        i, j = place[a], place[b]
        wins[prompts[prompt], i, j] += share
        wins[prompts[prompt], j, i] += 1 - share
        which = met.setdefault((min(i, j), max(i, j)), ([], []))
        which[0].append(prompt)
        which[1].append(share if i > j else 1 - share)  # of the later model
    pairs = []
    for (i, j), (ids, shares) in sorted(met.items()):
        pairs.append((models[j], models[i], win_rate(np.full(len(shares), 0.5), shares, ids, draws=draws, seed=seed)))
    return Votes(pairs, rank("votes", models, wins, seed=seed) if len(models) > 2 else None)
