"""ImageReward on transformers' BLIP (Xu et al. 2023, "ImageReward", sec. 3; code of zai-org/ImageReward)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError
from palate.judges.kinds import KINDS, tokenizer_folder
from palate.judges.pictures import Preprocess, one_each
from palate.judges.weights import DTYPES, Options, affine, made_of, read_weights, reading

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, PreTrainedTokenizerBase

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw reward over the training set
MAX_LENGTH = 35  # BERT tokens, "to keep the same as BLIP" in training
HEAD_WIDTH = 64  # of BLIP's vision transformers
INSIDE = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection"}
OUTSIDE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}


class ImageRewardJudge:
    """(head(first token of the text tower, which attends to the picture) - mean) / std: about -2.3 to 2.

    The prompt is cut at 35 BERT tokens, as published. The head is an MLP without activations, so one affine map. Golden
    scores of the published weights stand in docs/judges.md.
    """

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        tokenizer: PreTrainedTokenizerBase,
        weight: Float[Tensor, " d"],
        bias: Float[Tensor, ""],
        size: int = 224,
    ):
        self.vision, self.text, self.tokenizer = vision, text, tokenizer
        self.weight, self.bias = weight.to(vision.device), bias.to(vision.device)
        self.preprocess = Preprocess(size, (size, size))

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.score_pixels(self.preprocess(images.to(self.weight.device)), prompts)

    def score_pixels(self, pixels: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """As a call, of pictures that are already preprocessed."""
        one_each(pixels, prompts)
        seen = self.vision(pixel_values=pixels.to(self.vision.device, self.vision.dtype)).last_hidden_state
        words = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        # The layers that attend to the picture exist in a "decoder" only, but the text is read as an encoder reads: both ways.
        state = self.text(
            input_ids=words.input_ids.to(seen.device),
            attention_mask=words.attention_mask.to(seen.device),
            encoder_hidden_states=seen,
            is_decoder=False,
        ).last_hidden_state
        return (state[:, 0].float() @ self.weight + self.bias - MEAN) / STD


def vision_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the original's vision transformer under the names of transformers' ``BlipVisionModel``."""
    made = {}
    for name, value in state.items():
        if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            made[f"encoder.layers.{block[1]}.{INSIDE.get(block[2], block[2])}.{block[3]}"] = value
        elif name in OUTSIDE:
            made[OUTSIDE[name]] = value
        else:
            raise UserError(f"unknown weight {name} of the vision transformer; expected ImageReward.pt")
    return made


def prepare(kind: str, place: Path, options: Options) -> Callable[[str | torch.device], ImageRewardJudge]:
    """From a folder with ``ImageReward.pt``, the tokenizer of bert-base-uncased and, if not BERT base, ``med_config.json``."""
    (name, _) = KINDS[kind].files
    if not (place / name).is_file():
        raise UserError(
            f"{place} has no {name} (1.8 GB); run 'hf download {KINDS[kind].hub} {name} med_config.json --local-dir {place}'"
        )
    words = tokenizer_folder(kind, place, "vocab.txt")
    return lambda device: _load(place / name, words, device, DTYPES[options.dtype])


def _load(file: Path, words: Path, device: str | torch.device, dtype: torch.dtype) -> ImageRewardJudge:
    from transformers import BertTokenizer, BlipTextModel, BlipVisionModel

    tokenizer = reading(words, lambda: BertTokenizer.from_pretrained(words, local_files_only=True))
    seen, read, head = _parts(file)
    as_seen = _vision_config(seen)
    as_read = _text_config(read, as_seen.hidden_size, file.parent / "med_config.json")
    vision = made_of(BlipVisionModel.from_pretrained, as_seen, vision_weights(seen), file, dtype).to(device)
    text = made_of(BlipTextModel.from_pretrained, as_read, read, file, dtype, add_pooling_layer=False).to(device)
    return ImageRewardJudge(vision, text, tokenizer, *affine(head, file), size=as_seen.image_size)


def _parts(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights of vision transformer, text tower and head."""
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for name, value in read_weights(file).items():  # its vision_proj, text_proj and decoder are of BLIP's other tasks
        for prefix, part in parts.items():
            if name.startswith(prefix) and not name.endswith("position_ids"):
                part[name.removeprefix(prefix)] = value
    if missing := [prefix for prefix, part in parts.items() if not part]:
        raise UserError(f"{file} has no weights {missing[0]}*; expected the published ImageReward.pt")
    seen, read, head = parts.values()
    return seen, read, head


def _vision_config(seen: dict[str, Tensor]) -> BlipVisionConfig:
    from transformers import BlipVisionConfig

    patch, width = seen["patch_embed.proj.weight"].shape[-1], seen["cls_token"].shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=seen["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("attn.qkv.weight") for name in seen),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((seen["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(read: dict[str, Tensor], width: int, med: Path) -> BlipTextConfig:
    """Of a text tower that attends to states of ``width``; ``med`` tells what its weights do not."""
    from transformers import BlipTextConfig

    bert = json.loads(med.read_text(encoding="utf-8")) if med.is_file() else {}
    return BlipTextConfig(
        vocab_size=read["embeddings.word_embeddings.weight"].shape[0],
        hidden_size=read["embeddings.word_embeddings.weight"].shape[1],
        intermediate_size=read["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("attention.self.query.weight") for name in read) // 2,
        num_attention_heads=bert.get("num_attention_heads", 12),
        max_position_embeddings=read["embeddings.position_embeddings.weight"].shape[0],
        encoder_hidden_size=width,
        layer_norm_eps=bert.get("layer_norm_eps", 1e-12),
        is_decoder=True,
        bos_token_id=None,
        sep_token_id=None,
    )
