"""How much smaller can files become before prompts are lost? Settings of the miniature DDPO recipe, and plain edits.

    python reproduction/smaller_files.py recipe kl guided late edits --output_dir out/smaller

Every variant is `palate train` with a few options changed, compared with the base model on *seen* prompts, so that the unseen
ones stay honest for what is chosen here. ``edits`` trains nothing: it blurs the base model's pictures of the first finished
variant and takes away contrast, which says how small files could be if a model learned just that. Finished runs are not
repeated; the table is written to ``<output_dir>/table.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image, ImageEnhance, ImageFilter

from palate.data.images import to_tensor
from palate.evaluation.manifest import read_manifest
from palate.judges.jpeg import jpeg_compressibility
from palate.names.judges import find_judges

JUDGES = ("jpeg_compressibility", "mini-clip")
BOTH = "{jpeg_compressibility: 1.0, mini-clip: 1.0}"
PERCEPTUAL = {"space": "perceptual", "guidance_in_training": "false"}
SLOWLY = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "num_evaluation_prompts": 64}
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
    "floor": (
        "miniature-ddpo-is",
        {"rounds": 18, "rewards": "{reproduction.smaller_files:floored: 1.0, mini-clip: 1.0}", **SLOWLY},
    ),
    "rwr": ("miniature-rwr", {"rounds": 4, "rewards": BOTH, "learning_rate": 3e-4}),
    "rwr-perceptual": ("miniature-rwr", {"rounds": 4, "rewards": BOTH, "learning_rate": 3e-4, **PERCEPTUAL}),
    "online-ncp-dpo": ("miniature-online-dpo", {"rounds": 4, "rewards": BOTH, "objective.beta": 7e5, **PERCEPTUAL}),
}
COMMON = {
    "evaluation_prompts": "miniature-seen",
    "held_out_rewards": "[]",
    "judges": f"[{', '.join(JUDGES)}]",
    "validation_prompts": "[]",
    "eval_steps": "null",
    "lr_warmup_steps": 0,
}
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


def train(name: str, out: Path) -> str:
    """A line of the table."""
    recipe, options = VARIANTS[name]
    if not (out / "metrics.json").is_file():
        words = [word for option, value in (COMMON | options).items() for word in (f"--{option}", str(value))]
        command = [sys.executable, "-m", "palate", "train", recipe, "--output_dir", str(out), *words]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = {one["judge"]: one for one in json.loads((out / "metrics.json").read_text())["comparisons"]}
    size, prompt = (found[judge] for judge in JUDGES)
    share = size["mean_tuned"] / size["mean_base"] - 1
    clip = "{mean_base:.1f} | {mean_tuned:.1f}".format(**prompt)
    change = "{low:+.1f} to {high:+.1f}".format(**prompt["difference"])
    return f"| {name} | {-size['mean_base']:.2f} | {-size['mean_tuned']:.2f} ({share:+.0%}) | {clip} ({change}) |"


def edits(base: Path) -> list[str]:
    pictures = read_manifest(base)
    prompts, images = [p.prompt for p in pictures], [Image.open(base / p.file).convert("RGB") for p in pictures]
    judges = {name: judge.load() for name, judge in find_judges(JUDGES).items()}
    lines = [f"| edit of {len(images)} pictures of the base model | size, kB | mini-clip |", "| --- | --- | --- |"]
    for name, (radius, contrast) in EDITS.items():
        edited = [ImageEnhance.Contrast(i.filter(ImageFilter.GaussianBlur(radius))).enhance(contrast) for i in images]
        size, prompt = (float(judge(to_tensor(edited), prompts).mean()) for judge in judges.values())
        lines.append(f"| {name} | {-size:.2f} | {prompt:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*VARIANTS, "edits"])
    parser.add_argument("--output_dir", type=Path, default=Path("out/smaller"))
    given = parser.parse_args()
    lines = [
        "| setting | size before, kB | after | mini-clip before | after (difference, 95 %) |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [train(name, given.output_dir / name) for name in given.parts if name != "edits"]
    if "edits" in given.parts:
        base = next((path for name in VARIANTS if (path := given.output_dir / name / "evaluation" / "base").is_dir()), None)
        if base is None:
            parser.error("edits needs the base model's pictures: name a variant to train first")
        lines += ["", *edits(base)]
    given.output_dir.mkdir(parents=True, exist_ok=True)
    (given.output_dir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
