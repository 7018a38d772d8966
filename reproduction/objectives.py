"""Question: which objective first, when one knows nothing? All in latent space, equal updates, each at its tuned best.

And DPO with ``beta: auto``, which needs no tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runs import Run, table
from short import against_base, short
from tuning import OBJECTIVES, best, name_of, told, tuned

AUTOMATIC = "dpo-auto"


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    found = [run for method in OBJECTIVES for run in tuned(measured, method, seeds)]
    return found + short(AUTOMATIC, "miniature-dpo", seeds, {"objective.beta": "auto"})


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = [(rates[0].rate, ["dpo", "beta auto", *rates]) for rates in [against_base(measured, AUTOMATIC, seeds)] if rates]
    for method in OBJECTIVES:
        chosen = best(measured, method)
        if chosen is not None and (rates := against_base(measured, name_of(method, chosen), seeds)):
            rows.append((rates[0].rate, [method, told(chosen), *rates]))
    ordered = [cells for _, cells in sorted(rows, key=lambda one: -one[0])]
    return table(["objective", "setting", "held out", "preference", "prompt", "looks"], ordered)
