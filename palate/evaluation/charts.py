"""Curves and bars of the page, as SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeGuard

from markupsafe import Markup, escape

from palate.evaluation.compare import percent
from palate.evaluation.statistics import Average, WinRate

Row = Mapping[str, object]
"""A line of a log."""
Points = list[tuple[float, float]]
Series = dict[str, Points]
"""Where and what, by the name in the log."""

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


def bar(w: WinRate | Average) -> Markup:
    """A share with its interval, from 0 to 100 %."""
    label = f"{percent(w.rate)} %, interval {percent(w.low)} to {percent(w.high)} %"
    x, low, high = (10 + 200 * v for v in (w.rate, w.low, w.high))
    return Markup(f"""<svg class="bar" viewBox="0 0 220 26" role="img" aria-label="{label}">
<rect class="track" x="10" y="12" width="200" height="2" rx="1"/><line class="half" x1="110" x2="110" y1="2" y2="24"/>
<rect class="span" x="{low:.1f}" y="8" width="{max(high - low, 1):.1f}" height="10" rx="5"/>
<circle class="dot" cx="{x:.1f}" cy="13" r="5"/></svg>""")


class Distance(NamedTuple):
    """Over-optimisation: what training pushes up and what it does not see, against the distance from the base."""

    figure: Markup
    held_out: bool
    """Something is drawn that training does not see."""
    beyond: bool
    """The last points lie further than the distance was measured."""


def distance(rows: Sequence[Row]) -> Distance | None:
    """None where the log does not tell how far the model went, or of nothing it was trained on."""
    name = next((d for d in DISTANCES if sum(_is_number(row.get(d)) for row in rows) > 1), None)
    if name is None:
        return None
    known = [(_updates(row, i, name), float(far)) for i, row in enumerate(rows) if _is_number(far := row.get(name))]
    found: Series = {}
    for index, row in enumerate(rows):
        for key, value in row.items():
            if _is_number(value) and (_is_trained(key) or _is_held_out(key)):
                found.setdefault(key, []).append((_updates(row, index, key), float(value)))
    found = {key: points for key, points in _without_copy(found).items() if len(points) > 2}
    if not any(map(_is_trained, found)):
        return None
    lines = {key: [(_far(known, updates), value) for updates, value in points] for key, points in found.items()}
    beyond = any(points[-1][0] > known[-1][0] for points in found.values())
    return Distance(_against(lines, _title(name)), any(map(_is_held_out, lines)), beyond)


def _updates(row: Row, index: int, name: str) -> float:
    """After how many updates the model was as it is measured: a round is drawn before the update in whose line it is told."""
    of_round = name in ("kl_path", "reward_mean") or name.startswith("reward/")
    return max(0.0, _value(row, "step", float(index)) - of_round)


def _far(known: Sequence[tuple[float, float]], updates: float) -> float:
    """The distance from the base after so many updates, between and beyond those after which it is known."""
    points = [*([] if known[0][0] == 0 else [(0.0, 0.0)]), *known]
    (x0, y0), (x1, y1) = next((pair for pair in pairwise(points) if updates <= pair[1][0]), points[-2:])
    return max(0.0, y0 + (updates - x0) / ((x1 - x0) or 1) * (y1 - y0))


def _against(lines: Mapping[str, Points], name: str) -> Markup:
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
        change = f"{number(ys[0])} → {number(ys[-1])}"
        key_line = f'<svg class="key" viewBox="0 0 24 4" aria-hidden="true"><path {stroke} d="M0 2h24"/></svg>'
        keys.append(f"<span>{key_line}{escape(_title(key))} {change}</span>")
    label = f"Trained and held-out measures against {name}"
    return Markup(f"""<figcaption class="keys">{"".join(keys)}</figcaption>
