"""What was trained, in the layouts of other programs: kohya's LoRA, merged weights, a LoRA out of full weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from palate.base.errors import UserError
from palate.base.files import replacing
from palate.models.denoiser import Denoiser
from palate.models.lora import LORA, save_lora

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


@dataclass(frozen=True)
class LoraLayer:
    """The matrices of one layer: its change is ``scale * up @ down``."""

    down: Tensor  # (rank, in), or (rank, in, k, k) of a convolution
    up: Tensor  # (out, rank), or (out, rank, 1, 1)
    scale: float

    @property
    def alpha(self) -> float:
        """What a reader divides by the rank to get the scale."""
        return self.scale * self.down.shape[0]


def lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """The trained LoRA of a U-Net, as it is applied, by the name of the layer."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    found = {}
    for name, module in unet.named_modules():
        if isinstance(module, PeftLayer) and "default" in module.lora_A:
            down, up = (part["default"].weight.detach() for part in (module.lora_A, module.lora_B))  # type: ignore[union-attr]
            found[name] = LoraLayer(down, up, float(module.scaling["default"]))
    return found


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
    denoiser: Denoiser, unet: nn.Module, path: str | Path, *, dtype: torch.dtype = torch.float32, about: Mapping[str, str]
) -> Path:
    """Write the LoRA of ``unet`` as kohya's scripts do, for ComfyUI, A1111 and their kin; returns the path.

    Args:
        dtype: of the file.
        about: what else its metadata tells, such as ``ss_seed``. Names and strength of the network are added.
    """
    path, layers = Path(path), _with_one_alpha(lora_layers(unet))
    blocks = int(unet.config.layers_per_block)  # type: ignore[union-attr, arg-type]
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
    second = denoiser.family == "sd" and int(denoiser.unet.config.cross_attention_dim) == 1024  # type: ignore[union-attr, arg-type]
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


@contextmanager
def _of_dtype(module: nn.Module, dtype: torch.dtype, only: str = "") -> Iterator[None]:
    kept = {name: p.data for name, p in module.named_parameters() if only in name}
    parameters = dict(module.named_parameters())
    for name, tensor in kept.items():
        parameters[name].data = tensor.to(dtype)
    try:
        yield
    finally:
        for name, tensor in kept.items():
            parameters[name].data = tensor


def save_diffusers(denoiser: Denoiser, unet: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the LoRA of ``unet`` for ``load_lora_weights``; returns the file."""
    with _of_dtype(unet, dtype, LORA):
        return save_lora(denoiser, unet, folder)


def merge(unet: Any) -> nn.Module:
    """The LoRA of ``unet`` added to its weights (in place, in their own precision) and taken away."""
    if lora_layers(unet):
        unet.fuse_lora()
        unet.unload_lora()
    return unet


def save_unet(unet: Any, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a whole U-Net for ``UNet2DConditionModel.from_pretrained``; a LoRA in it is merged. It is changed in place."""
    return replacing(Path(folder), merge(unet).to(dtype).save_pretrained)  # type: ignore[operator]


def save_pipeline(denoiser: Denoiser, unet: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write all a pipeline needs, with ``unet`` (a LoRA in it is merged), for ``from_pretrained``; all changed in place.

    SDXL's VAE says in its configuration that it must be computed in float32; its stored precision may be half.
    """
    pipeline = denoiser.pipeline(merge(unet))
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(dtype)
    return replacing(Path(folder), pipeline.save_pretrained)


# A LoRA out of full weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extraction:
    """How much of a change a LoRA holds, as shares of its sum of squares."""

    layers: int
    ranks: tuple[int, int]
    """Least and greatest."""
    of_layers: float
    """Of the change of those layers."""
    of_all: float
    """Of the change of all weights: biases and layers without a LoRA stay as they were."""

    def sentence(self) -> str:
        low, high = self.ranks
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return (
            f"a LoRA of {rank} in {self.layers} layers holds {100 * self.of_layers:.2f} % of their squared change, and "
            f"{100 * self.of_all:.2f} % of the change of all weights"
        )


@torch.no_grad()
def extract_lora(
    denoiser: Denoiser,
    full: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    layers: str = "all",
    progress: bool = False,
) -> Extraction:
    """Put the nearest LoRA to ``full - base`` into the denoiser's own U-Net, by singular values (Eckart-Young).

    Args:
        full: the tuned U-Net.
        rank: of every layer, or less where a layer has less.
        energy: instead of a rank, the least one that holds this share of a layer's squared change.
        layers: as of a policy.

    Raises:
        UserError: the two differ in shape, or do not differ at all.
    """
    from peft import LoraConfig

    unet: Any = denoiser.unet
    before, after = dict(unet.named_parameters()), dict(full.named_parameters())
    if before.keys() != after.keys() or any(before[n].shape != after[n].shape for n in before):
        raise UserError(f"the tuned U-Net is not shaped like that of {denoiser.name}: name the model it was trained from")
    total = sum(float((after[n].float() - before[n].float()).square().sum()) for n in before)
    if not total:
        raise UserError(f"the tuned U-Net is that of {denoiser.name}: there is no change to extract")
    targets = tuple(denoiser.lora_targets[layers])
    names = [
        n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and f".{n}".endswith(_suffixes(targets))
    ]
    found, covered, held = {}, 0.0, 0.0
    for name in tqdm(names, desc="singular values", disable=not progress):
        change = after[f"{name}.weight"].float() - before[f"{name}.weight"].float()
        squared = float(change.square().sum())
        covered += squared
        if squared:  # a layer that did not change needs no LoRA
            layer, share = _nearest(change, rank, energy)
            found[name], held = layer, held + share * squared
    if not found:
        raise UserError(f"no layer of {layers!r} changed; extract from layers all")
    ranks = {name: layer.down.shape[0] for name, layer in found.items()}
    greatest = max(ranks.values())
    unet.add_adapter(
        LoraConfig(r=greatest, lora_alpha=greatest, target_modules=list(found), rank_pattern=ranks, alpha_pattern=ranks)
    )
    for name, layer in found.items():
        module = unet.get_submodule(name)
        module.lora_A["default"].weight.data = layer.down
        module.lora_B["default"].weight.data = layer.up
    return Extraction(len(found), (min(ranks.values()), greatest), held / covered, held / total)


def _suffixes(targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{target}" for target in targets)


def _nearest(change: Tensor, rank: int | None, energy: float | None) -> tuple[LoraLayer, float]:
    """The best LoRA of one layer at scale 1, and the share of the squared change that it holds."""
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    shares = s.square().cumsum(0) / s.square().sum()
    # Rounding may leave even the last share below a energy of 1.
    least = len(s) if energy is None else min(len(s), int((shares < energy - 1e-6).sum()) + 1)
    keep = least if rank is None else min(rank, least)
    root = s[:keep].sqrt()
    down, up = root[:, None] * vh[:keep], u[:, :keep] * root
    if change.ndim == 4:
        down, up = down.reshape(keep, *change.shape[1:]), up[..., None, None]
    share = float(shares[keep - 1])
    if not math.isfinite(share):
        raise UserError("the tuned U-Net holds numbers that are not finite; it cannot be used")
    return LoraLayer(down.contiguous(), up.contiguous(), 1.0), share
