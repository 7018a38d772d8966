"""Human Preference Score v2 and v2.1: an open_clip checkpoint on transformers' CLIPModel (Wu et al. 2023)."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from palate.base.errors import UserError
from palate.judges.clip import Clip, ClipJudge, check_clip, checked_dtype, load_clip, load_tokenizer, shared_clip
from palate.judges.kinds import KINDS, tokenizer_folder
from palate.judges.pictures import Preprocess
from palate.judges.weights import DTYPES, made_of, read_weights

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


def check(kind: str, place: Path, *, dtype: str = "float32") -> None:
    checked_dtype(dtype)
    if checkpoint(kind, place) is None:
        check_clip(place, kind)
    else:
        tokenizer_folder(kind, place, "vocab.json", "merges.txt")


def load(kind: str, place: Path, device: str | torch.device = "cpu", *, dtype: str = "float32") -> ClipJudge:
    """From a folder with the published checkpoint and a tokenizer, or one in transformers' layout."""
    checked_dtype(dtype)
    file = checkpoint(kind, place)
    clip = load_clip(place, kind, device, dtype) if file is None else _load_published(kind, place, file, device, dtype)
    size = clip.model.config.vision_config.image_size
    return ClipJudge(kind, clip, Preprocess(size, (size, size), whole=True))


def _load_published(kind: str, folder: Path, file: Path, device: str | torch.device, dtype: str) -> Clip:
    def make() -> Clip:
        from transformers import CLIPConfig, CLIPModel

        words = load_tokenizer(tokenizer_folder(kind, folder, "vocab.json", "merges.txt"))
        state = from_open_clip(read_weights(file))
        if (folder / "config.json").is_file():
            config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        else:
            patches = state.get("vision_model.embeddings.patch_embedding.weight", torch.empty(0))
            if patches.shape != (VISION["hidden_size"], 3, VISION["patch_size"], VISION["patch_size"]):
                raise UserError(f"{file} is no ViT-H/14; expected the published file, or the model's config.json beside it")
            config = CLIPConfig(text_config=TEXT | ENDS, vision_config=VISION, projection_dim=1024)
        model = made_of(CLIPModel, config, state, file, DTYPES[dtype])
        return Clip(model.to(device), words)

    return shared_clip(make, file.resolve(), device, dtype)
