"""Kinds of small trained matrices beside frozen weights: LoRA and its variants, all by PEFT.

The change of a layer's weights W, with matrices of rank r and a strength s:

- ``lora``: s B A (Hu et al., arXiv 2106.09685)
- ``dora``: m (W + s B A) / |W + s B A| - W, with a trained magnitude m for each output (Liu et al., arXiv 2402.09353)
- ``loha``: s (B A) * (D C), elementwise (FedPara; LyCORIS, arXiv 2309.14859)
- ``lokr``: s W1 (x) W2, a Kronecker product, its second factor B A where that is smaller (LyCORIS)

s is alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, arXiv 2312.03732).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from palate.base.errors import UserError, nearest
from palate.models.denoiser import Denoiser, one_to_one

KINDS = ("lora", "dora", "loha", "lokr")
LYCORIS = {"loha": "hada", "lokr": "lokr"}
"""Kinds whose files have LyCORIS's layout, and how the names of their matrices begin."""
MARKS = (".lora_", *(f".{mark}_" for mark in LYCORIS.values()))
MATRICES = {
    "hada": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
}
"""The matrices that a layer may have, by the rest of their names; a pair ``_a``, ``_b`` stands for its product."""


@dataclass(frozen=True)
class Adapter:
    """What is trained beside frozen weights, besides rank, alpha and layers."""

    kind: str = "lora"
    rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of layers whose name ends in a pattern; a regular expression, as PEFT has it."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def config(self, rank: int, alpha: float | None, targets: Sequence[str]) -> Any:
        """PEFT's configuration."""
        from peft import LoHaConfig, LoKrConfig, LoraConfig

        shared: dict[str, Any] = {
            "r": rank,
            "target_modules": list(targets),
            "rank_pattern": dict(self.rank_pattern),
            # Without an alpha the strength is 1, or of rsLoRA the root of the rank, in every layer.
            "alpha_pattern": {**(self.rank_pattern if alpha is None else {}), **self.alpha_pattern},
        }
        strength = cast(int, rank if alpha is None else alpha)
        if self.kind in LYCORIS:
            return (LoHaConfig if self.kind == "loha" else LoKrConfig)(alpha=strength, **shared)
        return LoraConfig(
            lora_alpha=strength,
            init_lora_weights="gaussian",
            use_dora=self.kind == "dora",
            use_rslora=self.rslora,
            lora_dropout=self.dropout,
            **shared,
        )


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's."""
    return any(mark in name for mark in MARKS)


def twin(module: nn.Module, *, share: bool) -> nn.Module:
    """A second module tree; with ``share`` its parameters and buffers are the very tensors of the first, a LoRA's excepted.

    Adapters put into one tree later are not in the other, so a shared twin is the model as it is now at no memory but that of
    the LoRA it has.
    """
    memo: dict[int, object] = {}
    if share:
        memo = {id(x): x for name, x in (*module.named_parameters(), *module.named_buffers()) if not is_adapter(name)}
    return copy.deepcopy(module, memo)


def targets_of(network: nn.Module, suffixes: Iterable[str]) -> list[str]:
    """The layers that adapters of these targets are put on."""
    ends = tuple(f".{suffix}" for suffix in suffixes)
    return [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and f".{n}".endswith(ends)]


def check_adapter(denoiser: Denoiser, adapter: Adapter, suffixes: Iterable[str]) -> None:
    """Raise ``UserError`` for a pattern that fits no layer, or a kind whose file the family has no names for."""
    if adapter.kind in LYCORIS and one_to_one(denoiser) is None:
        why = (
            f"which has no names for the layers of {denoiser.card.pipeline}"
            if denoiser.kohya is None
            else f"where several layers of {denoiser.card.pipeline}, such as queries, keys and values, are one: of their LoRAs "
            "one is made, of such products there is none"
        )
        raise UserError(f"lora_kind {adapter.kind} is kept in LyCORIS's layout, {why}; use lora or dora")
    layers = targets_of(denoiser.network, suffixes)
    for option, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            try:
                found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in layers)
            except re.error as error:
                raise UserError(f"{option} names {pattern!r}, which is no regular expression ({error})") from None
            if not found:
                ends = {".".join(name.split(".")[-2:]) for name in layers}
                raise UserError(f"{option} names {pattern!r}, with which no trained layer ends{nearest(pattern, ends)}")


