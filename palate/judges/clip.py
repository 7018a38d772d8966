"""Judges in CLIP's layout: the score is a cosine between the embeddings of picture and prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from palate.errors import UserError, nearest
from palate.judges.pictures import Preprocess

KINDS = ("clipscore", "pickscore")


def load_clip(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Any, Any, Preprocess]:
    """A frozen float32 ``CLIPModel``, its tokenizer and its preprocessing, from a folder in transformers' layout.

    The tokenizer lies in the folder itself or in its subfolder ``tokenizer``. Weights must be safetensors and complete:
    transformers would fill missing ones with random numbers.
    """
    from transformers import CLIPModel, CLIPTokenizer

    folder = Path(folder)
    words = check_clip(folder)
    model, loading = CLIPModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(f"{folder} is no whole CLIP model: {len(missing)} weights are missing, the first is {missing[0]}")
    tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
    preprocess = Preprocess.load(folder, model.config.vision_config.image_size)
    return model.eval().requires_grad_(False).to(device), tokenizer, preprocess


def check_clip(folder: Path) -> Path:
    """The folder of the tokenizer; raises ``UserError`` if a file is missing, without reading any weights."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected the folder of a CLIP model")
    words = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    _need(folder, ("config.json",))
    _need(folder, ("model.safetensors", "model.safetensors.index.json"))
    if not (words / "tokenizer.json").exists():
        _need(words, ("vocab.json",))
        _need(words, ("merges.txt",))
    return words


def _need(folder: Path, names: tuple[str, ...]) -> None:
    if not any((folder / name).exists() for name in names):
        raise UserError(f"{folder} has no {' or '.join(names)}; expected a CLIP model saved by transformers (save_pretrained)")


def embed_images(model: Any, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d"]:
    """L2-normalised image embeddings, without a pass through the text half."""
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


class ClipJudge:
    """PickScore or CLIPScore.

    - ``pickscore``: exp(logit_scale) * cos, about 18 to 24 (Kirstain et al. 2023, "Pick-a-Pic", Eq. 1 and model card).
    - ``clipscore``: 100 * cos, neither clamped at 0 nor with a prefix to the prompt, about 20 to 35. Other conventions of
      the same name: 2.5 * max(cos, 0) (Hessel et al. 2021, Eq. 1), 100 * max(cos, 0) (torchmetrics).

    Prompts are cut at the tokenizer's limit (77 for the published models).
    """

    def __init__(self, kind: str, model: Any, tokenizer: Any, preprocess: Preprocess):
        if kind not in KINDS:
            raise UserError(f"unknown CLIP judge {kind!r}{nearest(kind, KINDS)}")
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        # An unset limit of a tokenizer is a huge number; the text tower has a position for each token it can read.
        self.max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        self.scale = float(model.logit_scale.exp()) if kind == "pickscore" else 100.0

    @classmethod
    def load(cls, kind: str, folder: str | Path, *, device: str | torch.device = "cpu") -> ClipJudge:
        return cls(kind, *load_clip(folder, device))

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.score_pixels(self.preprocess(images.to(self.model.logit_scale.device)), prompts)

    def score_pixels(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """As a call, of pictures that are already preprocessed."""
        if len(images) != len(prompts):
            raise UserError(f"{len(images)} pictures came with {len(prompts)} prompts; give one prompt per picture")
        device = self.model.logit_scale.device
        text = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        output = self.model(
            input_ids=text.input_ids.to(device),
            attention_mask=text.attention_mask.to(device),
            pixel_values=images.to(device),
        )
        return self.scale * (output.image_embeds * output.text_embeds).sum(dim=-1)

    def embed(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """L2-normalised image embeddings ``(b, d)``."""
        return embed_images(self.model, self.preprocess(images.to(self.model.logit_scale.device)))
