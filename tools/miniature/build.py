"""All stages of the miniature world, in order, and the cards that say what was measured."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palate.base.files import write_atomically
from palate.miniature import world
from palate.miniature.captions import ATTRIBUTES
from tools.miniature import base_model, base_model_sd3, base_model_xl, judging, voting
from tools.miniature.base_model import SEED, say
from tools.miniature.raters import load_eye


def build_all(work: Path, target: Path = world.ROOT) -> None:
    """Train and write the whole world. Stages already done in ``work`` are not repeated; ``target`` gets the results.

    On two cores this takes about three hours. Each training continues where it was stopped.
    """
    work.mkdir(parents=True, exist_ok=True)
    sd = work / "mini-sd"
    _once(sd / "tokenizer" / "tokenizer_config.json", lambda: base_model.build_tokenizer(sd / "tokenizer"))
    _once(sd / "vae" / "config.json", lambda: base_model.build_vae(work, sd / "vae"))
    _once(sd / "model_index.json", lambda: base_model.build_diffusion(work, sd))
    _once(work / "mini-rater" / "model.safetensors", lambda: judging.build_eye(work, work / "mini-rater"))
    _once(work / "mini-clip" / "config.json", lambda: judging.build_clip(work, work / "mini-clip"))
    _once(
        work / "mini-aesthetic" / "aesthetic_head.safetensors",
        lambda: judging.build_aesthetic(work, work / "mini-clip", work / "mini-aesthetic"),
    )
    _once(
        work / "mini-pickscore" / "config.json",
        lambda: judging.build_preference(
            work, work / "mini-pickscore", start=work / "mini-clip", seed=SEED + 4, pairs="pairs-a", steps=1000
        ),
    )
    _once(
        work / "mini-heldout" / "config.json",
        lambda: judging.build_preference(
            work,
            work / "mini-heldout",
            start=None,
            seed=SEED + 5,
            pairs="pairs-b",
            steps=judging.HELD_OUT_STEPS,
            **judging.HELD_OUT_SHAPE,
        ),
    )
    texts = voting.prompts(SEED + 50, voting.PAIRS, held_out=False)
    both = voting.candidates(work, sd, "candidates", texts, SEED * 10)
    voted = voting.write_pairs(
        target / world.PAIRS["miniature-pairs"] / "train.parquet", texts, both, work / "mini-rater", SEED + 51, "mini-sd"
    )
    unseen = voting.prompts(SEED + 70, voting.UNSEEN, held_out=True)
    for name, lines in (("seen", texts[: voting.UNSEEN]), ("unseen", unseen)):
        write_atomically(target / "prompts" / f"{name}.txt", ("\n".join(lines) + "\n").encode())
    for name in ("mini-sd", "mini-rater", *world.JUDGES):
        shutil.copytree(work / name, target / "checkpoints" / name, dirs_exist_ok=True)
    _write_measured(target, measure(work, voted))
    build_xl(work, target)
    build_sd3(work, target)
    build_mixed(target)
    say(f"the miniature world lies in {target}")


def build_xl(work: Path, target: Path = world.ROOT) -> None:
    """Train ``mini-sdxl`` from the finished mini-sd and mini-clip in ``target``, and have its pictures voted on.

    On one core this takes about an hour.
    """
    work.mkdir(parents=True, exist_ok=True)
    parts, xl = target / "checkpoints", work / "mini-sdxl"
    _once(
        xl / "model_index.json",
        lambda: base_model_xl.build_diffusion_xl(work, parts / "mini-sd", parts / "mini-clip", xl),
    )
    _have_voted(work, target, xl, "miniature-sdxl-pairs", SEED + 52, SEED * 10 + 1_000_000, steps=10, half=True)


def build_sd3(work: Path, target: Path = world.ROOT) -> None:
    """Train ``mini-sd3`` from the finished mini-sd and mini-clip in ``target``, and have its pictures voted on.

    On one core this takes about an hour and a half.
    """
    work.mkdir(parents=True, exist_ok=True)
    parts, sd3 = target / "checkpoints", work / "mini-sd3"
    _once(
        sd3 / "model_index.json",
        lambda: base_model_sd3.build_diffusion_sd3(work, parts / "mini-sd", parts / "mini-clip", sd3),
    )
    # Without guidance: with it two of its pictures are so much alike that raters cannot tell.
    _have_voted(work, target, sd3, "miniature-sd3-pairs", SEED + 54, SEED * 10 + 2_000_000, steps=12, guidance=1.0)


def _have_voted(work: Path, target: Path, model: Path, pairs: str, seed: int, first: int, **options: Any) -> None:
    """Draw pictures of a finished model from ``first`` on, have them voted on, and put all where the package has it.

    options: of :func:`voting.sample`, for the candidates.
    """
    parts = target / "checkpoints"
    texts = voting.prompts(seed, voting.MORE_PAIRS, held_out=False)
    both = voting.candidates(work, model, f"candidates-{model.name}", texts, first, **options)
    path = target / world.PAIRS[pairs] / "train.parquet"
    voted = voting.write_pairs(path, texts, both, parts / "mini-rater", seed + 1, model.name)
    shutil.copytree(model, parts / model.name, dirs_exist_ok=True)
    say(f"measuring {model.name}")
    found = {
        f"{model.name}: date": time.strftime("%Y-%m-%d"),
        f"{model.name}: attributes found in pictures of unseen prompts": voting.followed(model, parts / "mini-rater"),
        f"{model.name}: pairs": voted,
    }
    _write_measured(target, json.loads((parts / "measured.json").read_text()) | found)


def build_mixed(target: Path = world.ROOT) -> None:
    """Render the pairs of several sizes; seconds."""
    path = target / world.PAIRS["miniature-mixed-pairs"] / "train.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    say(f"pairs by size: {voting.write_mixed_pairs(path, SEED + 80)}")


def _write_measured(target: Path, measured: dict[str, Any]) -> None:
    (target / "checkpoints" / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    write_cards(target / "checkpoints", measured)


def _once(done: Path, make: Any) -> None:
    if done.is_file():
        say(f"{done.parent.name}: done before")
    else:
        make()


def measure(work: Path, voted: dict[str, float]) -> dict[str, Any]:
    """Every number on the cards."""
    from diffusers import AutoencoderKL

    say("measuring")
    images, _, labels, appeal = base_model.picture_set(work, "test-shots", SEED + 90, 2000)
    eye = load_eye(work / "mini-rater")
    vae = AutoencoderKL.from_pretrained(work / "mini-sd" / "vae", dtype=torch.float32).eval()
    with torch.no_grad():
        logits, looks = eye(images.float() / 255)
        x = images[:512].float() / 127.5 - 1
        back = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in x.split(64)])
    hits = torch.stack([p.argmax(1) == labels[:, i] for i, p in enumerate(eye.split(logits).values())], 1).float()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "seed": SEED,
        "vae: mean absolute error in grey levels of 255": float((back - x).abs().mean() * 127.5),
        "mini-sd: attributes found in pictures of unseen prompts": voting.followed(work / "mini-sd", work / "mini-rater"),
        "mini-rater: attribute accuracy on renders": dict(zip(ATTRIBUTES, hits.mean(0).tolist(), strict=True)),
        "mini-rater: correlation of appeal with the truth": float(np.corrcoef(looks, appeal)[0, 1]),
        "mini-pickscore: accuracy on unseen pairs of renders": judging.accuracy(work, work / "mini-pickscore"),
        "mini-heldout: accuracy on unseen pairs of renders": judging.accuracy(work, work / "mini-heldout"),
        "mini-clip: finds the right caption among one-attribute changes": judging.caption_accuracy(work, work / "mini-clip"),
        "mini-aesthetic: correlation with the truth": judging.aesthetic_correlation(work, work / "mini-aesthetic"),
        "pairs": voted,
    }


ABOUT = {
    "mini-sd": """A Stable Diffusion 1.x pipeline in everything but size: 64 x 64 pictures, 16 x 16 x 4 latents, noise
