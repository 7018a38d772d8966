"""Short runs on mini-sd that several claims share: 40 updates of 16 pairs, the recipes' settings, 64 unseen prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import JUDGES, QUIET, Drawing, Preference, Run, base_name, versus

UNSEEN = "miniature-unseen"
PROMPTS = 64
BATCH, UPDATES = 16, 40
SEEDS = (0, 1, 2, 3, 4)
BASE = base_name("mini-sd", UNSEEN, PROMPTS)
NUMBER = ("--num_prompts", str(PROMPTS))
COMMON = {
    **QUIET,
    "train_batch_size": BATCH,
    "max_train_steps": UPDATES,
    "checkpointing_steps": "null",
    "validation_fraction": 0.0,
}


def short(
    method: str,
    recipe: str,
    seeds: Sequence[int],
    changes: dict[str, Any] | None = None,
    prompts: str = UNSEEN,
    **other: Any,
) -> list[Run]:
    """One run a seed, named METHOD-SEED; runs of one name are the same run to every script."""
    return [
        Run(f"{method}-{seed}", recipe, {"seed": seed, **COMMON, **(changes or {})}, (prompts,), PROMPTS, **other)
        for seed in seeds
    ]


def drawn_base(prompts: str) -> Drawing:
    """mini-sd's pictures of a list by ``palate generate``: other drawings of it begin with the same noise."""
    return Drawing(f"drawn-base-{prompts}", "mini-sd", prompts, NUMBER, judges=("jpeg_compressibility", *JUDGES))


def against_base(measured: Path, method: str, seeds: Sequence[int]) -> list[Preference]:
    return versus(measured, [(BASE, f"{method}-{seed}") for seed in seeds], UNSEEN)
