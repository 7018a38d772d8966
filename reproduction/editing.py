"""Claim: a tuned model edits better too. SDEdit of 64 pictures by the base model and by tuned ones, another prompt each.

Published (arXiv 2311.12908): DPO-SDXL is preferred to SDXL in 65 against 24 % of edits at strength 0.6. What is edited are
pictures of seen prompts by the base model, what is wished for are unseen prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import layers
from runs import DRAWN, Drawing, locked, palate, table, versus
from short import PROMPTS, short

WISHES, STRENGTH, SOURCES = "wishes.jsonl", "0.6", "edit-sources"
NCP = layers.named("last_down, one step back")


def runs(measured: Path, seeds: Sequence[int]) -> list[Drawing]:
    found = [Drawing("edit-base", "mini-sd", WISHES, ("--strength", STRENGTH), before=make)]
    tuned = [*short("dpo", "miniature-dpo", seeds), *(run for run in layers.runs(measured, seeds) if run.name.startswith(NCP))]
    return found + [
        Drawing(f"edit-{run.name}", "mini-sd", WISHES, ("--strength", STRENGTH), ((run, 1.0),), before=make) for run in tuned
    ]


def make(root: Path) -> None:
    from palate.data.prompts import read_prompts
    from palate.miniature import world

    with locked(root / WISHES):
        if (root / WISHES).is_file():
            return
        words = ["--prompts", "miniature-seen", "--num_prompts", str(PROMPTS), "--output_dir", SOURCES, *DRAWN]
        palate(["generate", "mini-sd", *words], root / f"{SOURCES}.txt")
        wishes = read_prompts(world.unseen_prompts())[:PROMPTS]
        lines = [{"prompt": wish.text, "init_image": f"{SOURCES}/{i:05d}-00.png"} for i, wish in enumerate(wishes)]
        (root / WISHES).write_text("".join(json.dumps(line) + "\n" for line in lines))


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    names = {"DPO": "dpo", "NCP-DPO": NCP}
    rows = [
        [label, *versus(measured, [("edit-base", f"edit-{name}-{seed}") for seed in seeds], WISHES)]
        for label, name in names.items()
    ]
    return table(["edits of", "held out", "preference", "prompt", "looks"], [row for row in rows if row[1:]])
