"""What the votes say so far: models against each other, and how far raters agree with others and with themselves."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import median
from typing import TypedDict

import numpy as np

from palate.data.votes import LABELS, QUESTIONS, Vote
from palate.evaluation.statistics import krippendorff_alpha

DRAWS = 2000  # of the bootstrap of a category, of which there may be many
CHOSEN = {"first": "preferred", "second": "preferred"}
Pair = tuple[int, int]


class Counted(Vote):
    """A vote that counts, with what it says of the first picture of which pair."""

    label: float
    pair: Pair


class Rate(TypedDict):
    """A :class:`palate.evaluation.statistics.WinRate`."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    prompts: int
    n: int


class Category(Rate):
    name: str


class Majority(TypedDict):
    """Of pairs: what most of their raters say, and on how many of those with several all say the same."""

    a: int
    ties: int
    b: int
    unanimous: int
    shared: int


class Comparison(TypedDict):
    """Two models; rates are those of ``b``, which comes second by name."""

    a: str
    b: str
    win_rate: Rate
    majority: Majority
    categories: list[Category]


class Strength(TypedDict):
    model: str
    elo: float
    low: float
    high: float


class Question(TypedDict):
    votes: int
    choices: dict[str, int]
    alpha: float | None
    comparisons: list[Comparison]
    strengths: list[Strength]


class Rater(TypedDict):
    """``agreement`` with others, ``same`` of ``repeated`` with themselves, ``left``: how often the left one was preferred."""

    rater: str
    name: str
    votes: int
    agreement: float | None
    same: int
    repeated: int
    seconds: float | None
    left: float | None
    passed: int
    """Of ``checked`` attention checks."""
    checked: int


class Results(TypedDict):
    mode: str
    votes: int
    raters_per_pair: int
    judged: int
    at_once: int
    """The most pictures that were shown together."""
    questions: dict[str, Question]
    raters: list[Rater]


def results(
    votes: Sequence[Vote], *, mode: str, raters_per_pair: int, checks: Mapping[str, tuple[int, int]] | None = None
) -> Results:
    """Plain values for the owner's page, from ``palate.data.votes.valid_votes`` in any order.

    Per question: win rates of each two models over votes (ties as half; clusters are prompts), the majorities of pairs, and
    Bradley-Terry strengths; Krippendorff's alpha (nominal) over pairs with two raters or more. A vote for the best of several
    pictures counts as one on each pair that it compares; two raters who choose at random then agree on half of the pairs
    that both compare, as on single pairs. Planned repeats count for nothing but ``consistency``. ``checks``: by rater,
    attention checks passed and seen.
    """
    fresh = [Counted(**v, label=LABELS[v["choice"]], pair=_pair(v)) for v in votes if not v["repeat"]]
    asked = [q for q in QUESTIONS if any(v["question"] == q for v in fresh)]
    return {
        "mode": mode,
        "votes": _votes(fresh),
        "raters_per_pair": raters_per_pair,
        "judged": len({v["shown"] for v in fresh}),
        "at_once": max((len(v["shown"]) for v in fresh), default=2),
        "questions": {q: _question([v for v in fresh if v["question"] == q]) for q in asked},
        "raters": _raters(fresh, [v for v in votes if v["repeat"]], checks or {}),
    }


def _pair(vote: Vote) -> Pair:
    return vote["picture_0"], vote["picture_1"]


def _votes(said: Sequence[Vote]) -> int:
    return len({v["id"] for v in said})


def _question(votes: list[Counted]) -> Question:
    across = [v for v in votes if v["model_0"] != v["model_1"]]
    models = sorted({v[side] for v in across for side in ("model_0", "model_1")})
    return {
        "votes": _votes(votes),
        "choices": dict(Counter({v["id"]: CHOSEN.get(v["choice"], v["choice"]) for v in votes}.values())),
        "alpha": _alpha(votes),
        "comparisons": [
            _comparison(a, b, found)
            for a, b in combinations(models, 2)
            if (found := [v for v in across if {v["model_0"], v["model_1"]} == {a, b}])
        ],
        "strengths": _strengths(across, models),
    }


