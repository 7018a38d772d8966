"""Statistics of paired comparisons. The prompt is the unit that is drawn anew: pictures of one prompt are not independent,
and intervals over pictures would be too narrow (Efron and Tibshirani 1993, ch. 13; Field and Welsh 2007, cluster bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from palate.errors import UserError

Numbers = Sequence[float] | np.ndarray
CHUNK = 2_000_000  # random numbers in memory at once
EXACT = 14  # up to this many prompts all sign patterns are listed


@dataclass(frozen=True)
class WinRate:
    """``rate`` = (wins + ties / 2) / n, with its interval; ``prompts`` different prompts among ``n`` comparisons."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    prompts: int
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 50 % out."""
        return self.low > 0.5 or self.high < 0.5


@dataclass(frozen=True)
class MeanDifference:
    """Mean of tuned - base, in the judge's units, with its interval."""

    difference: float
    low: float
    high: float


def win_rate(
    base: Numbers,
    tuned: Numbers,
    prompt_ids: Sequence[Hashable] | np.ndarray,
    *,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> WinRate:
    """How often ``tuned[i] > base[i]``, ties as half, with a percentile interval from a cluster bootstrap over prompts.

    Where all prompts agree the bootstrap has no spread and would claim certainty after a single prompt; there the interval
    is Wilson's for one vote per prompt. Higher scores are better; rows i are pictures of one prompt and one seed.
    """
    base, tuned, clusters = _paired(base, tuned, prompt_ids)
    points = (tuned > base) + 0.5 * (tuned == base)
    rate = float(points.mean())
    sums, counts = np.bincount(clusters, points), np.bincount(clusters)
    if np.ptp(sums / counts) == 0:
        low, high = wilson(rate, len(counts), confidence)
    else:
        low, high = _cluster_bootstrap(sums, counts, draws, seed, confidence)
    wins, losses = int((tuned > base).sum()), int((tuned < base).sum())
    return WinRate(rate, low, high, wins, len(base) - wins - losses, losses, len(counts), len(base))


def mean_difference(
    base: Numbers,
    tuned: Numbers,
    prompt_ids: Sequence[Hashable] | np.ndarray,
    *,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> MeanDifference:
    """Mean of ``tuned - base`` with a percentile interval from a cluster bootstrap over prompts.

    A single prompt gives an interval without width: it says nothing about other prompts.
    """
    base, tuned, clusters = _paired(base, tuned, prompt_ids)
    sums, counts = np.bincount(clusters, tuned - base), np.bincount(clusters)
    return MeanDifference(float((tuned - base).mean()), *_cluster_bootstrap(sums, counts, draws, seed, confidence))


def prompt_differences(base: Numbers, tuned: Numbers, prompt_ids: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """Mean of ``tuned - base`` per prompt, ``(prompts,)``, in the order in which prompts first appear."""
    base, tuned, clusters = _paired(base, tuned, prompt_ids)
    return np.bincount(clusters, tuned - base) / np.bincount(clusters)


def sign_flip_test(differences: Numbers, *, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of "differences are symmetric around 0": share of sign flips whose mean is at least as far from 0.

    One difference per prompt. Exact up to 14 prompts; beyond, (1 + hits) / (1 + draws) over random flips (Phipson and Smyth
    2010), so p is never 0.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) == 0 or not np.isfinite(d).all():
        raise UserError("the sign-flip test needs at least one finite difference")
    # Flips whose sums differ by rounding alone are as far from 0.
    threshold = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if len(d) <= EXACT:
        patterns = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        return float((np.abs((1 - 2 * patterns) @ d) >= threshold).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    for size in _chunks(draws, len(d)):
        flipped = rng.integers(0, 2, (size, len(d)), dtype=np.int8)
        hits += int((np.abs(d.sum() - 2 * (flipped @ d)) >= threshold).sum())
    return (1 + hits) / (1 + draws)


def wilson(rate: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share ``rate`` among ``n`` independent votes (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _cluster_bootstrap(sums: np.ndarray, counts: np.ndarray, draws: int, seed: int, confidence: float) -> tuple[float, float]:
    """Percentile interval of sum(sums) / sum(counts) when whole clusters are drawn with replacement."""
    rng = np.random.default_rng(seed)
    equal = np.ptp(counts) == 0
    means = []
    for size in _chunks(draws, len(sums)):
        rows = rng.integers(0, len(sums), (size, len(sums)))
        total = counts[0] * len(sums) if equal else counts[rows].sum(axis=1)
        means.append(sums[rows].sum(axis=1) / total)
    low, high = np.quantile(np.concatenate(means), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _chunks(draws: int, width: int) -> list[int]:
    size = max(1, CHUNK // width)
    return [min(size, draws - start) for start in range(0, draws, size)]


def _paired(
    base: Numbers, tuned: Numbers, prompt_ids: Sequence[Hashable] | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked float64 scores and, per row, the number of its prompt."""
    base, tuned = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if base.ndim != 1 or base.shape != tuned.shape or len(base) != len(prompt_ids):
        raise UserError(
            f"scores {base.shape} of the base, {tuned.shape} of the tuned model and {len(prompt_ids)} prompts do not pair up; "
            "give one score of each and one prompt per row"
        )
    if len(base) == 0:
        raise UserError("there is nothing to compare; give at least one pair of scores")
    bad = np.flatnonzero(~(np.isfinite(base) & np.isfinite(tuned)))
    if len(bad):
        i = bad[0]
        raise UserError(f"score {i} is not finite (base {base[i]}, tuned {tuned[i]}); leave that picture out of both")
    numbers: dict[Hashable, int] = {}
    return base, tuned, np.array([numbers.setdefault(p, len(numbers)) for p in prompt_ids])
