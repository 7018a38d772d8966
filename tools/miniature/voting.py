"""Builder of the voted pairs, the unseen prompts and the measurements on the model cards."""

from __future__ import annotations

import functools
import io
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from palate.base.files import write_atomically
from palate.data import pickapic
from palate.data.images import to_tensor
from palate.miniature.captions import ATTRIBUTES, caption, scene_of
from palate.models.sd3 import T5_LENGTH
from tools.miniature import scenes
from tools.miniature.base_model import SEED, say
from tools.miniature.base_model_sd3 import MergedZeros
from tools.miniature.raters import crowd, load_eye

PAIRS, MORE_PAIRS, UNSEEN, MIXED = 2400, 1000, 400, 450
SIZES = ((64, 96), (96, 64), (64, 64))
"""Of the mixed pairs, width and height, in turn."""
STEPS, GUIDANCE = 14, 4.0
LAST = "num_example_per_prompt"
COLUMNS = (*sorted(pickapic.TYPES.keys() - {"created_at", "rater", LAST}), LAST)


def prompts(seed: int, count: int, *, held_out: bool) -> list[str]:
    """Different captions of scenes from one side of the split."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        scene = scenes.random_scene(rng)
        if scenes.is_held_out(scene) == held_out:
            found.setdefault(scene, caption(scene, rng))
    return list(found.values())


def sample(
    folder: Path, texts: list[str], seeds: list[int], *, guidance: float = GUIDANCE, steps: int = STEPS, half: bool = False
) -> list[Image.Image]:
    """Pictures of a miniature model, each from its own seed; with ``half`` the network computes in bfloat16.

    By DPM-Solver++, or of mini-sd3 by its own sampler.
    """
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

    sd3 = "StableDiffusion3Pipeline" in (folder / "model_index.json").read_text()
    absent, length = ({"text_encoder_3": None, "tokenizer_3": None}, {"max_sequence_length": 1}) if sd3 else ({}, {})
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)  # of the class that the folder names
    if sd3:
        pipe.transformer.set_attn_processor(MergedZeros(T5_LENGTH))
    else:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(texts), 32):
        generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + 32]]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            images += pipe(
                texts[start : start + 32], num_inference_steps=steps, guidance_scale=guidance, generator=generators, **length
            ).images
        if start % 640 == 0:
            say(f"sampled {len(images)}/{len(texts)}")
    return images


def candidates(work: Path, folder: Path, name: str, texts: list[str], seed: int, **options: Any) -> Tensor:
    """Two pictures of a miniature model for every prompt, uint8 ``(n, 2, 3, 64, 64)``; kept part by part.

    options: of :func:`sample`.
    """
    parts = []
    for start in range(0, len(texts), 200):
        path = work / f"{name}-{start}.pt"
        if not path.exists():
            part = texts[start : start + 200]
            seeds = [seed + 2 * (start + i) + k for i in range(len(part)) for k in range(2)]
            images = sample(folder, [t for t in part for _ in range(2)], seeds, **options)
            pixels = (to_tensor(images) * 255).round().byte().view(len(part), 2, 3, 64, 64)
            write_atomically(path, functools.partial(torch.save, pixels))
        parts.append(torch.load(path, weights_only=True))
    return torch.cat(parts)


def jpeg(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def write_pairs(path: Path, texts: list[str], both: Tensor, eye_folder: Path, seed: int, model: str) -> dict[str, float]:
    """One vote of one rater on every pair, in Pick-a-Pic v2's columns. Returns what the card states."""
    eye, people = load_eye(eye_folder), crowd()
    asked = [scene_of(t) for t in texts]
    looks, follow = (
        np.stack(columns, 1)
        for columns in zip(*([x.numpy() for x in eye.look(both[:, k].float() / 255, asked)[:2]] for k in range(2)), strict=True)
    )
    rows: list[dict[str, pickapic.Value]] = []
    everyone = np.zeros((len(people), len(texts)))
    for index, text in enumerate(texts):
        rng = np.random.default_rng([seed, index])
        for k, person in enumerate(people):
            worth = person.worth(looks[index], follow[index], "general")
            everyone[k, index] = person.vote(float(worth[0]), float(worth[1]), rng)
        chosen = int(rng.integers(len(people)))
        label = float(everyone[chosen, index])
        ids = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(3)]
        rows.append(_row(text, (jpeg(both[index, 0]), jpeg(both[index, 1])), label, ids, model, index, chosen))
    _write(path, rows)
    agree = np.mean([np.mean(a == b) for i, a in enumerate(everyone) for b in everyone[i + 1 :]])
    decided = [(a != 0.5) & (b != 0.5) for i, a in enumerate(everyone) for b in everyone[i + 1 :]]
    among = [
        (a == b)[d].mean()
        for (a, b), d in zip(((a, b) for i, a in enumerate(everyone) for b in everyone[i + 1 :]), decided, strict=True)
    ]
    return {
        "pairs": len(rows),
        "ties": float(np.mean([r["label_0"] == 0.5 for r in rows])),
        "agreement of two raters": float(agree),
        "agreement of two raters, ties left out": float(np.mean(among)),
    }


def write_mixed_pairs(path: Path, seed: int) -> dict[str, int]:
    """Renders of several sizes, two of a scene, with the vote of one rater who sees what the renderer knows.

    Returns how many pairs there are of each size.
    """
    people, rows = crowd(), []
    for index, text in enumerate(prompts(seed, MIXED, held_out=False)):
        rng = np.random.default_rng([seed, index])
        scene, size = scene_of(text), SIZES[index % len(SIZES)]
        shots = [scenes.shoot(scene, rng, flaw_share=0.6, size=size) for _ in range(2)]
        chosen = int(rng.integers(len(people)))
        follow = [np.mean([a == b for a, b in zip(s.asked.labels(), s.shown.labels(), strict=True)]) for s in shots]
        worth = people[chosen].worth(np.array([s.appeal for s in shots]), np.array(follow), "general")
        label = people[chosen].vote(float(worth[0]), float(worth[1]), rng)
        ids = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(2)]
        files = [jpeg(torch.from_numpy(np.array(s.image)).permute(2, 0, 1)) for s in shots]
        rows.append(_row(text, (files[0], files[1]), label, ids, "renderer", index, chosen))
    _write(path, rows)
    return {f"{width}x{height}": sum(SIZES[i % len(SIZES)] == (width, height) for i in range(MIXED)) for width, height in SIZES}


def _row(
    text: str, files: tuple[bytes, bytes], label: float, ids: list[str], model: str, index: int, rater: int
) -> dict[str, pickapic.Value]:
    return pickapic.row(
        text,
        *files,
        label,
        uids=(ids[0], ids[1]),
        model_0=model,
        model_1=model,
        ranking_id=index,
        user_id=rater,
        num_example_per_prompt=1,
    )


def _write(path: Path, rows: list[dict[str, pickapic.Value]]) -> None:
    pickapic.write(path, rows, {name: pickapic.TYPES[name] for name in COLUMNS}, group=256, compression="zstd")


def followed(folder: Path, eye_folder: Path, count: int = 400) -> dict[str, float]:
    """Share of unseen prompts whose attributes the raters' eye finds in the model's picture, and the mean appeal."""
    texts = prompts(SEED + 60, count, held_out=True)
    images = to_tensor(sample(folder, texts, list(range(count))))
    looks, _, hits = load_eye(eye_folder).look(images, [scene_of(t) for t in texts])
    result = {name: float(hits[:, i].float().mean()) for i, name in enumerate(ATTRIBUTES)}
    return {**result, "all seven": float(hits.all(1).float().mean()), "mean appeal": float(looks.mean())}
