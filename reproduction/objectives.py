"""Question: which objective first, when one knows nothing? All in latent space, equal updates, each at its tuned best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runs import Run, table
from short import against_base
from tuning import OBJECTIVES, best, name_of, told, tuned


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [run for method in OBJECTIVES for run in tuned(measured, method, seeds)]


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = []
    for method in OBJECTIVES:
        chosen = best(measured, method)
        if chosen is not None and (rates := against_base(measured, name_of(method, chosen), seeds)):
            rows.append((rates[0].rate, [method, told(chosen), *rates]))
    ordered = [cells for _, cells in sorted(rows, key=lambda one: -one[0])]
    return table(["objective", "setting", "held out", "preference", "prompt", "looks"], ordered)
