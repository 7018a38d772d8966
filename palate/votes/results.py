"""What the votes say so far: models against each other, and how far raters agree with others and with themselves."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from palate.data.votes import LABELS, QUESTIONS
from palate.evaluation.statistics import krippendorff_alpha

DRAWS = 2000  # of the bootstrap of a category, of which there may be many
Vote = Mapping[str, Any]


def results(votes: Sequence[Vote], *, mode: str, raters_per_pair: int) -> dict[str, Any]:
    """Plain values for the owner's page, from rows of ``palate.data.votes.VALID`` in any order.

    Per question: win rates of each two models over votes (ties as half; clusters are prompts), the majorities of pairs, and
    Bradley-Terry strengths; Krippendorff's alpha (nominal) over pairs with two raters or more. Planned repeats count for
    nothing but ``consistency``.
    """
    fresh = [dict(v) for v in votes if not v["repeat"]]
    for vote in fresh:
        vote["label"] = LABELS[vote["choice"]]
        vote["pair"] = (vote["picture_0"], vote["picture_1"])
    asked = [q for q in QUESTIONS if any(v["question"] == q for v in fresh)]
    return {
        "mode": mode,
        "votes": len(fresh),
        "raters_per_pair": raters_per_pair,
        "judged": len({v["pair"] for v in fresh}),
        "questions": {q: _question([v for v in fresh if v["question"] == q]) for q in asked},
        "raters": _raters(fresh, [v for v in votes if v["repeat"]]),
    }


def _question(votes: list[dict[str, Any]]) -> dict[str, Any]:
    across = [v for v in votes if v["model_0"] != v["model_1"]]
    models = sorted({v[side] for v in across for side in ("model_0", "model_1")})
    return {
        "votes": len(votes),
        "choices": dict(Counter("preferred" if v["choice"] in ("first", "second") else v["choice"] for v in votes)),
        "alpha": _alpha(votes),
        "comparisons": [
            _comparison(a, b, found)
            for a, b in combinations(models, 2)
            if (found := [v for v in across if {v["model_0"], v["model_1"]} == {a, b}])
        ],
        "strengths": _strengths(across, models),
    }


def _comparison(a: str, b: str, votes: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates are those of ``b``, which comes second by name."""
    by_pair: dict[Any, list[float]] = defaultdict(list)
    categories: dict[str, list[dict[str, Any]]] = defaultdict(list)
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


def _rate(a: str, b: str, votes: list[dict[str, Any]], draws: int = 10_000) -> dict[str, Any]:
    """The win rate of ``b`` over ``a``, as ``palate compare`` counts it."""
    from palate.evaluation.compare import count_votes

    return asdict(count_votes([a, b], _shares(votes), draws=draws).pairs[0][2])


def _shares(votes: list[dict[str, Any]]) -> list[tuple[str, str, str, float]]:
    return [(v["prompt"], v["model_0"], v["model_1"], v["label"]) for v in votes]


def _for(model: str, vote: Mapping[str, Any]) -> float:
    return vote["label"] if vote["model_0"] == model else 1 - vote["label"]


def _strengths(votes: list[dict[str, Any]], models: list[str]) -> list[dict[str, Any]]:
    """Of three models or more, on the scale of chess, strongest first; with their intervals over prompts."""
    from palate.evaluation.compare import count_votes

    ranking = count_votes(models, _shares(votes), draws=1).ranking if len(models) > 2 else None
    if ranking is None:
        return []
    rows = zip(ranking.models, ranking.elo, ranking.low, ranking.high, strict=True)
    return sorted(({"model": m, "elo": e, "low": low, "high": high} for m, e, low, high in rows), key=lambda row: -row["elo"])


def _alpha(votes: list[dict[str, Any]]) -> float | None:
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


def _raters(fresh: list[dict[str, Any]], repeats: list[Vote]) -> list[dict[str, Any]]:
    by_unit: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for vote in fresh:
        by_unit[vote["pair"], vote["question"]].append(vote)
    first = {(v["rater"], v["pair"], v["question"]): v["label"] for v in fresh}
    found = []
    for rater in dict.fromkeys(v["rater"] for v in fresh):
        own = [v for v in fresh if v["rater"] == rater]
        others = [
            1 - abs(v["label"] - other["label"])
            for v in own
            for other in by_unit[v["pair"], v["question"]]
            if other["rater"] != rater
        ]
        again = [
            first[key] == LABELS[v["choice"]]
            for v in repeats
            if (key := (v["rater"], (v["picture_0"], v["picture_1"]), v["question"])) in first and v["rater"] == rater
        ]
        seconds = [v["seconds"] for v in own if v["seconds"] is not None]
        found.append(
            {
                "rater": rater,
                "name": own[0]["name"],
                "votes": len(own),
                "agreement": sum(others) / len(others) if others else None,
                "same": sum(again),
                "repeated": len(again),
                "seconds": median(seconds) if seconds else None,
                "left": _left(own),
            }
        )
    return sorted(found, key=lambda row: -row["votes"])


def _left(votes: list[dict[str, Any]]) -> float | None:
    """How often the left picture was preferred: far from a half, somebody did not look."""
    sides = [(v["choice"] == "first") != bool(v["swapped"]) for v in votes if v["choice"] in ("first", "second")]
    return sum(sides) / len(sides) if sides else None
