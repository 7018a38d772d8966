"""Guards against collapse: what no judge of single pictures can see. All work on thumbnails, so any number of pictures fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from palate.base.errors import UserError
from palate.evaluation.statistics import resampled_means

SIDE = 16
TWIN = 0.02  # pictures nearer than this are twins; JPEG at quality 90 moves a picture by less, another noise by far more
LOOKED = 2000  # pictures among which twins are searched: every pair is looked at
MEASURE = "root-mean-square difference of pixels in [0, 1] at 16 x 16"


@dataclass(frozen=True)
class Diversity:
    """Mean distance between pictures before and after: a fall warns of collapse onto one picture."""

    base: float
    tuned: float
    over: str
    """What the distance lies between: "seeds of a prompt" or "prompts"."""
    low: float | None = None
    """95 % interval of tuned / base by a bootstrap over prompts, where prompts have several pictures."""
    high: float | None = None
    twins_base: float = 0.0
    """Share of pictures that have a near duplicate."""
    twins_tuned: float = 0.0
    saturation_base: float = 0.0
    """Mean saturation of colours in [0, 1]."""
    saturation_tuned: float = 0.0
    measure: str = MEASURE

    @property
    def ratio(self) -> float:
        return self.tuned / self.base if self.base else float("nan")

    def sentence(self) -> str:
        if not self.base:
            return "Diversity could not be measured: the base model's pictures are all alike."
        interval = (
            "" if self.low is None or self.high is None else f", 95 % interval {_change(self.low)} to {_change(self.high)}"
        )
        return f"Variety between {self.over} changed by {_change(self.ratio)} ({self.measure}{interval})."

    def flags(self) -> list[str]:
        """What a reader must look at before believing any judge."""
        found = []
        if self.base and self.ratio <= 0.9 and (self.high is None or self.high < 1):
            found.append(
                f"Variety between {self.over} fell by {round(100 * (1 - self.ratio))} %: "
                "look for repeated compositions or colours."
            )
        if self.twins_tuned > self.twins_base + 0.02:
            found.append(
                f"{100 * self.twins_tuned:.0f} % of the pictures have a near duplicate, {100 * self.twins_base:.0f} % before: "
                "the model repeats itself."
            )
        if self.saturation_base and self.saturation_tuned > 1.25 * self.saturation_base:
            change = _change(self.saturation_tuned / self.saturation_base)
            found.append(f"Colours are more saturated by {change}: many judges reward that, eyes tire of it.")
        return found


def thumbnail(image: Image.Image) -> np.ndarray:
    """``(16, 16, 3)`` float32 in [0, 1]: composition and colour, no meaning and no detail."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def thumbnails(paths: Iterable[Path], *, workers: int = 2) -> np.ndarray:
    """Those of picture files, ``(n, 16, 16, 3)``, in order.

    Raises:
        UserError: a file that is no whole picture.
    """
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(_load, paths))
    return np.stack(found) if found else np.zeros((0, SIDE, SIDE, 3), dtype=np.float32)


def _load(path: Path) -> np.ndarray:
    from palate.data.images import decode

    try:
        return thumbnail(decode(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no readable picture ({error}); generate it again, or leave it out of the manifest"
        ) from error


def diversity(base: np.ndarray, tuned: np.ndarray, prompts: Sequence[str], *, draws: int = 2000, seed: int = 0) -> Diversity:
    """Compare the variety of two sets of thumbnails ``(n, 16, 16, 3)``; row i of all three belongs together.

    Mean pairwise distance within prompts that have several pictures; across all pictures if no prompt has.
    """
    if not len(base) == len(tuned) == len(prompts):
        raise UserError(f"{len(base)} and {len(tuned)} pictures came with {len(prompts)} prompts; give as many of each")
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    several = [rows for rows in groups.values() if len(rows) > 1]
    picked = np.unique(np.linspace(0, len(base) - 1, min(len(base), LOOKED)).astype(int))
    apart = [np.array([_pairwise(x[rows]).mean() for rows in several]) for x in (base, tuned)]
    low = high = None
    if several:
        means = resampled_means(np.stack(apart, axis=1), np.ones(len(several)), draws=draws, seed=seed)
        if (means[:, 0] > 0).all() and len(several) > 1:
            low, high = (float(q) for q in np.quantile(means[:, 1] / means[:, 0], [0.025, 0.975]))
    else:
        apart = [_pairwise(x[picked]) if len(x) > 1 else np.zeros(1) for x in (base, tuned)]
    return Diversity(
        base=float(apart[0].mean()),
        tuned=float(apart[1].mean()),
        over="seeds of a prompt" if several else "prompts",
        low=low,
        high=high,
        twins_base=_twins(base[picked]),
        twins_tuned=_twins(tuned[picked]),
        saturation_base=_saturation(base),
        saturation_tuned=_saturation(tuned),
    )


def _distances(x: np.ndarray) -> np.ndarray:
    """``(n, n)`` root-mean-square differences."""
    flat = x.reshape(len(x), -1).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    square = (flat * flat).sum(axis=1)
    return np.sqrt(np.maximum(square[:, None] + square - 2 * flat @ flat.T, 0) / flat.shape[1])


def _pairwise(x: np.ndarray) -> np.ndarray:
    return _distances(x)[np.triu_indices(len(x), 1)]


def _twins(x: np.ndarray) -> float:
    if len(x) < 2:
        return 0.0
    near = _distances(x) < TWIN
    np.fill_diagonal(near, False)
    return float(near.any(axis=1).mean())


def _saturation(x: np.ndarray) -> float:
    high, low = x.max(axis=-1), x.min(axis=-1)
    return float(np.mean((high - low) / np.maximum(high, 1e-6))) if len(x) else 0.0


def _change(ratio: float) -> str:
    return f"{round(100 * (ratio - 1)):+d} %"
