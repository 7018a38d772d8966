"""Statistics of paired comparisons. The prompt is the unit that is drawn anew: pictures of one prompt are not independent,
and intervals over pictures would be too narrow (Efron and Tibshirani 1993, ch. 13; Field and Welsh 2007, cluster bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from palate.base.errors import UserError, nearest

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


@dataclass(frozen=True)
class Average:
    """Macro average: the mean of the win rates of ``judges`` judges, with its interval."""

    rate: float
    low: float
    high: float
    judges: int


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
    return paired(base, tuned, prompt_ids, draws=draws, seed=seed, confidence=confidence)[0][0]


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
    return paired(base, tuned, prompt_ids, draws=draws, seed=seed, confidence=confidence)[1][0]


def paired(
    base: Numbers,
    tuned: Numbers,
    prompt_ids: Sequence[Hashable] | np.ndarray,
    *,
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[list[WinRate], list[MeanDifference], Average]:
    """:func:`win_rate` and :func:`mean_difference` of several judges at once: ``base``, ``tuned`` ``(n,)`` or ``(n, judges)``.

    All judges meet the same draws of prompts. The third is the macro average, the mean of their win rates.
    """
    base, tuned, clusters = _paired(base, tuned, prompt_ids)
    judges = base.shape[1]
    points = (tuned > base) + 0.5 * (tuned == base)
    values = np.column_stack([points, tuned - base, points.mean(axis=1)])
    sums, counts = _per_cluster(values, clusters)
    means = values.mean(axis=0)
    tails = [0.5 - confidence / 2, 0.5 + confidence / 2]
    low, high = np.quantile(resampled_means(sums, counts, draws=draws, seed=seed), tails, axis=0)
    for column in (*range(judges), 2 * judges):
        if np.ptp(sums[:, column] / counts) < 1e-12:
            low[column], high[column] = wilson(min(1.0, float(means[column])), len(counts), confidence)
    spans = [(float(m), float(a), float(b)) for m, a, b in zip(means, low, high, strict=True)]
    rates = []
    for j in range(judges):
        wins, losses = int((points[:, j] == 1).sum()), int((points[:, j] == 0).sum())
        rates.append(WinRate(*spans[j], wins, len(base) - wins - losses, losses, len(counts), len(base)))
    return rates, [MeanDifference(*span) for span in spans[judges:-1]], Average(*spans[-1], judges)


def resampled_means(sums: np.ndarray, counts: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """``(draws, k)``: sum(sums) / sum(counts) when clusters are drawn whole, with replacement, as many as there are.

    ``sums (clusters, k)`` and ``counts (clusters,)`` are the totals of a cluster and its number of rows. How often each
    cluster is drawn decides everything, so a draw is one row of a matrix product, and k columns cost little more than one.
    """
    rng = np.random.default_rng(seed % 2**64)
    clusters, parts = len(counts), []
    totals = np.column_stack([sums, counts])
    for size in _chunks(draws, clusters):
        drawn = rng.integers(0, clusters, (size, clusters), dtype=np.int32) + np.arange(0, size * clusters, clusters)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters)
        parts.append(times.astype(np.float64) @ totals)
    drawn_totals = np.concatenate(parts)
    return drawn_totals[:, :-1] / drawn_totals[:, -1:]


def sign_flip_test(
    differences: Numbers, clusters: Sequence[Hashable] | np.ndarray | None = None, *, draws: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p of "differences are symmetric around 0": share of sign flips whose mean is at least as far from 0.

    ``clusters``: the prompt of each difference; those of one prompt flip together. Without it every difference is a prompt of
    its own. Exact up to 14 prompts; beyond, (1 + hits) / (1 + draws) over random flips (Phipson and Smyth 2010), so p is
    never 0.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) == 0 or not np.isfinite(d).all():
        raise UserError("the sign-flip test needs at least one finite difference")
    if clusters is not None:
        if len(clusters) != len(d):
            raise UserError(f"{len(d)} differences came with {len(clusters)} prompts; give one prompt per difference")
        d = np.bincount(_numbers(clusters), d)
    # Flips whose sums differ by rounding alone are as far from 0.
    threshold = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if len(d) <= EXACT:
        patterns = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        return float((np.abs((1 - 2 * patterns) @ d) >= threshold).mean())
    rng = np.random.default_rng(seed % 2**64)
    hits = 0
    for size in _chunks(draws, len(d)):
        # One random bit a sign.
        bits = np.unpackbits(rng.integers(0, 256, (size, -(-len(d) // 8)), dtype=np.uint8), axis=1, count=len(d))
        hits += int((np.abs(d.sum() - 2 * (bits.astype(np.float64) @ d)) >= threshold).sum())
    return (1 + hits) / (1 + draws)


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths on a logarithmic scale around 0, ``(m,)`` each, with their intervals: i beats j with probability
    ``1 / (1 + exp(strengths[j] - strengths[i]))``."""

    strengths: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def elo(self) -> np.ndarray:
        """``(3, m)`` strengths, low and high on the scale of chess: 400 points are odds of ten to one, the mean is 1000."""
        return 1000 + 400 / math.log(10) * np.stack([self.strengths, self.low, self.high])