def tuner_layers(network: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def kind_of(network: nn.Module, adapter: str = "default") -> str | None:
    """The kind of a network's adapter; None without one."""
    config = getattr(network, "peft_config", {}).get(adapter)
    if config is None:
        return None
    name = str(config.peft_type.value).lower()
    return "dora" if getattr(config, "use_dora", False) else name


# LyCORIS's layout ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LycorisLayer:
    """The matrices of one layer, by the rest of their names, such as ``w1_a``; the change is ``strength`` of their product."""

    mark: str
    matrices: Mapping[str, Tensor]
    strength: float = 1.0

    @property
    def kind(self) -> str:
        """``loha`` or ``lokr``."""
        return next(kind for kind, mark in LYCORIS.items() if mark == self.mark)

    @property
    def dim(self) -> int | None:
        """The rank by which readers divide alpha: that of a factor in two matrices; None where there is none."""
        pairs = (self.matrices[name] for name in ("w1_b", "w2_b") if name in self.matrices)
        return next((int(matrix.shape[0]) for matrix in pairs), None)

    @property
    def alpha(self) -> float:
        """What readers divide by ``dim`` to get the strength; what is missing of it is in the matrices already."""
        return self.strength * (self.dim or 1)

    @property
    def held(self) -> tuple[Tensor, ...]:
        return tuple(self.matrices.values())

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return not self.strength or any(not matrix.any() for matrix in self.matrices.values())

    @property
    def dead(self) -> bool:
        """Whether it changes nothing and cannot learn to: the gradient of each matrix is a multiple of all others."""
        return not self.strength or sum(not matrix.any() for matrix in self.matrices.values()) > 1

    def exceeds(self, limit: float) -> bool:
        """Whether the change holds a number above ``limit``, or one that is not finite."""
        return not float(self.product().abs().max()) <= limit

    def product(self) -> Tensor:
        """The change of the weights, as a matrix ``(out, in)`` or with kernels flattened into ``in``."""
        first, second = (self._factor(number) for number in "12")
        if self.mark == "hada":
            return self.strength * first.flatten(1) * second.flatten(1)
        first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
        return self.strength * torch.kron(first, second.contiguous()).flatten(1)

    def _factor(self, number: str) -> Tensor:
        found = self.matrices
        if f"w{number}" in found:
            return found[f"w{number}"].float()
        a, b = (found[f"w{number}_{half}"].float() for half in "ab")
        if f"t{number}" in found:
            return torch.einsum("ij...,ip,jr->pr...", found[f"t{number}"].float(), a, b)
        return a @ b


def lycoris_layers(network: nn.Module) -> dict[str, LycorisLayer]:
    """The trained matrices of a network's LoHa or LoKr, by the name of the layer; empty for other kinds."""
    mark = LYCORIS.get(kind_of(network) or "")
    if mark is None:
        return {}
    found = {}
    for name, module in tuner_layers(network).items():
        parts = {part: getattr(module, f"{mark}_{part}", {}) for part in MATRICES[mark]}
        matrices = {part: held["default"].detach() for part, held in parts.items() if "default" in held}
        layer = LycorisLayer(mark, matrices, float(module.scaling["default"]))
        if layer.dim is None and layer.strength != 1:  # readers take the strength of whole factors to be 1
            matrices = {**matrices, "w1": matrices["w1"] * layer.strength}
            layer = LycorisLayer(mark, matrices)
        found[name] = layer
    return found


def put_lycoris(model: nn.Module, layers: Mapping[str, LycorisLayer], adapter: str) -> None:
    """Put layers, which were checked, into a model: PEFT's layers with these very matrices."""
    from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model

    first = next(iter(layers.values()))
    mark, config = first.mark, LoHaConfig if first.kind == "loha" else LoKrConfig
    inject_adapter_in_model(config(r=1, alpha=1, target_modules=list(layers)), model, adapter_name=adapter)
    for name, layer in layers.items():
        module: Any = model.get_submodule(name)
        device = module.get_base_layer().weight.device
        for part in MATRICES[mark]:
            held = getattr(module, f"{mark}_{part}", {})
            if adapter in held:
                del held[adapter]
            if part in layer.matrices:
                held[adapter] = nn.Parameter(layer.matrices[part].to(device))
        module.r[adapter], module.alpha[adapter] = layer.dim or 1, layer.alpha
        module.scaling[adapter] = layer.strength
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