def _comparison(a: str, b: str, votes: list[Counted]) -> Comparison:
    by_pair: dict[Pair, list[float]] = defaultdict(list)
    categories: dict[str, list[Counted]] = defaultdict(list)
    for vote in votes:
        by_pair[vote["pair"]].append(_for(b, vote))
        if category := json.loads(vote["metadata"]).get("category"):
            categories[str(category)].append(vote)
    means = [sum(points) / len(points) for points in by_pair.values()]
    return {
        "a": a,
        "b": b,
        "win_rate": _rate(a, b, votes),
        "majority": {
            "a": sum(m < 0.5 for m in means),
            "ties": sum(m == 0.5 for m in means),
            "b": sum(m > 0.5 for m in means),
            "unanimous": sum(len(p) > 1 and len(set(p)) == 1 for p in by_pair.values()),
            "shared": sum(len(p) > 1 for p in by_pair.values()),
        },
        "categories": [{"name": name, **_rate(a, b, found, DRAWS)} for name, found in sorted(categories.items())],
    }


def _rate(a: str, b: str, votes: list[Counted], draws: int = 10_000) -> Rate:
    """The win rate of ``b`` over ``a``, as ``palate compare`` counts it."""
    from palate.evaluation.compare import count_votes

    return Rate(**asdict(count_votes([a, b], _shares(votes), draws=draws).pairs[0][2]))


def _shares(votes: list[Counted]) -> list[tuple[str, str, str, float]]:
    return [(v["prompt"], v["model_0"], v["model_1"], v["label"]) for v in votes]


def _for(model: str, vote: Counted) -> float:
    return vote["label"] if vote["model_0"] == model else 1 - vote["label"]


def _strengths(votes: list[Counted], models: list[str]) -> list[Strength]:
    """Of three models or more, on the scale of chess, strongest first; with their intervals over prompts."""
    from palate.evaluation.compare import count_votes

    ranking = count_votes(models, _shares(votes), draws=1).ranking if len(models) > 2 else None
    if ranking is None:
        return []
    rows = zip(ranking.models, ranking.elo, ranking.low, ranking.high, strict=True)
    return sorted((Strength(model=m, elo=e, low=low, high=high) for m, e, low, high in rows), key=lambda row: -row["elo"])


def _alpha(votes: list[Counted]) -> float | None:
    """None where no pair has two raters, or all say the same."""
    raters = {rater: i for i, rater in enumerate(dict.fromkeys(v["rater"] for v in votes))}
    units = {pair: i for i, pair in enumerate(dict.fromkeys(v["pair"] for v in votes))}
    ratings = np.full((len(raters), len(units)), np.nan)
    for vote in votes:
        ratings[raters[vote["rater"]], units[vote["pair"]]] = vote["label"]
    if not ((~np.isnan(ratings)).sum(axis=0) > 1).any():
        return None
    alpha = krippendorff_alpha(ratings, level="nominal")
    return None if math.isnan(alpha) else alpha


def _raters(fresh: list[Counted], repeats: list[Vote], checks: Mapping[str, tuple[int, int]]) -> list[Rater]:
    by_unit: dict[tuple[Pair, str], list[Counted]] = defaultdict(list)
    for vote in fresh:
        by_unit[vote["pair"], vote["question"]].append(vote)
    first, again = _said(fresh), _said(repeats)
    found: list[Rater] = []
    for rater in dict.fromkeys(v["rater"] for v in fresh):
        own = [v for v in fresh if v["rater"] == rater]
        others = [
            1 - abs(v["label"] - other["label"])
            for v in own
            for other in by_unit[v["pair"], v["question"]]
            if other["rater"] != rater
        ]
        same = [first[key] == said for key, said in again.items() if key[0] == rater and key in first]
        seconds = [taken for taken in {v["id"]: v["seconds"] for v in own}.values() if taken is not None]
        found.append(
            {
                "rater": rater,
                "name": own[0]["name"],
                "votes": _votes(own),
                "agreement": sum(others) / len(others) if others else None,
                "same": sum(same),
                "repeated": len(same),
                "seconds": median(seconds) if seconds else None,
                "left": _left(own),
                "passed": checks.get(rater, (0, 0))[0],
                "checked": checks.get(rater, (0, 0))[1],
            }
        )
    return sorted(found, key=lambda row: -row["votes"])


def _said(votes: Sequence[Vote]) -> dict[tuple[str, tuple[int, ...], str], set[tuple[Pair, float]]]:
    """By rater, pictures and question, all that a vote says."""
    found: dict[tuple[str, tuple[int, ...], str], set[tuple[Pair, float]]] = defaultdict(set)
    for v in votes:
        found[v["rater"], v["shown"], v["question"]].add((_pair(v), LABELS[v["choice"]]))
    return found


def _left(votes: list[Counted]) -> float | None:
    """How often, of each two pictures, the one that stands first was preferred: far from a half, somebody did not look."""
    sides = [(v["choice"] == "first") != bool(v["swapped"]) for v in votes if v["choice"] in ("first", "second")]
    return sum(sides) / len(sides) if sides else None
