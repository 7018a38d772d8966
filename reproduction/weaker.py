"""Question: do pairs of a weaker model's pictures lift a stronger one above the winners that it is shown?

Published (arXiv 2311.12908, fig. 7): SDXL, already above the winners, becomes clearly better on them. Here a U-Net as
mini-sd's is trained for a seventh of its steps; its pictures of 200 seen prompts are labelled by ``mini-pickscore``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from runs import DRAWN, JUDGES, Task, judge, locked, palate, read_scores, sheet, table
from short import BASE, UNSEEN, against_base, short
from worldmaking import base_model

WEAK, FILE, STEPS, PROMPTS = "weak-model", "weaker.parquet", 800, 200
METHODS = {"DPO": "miniature-dpo", "NCP-DPO": "miniature-ncp-dpo", "SFT": "miniature-sft"}


@dataclass(frozen=True)
class Pictures:
    """The weaker model's pictures, judged: winners and losers in their order."""

    name: str = "weaker-pictures"
    cost: int = 600

    def finished(self, measured: Path) -> bool:
        return (measured / f"{self.name}.json").is_file()

    def carry_out(self, root: Path, measured: Path) -> str:
        make(root)
        judge(root / "weak-pictures", "miniature-seen", root / f"{WEAK}.txt", measured / f"{self.name}.json")
        return "judged"


def named(method: str) -> str:
    return f"weaker-{method}"


def runs(measured: Path, seeds: Sequence[int]) -> list[Task]:
    found: list[Task] = [Pictures()]
    for method, recipe in METHODS.items():
        found += short(named(method), recipe, seeds, {"train_data": FILE}, before=make)
    return found


def make(root: Path) -> None:
    with locked(root / FILE):
        if (root / FILE).is_file():
            return
        train(root)
        log, pictures = root / f"{WEAK}.txt", root / "weak-pictures"
        words = ["--prompts", "miniature-seen", "--num_prompts", str(PROMPTS), "--images_per_prompt", "2"]
        palate(["generate", str(root / WEAK), *words, "--output_dir", str(pictures), *DRAWN], log)
        palate(["label", str(pictures), "--judges", "[mini-pickscore]", "--output", str(root / FILE)], log)


def train(root: Path) -> None:
    """A U-Net as mini-sd's from random weights, with the finished text encoder and autoencoder, on 6,000 renders."""
    import torch
    from diffusers import StableDiffusionPipeline

    from palate.miniature import world

    out, work = root / WEAK, root / f"{WEAK}-training"
    if out.is_dir():
        return
    work.mkdir(exist_ok=True)
    tools = base_model()
    pipeline = StableDiffusionPipeline.from_pretrained(world.checkpoint("mini-sd"), dtype=torch.float32, safety_checker=None)
    images, captions, *_ = tools.picture_set(work, "shots", tools.SEED + 9, 6000)
    latents = tools.latents_of(work, pipeline.vae, images)
    with torch.no_grad():
        ids = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        texts = torch.cat([pipeline.text_encoder(part).last_hidden_state for part in ids.split(200)])
    torch.manual_seed(tools.SEED + 9)
    unet, scheduler = tools.new_unet(), tools.new_scheduler()

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (tools.UNET_BATCH,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        t = torch.randint(1000, (tools.UNET_BATCH,), generator=generator)
        return tools.noise_loss(lambda xt: unet(xt, t, texts[rows]).sample, scheduler, latents[rows], noise, t)

    tools.train(work, "unet", unet, loss_of, steps=STEPS, learning_rate=6e-4, seed=tools.SEED + 9, ema=0.99)
    part = out.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(world.checkpoint("mini-sd"), part)
    unet.save_pretrained(part / "unet")
    part.rename(out)


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = [[method, *against_base(measured, named(method), seeds)] for method in METHODS]
    lines = table(["on a weaker model's pairs", "held out", "preference", "prompt", "looks"], [r for r in rows if r[1:]])
    shown = read_scores(measured, "weaker-pictures", "miniature-seen")
    base = read_scores(measured, BASE, UNSEEN)
    if shown is None or base is None:
        return lines
    both = shown.reshape(-1, 2, len(JUDGES))
    order = np.argsort(both[:, :, JUDGES.index("mini-pickscore")], axis=1)
    groups = {
        "losers": np.take_along_axis(both, order[:, :1, None], axis=1)[:, 0],
        "winners": np.take_along_axis(both, order[:, 1:, None], axis=1)[:, 0],
        "mini-sd": base,
    }
    for method in METHODS:
        found = [one for seed in seeds if (one := read_scores(measured, f"{named(method)}-{seed}", UNSEEN)) is not None]
        if found:
            groups[f"mini-sd after {method}"] = np.concatenate(found)
    medians = [[name, *(f"{value:.2f}" for value in np.median(values, axis=0))] for name, values in groups.items()]
    return [*lines, "", *table(["median score of", *JUDGES], medians)]


def grid(root: Path, path: Path) -> None:
    """What the weaker model draws, mini-sd, and mini-sd after SFT and after DPO on those pictures; nothing without them."""
    after = {f"{method} on the weaker": root / f"{named(method)}-0" / "evaluation" / "tuned" for method in ("SFT", "DPO")}
    sheet({"the weaker model": root / "weak-pictures", "mini-sd": root / BASE, **after}, path)
