"""LoRA files as kohya's scripts write them, for ComfyUI, A1111 and their kin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from palate.base.files import replacing
from palate.models.denoiser import Denoiser
from palate.models.lora import LoraLayer, lora_layers

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
"""Beside diffusers' own name, and not mistaken for it by ``load_lora_weights(folder)``."""


def kohya_name(module: str, family: str, layers_per_block: int) -> str:
    """A layer of diffusers' U-Net by the name that kohya's LoRAs have for it.

    Stable Diffusion 1.x and 2.x keep diffusers' names, with ``_`` for ``.``; SDXL has those of the original code, whose blocks
    are numbered through. (In diffusers, down block b has ``layers_per_block`` layers and a downsampler, up block b one layer
    more; ``input_blocks.0`` is ``conv_in``.)

    >>> kohya_name("down_blocks.1.attentions.0.proj_in", "sdxl", 2)
    'lora_unet_input_blocks_4_1_proj_in'
    """
    name = _original(module, layers_per_block) if family == "sdxl" else module
    return "lora_unet_" + name.replace(".", "_")


OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def _original(module: str, layers_per_block: int) -> str:
    if module in OUTER:
        return OUTER[module]
    part, *rest = module.split(".")
    block = 0 if part == "mid_block" else int(rest.pop(0))
    kind, layer, inner = rest[0], int(rest[1]), ".".join(rest[2:])
    if kind == "resnets":
        inner = RESNET[inner]
    if part == "mid_block":  # resnet, attention, resnet
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{inner}"
    first = block * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if kind == "upsamplers":  # after the resnet and the attention, which the up blocks with an upsampler have in SDXL
        return f"output_blocks.{first + layers_per_block}.2.{inner}"
    place = 1 if kind == "attentions" else 0
    return (
        f"input_blocks.{first + layer + 1}.{place}.{inner}"
        if part == "down_blocks"
        else (f"output_blocks.{first + layer}.{place}.{inner}")
    )


def _with_one_alpha(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """The same changes with the greatest alpha in all layers: some readers, diffusers among them, mix up several."""
    alpha = max((layer.alpha for layer in layers.values()), default=1.0)
    return {
        name: layer
        if layer.alpha == alpha
        else LoraLayer(layer.down, layer.up * (layer.alpha / alpha), alpha / layer.down.shape[0])
        for name, layer in layers.items()
    }


def save_kohya(
    denoiser: Denoiser, network: nn.Module, path: str | Path, *, dtype: torch.dtype = torch.float32, about: Mapping[str, str]
) -> Path:
    """Write the LoRA of ``network`` as kohya's scripts do, for ComfyUI, A1111 and their kin; returns the path.

    Args:
        dtype: of the file.
        about: what else its metadata tells, such as ``ss_seed``. Names and strength of the network are added.
    """
    path, layers = Path(path), _with_one_alpha(lora_layers(network))
    blocks = int(network.config.layers_per_block)  # type: ignore[union-attr, arg-type]
    tensors = {}
    for module, layer in layers.items():
        name = kohya_name(module, denoiser.family, blocks)
        tensors[f"{name}.lora_down.weight"] = layer.down.to("cpu", dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = layer.up.to("cpu", dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=dtype)
    metadata = {**_kohya_metadata(denoiser, layers), **about}

    def write(partial: str) -> None:
        Path(partial).mkdir()
        save_file(tensors, Path(partial) / path.name, metadata={"format": "pt", **metadata})

    path.parent.mkdir(parents=True, exist_ok=True)
    return replacing(path, write, path.name)


def _kohya_metadata(denoiser: Denoiser, layers: Mapping[str, LoraLayer]) -> dict[str, str]:
    """``ss_*`` names as kohya's scripts write them, ``modelspec.*`` as the specification has them (Stability-AI/ModelSpec)."""
    velocity = denoiser.schedule.prediction_type == "v_prediction"
    second = denoiser.family == "sd" and int(denoiser.network.config.cross_attention_dim) == 1024  # type: ignore[union-attr, arg-type]
    if denoiser.family == "sdxl":
        version, architecture = "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    elif second:
        version, architecture = ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512")
    else:
        version, architecture = "sd_v1", "stable-diffusion-v1"
    linear, conv = ([x for x in layers.values() if (x.down.ndim == 4) is wanted] for wanted in (False, True))
    shape = {
        "ss_network_dim": _one_of({x.down.shape[0] for x in linear}),
        "ss_network_alpha": _one_of({x.alpha for x in linear}),
    }
    more = {"conv_dim": _one_of({x.down.shape[0] for x in conv}), "conv_alpha": _one_of({x.alpha for x in conv})}
    return {
        "ss_network_module": "networks.lora",
        **shape,
        "ss_network_args": json.dumps(more if conv else {}),
        "ss_base_model_version": version,
        "ss_v2": str(second),
        "ss_sd_model_name": Path(denoiser.name).name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": (
            "https://github.com/Stability-AI/generative-models" if denoiser.family == "sdxl" else "diffusers"
        ),
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "modelspec.resolution": f"{denoiser.default_resolution}x{denoiser.default_resolution}",
    }


def _one_of(values: set[Any]) -> str:
    """One number for all layers, or the word that kohya's scripts have where there is none."""
    return f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"
