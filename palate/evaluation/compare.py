"""Two models, the same prompts, the same seeds: what each judge says about the pictures, in numbers and in one sentence."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from palate.errors import UserError
from palate.evaluation.statistics import (
    MeanDifference,
    WinRate,
    paired,
    sign_flip_test,
)
from palate.files import write_atomically

Scores = Sequence[float] | np.ndarray | Tensor
HELD_OUT, LABELS = "held out", "labels"


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    scores: Mapping[str, tuple[Scores, Scores]],
    prompts: Sequence[str],
    *,
    kinds: Mapping[str, str] | None = None,
    contaminated: Collection[str] = (),
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[Comparison]:
    """Compare by every judge: ``scores[judge] = (base (n,), tuned (n,))``, row i of both from prompt i and one seed.

    ``kinds`` names the judges' parts ("held out" where unnamed); those of kind "labels" are contaminated, and so are those
    listed. Held-out judges come first, contaminated ones last.
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


def headline(comparisons: Sequence[Comparison], *, unseen: bool = True) -> str:
    """The result in one sentence, by the most independent judge; says so when nothing or harm was found.

    ``unseen``: the prompts were in none of the training pairs.
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
            f"No clear difference: {judge} prefers the aligned model's picture in {percent(w.rate)} % of {among}, "
            f"and 50 % lies inside the uncertainty ({interval})."
        )
    if w.rate < 0.5:
        return (
            f"The aligned model is worse here: {judge} prefers its picture in only {percent(w.rate)} % of {among} ({interval})."
        )
    return f"{judge[0].upper()}{judge[1:]} prefers the aligned model's picture in {percent(w.rate)} % of {among} ({interval})."


def percent(share: float) -> str:
    """A share as whole percent; with one decimal where rounding would claim 0, 50 or 100 % wrongly."""
    whole = f"{100 * share:.0f}"
    return f"{100 * share:.1f}" if whole in ("0", "50", "100") and abs(100 * share - float(whole)) > 1e-9 else whole


@dataclass(frozen=True)
class Diversity:
    """Mean distance between pictures before and after: a fall warns of collapse onto one picture."""

    base: float
    tuned: float
    over: str  # "seeds of a prompt" or "prompts"
    measure: str = "root-mean-square difference of pixels in [0, 1] at 16 x 16"

    @property
    def ratio(self) -> float:
        return self.tuned / self.base if self.base else float("nan")

    def sentence(self) -> str:
        if not self.base:
            return "Diversity could not be measured: the base model's pictures are all alike."
        change = round(100 * (self.ratio - 1))
        warning = " Look for repeated compositions or colours." if change <= -20 else ""
        return f"Variety between {self.over} changed by {change:+d} % ({self.measure}).{warning}"


def diversity(base_images: Sequence[Image.Image], tuned_images: Sequence[Image.Image], prompts: Sequence[str]) -> Diversity:
    """Mean pairwise distance within prompts that have several pictures; across all pictures if no prompt has.

    The distance is the root-mean-square difference of pixels after downscaling to 16 x 16: it sees composition and colour,
    not meaning. Row i of all three belongs together.
    """
    if not len(base_images) == len(tuned_images) == len(prompts):
        raise UserError(
            f"{len(base_images)} and {len(tuned_images)} pictures came with {len(prompts)} prompts; give as many of each"
        )
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    several = [rows for rows in groups.values() if len(rows) > 1]
    over = "seeds of a prompt" if several else "prompts"
    rows = several or [list(range(len(prompts)))]
    return Diversity(_distance(base_images, rows), _distance(tuned_images, rows), over)


def _distance(images: Sequence[Image.Image], groups: list[list[int]]) -> float:
    """Mean over groups of the mean pairwise distance; 0 where a group has one picture."""
    means = []
    for rows in groups:
        small = [images[i].convert("RGB").resize((16, 16), Image.Resampling.BOX) for i in rows]
        x = np.stack([np.asarray(s, dtype=np.float64).ravel() / 255 for s in small])
        x -= x.mean(axis=0)
        square = (x * x).sum(axis=1)
        apart = np.sqrt(np.maximum(square[:, None] + square - 2 * x @ x.T, 0) / x.shape[1])
        means.append(apart[np.triu_indices(len(x), 1)].mean() if len(x) > 1 else 0.0)
    return float(np.mean(means))


def write_metrics(path: str | Path, comparisons: Sequence[Comparison], extra: Mapping[str, Any] | None = None) -> None:
    """Write ``metrics.json`` atomically: {"comparisons": [...], ...extra}."""
    content = {"comparisons": [c.to_dict() for c in comparisons], **(extra or {})}
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be written as JSON ({error}); use finite numbers, text, lists and dicts") from error
    write_atomically(path, (text + "\n").encode())
