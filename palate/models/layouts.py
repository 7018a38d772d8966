"""What was trained, in the layouts of other programs: kohya's LoRA, merged weights, a LoRA out of full weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from palate.base.errors import UserError
from palate.base.files import replacing
from palate.models.adapters import is_adapter, kind_of, targets_of, tuner_layers
from palate.models.denoiser import Denoiser
from palate.models.lora import LoraLayer, adapter_layers, save_lora
from palate.models.quantised import is_quantised
from palate.models.reading import PLACE, apart, reading_of
from palate.models.rounding import to_dtype


@contextmanager
def _adapter_of_dtype(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    kept = {name: p.data for name, p in module.named_parameters() if is_adapter(name)}
    parameters = dict(module.named_parameters())
    for name, tensor in kept.items():
        parameters[name].data = tensor.to(dtype)
    try:
        yield
    finally:
        for name, tensor in kept.items():
            parameters[name].data = tensor


def save_diffusers(denoiser: Denoiser, network: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the LoRA of ``network`` for ``load_lora_weights``; returns the file."""
    with _adapter_of_dtype(network, dtype):
        return save_lora(denoiser, network, folder)


def before_merging(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that a LoRA is about to change, as ``dtype`` holds them, by their names after :func:`merge`."""
    # The magnitudes of a DoRA change weights too.
    names = [name for name, layer in adapter_layers(network).items() if not layer.idle or kind_of(network) == "dora"]
    return {f"{n}.weight": network.get_parameter(f"{n}.base_layer.weight").detach().to(dtype, copy=True) for n in names}


def changed_weights(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """The weights of ``base`` that are others in ``tuned``, a network of the same shape."""
    after = dict(tuned.named_parameters())
    return {name: p.detach() for name, p in base.named_parameters() if not torch.equal(p, after[name])}


def merge(network: nn.Module) -> nn.Module:
    """The LoRA of ``network`` added to its weights (in place, in their own precision) and taken away.

    Raises ValueError for quantised weights, to which nothing can be added: merge into whole ones.
    """
    if is_quantised(network):
        raise ValueError("a LoRA is merged into whole weights, not into quantised ones")
    if tuner_layers(network):
        network.fuse_lora()  # type: ignore[operator]
        network.unload_lora()  # type: ignore[operator]
        with apart(network) as texts:  # whose layers are whole again, too
            for encoder in texts.values():
                encoder.__dict__.pop("peft_config", None)
                encoder._hf_peft_config_loaded = False  # type: ignore[assignment]
    return network


def save_network(network: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a whole network for its class's ``from_pretrained``; a LoRA in it is merged. It is changed in place.

    Raises UserError for one that was trained with text encoders, without which it is not what was trained.
    """
    if reading_of(network) is not None:
        raise UserError("this LoRA is also of the text encoders, for which a network alone has no room: use --format pipeline")
    return replacing(Path(folder), to_dtype(merge(network), dtype, "the network").save_pretrained)  # type: ignore[operator]


def save_pipeline(denoiser: Denoiser, network: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write all a pipeline needs, with ``network`` (a LoRA in it is merged), for ``from_pretrained``; all changed in place.

    SDXL's VAE says in its configuration that it must be computed in float32; its stored precision may be half.
    """
    pipeline = denoiser.pipeline(merge(network))
    if reading_of(network) is not None:
        delattr(network, PLACE)  # a part of its own there
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            to_dtype(part, dtype, name)
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
    """Put the nearest LoRA to ``full - base`` into the denoiser's own network, by singular values (Eckart-Young).

    Args:
        full: the tuned network.
        rank: of every layer, or less where a layer has less.
        energy: instead of a rank, the least one that holds this share of a layer's squared change.
        layers: as of a policy.

    Raises:
        UserError: the two differ in shape, or do not differ at all.
    """
    from peft import LoraConfig

    network: Any = denoiser.network
    before, after = dict(network.named_parameters()), dict(full.named_parameters())
    if before.keys() != after.keys() or any(before[n].shape != after[n].shape for n in before):
        raise UserError(
            f"the tuned {denoiser.part_name} is not shaped like that of {denoiser.name}: name the model it was trained from"
        )
    total = sum(float((after[n].float() - before[n].float()).square().sum()) for n in before)
    if not total:
        raise UserError(f"the tuned {denoiser.part_name} is that of {denoiser.name}: there is no change to extract")
    targets = tuple(denoiser.lora_targets[layers])
    names = targets_of(network, targets)
    found, covered, held = {}, 0.0, 0.0
    for name in tqdm(names, desc="singular values", disable=not progress):
        change = after[f"{name}.weight"].float() - before[f"{name}.weight"].float()
        squared = float(change.square().sum())
        covered += squared
        if squared:  # a layer that did not change needs no LoRA
            layer, share = _nearest(change, rank, energy)
            if not math.isfinite(share):
                raise UserError(f"the tuned {denoiser.part_name} holds numbers that are not finite; it cannot be used")
            found[name], held = layer, held + share * squared
    if not found:
        raise UserError(f"no layer of {layers!r} changed; extract from layers all")
    ranks = {name: layer.down.shape[0] for name, layer in found.items()}
    greatest = max(ranks.values())
    network.add_adapter(
        LoraConfig(r=greatest, lora_alpha=greatest, target_modules=list(found), rank_pattern=ranks, alpha_pattern=ranks)
    )
    for name, layer in found.items():
        module = network.get_submodule(name)
        module.lora_A["default"].weight.data = layer.down
        module.lora_B["default"].weight.data = layer.up
    return Extraction(len(found), (min(ranks.values()), greatest), held / covered, held / total)


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
    return LoraLayer(down.contiguous(), up.contiguous(), 1.0), float(shares[keep - 1])
