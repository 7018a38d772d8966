"""Claim: files 25 % smaller at unchanged prompt following, with thousands of queries.

    python reproduction/claims.py files             runs what is missing
    python reproduction/smaller_files.py FOLDER     plain edits of the pictures in a folder, and training nothing

DDPO-IS for small files and prompt following: 3,072 queries at a third of the recipe's rate, against the recipe's 768. One
reward is the size once all pictures have the same contrast. Settings were chosen on *seen* prompts, with another seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from runs import PER_ROUND, QUIET, Run, base_name, interval, pyplot, read_curve, read_scores, table
from short import UNSEEN

from palate.data.images import to_tensor
from palate.evaluation.manifest import read_manifest
from palate.judges import Judge
from palate.judges.jpeg import jpeg_compressibility
from palate.names.judges import find_judges

PROMPTS = 192
JUDGES = ("jpeg_compressibility", "mini-clip", "mini-heldout", "mini-pickscore")
BASE = base_name("mini-sd", UNSEEN, PROMPTS)
LONG: dict[str, Any] = {
    "objective.clip_range": 0.01,
    "learning_rate": 3e-4,
    "lr_warmup_steps": 0,
    "timestep_fraction": 1.0,
    "rounds": 3072 // PER_ROUND,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "long": {**LONG, "rewards": "{jpeg_compressibility: 1.0, mini-clip: 0.5}"},
    "long-one-contrast": {**LONG, "rewards": "{smaller_files:size_at_one_contrast: 1.0, mini-clip: 0.5}"},
}
WATCHED = {"held_out_rewards": "[smaller_files:size, smaller_files:following]", "held_out_pictures": 64, "eval_steps": 16}
EDITS = {
    "none": (0.0, 1.0),
    "contrast 0.4": (0.0, 0.4),
    "blur 1.5": (1.5, 1.0),
    "blur 2": (2.0, 1.0),
    "blur 2, contrast 0.8": (2.0, 0.8),
    "blur 2.5": (2.5, 1.0),
    "blur 3": (3.0, 1.0),
}
"""Radius of a Gaussian blur in pixels, and the share of contrast that is left."""


def size_at_one_contrast(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> torch.Tensor:
    """Minus the kB of each picture's file once all have the same mean and contrast: turning grey earns nothing."""
    mean, std = images.mean(dim=(1, 2, 3), keepdim=True), images.std(dim=(1, 2, 3), keepdim=True)
    return jpeg_compressibility((0.5 + 0.2 * (images - mean) / std.clamp_min(1e-3)).clamp(0, 1), prompts)


def size(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> torch.Tensor:
    """What a run is watched by, under another name than what it may be trained on."""
    return jpeg_compressibility(images, prompts)


def following(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[object]) -> torch.Tensor:
    return _mini_clip()(images, prompts)


@cache
def _mini_clip() -> Judge:
    return find_judges(("mini-clip",))["mini-clip"].load()


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [
        Run(
            f"files-{name}-{seed}",
            "miniature-ddpo-is",
            {**QUIET, **WATCHED, "seed": seed, "checkpointing_steps": 16, **changes},
            (UNSEEN,),
            PROMPTS,
            judges=JUDGES,
            cost=1200 if changes else 400,
        )
        for seed in seeds
        for name, changes in VARIANTS.items()
    ]


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    """The mean of each judge before, and its change: 95 % over prompts and seeds, then each seed's own."""
    base = read_scores(measured, BASE, UNSEEN, JUDGES)
    if base is None:
        return []
    before = base.mean(axis=0)
    rows = []
    for name in VARIANTS:
        found = [read_scores(measured, f"files-{name}-{seed}", UNSEEN, JUDGES) for seed in seeds]
        if found := [one for one in found if one is not None]:
            cells = []
            for k in range(len(JUDGES)):
                changes = np.stack([one[:, k] - base[:, k] for one in found])
                unit = -100 / before[k] if k == 0 else 1
                low, high = sorted(unit * end for end in interval(changes))
                each = ", ".join(f"{unit * change.mean():+.1f}" for change in changes)
                cells.append(f"{unit * changes.mean():+.1f} ({low:+.1f} to {high:+.1f}); {each}")
            rows.append([name, *cells])
    others = [f"{judge}, from {mean:.2f}" for judge, mean in zip(JUDGES[1:], before[1:], strict=True)]
    return table(["DDPO-IS", f"size, % of {-before[0]:.2f} kB", *others], rows)


def plot(measured: Path, seeds: Sequence[int], to: Path) -> None:
    """Prompt following against size as training goes on, every 512 queries on the same 64 seen prompts; a line a seed."""
    curves = {name: [read_curve(measured, f"files-{name}-{seed}") for seed in seeds] for name in VARIANTS}
    if not any(curve for found in curves.values() for curve in found):
        return
    kb, prompt = (f"held_out/smaller_files:{name}" for name in ("size", "following"))
    figure, axis = pyplot().subplots(figsize=(5.5, 3.6))
    for color, (name, found) in enumerate(curves.items()):
        for number, curve in enumerate(curve for curve in found if curve):
            watched = [(-line[kb], line[prompt]) for line in curve if kb in line]
            axis.plot(*zip(*watched, strict=True), "o-", markersize=3, color=f"C{color}", label=None if number else name)
    axis.set(xlabel="size, kB", ylabel="prompt following (mini-clip)")
    axis.invert_xaxis()
    axis.legend()
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def edits(base: Path) -> list[str]:
    """base: a folder of the base model's pictures, such as ``out/reproduction/`` and :data:`BASE`."""
    pictures = read_manifest(base)
    prompts, images = [p.prompt for p in pictures], [Image.open(base / p.file).convert("RGB") for p in pictures]
    judges = {name: judge.load() for name, judge in find_judges(JUDGES[:2]).items()}
    rows = []
    for name, (radius, contrast) in EDITS.items():
        edited = [ImageEnhance.Contrast(i.filter(ImageFilter.GaussianBlur(radius))).enhance(contrast) for i in images]
        kb, prompt = (float(judge(to_tensor(edited), prompts).mean()) for judge in judges.values())
        rows.append([name, f"{-kb:.2f}", f"{prompt:.1f}"])
    return table([f"edit of {len(images)} pictures of the base model", "size, kB", "mini-clip"], rows)


if __name__ == "__main__":
    import sys

    print("\n".join(edits(Path(sys.argv[1]))))
