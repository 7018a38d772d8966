"""Question: which Noise-Conditioned Perception? Layers, and where the step of the model goes; DPO with ``beta: auto`` for all.

The paper prints no such comparison. Equal updates, not equal compute: layers differ by a tenth or so in cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runs import Run, table
from short import against_base, short

VARIANTS = {
    "last_down, one step back": {},
    "mid, one step back": {"space.layers": "mid"},
    "all, normalised, one step back": {"space.layers": "all", "space.normalise": "true"},
    "last_down, 20 steps back": {"space.steps_back": 20},
    "last_down, a random time": {"space.target_time": "uniform"},
}


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    changes = {"objective.beta": "auto"}
    return [run for v in VARIANTS for run in short(named(v), "miniature-ncp-dpo", seeds, changes | VARIANTS[v], cost=75)]


def named(variant: str) -> str:
    return "ncp-" + variant.replace(",", "").replace(" ", "-")


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = [[variant, *against_base(measured, named(variant), seeds)] for variant in VARIANTS]
    return table(["perceptual space", "held out", "preference", "prompt", "looks"], [r for r in rows if len(r) > 1])
