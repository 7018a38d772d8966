"""AI feedback: judges' scores to preference pairs (Diffusion-DPO, arXiv 2311.12908, section 5.3)."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from palate.base.errors import UserError
from palate.data.selection import unbeaten

Key = TypeVar("Key", bound=Hashable)
"""What tells a picture from others: its file, or the digest of its bytes."""
Row = TypeVar("Row")


@dataclass(frozen=True)
class Labelled(Generic[Key]):
    """Two pictures of a prompt, and how probably the first is the better one; 0.5 is a tie."""

    prompt: str
    first: Key
    second: Key
    label: float
    source: int | None = None
    """Its number in the set it comes from."""

    @property
    def winner(self) -> Key | None:
        return None if self.label == 0.5 else self.first if self.label > 0.5 else self.second


@dataclass(frozen=True)
class LabelCounts:
    """What became of the candidates."""

    prompts: int
    single: int
    """Prompts with one picture only: nothing to compare."""
    pairs: int
    ties: int
    disagreements: int
    """Pairs on which not all judges say the same."""
    filtered: int
    """Pairs left out for want of the sole winner of their prompt in them."""
    written: int
    changed: int | None = None
    """Of an existing set: labels that no longer point the same way."""

    def sentence(self) -> str:
        parts = [f"{self.prompts} prompts, {self.pairs} pairs: {self.ties} ties, judges disagree on {self.disagreements}"]
        if self.single:
            parts.append(f"{self.single} prompts have one picture only")
        if self.filtered:
            parts.append(f"{self.filtered} without the absolute winner of their prompt left out")
        if self.changed is not None:
            parts.append(f"{self.changed} labels changed")
        return "; ".join([*parts, f"{self.written} written"])


def label_of(margins: Sequence[float], *, temperature: float | None = None, threshold: float | Sequence[float] = 0.0) -> float:
    """One label of several judges' margins (score of the first minus score of the second).

    Hard (``temperature`` None): the majority's vote, 1, 0, or 0.5 where as many judges say one as the other. Soft: the mean of
    ``sigmoid(margin / temperature)``. A judge whose margin is at most ``threshold`` (one number, or one for each) says 0.5.
    Judges of different scales need hard labels and thresholds of their own.
    """
    limits = [threshold] * len(margins) if isinstance(threshold, int | float) else threshold

    def vote(margin: float, limit: float) -> float:
        if abs(margin) <= limit:
            return 0.5
        if temperature is None:
            return float(margin > 0)
        return 0.5 * (1 + math.tanh(margin / temperature / 2))  # the sigmoid, without overflow

    mean = math.fsum(vote(m, limit) for m, limit in zip(margins, limits, strict=True)) / len(margins)
    return mean if temperature is not None else 0.5 * (1 + (mean > 0.5) - (mean < 0.5))


def pairs_of(
    candidates: Mapping[str, Mapping[Key, Sequence[float]]], decide: Callable[[Sequence[float]], float], *, which: str = "all"
) -> tuple[list[Labelled[Key]], int]:
    """Pairs of candidates, and on how many the judges disagree.

    Args:
        candidates: prompt -> picture -> its scores by every judge.
        decide: margins to a label, such as :func:`label_of`.
        which: ``all``, or ``extremes``: of each prompt the picture that wins most and the one that wins least.
    """
    found, disagreements = [], 0
    for prompt, scores in candidates.items():
        pairs = [
            (a, b, [x - y for x, y in zip(scores[a], scores[b], strict=True)]) for a, b in itertools.combinations(scores, 2)
        ]
        labelled = [(Labelled(prompt, a, b, decide(margins)), margins) for a, b, margins in pairs]
        if which == "extremes" and labelled:
            points = dict.fromkeys(scores, 0.0)
            for pair, _ in labelled:
                points[pair.first] += pair.label
                points[pair.second] += 1 - pair.label
            best, least = max(points, key=points.__getitem__), min(reversed(list(points)), key=points.__getitem__)
            labelled = [(p, m) for p, m in labelled if {p.first, p.second} == {best, least}]
        disagreements += sum(disagree(margins) for _, margins in labelled)
        found += [pair for pair, _ in labelled]
    return found, disagreements


def disagree(margins: Sequence[float]) -> bool:
    return min(margins) < 0 < max(margins)


def sole_winners(pairs: Sequence[Labelled[Key]]) -> list[Labelled[Key]]:
    """The pairs won by the sole winner of their prompt: the one picture that wins all its pairs, without a tie.

    Stricter than the absolute winners of training (:func:`palate.data.selection.absolute_winners`), which are all unbeaten
    pictures: a prompt with two, of pairs that never met, has no sole winner. Where all pictures of a prompt meet, as those of
    picture folders do, it is the same.
    """
    winners = unbeaten(((pair.prompt, pair.first), (pair.prompt, pair.second), pair.label) for pair in pairs)
    of_prompt = Counter(prompt for prompt, _ in winners)
    return [p for p in pairs if of_prompt[p.prompt] == 1 and (p.prompt, p.winner) in winners]


def finish(
    pairs: Sequence[Labelled[Key]], counts: LabelCounts, *, absolute_winner: bool, keep_ties: bool
) -> tuple[list[Labelled[Key]], LabelCounts]:
    """Apply the filters, and count what they left out.

    Raises:
        UserError: nothing is left.
    """
    kept = sole_winners(pairs) if absolute_winner else list(pairs)
    written = [pair for pair in kept if keep_ties or pair.label != 0.5]
    ties = sum(pair.label == 0.5 for pair in pairs)
    counts = replace(counts, pairs=len(pairs), ties=ties, filtered=len(pairs) - len(kept), written=len(written))
    if not written:
        raise UserError(f"no pairs are left ({counts.sentence()}); lower the threshold, keep ties, or give more candidates")
    return written, counts


def kind_of(value: object) -> type:
    """The type of column that a plain value fits."""
    kind = type(value)
    return kind if kind in (bool, float) or (kind is int and isinstance(value, int) and abs(value) < 1 << 63) else str


def common(kinds: Collection[type]) -> type:
    """The type of column that values of all these kinds fit."""
    return next(iter(kinds)) if len(kinds) == 1 else float if set(kinds) == {int, float} else str
