"""Question: what do fixed draws of time and noise cost in quality? DPO on 32 pairs that return 20 times, with k draws a pair.

With 16 draws hardly any returns. The reference's pass is left out wherever one does (``draws_per_pair``, docs/speed.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runs import Run, table
from short import against_base, short

DRAWS = {"1": 1, "4": 4, "16": 16, "fresh": "null"}
FEW = {"max_train_samples": 32, "train_batch_size": 8, "max_train_steps": 80}


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [r for k, given in DRAWS.items() for r in short(named(k), "miniature-dpo", seeds, FEW | {"draws_per_pair": given})]


def named(draws: str) -> str:
    return f"draws-{draws}"


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = [[k, *against_base(measured, named(k), seeds)] for k in DRAWS]
    return table(["draws a pair", "held out", "preference", "prompt", "looks"], [r for r in rows if len(r) > 1])