def bradley_terry(
    wins: np.ndarray, *, draws: int = 1000, seed: int = 0, confidence: float = 0.95, prior: float = 0.1
) -> BradleyTerry:
    """Strengths of m models from how often each beat each (Bradley and Terry 1952), with percentile intervals.

    Args:
        wins: ``(m, m)``, ``wins[i, j]`` = how often i beat j, a tie as half a win of both. Or ``(prompts, m, m)``, a matrix a
            prompt: then the bootstrap draws prompts whole. Without prompts it draws every comparison by itself, and the
            intervals are too narrow where one prompt was compared several times.
        draws: of the bootstrap.
        prior: every model has beaten, and lost to, an imaginary average one so often. It keeps a model that has won every
            comparison finite; 0 gives the maximum likelihood, where there is one.

    Raises:
        UserError: not such a matrix, or prior 0 where no finite strengths fit best.
    """
    wins = np.asarray(wins, dtype=np.float64)
    if wins.ndim not in (2, 3) or wins.shape[-1] != wins.shape[-2] or wins.shape[-1] < 2 or not (wins >= 0).all():
        raise UserError(f"wins of shape {wins.shape}; expected counts (models, models) of two models or more, none negative")
    total = wins if wins.ndim == 2 else wins.sum(axis=0)
    total = total * (1 - np.eye(len(total)))
    if not np.isfinite(total).all() or total.sum() == 0:
        raise UserError("there is no comparison among the wins; give how often each model beat each")
    if prior == 0 and not _strongly_connected(total):
        raise UserError("some models never lost to the others, so no finite strength fits best; use a prior above 0")
    strengths = _strengths(total[None], prior)[0]
    tails = [0.5 - confidence / 2, 0.5 + confidence / 2]
    drawn = _strengths(_redrawn(wins, draws, seed), prior or 0.1)
    low, high = np.quantile(drawn, tails, axis=0)
    return BradleyTerry(strengths, np.minimum(low, strengths), np.maximum(high, strengths))


def krippendorff_alpha(ratings: np.ndarray, level: str = "nominal") -> float:
    """Agreement of raters beyond chance: 1 perfect, 0 as by chance (Krippendorff 2011, "Computing Krippendorff's alpha").

    Args:
        ratings: ``(raters, units)`` numbers, NaN where a rater did not rate. Units with one rating or none do not count.
        level: nominal (same or not), ordinal (by ranks), interval (by squared distance).

    Returns:
        Alpha; NaN where all ratings that count are equal, for then nothing could disagree.

    Raises:
        UserError: no unit was rated twice, or an unknown level.
    """
    ratings = np.asarray(ratings, dtype=np.float64)
    if level not in ("nominal", "ordinal", "interval"):
        raise UserError(f"unknown level {level!r}{nearest(level, ['nominal', 'ordinal', 'interval'])}")
    if ratings.ndim != 2:
        raise UserError(f"ratings of shape {ratings.shape}; expected (raters, units)")
    values, place = np.unique(ratings[~np.isnan(ratings)], return_inverse=True)
    units = np.nonzero(~np.isnan(ratings))[1]
    counts = np.zeros((ratings.shape[1], len(values)))
    np.add.at(counts, (units, place), 1)
    counts = counts[counts.sum(axis=1) > 1]
    if len(counts) == 0:
        raise UserError("no unit was rated by two raters; agreement needs at least one")
    raters = counts.sum(axis=1)
    # Coincidences: pairs of ratings within units, each unit weighing as many pairs as it has ratings.
    observed = (counts / (raters - 1)[:, None]).T @ counts
    observed -= np.diag((counts / (raters - 1)[:, None]).sum(axis=0))
    n = counts.sum(axis=0)
    expected = (np.outer(n, n) - np.diag(n)) / (n.sum() - 1)
    if level == "nominal":
        distance = 1.0 - np.eye(len(values))
    else:
        # Ordinal: how many ratings lie between two values, each of both by half.
        scale = np.cumsum(n) - n / 2 if level == "ordinal" else values
        distance = (scale[:, None] - scale) ** 2
    disagreement = (expected * distance).sum()
    return float(1 - (observed * distance).sum() / disagreement) if disagreement > 0 else math.nan


