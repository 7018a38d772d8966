"""Claim: files 25 % smaller at unchanged prompt following. Settings of the DDPO recipe, and plain edits of the base's pictures.

Compared on *seen* prompts, so that the unseen ones stay honest for what is chosen here. ``edits`` trains nothing: it blurs the
base model's pictures and takes away contrast, which says how small files could be if a model learned just that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageEnhance, ImageFilter
from runs import QUIET, Run, base_name, mean_change, read_scores, table

from palate.data.images import to_tensor
from palate.evaluation.manifest import read_manifest
from palate.judges.jpeg import jpeg_compressibility
from palate.names.judges import find_judges

SEEN, PROMPTS, STEPS = "miniature-seen", 96, 15
JUDGES = ("jpeg_compressibility", "mini-clip")
BASE = base_name("mini-sd", SEEN, PROMPTS)
BOTH = "{jpeg_compressibility: 1.0, mini-clip: 1.0}"
PERCEPTUAL = {"space": "perceptual", "guidance_in_training": "false"}
SLOWLY = {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
VARIANTS = {
    "recipe": ("miniature-ddpo-is", {"lr_warmup_steps": 3}),
    "short": ("miniature-ddpo-is", {"lr_warmup_steps": 3, "rounds": 8}),
    "late": ("miniature-ddpo-is", {"rounds": 8, "window_start": 3, "window_size": 3, "timestep_fraction": 1.0}),
    "guided": ("miniature-ddpo-is", {"rounds": 8, "sample_guidance_scale": 2.5}),
    "kl": ("miniature-ddpo-is", {"kl_weight": 0.05}),
    "kl-long": (
        "miniature-ddpo-is",
        {"rounds": 24, "rewards": "{jpeg_compressibility: 1.0, mini-clip: 1.5}", "kl_weight": 0.03, **SLOWLY},
    ),
    "floor": ("miniature-ddpo-is", {"rounds": 18, "rewards": "{smaller_files:floored: 1.0, mini-clip: 1.0}", **SLOWLY}),
    "rwr": ("miniature-rwr", {"rounds": 4, "rewards": BOTH, "learning_rate": 3e-4}),
    "rwr-perceptual": ("miniature-rwr", {"rounds": 4, "rewards": BOTH, "learning_rate": 3e-4, **PERCEPTUAL}),
    "online-ncp-dpo": ("miniature-online-dpo", {"rounds": 4, "rewards": BOTH, "objective.beta": 7e5, **PERCEPTUAL}),
}
COMMON = {**QUIET, "held_out_rewards": "[]", "lr_warmup_steps": 0}
EDITS = {
    "none": (0.0, 1.0),
    "contrast 0.4": (0.0, 0.4),
    "blur 1.5": (1.5, 1.0),
    "blur 1.5, contrast 0.8": (1.5, 0.8),
    "blur 1.5, contrast 0.7": (1.5, 0.7),
}
"""Radius of a Gaussian blur in pixels, and the share of contrast that is left."""


def floored(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
    """Smaller files, down to 1.2 kB: a picture that is grey all over earns no more than that."""
    return jpeg_compressibility(images, prompts).clamp(max=-1.2)


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [
        Run(f"files-{name}-{seed}", recipe, {**COMMON, "seed": seed, **options}, (SEEN,), PROMPTS, STEPS, JUDGES, cost=900)
        for name, (recipe, options) in VARIANTS.items()
        for seed in seeds
    ]


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    """The mean size and score of prompt following, and what each seed changed."""
    rows, base = [], read_scores(measured, BASE, SEEN, JUDGES)
    for name in VARIANTS:
        found = [read_scores(measured, f"files-{name}-{seed}", SEEN, JUDGES) for seed in seeds]
        if base is not None and (found := [one for one in found if one is not None]):
            sizes = ", ".join(f"{one[:, 0].mean() / base[:, 0].mean() - 1:+.0%}" for one in found)
            rows.append(
                [name, f"{-base[:, 0].mean():.2f}", sizes, f"{base[:, 1].mean():.1f}", mean_change(base[:, 1], found, 1)]
            )
    return table(["setting", "kB before", "size, each seed", "mini-clip before", "change, each seed (95 %)"], rows)


def edits(base: Path) -> list[str]:
    """base: a folder of the base model's pictures, such as ``out/reproduction/`` and :data:`BASE`."""
    pictures = read_manifest(base)
    prompts, images = [p.prompt for p in pictures], [Image.open(base / p.file).convert("RGB") for p in pictures]
    judges = {name: judge.load() for name, judge in find_judges(JUDGES).items()}
    rows = []
    for name, (radius, contrast) in EDITS.items():
        edited = [ImageEnhance.Contrast(i.filter(ImageFilter.GaussianBlur(radius))).enhance(contrast) for i in images]
        size, prompt = (float(judge(to_tensor(edited), prompts).mean()) for judge in judges.values())
        rows.append([name, f"{-size:.2f}", f"{prompt:.1f}"])
    return table([f"edit of {len(images)} pictures of the base model", "size, kB", "mini-clip"], rows)


if __name__ == "__main__":
    import sys

    print("\n".join(edits(Path(sys.argv[1]))))
