"""A small picture folder of two models, drawn by the miniature world."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from palate.miniature.captions import caption
from tools.miniature import scenes

CATEGORIES = ("people", "places")


def picture_folder(folder: Path, *, prompts: int = 4, per_prompt: int = 1, models=("plain", "tuned"), size: int = 64) -> Path:
    """``models[0]`` draws flawed pictures, the others good ones; the files' texts name the model, as other programs write."""
    rng = np.random.default_rng(0)
    for model in models:
        (folder / model).mkdir(parents=True, exist_ok=True)
        (folder / model / "manifest.jsonl").unlink(missing_ok=True)
    for number in range(prompts):
        scene = scenes.random_scene(rng)
        prompt = f"{caption(scene, rng)} <b>&{number}"
        for index in range(per_prompt):
            for model in models:
                texts = PngImagePlugin.PngInfo()
                texts.add_text("parameters", f"Model: {model}")
                image = scenes.shoot(scene, rng, flaw_share=float(model == models[0]), wrong_share=0.0).image
                name = f"{number:03d}-{index}.png"
                image.resize((size, size), Image.Resampling.BICUBIC).save(folder / model / name, pnginfo=texts)
                line = {"file": name, "prompt": prompt, "seed": 7 * number + index, "index": index, "model": model}
                line["metadata"] = {"category": CATEGORIES[number % 2]}
                with (folder / model / "manifest.jsonl").open("a") as manifest:
                    manifest.write(json.dumps(line) + "\n")
    return folder
