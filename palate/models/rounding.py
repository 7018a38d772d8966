"""What the precision of a file does to what was trained, told before the file is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from palate.base.errors import UserError
from palate.models.adapters import LycorisLayer
from palate.models.lora import LoraLayer

COARSE = 0.05
"""A layer that loses more of its size than this is told of; rounding alone takes less than 0.01 in either half precision."""


def called(dtype: torch.dtype) -> str:
    """A precision by the name that options have for it."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def check_lora(layers: Mapping[str, LoraLayer] | Mapping[str, LycorisLayer], dtype: torch.dtype) -> list[str]:
    """What rounding a LoRA to ``dtype`` loses, in sentences.

    Raises:
        UserError: it changes nothing, before or after, or its matrices or the change hold numbers that are too large.
    """
    held = {name: layer for name, layer in layers.items() if not layer.idle}
    if not held:
        raise UserError("the LoRA changes nothing (its matrices, or their alphas, are 0): there is nothing to export")
    errors = {name: sum(_error(x, dtype) for x in layer.held) for name, layer in held.items()}
    most = torch.finfo(dtype).max
    large = [name for name, layer in held.items() if not errors[name] < torch.inf or layer.exceeds(most)]
    _check_overflow(large, len(layers), "layers", dtype)
    lost = [name for name, x in held.items() if not all(part.to(dtype).any() for part in x.held)]
    return _lost(lost, len(held), "layers", dtype) + _coarse([e for n, e in errors.items() if n not in lost], dtype)


def check_weights(before: Mapping[str, Tensor], network: nn.Module, dtype: torch.dtype) -> list[str]:
    """What rounding merged or tuned weights to ``dtype`` loses of their change, in sentences.

    Args:
        before: those weights that were changed, as they were, in ``dtype`` or finer.
        network: with the change in its weights.

    Raises:
        UserError: nothing of the change is left, or there are numbers that are too large.
    """
    if not before:
        raise UserError("the weights are those of the model before training: there is nothing to export")
    after = dict(network.named_parameters())
    finite = {name: bool(weight.to(dtype).isfinite().all()) for name, weight in after.items()}
    _check_overflow([name for name, fine in finite.items() if not fine], len(after), "weights", dtype)
    lost = [name for name, weight in before.items() if torch.equal(weight.to(dtype), after[name].detach().to(dtype))]
    return _lost(lost, len(before), "changed weights", dtype)


def to_dtype(module: nn.Module, dtype: torch.dtype, what: str) -> nn.Module:
    """``module``, called ``what``, in another precision, in place. Raises UserError if it holds numbers that are too large."""
    module.to(dtype)
    wrong = [name for name, weight in module.named_parameters() if not weight.isfinite().all()]
    _check_overflow(wrong, len(list(module.parameters())), f"weights of {what}", dtype)
    return module


def _error(tensor: Tensor, dtype: torch.dtype) -> float:
    """Size of what rounding changes, as a share of the whole; infinite where a number is too large."""
    rounded = tensor.to(dtype).float()
    if not rounded.isfinite().all():
        return torch.inf
    exact = tensor.double()  # squares of small numbers are 0 in float32
    return float((rounded.double() - exact).norm() / exact.norm())


def _check_overflow(names: list[str], of: int, what: str, dtype: torch.dtype) -> None:
    finer = {torch.float16: "use --dtype bf16 or fp32", torch.bfloat16: "use --dtype fp32"}
    if names:
        raise UserError(
            f"{len(names)} of {of} {what}, such as {names[0]}, hold numbers above {torch.finfo(dtype).max:g}, where "
            f"{called(dtype)} ends: {finer.get(dtype, 'nothing can be drawn with them; train anew, at a lower learning_rate')}"
        )


def _lost(names: list[str], of: int, what: str, dtype: torch.dtype) -> list[str]:
    if not names:
        return []
    finer = f"use {'--dtype fp32' if dtype != torch.float32 else 'a LoRA, --format kohya or diffusers'}"
    if len(names) == of:
        raise UserError(f"nothing of the change of all {of} {what} is left in {called(dtype)}: {finer}")
    return [f"{len(names)} of {of} {what}, such as {names[0]}, lose their change in {called(dtype)}: {finer} to keep it"]


def _coarse(errors: list[float], dtype: torch.dtype) -> list[str]:
    coarse = [error for error in errors if error > COARSE]
    if not coarse:
        return []
    return [
        f"{called(dtype)} is coarse for {len(coarse)} layers, which change by up to {100 * max(coarse):.0f} % of their size: "
        "use --dtype fp32 to keep them"
    ]