def wilson(rate: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share ``rate`` among ``n`` independent votes (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _chunks(draws: int, width: int) -> list[int]:
    size = max(1, CHUNK // width)
    return [min(size, draws - start) for start in range(0, draws, size)]


def _numbers(ids: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """Clusters numbered in the order in which they first appear."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(p, len(numbers)) for p in ids], dtype=np.int64)


def _per_cluster(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(clusters, k)`` sums of the rows ``(n, k)`` and ``(clusters,)`` their numbers."""
    return np.column_stack([np.bincount(clusters, column) for column in values.T]), np.bincount(clusters)


def _paired(
    base: Numbers, tuned: Numbers, prompt_ids: Sequence[Hashable] | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked float64 scores ``(n, judges)`` and, per row, the number of its prompt."""
    base, tuned = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if base.ndim not in (1, 2) or base.shape != tuned.shape or len(base) != len(prompt_ids):
        raise UserError(
            f"scores {base.shape} of the base, {tuned.shape} of the tuned model and {len(prompt_ids)} prompts do not pair up; "
            "give one score of each and one prompt per row"
        )
    if base.size == 0:
        raise UserError("there is nothing to compare; give at least one pair of scores")
    base, tuned = base.reshape(len(base), -1), tuned.reshape(len(base), -1)
    bad = np.argwhere(~(np.isfinite(base) & np.isfinite(tuned)))
    if len(bad):
        i, j = bad[0]
        raise UserError(f"score {i} is not finite (base {base[i, j]}, tuned {tuned[i, j]}); leave that picture out of both")
    return base, tuned, _numbers(prompt_ids)


def _redrawn(wins: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """``(draws, m, m)`` tables of wins as they might have been."""
    m = wins.shape[-1]
    if wins.ndim == 3:
        flat = wins.reshape(len(wins), m * m)
        return (resampled_means(flat, np.ones(len(wins)), draws=draws, seed=seed) * len(wins)).reshape(draws, m, m)
    rng = np.random.default_rng(seed % 2**64)
    drawn = np.zeros((draws, m, m))
    for i in range(m):
        for j in range(i):
            n = wins[i, j] + wins[j, i]
            if n:
                # Half-wins of ties are drawn as half as many whole votes: a little wider than the truth, never narrower.
                drawn[:, i, j] = rng.binomial(max(1, round(n)), wins[i, j] / n, draws) * n / max(1, round(n))
                drawn[:, j, i] = n - drawn[:, i, j]
    return drawn


def _strengths(wins: np.ndarray, prior: float) -> np.ndarray:
    """``(b, m)`` log strengths, mean 0, of ``b`` tables of wins, by Newton's method on the concave log-likelihood."""
    m = wins.shape[-1]
    wins = wins * (1 - np.eye(m))
    games = wins + wins.swapaxes(1, 2)
    s = np.zeros(wins.shape[:2])
    for _ in range(100):
        chance = 1 / (1 + np.exp(s[:, None, :] - s[:, :, None]))  # i beats j
        alone = 1 / (1 + np.exp(-s))  # i beats the imaginary average
        slope = (wins - games * chance).sum(axis=2) + prior * (1 - 2 * alone)
        weight = games * chance * (1 - chance)
        curve = -weight
        curve[:, np.arange(m), np.arange(m)] = weight.sum(axis=2) + 2 * prior * alone * (1 - alone)
        # Without a prior, adding the same to all strengths changes no chance: that direction is held at mean 0.
        step = np.linalg.solve(curve + (1 / m if prior == 0 else 0), slope[..., None])[..., 0]
        longest = np.abs(step).max(axis=1, keepdims=True)
        s = s + step / np.maximum(1, longest)
        if longest.max() < 1e-10:
            break
    return s - s.mean(axis=1, keepdims=True)


def _strongly_connected(wins: np.ndarray) -> bool:
    """Whether everyone reaches everyone along wins: exactly then a best finite fit exists (Ford 1957)."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(len(wins).bit_length()):
        reach = (reach.astype(np.float64) @ reach) > 0
    return bool(reach.all())
