"""Question: what do a LoRA's strength, the average of weights, and a trust region save of a model that was rewarded too far?

DDPO-IS for ``mini-aesthetic`` alone, 1024 queries at 2e-3, three seeds, as it is, with EMA, and in a trust region
in place of the clip; the same 64 unseen prompts drawn with a part of the LoRA. KL budgets and the held-out best are read off
the curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import PER_ROUND, QUIET, Drawing, Run, Task, guards, read_curve, table, versus
from short import NUMBER, UNSEEN, drawn_base

QUERIES, SCALES = 1024, (0.25, 0.5, 0.75, 1.0)
FAR: dict[str, Any] = {
    **QUIET,
    "rewards": "[mini-aesthetic]",
    "held_out_rewards": "[mini-heldout, mini-clip]",
    "held_out_pictures": 32,
    "eval_steps": 4,
    "rounds": QUERIES // PER_ROUND,
    "lr_warmup_steps": 0,
    "learning_rate": 2e-3,
    "checkpointing_steps": 4,
}
CLIPPED = {"objective.clip_range": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "plain": CLIPPED,
    "averaged": {**CLIPPED, "ema_decay": 0.9},
    "trust-region": {"objective": "ddpo_tr"},
}
BASE = drawn_base(UNSEEN)


def run_of(kind: str, seed: int) -> Run:
    return Run(f"far-{kind}-{seed}", "miniature-ddpo-is", {**FAR, **KINDS[kind], "seed": seed}, cost=300)


def runs(measured: Path, seeds: Sequence[int]) -> list[Task]:
    found: list[Task] = [BASE, *(run_of(kind, seed) for seed in seeds for kind in KINDS)]
    for seed in seeds:
        for kind in KINDS:
            for scale in SCALES if kind == "plain" else (1.0,):
                run = run_of(kind, seed)
                found.append(Drawing(f"drawn-{run.name}-{scale:g}", "mini-sd", UNSEEN, NUMBER, ((run, scale),)))
    return found


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = []
    for kind in KINDS:
        for scale in SCALES:
            pairs = [(BASE.name, f"drawn-far-{kind}-{seed}-{scale:g}") for seed in seeds]
            rows.append([f"{kind}, LoRA at {scale:g}", *versus(measured, pairs, UNSEEN)])
    lines = table(["model", "held out", "preference", "prompt", "looks (rewarded)"], [row for row in rows if row[1:]])
    ends = []
    for seed in seeds:
        if curve := read_curve(measured, f"far-plain-{seed}"):
            ends += [[seed, *row] for row in guards(curve, "mini-heldout", ["mini-clip"])]
    return [*lines, "", *table(["seed", "guard", "queries", "reward", "mini-heldout", "mini-clip"], ends)]
