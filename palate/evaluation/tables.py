"""A comparison as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from palate.evaluation.compare import Ranking, Versus, percent
from palate.evaluation.folders import Result
from palate.evaluation.statistics import Average, WinRate


def table(result: Result) -> str:
    """All that :class:`Result` holds but the groups of small parts, in lines of about 100 characters."""
    blocks = [_versus(v) for v in result.versus]
    blocks += [_ranking(r) for r in result.rankings]
    blocks += ["\n".join(f"note: {note}" for note in result.notes)] if result.notes else []
    return "\n\n".join(blocks)


def _versus(v: Versus) -> str:
    head = ("judge", "win rate", "interval", "won/tied/lost", "base", "other", "difference [interval]", "p")
    rows = [
        (
            f"{c.judge}{' *' if c.contaminated else ''}",
            f"{percent(c.win_rate.rate)} %",
            _interval(c.win_rate),
            f"{c.win_rate.wins}/{c.win_rate.ties}/{c.win_rate.losses}",
            f"{c.mean_base:.4g}",
            f"{c.mean_tuned:.4g}",
            f"{c.difference.difference:+.3g} [{c.difference.low:.3g}, {c.difference.high:.3g}]",
            "<0.001" if c.p < 0.001 else f"{c.p:.3f}",
        )
        for c in v.comparisons
    ]
    if v.macro is not None:
        rows.append((f"mean of {v.macro.judges}", f"{percent(v.macro.rate)} %", _interval(v.macro), "", "", "", "", ""))
    lines = [f"{v.model} against {v.base}: {v.headline}", "", *columns([head, *rows], right=True)]
    if any(c.contaminated for c in v.comparisons):
        lines.append("* training followed this judge: its verdict shows that training worked, not that pictures got better")
    first = v.comparisons[0] if v.comparisons else None
    if first is not None and first.groups:
        parts = [
            (f"{g.field}: {g.value}", f"{percent(g.win_rate.rate)} %", _interval(g.win_rate), f"{g.win_rate.prompts} prompts")
            for g in first.groups
        ]
        lines += ["", *columns([(f"{first.judge}, by", "win rate", "interval", ""), *parts], right=True)]
    lines += ["", v.diversity.sentence(), *(f"warning: {flag}" for flag in v.flags)]
    return "\n".join(lines)


def _ranking(r: Ranking) -> str:
    order = r.order
    head = (f"{r.judge}{' *' if r.contaminated else ''}", "strength", "interval", *(f"beats {r.models[j]}" for j in order))
    rows = [
        (r.models[i], f"{r.elo[i]:.0f}", f"{r.low[i]:.0f}-{r.high[i]:.0f}", *(_share(r.shares[i][j]) for j in order))
        for i in order
    ]
    return "\n".join(columns([head, *rows], right=True))


def _share(share: float | None) -> str:
    return "" if share is None else f"{percent(share)} %"


def _interval(w: WinRate | Average) -> str:
    return f"{percent(w.low)}-{percent(w.high)} %"


def columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """The lines of a table whose columns are aligned to the left; with ``right`` all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(t.rjust(w) if right and i else t.ljust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
