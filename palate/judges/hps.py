"""Human Preference Score v2 and v2.1: an open_clip checkpoint on transformers' CLIPModel (Wu et al. 2023)."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
import torch
from torch import Tensor

from palate.base.errors import UserError
from palate.judges.clip import Clip, ClipJudge, check_clip, clip_tokenizer, load_clip, load_tokenizer, shared_clip
from palate.judges.kinds import KINDS
from palate.judges.pictures import Preprocess
from palate.judges.weights import DTYPES, Options, made_of, read_weights

if TYPE_CHECKING:
    from transformers import CLIPConfig

# ViT-H/14, what both checkpoints are.
TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "patch_size": 14,
    "image_size": 224,
}
ENDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}

RENAMED = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "logit_scale": "logit_scale",
}
INSIDE = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelt so in transformers
    "visual.ln_post": "vision_model.post_layernorm",
}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an open_clip ViT model under the names of transformers' ``CLIPModel``.

    Projections are stored transposed, and the three parts of attention in one matrix. open_clip pads with 0 where transformers
    pads with the end token; no difference, since the text tower is causal.
    """
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in RENAMED:
            made[RENAMED[name]] = value
        elif name in ("text_projection", "visual.proj"):
            made["text_projection.weight" if name == "text_projection" else "visual_projection.weight"] = value.T.contiguous()
        elif name.rpartition(".")[0] in NORMS:
            norm, _, leaf = name.rpartition(".")
            made[f"{NORMS[norm]}.{leaf}"] = value
        elif block := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name):
            tower = "vision_model" if block[1] else "text_model"
            layer, part, leaf = f"{tower}.encoder.layers.{block[2]}", block[3], block[4]
            if part == "attn.in_proj":
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    made[f"{layer}.self_attn.{letter}_proj.{leaf}"] = third.contiguous()
            else:
                made[f"{layer}.{INSIDE.get(part, 'self_attn.out_proj')}.{leaf}"] = value
        elif name != "attn_mask":
            raise UserError(f"unknown weight {name}; expected an open_clip ViT checkpoint such as HPS_v2.1_compressed.pt")
    return made


def checkpoint(kind: str, folder: Path) -> Path | None:
    """The published checkpoint in a folder, or None if it holds a model that transformers saved."""
    (name,) = KINDS[kind].files
    if (folder / name).is_file():
        return folder / name
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        return None
    raise UserError(
        f"{folder} has no {name} (2 to 4 GB); run 'hf download xswu/HPSv2 {name} --local-dir {folder}', or give the folder of "
        "a CLIP model with these weights that transformers saved"
    )


def repaired(prompt: str) -> str:
    """A prompt as the published code has it read (``basic_clean`` of open_clip's tokenizer): broken encodings and curly quotes
    mended, entities of HTML written out, twice."""
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def prepare(kind: str, place: Path, options: Options) -> Callable[[str | torch.device], ClipJudge]:
    """From a folder with the published checkpoint and a tokenizer, or one in transformers' layout."""
    file, dtype = checkpoint(kind, place), options.dtype
    words = clip_tokenizer(kind, place) if file is not None else check_clip(place, kind)

    def load(device: str | torch.device) -> ClipJudge:
        clip = load_clip(place, kind, device, dtype) if file is None else _load_published(file, words, device, dtype)
        return ClipJudge(kind, clip, Preprocess(clip.image_size, (clip.image_size, clip.image_size), whole=True), repaired)

    return load


def _load_published(file: Path, words: Path, device: str | torch.device, dtype: str) -> Clip:
    def make() -> Clip:
        from transformers import CLIPModel

        tokenizer = load_tokenizer(words)
        state = from_open_clip(read_weights(file))
        model = made_of(CLIPModel.from_pretrained, _config(file, state), state, file, DTYPES[dtype])
        return Clip(model.to(device), tokenizer)

    return shared_clip(make, file.resolve(), device, dtype)


def _config(file: Path, state: dict[str, Tensor]) -> CLIPConfig:
    """What ``config.json`` beside the checkpoint says; ViT-H/14 without it."""
    from transformers import CLIPConfig

    if (file.parent / "config.json").is_file():
        return CLIPConfig.from_pretrained(file.parent, local_files_only=True)
    patches = state.get("vision_model.embeddings.patch_embedding.weight", torch.empty(0))
    if patches.shape != (VISION["hidden_size"], 3, VISION["patch_size"], VISION["patch_size"]):
        raise UserError(f"{file} is no ViT-H/14; expected the published file, or the model's config.json beside it")
    return CLIPConfig(text_config=TEXT | ENDS, vision_config=VISION, projection_dim=1024)