<svg viewBox="0 0 360 172" role="img" aria-label="{escape(label)}">
<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>{"".join(drawn)}
<text x="{left}" y="{bottom + 17}">0</text>
<text x="{right}" y="{bottom + 17}" text-anchor="end">{escape(name)} {number(far)}</text></svg>""")


def _without_copy(series: Mapping[str, Points]) -> Series:
    """Without the mean reward where it is that of the only reward."""
    same = [n for n, points in series.items() if n.startswith("reward/") and points == series.get("reward_mean")]
    return {name: points for name, points in series.items() if not (same and name == "reward_mean")}


def _value(row: Row, name: str, otherwise: float) -> float:
    found = row.get(name, otherwise)
    return float(found)  # type: ignore[arg-type]


def _is_trained(name: str) -> bool:
    return name in ("reward_mean", "implicit_accuracy") or name.startswith("reward/")


def _is_held_out(name: str) -> bool:
    return name.startswith("held_out") and not name.endswith(BOUNDS)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _title(name: str) -> str:
    """What a reader calls it: of a reward its own name, and its part in training."""
    part, slash, judge = name.partition("/")
    if slash and part in ("held_out", "reward"):
        return f"{judge}, {'held out' if part == 'held_out' else 'trained on'}"
    return TITLES.get(name, name.replace("_", " "))


class Curves(NamedTuple):
    """A chart of every measure that a log tells twice or more."""

    first: list[Markup]
    """What training is about."""
    rest: list[Markup]
    queries: bool
    """They lie over the number of pictures judged, not of updates."""
    accuracy: bool
    """There is an accuracy among them."""


def curves(rows: Sequence[Row]) -> Curves | None:
    """None where there is nothing to draw."""
    series: Series = {}
    queries = any("reward_queries" in row for row in rows)
    axis = "reward_queries" if queries else "step"
    asked = 0.0
    for index, row in enumerate(rows):
        asked = _value(row, "reward_queries", asked)
        place = asked if queries else _value(row, "step", float(index))
        for name, value in row.items():
            if name not in UNDRAWN and _is_number(value):
                series.setdefault(name, []).append((place, float(value)))
    # An interval is drawn around its measure.
    drawn = {
        n: points for n, points in _without_copy(series).items() if not (n.endswith(BOUNDS) and n.rpartition("_")[0] in series)
    }
    names = sorted((n for n, points in drawn.items() if len(points) > 1), key=_importance)
    if not names:
        return None

    def chart(name: str) -> Markup:
        return _chart(name, series[name], _title(axis), [series[name + end] for end in BOUNDS if name + end in series])

    first, rest = [n for n in names if _importance(n) < 3], [n for n in names if _importance(n) == 3]
    return Curves([*map(chart, first)], [*map(chart, rest)], queries, any("accuracy" in name for name in names))


def _importance(name: str) -> int:
    name = name.lower()
    if name == "reward_mean" or _is_held_out(name) or "accuracy" in name:
        return 0
    return 1 if name == "loss" else 2 if "loss" in name or "margin" in name or name.startswith(("reward/", "kl")) else 3


def _chart(name: str, points: Points, axis: str, bounds: Sequence[Points] = ()) -> Markup:
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
    left, right, top, bottom = 68, 354, 8, 128  # room for -1.75e-08

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
    start, end = number(smooth[0]), number(smooth[-1])
    return Markup(f"""<figure class="chart"><figcaption title="{escape(name)}">{title}<span>{start} → {end}</span></figcaption>
<svg viewBox="0 0 360 146" role="img" aria-label="{title} from {start} to {end}">
<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>{chance}
{"".join(line(values, "raw") for values in around)}
{line(ys, "raw") if smooth is not ys else ""}{line(smooth, "smooth")}
<text x="{left - 6}" y="{top + 8}" text-anchor="end">{number(high)}</text>
<text x="{left - 6}" y="{bottom}" text-anchor="end">{number(low)}</text>
<text x="{left}" y="{bottom + 15}">{axis} {xs[0]:g}</text>
<text x="{right}" y="{bottom + 15}" text-anchor="end">{xs[-1]:g}</text></svg></figure>""")


def _thin(points: Points, limit: int) -> list[tuple[float, float]]:
    """At most ``limit`` points, each the mean of its neighbours."""
    size = -(-len(points) // limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def _moving_average(values: list[float], radius: int) -> list[float]:
    windows = (values[max(0, i - radius) : i + radius + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def number(value: float) -> str:
    """Three digits, or whole thousands."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