prediction, scaled-linear betas, CLIP text encoder. It has learned good and spoilt pictures alike,
so that alignment has something to mend.""",
    "mini-sdxl": """A Stable Diffusion XL pipeline in everything but size: two text encoders (those of mini-sd and
mini-clip), a pooled embedding, size and crop of every picture, 64 x 64 pictures, mini-sd's VAE, Euler scheduler. Only its
U-Net was trained, from mini-sd's weights on.""",
    "mini-sd3": """A Stable Diffusion 3 pipeline in everything but size: a rectified flow whose transformer text and picture
share (3.5's normalised queries and keys), the text encoders of mini-sd and mini-clip, no T5, mini-sd's VAE. Only its
transformer was trained, from random weights.""",
    "mini-rater": """The eye of the simulated raters: reads the seven attributes of a scene and the looks of a picture.
It votes on the pairs and measures the model; it is no judge of results.""",
    "mini-clip": """A contrastive CLIP for CLIPScore: does the picture fit the prompt? Trained on renders and their
captions.""",
    "mini-aesthetic": """mini-clip with a linear head on its image embedding, in the form of LAION's aesthetic predictor v1,
scale 1 to 10.""",
    "mini-pickscore": """A preference judge in PickScore's form, fine-tuned from mini-clip on pairs of renders voted by
simulated raters. For labels and rewards.""",
    "mini-heldout": """A preference judge of another shape, trained from scratch on other pairs, voted by other raters with
another seed. It only evaluates.""",
}


def write_cards(folder: Path, measured: dict[str, Any]) -> None:
    """One README.md per checkpoint that is there, with what was measured on the day it was built."""
    for name, about in ((n, a) for n, a in ABOUT.items() if (folder / n).is_dir()):
        lines = [
            "---",
            "license: apache-2.0",
            "library_name: " + ("diffusers" if name in world.MODELS else "transformers"),
            "---",
            "",
        ]
        lines += [
            f"# {name}",
            "",
            about,
            "",
            "Part of the miniature world of Palate, made from a procedural renderer alone.",
            "",
        ]
        lines += ["| measured | value |", "| --- | --- |"]
        also = ("vae", "pairs") if name == "mini-sd" else ()
        date = measured.get(f"{name}: date", measured["date"])
        mine = {k: v for k, v in measured.items() if k.partition(":")[0] in (name, *also) and k != f"{name}: date"}
        for key, value in mine.items():
            for label, number in value.items() if isinstance(value, dict) else [("", value)]:
                lines.append(f"| {key.partition(': ')[2] or key} {label}".rstrip() + f" | {number:.4g} |")
        lines += [
            "",
            f"Command: `python -m tools.miniature`, seed {measured['seed']}, {date}, torch {measured['torch']}, CPU.",
            "",
        ]
        write_atomically(folder / name / "README.md", "\n".join(lines).encode())
