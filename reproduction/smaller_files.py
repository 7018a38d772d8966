"""Claim: files 25 % smaller at unchanged prompt following, with thousands of queries.

    python reproduction/claims.py files             runs what is missing
    python reproduction/smaller_files.py FOLDER     plain edits of the pictures in a folder, and training nothing

DDPO-IS for small files and prompt following: the recipe; at a third of its rate; and with the size that a file has once all
pictures have the same contrast, 3,072 queries. Settings were chosen on *seen* prompts, with another seed. Unseen prompts are
drawn with a part of the LoRA's strength and with more than all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from runs import QUIET, Drawing, Run, Task, interval, mean_gain, pyplot, read_scores, sheet, table
from short import UNSEEN

from palate.data.images import to_tensor
from palate.evaluation.manifest import read_manifest
from palate.judges.jpeg import jpeg_compressibility
from palate.names.judges import find_judges
from palate.runs.models import load_base

PROMPTS, SCALES = 128, (0.5, 1.0, 1.5)
JUDGES = ("jpeg_compressibility", "mini-clip", "mini-heldout", "mini-pickscore")
NUMBER = ("--num_prompts", str(PROMPTS))
BASE = Drawing(f"drawn-base-{UNSEEN}-{PROMPTS}", "mini-sd", UNSEEN, NUMBER, judges=JUDGES)
SLOW: dict[str, Any] = {
    "objective.clip_range": 0.01,
    "learning_rate": 3e-4,
    "lr_warmup_steps": 0,
    "timestep_fraction": 1.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "slow": {**SLOW, "rounds": 16, "rewards": "{jpeg_compressibility: 1.0, mini-clip: 0.5}"},
    "one-contrast": {**SLOW, "rounds": 48, "rewards": "{smaller_files:size_at_one_contrast: 1.0, mini-clip: 0.5}"},
}
COMMON = {**QUIET, "held_out_rewards": "[]", "checkpointing_steps": 16}
DRAWN: dict[tuple[str, float], tuple[tuple[str, float], ...]] = {
    **{(name, scale): ((name, scale),) for name in VARIANTS for scale in SCALES},
    **{("both", scale): (("one-contrast", 1.0), ("slow", scale)) for scale in SCALES},
}
"""What is drawn, by a name and a strength: with which LoRAs, each at which strength."""
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


def trained(name: str, seed: int) -> Run:
    changes = VARIANTS[name]
    options = {**COMMON, "seed": seed, **changes}
    return Run(f"files-{name}-{seed}", "miniature-ddpo-is", options, cost=20 * changes.get("rounds", 12))


def drawn_name(name: str, scale: float, seed: int) -> str:
    return f"drawn-files-{name}-{seed}-{scale:g}"


def runs(measured: Path, seeds: Sequence[int]) -> list[Task]:
    found: list[Task] = [BASE]
    for seed in seeds:
        found += [trained(name, seed) for name in VARIANTS]
        for (name, scale), parts in DRAWN.items():
            loras = tuple((trained(part, seed), strength) for part, strength in parts)
            found.append(Drawing(drawn_name(name, scale, seed), "mini-sd", UNSEEN, NUMBER, loras, JUDGES, cost=50))
    return found


def changes(measured: Path, name: str, scale: float, seeds: Sequence[int]) -> np.ndarray | None:
    """``(seeds, pictures, judges)``, of finished seeds: scores less those of the base model, sizes in % of its mean."""
    base = read_scores(measured, BASE.name, UNSEEN, JUDGES)
    found = [read_scores(measured, drawn_name(name, scale, seed), UNSEEN, JUDGES) for seed in seeds]
    found = [one for one in found if one is not None]
    if base is None or not found:
        return None
    moved = np.stack(found) - base
    moved[:, :, 0] *= 100 / base[:, 0].mean()
    return moved


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    """The mean change by each judge: 95 % over prompts and seeds, then each seed's own."""
    rows = []
    for (name, scale), parts in DRAWN.items():
        if (moved := changes(measured, name, scale, seeds)) is not None:
            told = " and ".join(f"{part} at {strength:g}" for part, strength in parts)
            rows.append([told, *(mean_gain(moved[:, :, k], 1) for k in range(len(JUDGES)))])
    return table(["LoRA", "size, %", *JUDGES[1:]], rows)


def plot(measured: Path, seeds: Sequence[int], to: Path) -> None:
    """Prompt following against size at every strength of the LoRA, in the mean over the seeds, with 95 %."""
    figure, axis = pyplot().subplots(figsize=(5.5, 3.6))
    for name in (*VARIANTS, "both"):
        found = [moved for scale in SCALES if (moved := changes(measured, name, scale, seeds)) is not None]
        points = [(0.0, 0.0), *((float(one[:, :, 0].mean()), float(one[:, :, 1].mean())) for one in found)]
        ends = [(0.0, 0.0), *(interval(one[:, :, 1]) for one in found)]
        sizes, following = zip(*points, strict=True)
        bars = [
            [y - low for (_, y), (low, _) in zip(points, ends, strict=True)],
            [high - y for (_, y), (_, high) in zip(points, ends, strict=True)],
        ]
        axis.errorbar(sizes, following, yerr=bars, fmt="o-", capsize=2, label=name)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.axvline(-25, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="size, change in %", ylabel="mini-clip, change (95 %)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def grid(root: Path, path: Path) -> None:
    """The same prompts from the same noise by mini-sd and with the LoRAs of seed 0; nothing without the pictures."""
    with_loras = {name: root / drawn_name(name, 1.0, 0) for name in (*VARIANTS, "both")}
    sheet({"mini-sd": root / BASE.name, **with_loras}, path, every=8)


def edits(base: Path) -> list[str]:
    """base: a folder of the base model's pictures, such as that of :data:`BASE` in ``out/reproduction``.

    An edit that the model's own autoencoder does not keep is one that the model cannot learn.
    """
    pictures = read_manifest(base)
    prompts, images = [p.prompt for p in pictures], [Image.open(base / p.file).convert("RGB") for p in pictures]
    judges = [judge.load() for judge in find_judges(JUDGES[:2]).values()]
    model, rows = load_base("mini-sd"), []
    for name, (radius, contrast) in EDITS.items():
        edited = [ImageEnhance.Contrast(i.filter(ImageFilter.GaussianBlur(radius))).enhance(contrast) for i in images]
        pixels = to_tensor(edited)
        with torch.no_grad():
            kept = model.decode(model.encode_images(2 * pixels - 1)).clamp(0, 1)
        kb, prompt, kb_kept, prompt_kept = (float(judge(x, prompts).mean()) for x in (pixels, kept) for judge in judges)
        rows.append([name, f"{-kb:.2f}", f"{prompt:.1f}", f"{-kb_kept:.2f}", f"{prompt_kept:.1f}"])
    edit = f"edit of {len(images)} pictures of the base model"
    return table([edit, "size, kB", "mini-clip", "size, encoded and decoded", "mini-clip"], rows)


if __name__ == "__main__":
    import sys

    print("\n".join(edits(Path(sys.argv[1]))))
