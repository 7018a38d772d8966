"""Pictures a second of each family of judges, next to the one-picture-at-a-time snippet of its model card.

    python benchmarks/judge_speed.py --pictures 8 --side 512 --judges pickscore clipscore

The published architectures at their real size with random weights: time does not depend on the values. Both read the same
PNG files in one process and take turns; the snippet opens, prepares and scores one picture and its prompt at a time, ours is
``score_files``. "floor" is the time of the arithmetic alone: the multiplications of one picture and prompt at the rate at which
this machine multiplies large matrices. On a CPU without bfloat16 arithmetic leave that type out (``--dtypes float32``): it
takes minutes a picture there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
)

from palate.judges.aesthetic import AestheticJudge
from palate.judges.clip import Clip, ClipJudge
from palate.judges.hps import TEXT, VISION
from palate.judges.imagereward import MEAN, STD, ImageRewardJudge
from palate.judges.pictures import Preprocess
from palate.judges.stream import score_files
from palate.miniature import world

PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect, number {}"
L14 = {
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PROMPT.replace(",", "").split(), ",", *map(str, range(10))]


def clip(text: dict[str, Any], vision: dict[str, Any], width: int) -> Clip:
    tokenizer = CLIPTokenizer.from_pretrained(world.checkpoint("mini-pickscore"), model_max_length=77)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = vision | {"patch_size": 14, "image_size": 224}
    return Clip(CLIPModel(CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=width)), tokenizer)


def snippet_of_clip(model: Clip, padding: str | bool, scale: float) -> Callable[[Path, str], float]:
    """As the cards of PickScore and CLIP have it, with transformers 5's names."""
    processor = CLIPImageProcessor()

    def of(path: Path, prompt: str) -> float:
        pixels = processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
        text = model.tokenizer(prompt, padding=padding, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            seen = model.model.get_image_features(pixel_values=pixels).pooler_output
            read = model.model.get_text_features(**text).pooler_output
            return float(scale * (seen / seen.norm() * (read / read.norm())).sum())

    return of


def snippet_of_aesthetic(model: Clip, judge: AestheticJudge) -> Callable[[Path, str], float]:
    processor = CLIPImageProcessor()

    def of(path: Path, prompt: str) -> float:
        pixels = processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            seen = model.model.get_image_features(pixel_values=pixels).pooler_output
            return float((seen / seen.norm()) @ judge.weight + judge.bias)

    return of


def snippet_of_imagereward(judge: ImageRewardJudge) -> Callable[[Path, str], float]:
    processor = CLIPImageProcessor()

    def of(path: Path, prompt: str) -> float:
        text = judge.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        pixels = processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            seen = judge.vision(pixel_values=pixels).last_hidden_state
            state = judge.text(
                input_ids=text.input_ids, attention_mask=text.attention_mask, encoder_hidden_states=seen, is_decoder=False
            ).last_hidden_state
            return float((state[:, 0] @ judge.weight + judge.bias - MEAN) / STD)

    return of


def imagereward(folder: Path) -> ImageRewardJudge:
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(WORDS)) + "\n")
    heads = {"num_attention_heads": 12, "encoder_hidden_size": 1024, "is_decoder": True}
    vision = BlipVisionModel(BlipVisionConfig(**L14["vision"], image_size=224, patch_size=16, layer_norm_eps=1e-6))
    text = BlipTextModel(BlipTextConfig(**heads, bos_token_id=None, sep_token_id=None), add_pooling_layer=False)
    for model in (vision, text):
        model.eval().requires_grad_(False)
    return ImageRewardJudge(vision, text, BertTokenizer.from_pretrained(folder), torch.randn(768), torch.tensor(0.0))


def multiplications(tower: dict[str, int], tokens: int) -> float:
    """Floating-point operations of a transformer: projections and MLP of each token, and attention between them."""
    width, layers, inner = tower["hidden_size"], tower["num_hidden_layers"], tower["intermediate_size"]
    return 2.0 * layers * tokens * (4 * width**2 + 2 * width * inner + 2 * tokens * width)


