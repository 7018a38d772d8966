"""Question: winners from far away, real renders against the model's own pictures: what prevents that training harms?

Published (HG-DPO, CVPR 2025): with photos as winners DPO and NCP-DPO collapse. 300 seen prompts, 40 updates or 160.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runs import DRAWN, Run, locked, palate, read_json, table
from short import against_base, short
from worldmaking import jpeg, render

FILE, PROMPTS = "offpolicy.parquet", 300
LONG = {"max_train_steps": "160"}
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "DPO": ("miniature-dpo", {}),
    "DPO, ten times beta": ("miniature-dpo", {"objective.beta": "10000"}),
    "DPO, a third of the rate": ("miniature-dpo", {"learning_rate": "1e-4"}),
    "NCP-DPO": ("miniature-ncp-dpo", {}),
    "SDPO": ("miniature-sdpo", {}),
    "MaPO": ("miniature-mapo", {}),
    "SFT": ("miniature-sft", {}),
    "DPO, 160 updates": ("miniature-dpo", LONG),
    "NCP-DPO, 160 updates": ("miniature-ncp-dpo", LONG),
    "SDPO, 160 updates": ("miniature-sdpo", LONG),
    "SFT, 160 updates": ("miniature-sft", LONG),
}


def named(variant: str) -> str:
    return "offpolicy-" + variant.replace(",", "").replace(" ", "-")


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [
        run
        for variant, (recipe, changes) in VARIANTS.items()
        for run in short(
            named(variant), recipe, seeds, {"train_data": FILE, **changes}, before=make, cost=60 if changes != LONG else 180
        )
    ]


def make(root: Path) -> None:
    from PIL import Image

    from palate.data import pickapic
    from palate.data.prompts import read_prompts
    from palate.miniature import world

    with locked(root / FILE):
        if (root / FILE).is_file():
            return
        own = root / "offpolicy-own"
        words = ["--prompts", "miniature-seen", "--num_prompts", str(PROMPTS), "--output_dir", str(own), *DRAWN]
        palate(["generate", "mini-sd", *words], root / "offpolicy-own.txt")
        rows = []
        for number, prompt in enumerate(read_prompts(world.seen_prompts())[:PROMPTS]):
            sides = (render(prompt.text, number), Image.open(own / f"{number:05d}-00.png"))
            rows.append(pickapic.row(prompt.text, *map(jpeg, sides), 1.0))
        pickapic.write(root / FILE, rows)


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = [[variant, *against_base(measured, named(variant), seeds)] for variant in VARIANTS]
    lines = table(["renders against own pictures", "held out", "preference", "prompt", "looks"], [r for r in rows if r[1:]])
    rises = [[variant, *rise(measured, variant, seeds)] for variant in VARIANTS]
    return [*lines, "", *table(["times the reference's error at the end", "winners", "losers"], [r for r in rises if r[1:]])]


def rise(measured: Path, variant: str, seeds: Sequence[int]) -> list[str]:
    """Of winners and of losers, each seed's; nothing of runs without a reference."""
    found = [read_json(measured / f"{named(variant)}-{seed}.json") for seed in seeds]
    told = [
        [f"{one[f'{side}_error_rise']:.1f}" for one in found if f"{side}_error_rise" in one] for side in ("winner", "loser")
    ]
    return [", ".join(each) for each in told] if all(told) else []
