"""Curves and bars of the page, as SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from palate.evaluation.compare import percent
from palate.evaluation.statistics import Average, WinRate

UNDRAWN = ("step", "reward_queries", "seconds", "pairs", "epoch", "round")


DISTANCES = ("kl_path", "kl", "logit_abs")
"""Names in a log that say how far a model is from its base, the best first."""


DASHES = ("none", "7 4", "2 4")
"""Strokes that tell lines of one colour apart."""


BOUNDS = ("_low", "_high")
"""What follows a name in a log where the interval of a measure stands."""


TITLES = {
    "step": "updates",
    "reward_queries": "pictures judged",
    "reward_mean": "mean reward, trained on",
    "reward_std": "spread of the rewards",
    "kl_path": "KL divergence from the base",
    "kl": "KL divergence of trained steps",
    "diversity": "difference between pictures of a prompt",
    "advantage_clipped": "share of advantages cut off",
    "approx_kl": "half the squared log ratio",
    "clip_fraction": "share of steps out of the clip range",
    "moved": "KL divergence since sampling",
    "effective_samples": "effective number of pictures",
    "kept": "pictures trained on",
    "ties": "tied pairs",
    "parted": "alarm",
    "implicit_accuracy": "implicit accuracy, training pairs",
    "held_out_accuracy": "implicit accuracy, held-out pairs",
    "winner_error": "error of winners",
    "loser_error": "error of losers",
    "winner_advantage": "gain on winners",
    "loser_advantage": "gain on losers",
    "advantage": "gain",
    "margin": "margin of winners over losers",
    "logit_mean": "implicit preference, mean",
    "logit_std": "implicit preference, spread",
    "logit_abs": "implicit preference, size",
    "gradient_factor": "share of the push that is left",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
}
"""What the page calls the names of a log; the others by :func:`_title`'s rule."""


def _bar(w: WinRate | Average) -> str:
    label = f"{percent(w.rate)} %, interval {percent(w.low)} to {percent(w.high)} %"
    x, low, high = (10 + 200 * v for v in (w.rate, w.low, w.high))
    return f"""<svg class="bar" viewBox="0 0 220 26" role="img" aria-label="{label}">
<rect class="track" x="10" y="12" width="200" height="2" rx="1"/><line class="half" x1="110" x2="110" y1="2" y2="24"/>
<rect class="span" x="{low:.1f}" y="8" width="{max(high - low, 1):.1f}" height="10" rx="5"/>
<circle class="dot" cx="{x:.1f}" cy="13" r="5"/></svg>"""


def _distance(rows: Sequence[Mapping[str, Any]]) -> str:
    """Over-optimisation: what training pushes up and what it does not see, against the distance from the base."""
    name = next((d for d in DISTANCES if sum(_is_number(row.get(d)) for row in rows) > 1), None)
    if name is None:
        return ""
    known = [(_updates(row, index, name), float(row[name])) for index, row in enumerate(rows) if _is_number(row.get(name))]
    found: dict[str, list[tuple[float, float]]] = {}
    for index, row in enumerate(rows):
        for key, value in row.items():
            if _is_number(value) and (_is_trained(key) or _is_held_out(key)):
                found.setdefault(key, []).append((_updates(row, index, key), float(value)))
    found = {key: points for key, points in _without_copy(found).items() if len(points) > 2}
    if not any(map(_is_trained, found)):
        return ""
    lines = {key: [(_far(known, updates), value) for updates, value in points] for key, points in found.items()}
    beyond = any(points[-1][0] > known[-1][0] for points in found.values())
    held = any(map(_is_held_out, lines))
    told = (
        "The further a model goes, the more it earns from what it is trained on. While a measure that training never sees "
        "rises as well, pictures get better; where it turns down, training goes too far."
        if held
        else "Nothing that training does not see was measured three times: this view cannot tell when training went too far."
    )
    if beyond:
        told += " How far the last updates led was not measured: the last points lie where the updates before would have led."
    return f"""<section><h2>How far is too far</h2><p>{told} Every line is drawn in units of
its own range.</p><figure class="chart wide">{_against(lines, _title(name))}</figure></section>"""


