"""Claim: the one picture of a prompt that beats all others teaches more than all pairs do. Four pictures of each of 80 prompts.

``mini-pickscore`` labels them; equal updates. All pairs are six a prompt, pairs with the absolute winner three, extremes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from runs import Run, locked, palate, table
from short import against_base, short

CHOICES = {
    "all": [],
    "winner": ["--absolute_winner", "true"],
    "extremes": ["--pairs", "extremes"],
}
SIZE = ["--num_prompts", "80", "--images_per_prompt", "4", "--num_inference_steps", "10", "--guidance_scale", "2.5"]


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [
        run
        for choice in CHOICES
        for run in short(
            f"pairs-{choice}", "miniature-dpo", seeds, {"train_data": file_of(choice)}, before=partial(make, choice)
        )
    ]


def file_of(choice: str) -> str:
    return f"pairs-{choice}.parquet"


def make(choice: str, root: Path) -> None:
    pictures, log = root / "four-of-each", root / "four-of-each.txt"
    with locked(pictures):
        if not (root / file_of(choice)).is_file():
            drawn = ["--prompts", "miniature-seen", "--output_dir", str(pictures), "--batch_size", "32"]
            palate(["generate", "mini-sd", *drawn, *SIZE], log)
            output = ["--output", str(root / file_of(choice))]
            palate(["label", str(pictures), "--judges", "[mini-pickscore]", *CHOICES[choice], *output], log)


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = [[choice, *against_base(measured, f"pairs-{choice}", seeds)] for choice in CHOICES]
    return table(["pairs", "held out", "preference", "prompt", "looks"], [r for r in rows if len(r) > 1])
