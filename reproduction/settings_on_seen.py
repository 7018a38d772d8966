"""Question: which settings of NCP-DPO? Compared without the unseen prompts and the held-out judge, which so stay honest.

Each variant changes a few options of ``miniature-ncp-dpo`` and meets the base model on prompts *of the voted pairs*, before the
judge that stands for the raters (``mini-pickscore``) and that of prompt following (``mini-clip``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runs import QUIET, Run, base_name, table, versus

SEEN, PROMPTS, STEPS = "miniature-seen", 128, 15
JUDGES = ("mini-pickscore", "mini-clip")
VARIANTS = {
    "plain": {},
    "t_min-300": {"t_min": 300},
    "t_min-700": {"t_min": 700},
    "beta-2e5": {"objective.beta": 2e5},
    "beta-1e6": {"objective.beta": 1e6},
    "lr-6e-4": {"learning_rate": 6e-4},
    "steps-120": {"max_train_steps": 120},
    "batch-64": {"train_batch_size": 64, "max_train_steps": 60},
    "rank-64": {"rank": 64},
    "full": {"train_method": "full", "learning_rate": 3e-5},
}


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [
        Run(
            named(v, seed),
            "miniature-ncp-dpo",
            {**QUIET, "seed": seed, **VARIANTS[v]},
            (SEEN,),
            PROMPTS,
            STEPS,
            JUDGES,
            cost=600,
        )
        for v in VARIANTS
        for seed in seeds
    ]


def named(variant: str, seed: int) -> str:
    return f"setting-{variant}-{seed}"


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    base = base_name("mini-sd", SEEN, PROMPTS)
    rows = [[v, *versus(measured, [(base, named(v, seed)) for seed in seeds], SEEN, JUDGES)] for v in VARIANTS]
    return table(["setting", *JUDGES], [r for r in rows if len(r) > 1])