def _updates(row: Mapping[str, Any], index: int, name: str) -> float:
    """After how many updates the model was as it is measured: a round is drawn before the update in whose line it is told."""
    of_round = name in ("kl_path", "reward_mean") or name.startswith("reward/")
    return max(0.0, float(row.get("step", index)) - of_round)


def _far(known: Sequence[tuple[float, float]], updates: float) -> float:
    """The distance from the base after so many updates, between and beyond those after which it is known."""
    points = [*([] if known[0][0] == 0 else [(0.0, 0.0)]), *known]
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if updates <= pair[1][0]), points[-2:])
    return max(0.0, y0 + (updates - x0) / ((x1 - x0) or 1) * (y1 - y0))


def _against(lines: Mapping[str, list[tuple[float, float]]], name: str) -> str:
    left, right, top, bottom = 12, 354, 10, 148
    far = max(x for points in lines.values() for x, _ in points) or 1.0
    drawn, keys, alike = [], [], Counter[str]()
    for key, points in sorted(lines.items(), key=lambda item: _is_held_out(item[0])):
        ys = [y for _, y in points]
        span = (max(ys) - min(ys)) or 1.0
        style = "" if _is_held_out(key) else " trained"
        stroke = f'class="smooth{style}" stroke-dasharray="{DASHES[alike[style] % len(DASHES)]}"'
        alike[style] += 1
        places = [(left + x / far * (right - left), bottom - (y - min(ys)) / span * (bottom - top)) for x, y in points]
        # A distance measured on one batch goes to and fro: there only the points are drawn.
        if all(a[0] <= b[0] for a, b in pairwise(points)):
            drawn.append(f'<polyline {stroke} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        drawn += [f'<circle class="dotm{style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        change = f"{_number(ys[0])} → {_number(ys[-1])}"
        key_line = f'<svg class="key" viewBox="0 0 24 4" aria-hidden="true"><path {stroke} d="M0 2h24"/></svg>'
        keys.append(f"<span>{key_line}{escape(_title(key))} {change}</span>")
    label = f"Trained and held-out measures against {name}"
    return f"""<figcaption class="keys">{"".join(keys)}</figcaption>
<svg viewBox="0 0 360 172" role="img" aria-label="{escape(label)}">
<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>{"".join(drawn)}
<text x="{left}" y="{bottom + 17}">0</text>
<text x="{right}" y="{bottom + 17}" text-anchor="end">{escape(name)} {_number(far)}</text></svg>"""


def _without_copy(series: Mapping[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    """Without the mean reward where it is that of the only reward."""
    same = [n for n, points in series.items() if n.startswith("reward/") and points == series.get("reward_mean")]
    return {name: points for name, points in series.items() if not (same and name == "reward_mean")}


def _is_trained(name: str) -> bool:
    return name in ("reward_mean", "implicit_accuracy") or name.startswith("reward/")


def _is_held_out(name: str) -> bool:
    return name.startswith("held_out") and not name.endswith(BOUNDS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _title(name: str) -> str:
    """What a reader calls it: of a reward its own name, and its part in training."""
    part, slash, judge = name.partition("/")
    if slash and part in ("held_out", "reward"):
        return f"{judge}, {'held out' if part == 'held_out' else 'trained on'}"
    return TITLES.get(name, name.replace("_", " "))


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    queries = any("reward_queries" in row for row in rows)
    axis = "reward_queries" if queries else "step"
    asked = 0.0
    for index, row in enumerate(rows):
        asked = float(row.get("reward_queries", asked))
        place = asked if queries else float(row.get("step", index))
        for name, value in row.items():
            if name not in UNDRAWN and _is_number(value):
                series.setdefault(name, []).append((place, float(value)))
    # An interval is drawn around its measure.
    drawn = {
        n: points for n, points in _without_copy(series).items() if not (n.endswith(BOUNDS) and n.rpartition("_")[0] in series)
    }
    names = sorted((n for n, points in drawn.items() if len(points) > 1), key=_importance)
    if not names:
        return ""
    first, rest = [n for n in names if _importance(n) < 3], [n for n in names if _importance(n) == 3]
    more = _charts(rest, series, _title(axis))
    told = "The bold line is a moving average where the log is dense."
    if queries:
        told += " Rewards are those of the pictures that the model drew for training; below stands how many were judged so far."
    if any("accuracy" in name for name in names):
        told += " An accuracy says how often the model being trained orders a pair as the votes do; 0.5 (dashed) is chance."
    if first and rest:
        more = f"<details><summary>More curves</summary>{more}</details>"
    return f"""<section><h2>Training</h2>
<p>{told}</p>{_charts(first, series, _title(axis))}{more}</section>"""


def _importance(name: str) -> int:
    name = name.lower()
    if name == "reward_mean" or _is_held_out(name) or "accuracy" in name:
        return 0
    return 1 if name == "loss" else 2 if "loss" in name or "margin" in name or name.startswith(("reward/", "kl")) else 3


def _charts(names: list[str], series: Mapping[str, list[tuple[float, float]]], axis: str) -> str:
    def chart(name: str) -> str:
        return _chart(name, series[name], axis, [series[name + end] for end in BOUNDS if name + end in series])

    return f'<div class="charts">{"".join(map(chart, names))}</div>' if names else ""


def _chart(name: str, points: list[tuple[float, float]], axis: str, bounds: Sequence[list[tuple[float, float]]] = ()) -> str:
    """bounds: of its interval, at the same places."""
    points = _thin(sorted(points), 400)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    smooth = _moving_average(ys, max(1, len(ys) // 15)) if len(ys) > 30 else ys
    around = [[p[1] for p in _thin(sorted(bound), 400)] for bound in bounds]
    around = [values for values in around if len(values) == len(ys)]
    shares = "accuracy" in name.lower() and min(ys) >= 0 and max(ys) <= 1
    seen = [*ys, *(y for values in around for y in values)]
    low, high = (min(0.4, *seen), max(0.6, *seen)) if shares else (min(seen), max(seen))
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    left, right, top, bottom = 52, 354, 8, 128

    def line(values: list[float], style: str) -> str:
        span = (xs[-1] - xs[0]) or 1
        at = (
            f"{left + (x - xs[0]) / span * (right - left):.1f},{bottom - (v - low) / (high - low) * (bottom - top):.1f}"
            for x, v in zip(xs, values, strict=True)
        )
        return f'<polyline class="{style}" points="{" ".join(at)}"/>'

    chance = ""
    if shares:
        y = bottom - (0.5 - low) / (high - low) * (bottom - top)
        chance = f'<line class="half" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    title = escape(_title(name))
    start, end = _number(smooth[0]), _number(smooth[-1])
    return f"""<figure class="chart"><figcaption title="{escape(name)}">{title}<span>{start} → {end}</span></figcaption>
<svg viewBox="0 0 360 146" role="img" aria-label="{title} from {start} to {end}">
<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>{chance}
{"".join(line(values, "raw") for values in around)}
{line(ys, "raw") if smooth is not ys else ""}{line(smooth, "smooth")}
<text x="{left - 6}" y="{top + 8}" text-anchor="end">{_number(high)}</text>
<text x="{left - 6}" y="{bottom}" text-anchor="end">{_number(low)}</text>
<text x="{left}" y="{bottom + 15}">{axis} {xs[0]:g}</text>
<text x="{right}" y="{bottom + 15}" text-anchor="end">{xs[-1]:g}</text></svg></figure>"""


def _thin(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most ``limit`` points, each the mean of its neighbours."""
    size = -(-len(points) // limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def _moving_average(values: list[float], radius: int) -> list[float]:
    windows = (values[max(0, i - radius) : i + radius + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
