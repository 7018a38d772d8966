"""Question: which objective first, when one knows nothing? All of them in latent space, equal updates, the recipes' settings.

Only the settings of SFT and DPO were ever tuned; the others carry them over, with a beta of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runs import Run, table
from short import against_base, short

OBJECTIVES = ("dpo", "sft", "kto", "ipo", "sdpo", "cdpo", "hinge", "dspo", "orpo", "mapo", "cpo")


def runs(seeds: Sequence[int]) -> list[Run]:
    return [run for name in OBJECTIVES for run in short(name, f"miniature-{name}", seeds)]


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = [[name, *against_base(measured, name, seeds)] for name in OBJECTIVES]
    return table(["objective", "held out", "preference", "prompt", "looks"], [r for r in rows if len(r) > 1])