def rate(dtype: torch.dtype) -> float:
    """Operations a second of this machine in large products."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(taken)


def cases(names: list[str], folder: Path) -> dict[str, tuple[Any, Callable[[Path, str], float], list[Any], float]]:
    """Judge -> itself, its snippet, its models, operations a picture; the backbones are made as they are needed."""
    made: dict[str, Any] = {}

    def backbone(size: str) -> Clip:
        if size not in made:
            made[size] = clip(TEXT, VISION, 1024) if size == "H" else clip(L14["text"], L14["vision"], 768)
        return made[size]

    found = {}
    for name in names:
        if name == "imagereward":
            judge = imagereward(folder)
            bert = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
            cost = multiplications(L14["vision"], 197) + 1.4 * multiplications(bert, 20)
            found[name] = (judge, snippet_of_imagereward(judge), [judge.vision, judge.text], cost)
            continue
        model = backbone("L" if name in ("clipscore", "aesthetic") else "H")
        tower = L14["vision"] if name in ("clipscore", "aesthetic") else VISION
        cost = multiplications(tower, 257)
        if name == "aesthetic":
            judge = AestheticJudge(model, Preprocess(), torch.randn(768), torch.tensor(0.0))
            found[name] = (judge, snippet_of_aesthetic(model, judge), [model.model], cost)
            continue
        cost += multiplications(TEXT if name != "clipscore" else L14["text"], 20)
        judge = ClipJudge(name, model, Preprocess(whole=name.startswith("hps")))
        # open_clip, which HPS uses, always pads to 77 tokens; the other cards pad a single prompt, so not at all.
        padding = "max_length" if name.startswith("hps") else True
        found[name] = (judge, snippet_of_clip(model, padding, judge.scale), [model.model], cost)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = ["pickscore", "hpsv2.1", "clipscore", "aesthetic", "imagereward"]
    parser.add_argument("--judges", nargs="+", default=families, choices=families)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--per_prompt", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = []
        for i in range(given.pictures):
            noise = np.random.default_rng(i).integers(0, 256, (given.side // 8, given.side // 8, 3), dtype=np.uint8)
            path = folder / f"{i}.png"
            Image.fromarray(noise).resize((given.side, given.side), Image.Resampling.BICUBIC).save(path)
            items.append((path, PROMPT.format(i // given.per_prompt)))
        rates = {dtype: rate(getattr(torch, dtype)) for dtype in given.dtypes}
        print(
            f"{given.pictures} pictures of {given.side} x {given.side}, {given.per_prompt} a prompt, batches of "
            f"{given.batch_size}; torch {torch.__version__}, {torch.get_num_threads()} threads; products of 2048 x 2048: "
            + ", ".join(f"{dtype} {r / 1e9:.0f} GFLOP/s" for dtype, r in rates.items()),
            flush=True,
        )
        for family in given.judges:
            judge, snippet, models, cost = cases([family], folder)[family]
            taken: dict[str, list[float]] = {how: [] for how in ("snippet", *given.dtypes)}
            for turn in range(given.repeats + 1):
                for how, seconds in taken.items():
                    for model in models:
                        model.to(getattr(torch, how, torch.float32))
                    for shared in (getattr(judge, "clip", None),):
                        if shared is not None:
                            shared._known.clear()  # what earlier turns learnt of the prompts
                    began = time.perf_counter()
                    if how == "snippet":
                        scores = [snippet(*item) for item in items]
                    else:
                        scores = dict(score_files(judge, items, batch_size=given.batch_size))
                    if turn:
                        seconds.append(time.perf_counter() - began)
                    assert len(scores) == len(items)
            median = {how: statistics.median(seconds) / len(items) for how, seconds in taken.items()}
            floors = {how: cost / rates[how] for how in given.dtypes}
            print(
                f"{family:<12} {cost / 1e9:5.0f} GFLOP a picture; pictures/s: snippet {1 / median['snippet']:.3f}, "
                + ", ".join(
                    f"{how} {1 / median[how]:.3f} ({median['snippet'] / median[how]:.2f} x; floor {1 / floors[how]:.3f})"
                    for how in floors
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
