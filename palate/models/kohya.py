"""LoRA files as kohya's scripts write them, for ComfyUI, A1111 and their kin."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from palate.base.errors import UserError
from palate.models.adapters import LYCORIS, LycorisLayer, kind_of, lycoris_layers
from palate.models.denoiser import Denoiser, Kohya
from palate.models.lora import LoraLayer, held_exactly, lora_layers, lycoris_tensors, write_tensors
from palate.models.reading import text_layer


def _with_one_alpha(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """The same changes with the greatest alpha in all layers: some readers, diffusers among them, mix up several."""
    alpha = max((layer.alpha for layer in layers.values()), default=1.0)
    return {
        name: layer
        if layer.alpha == alpha
        else LoraLayer(layer.down, layer.up * (layer.alpha / alpha), alpha / layer.down.shape[0])
        for name, layer in layers.items()
    }


def _fused(
    network: nn.Module, layers: Mapping[str, LoraLayer], parts: Callable[[str], tuple[str, ...]]
) -> dict[str, LoraLayer]:
    """Layers that are one in the original code as one, by the name of the first of them."""
    groups = dict.fromkeys(parts(name) for name in layers)
    return {group[0]: layers[group[0]] if len(group) == 1 else _one(network, layers, group) for group in groups}


def _one(network: nn.Module, layers: Mapping[str, LoraLayer], group: tuple[str, ...]) -> LoraLayer:
    """The same change exactly: A of all parts in a column, B in a diagonal of blocks, alpha times their number.

    A part without a LoRA has rows of zeros.
    """
    there = [layers[name] for name in group if name in layers]
    down, scale = torch.cat([layer.down for layer in there]), max(layer.scale for layer in there) or 1.0
    rows, at = [], 0
    for name in group:
        outputs = int(network.get_submodule(name).weight.shape[0])  # type: ignore[union-attr, index]
        row = down.new_zeros(outputs, down.shape[0])
        if layer := layers.get(name):
            rank = layer.down.shape[0]
            row[:, at : at + rank] = layer.up if layer.scale == scale else layer.up * (layer.scale / scale)
            at += rank
        rows.append(row)
    return LoraLayer(down, torch.cat(rows), scale)


def save_kohya(
    denoiser: Denoiser, network: nn.Module, path: str | Path, *, dtype: torch.dtype = torch.float32, about: Mapping[str, str]
) -> Path:
    """Write the LoRA of ``network`` as kohya's scripts do, for ComfyUI, A1111 and their kin; returns the path.

    Args:
        dtype: of the file.
        about: what else its metadata tells, such as ``ss_seed``. Names and strength of the network are added.

    Raises:
        UserError: the family has no such layout.
    """
    kohya = denoiser.kohya
    if kohya is None:
        raise UserError(f"kohya's scripts have no layout for LoRAs of {denoiser.card.pipeline}: use that of diffusers")
    path, kind = Path(path), kind_of(network)
    if kind == "dora":
        raise UserError(
            "programs that read kohya's layout scale a DoRA in ways of their own, so it would draw other pictures there: use "
            "--format diffusers, or --format pipeline, which merges it"
        )
    if kind in LYCORIS:
        metadata = {**_metadata(denoiser, kohya, {}, kind), **_dims(lycoris_layers(network)), **about}
        return write_tensors(path, lycoris_tensors(denoiser, network, dtype), metadata)
    found, texts = _parted(lora_layers(network))
    layers = _with_one_alpha(found) if kohya.parts is None else _fused(network, found, kohya.parts)
    tensors = {}
    named = {kohya.name(module): layer for module, layer in layers.items()}
    for name, layer in {**named, **_with_one_alpha(texts)}.items():
        tensors[f"{name}.lora_down.weight"] = layer.down.to("cpu", dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = layer.up.to("cpu", dtype).contiguous()
        tensors[f"{name}.alpha"] = held_exactly(layer.alpha, dtype)
    return write_tensors(path, tensors, {**_metadata(denoiser, kohya, layers), **about})


def _parted(layers: Mapping[str, LoraLayer]) -> tuple[dict[str, LoraLayer], dict[str, LoraLayer]]:
    """The layers of the network by their names, and those of text encoders by kohya's: ``lora_te``, of two with a number."""
    found = {name: text_layer(name) for name in layers}
    several = "text_encoder_2" in {text[0] for text in found.values() if text}
    number = {"text_encoder": "1" if several else "", "text_encoder_2": "2"}
    texts = {
        f"lora_te{number[text[0]]}_{text[1].replace('.', '_')}": layers[name]
        for name, text in found.items()
        if text is not None
    }
    return {name: layers[name] for name, text in found.items() if text is None}, texts


def _dims(layers: Mapping[str, LycorisLayer]) -> dict[str, str]:
    return {
        "ss_network_dim": _one_of({layer.dim or 0 for layer in layers.values()}),
        "ss_network_alpha": _one_of({layer.alpha for layer in layers.values()}),
    }


def _metadata(denoiser: Denoiser, kohya: Kohya, layers: Mapping[str, LoraLayer], algo: str | None = None) -> dict[str, str]:
    """``ss_*`` names as kohya's scripts write them, ``modelspec.*`` as the specification has them (Stability-AI/ModelSpec)."""
    linear, conv = ([x for x in layers.values() if (x.down.ndim == 4) is wanted] for wanted in (False, True))
    shape = {
        "ss_network_dim": _one_of({x.down.shape[0] for x in linear}),
        "ss_network_alpha": _one_of({x.alpha for x in linear}),
    }
    more = {"conv_dim": _one_of({x.down.shape[0] for x in conv}), "conv_alpha": _one_of({x.alpha for x in conv})}
    return {
        "ss_network_module": "lycoris.kohya" if algo else "networks.lora",
        **shape,
        "ss_network_args": json.dumps({"algo": algo} if algo else more if conv else {}),
        "ss_base_model_version": kohya.version,
        "ss_v2": str(kohya.second),
        "ss_sd_model_name": Path(denoiser.name).name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{kohya.architecture}/lora",
        "modelspec.implementation": kohya.implementation,
        **({} if kohya.prediction is None else {"modelspec.prediction_type": kohya.prediction}),
        "modelspec.resolution": f"{denoiser.default_resolution}x{denoiser.default_resolution}",
    }


def _one_of(values: set[int] | set[float]) -> str:
    """One number for all layers, or the word that kohya's scripts have where there is none."""
    return f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"
