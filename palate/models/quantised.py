"""Frozen weights in 8 or 4 bits, made whole again a layer at a time where they are used.

The layer is our own, the 4-bit kernels are those of bitsandbytes: the linear layers of the libraries compute in one precision
for good, where Noise-Conditioned Perception goes through the same weights in float32; or copy their scales with every twin; or
keep the whole weights of the forward pass for the backward one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palate.base.errors import UserError, first_line

BLOCK = 64
"""Weights that share a scale in ``nf4``; in ``int8`` it is all that make one output."""


def check_quantize(kind: str | None) -> None:
    """Raise ``UserError`` if the package that a number format needs is missing."""
    if kind == "nf4":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional  # type: ignore[import-not-found]
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"quantize nf4 needs bitsandbytes ({first_line(error)}): pip install 'palate[4bit]', or use quantize int8"
        ) from error
    return bitsandbytes.functional


class QuantisedLinear(nn.Linear):
    """A linear layer whose frozen weights are quantised; ``weight`` is what they stand for, in the precision they came in.

    ``int8`` is symmetric, with one scale for each output; ``nf4`` (QLoRA, arXiv 2305.14314) has one for every 64 weights.

    Args:
        layer: the layer before; its weights are quantised on ``device``, and lie where they lay.
        kind: ``int8`` or ``nf4``.
    """

    def __init__(self, layer: nn.Linear, kind: str, device: torch.device):
        nn.Module.__init__(self)  # that of a linear layer would make weights of its own
        self.in_features, self.out_features, self.kind, self.dtype = (
            layer.in_features,
            layer.out_features,
            kind,
            layer.weight.dtype,
        )
        made = (_int8 if kind == "int8" else _nf4)(layer.weight.detach().to(device))
        # Parameters, which twins share and which stay the same objects when the network moves.
        self.packed, self.scale = (nn.Parameter(x.to(layer.weight.device), requires_grad=False) for x in made)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the layer multiplies by, ``(out, in)``."""
        return self.whole(self.dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weights ``(out, in)`` in any precision."""
        if self.kind == "int8":
            return (self.packed * self.scale).to(dtype)
        library, shape = _bitsandbytes(), torch.Size((self.out_features, self.in_features))
        state = library.QuantState(self.scale.data, shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return library.dequantize_4bit(self.packed.data, state)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return _Product.apply(input, self)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class _Product(torch.autograd.Function):
    """``F.linear`` that keeps nothing of its size: the backward pass makes the weights whole once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.whole(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.whole(gradient.dtype), None


def quantise(network: nn.Module, kind: str, device: torch.device) -> None:
    """Put ``int8`` or ``nf4`` in place of the linear layers of a frozen network's blocks, one after the other, on ``device``.

    All else stays as it is: embeddings, the last layer, norms, convolutions. They are small, but for convolutions, and the
    most sensitive.

    Raises:
        UserError: the package that ``nf4`` needs is missing.
    """
    check_quantize(kind)
    for name, part in network.named_children():
        if isinstance(part, nn.ModuleList) or "block" in name:
            for path, layer in list(part.named_modules()):
                if type(layer) is nn.Linear:
                    parent, _, own = path.rpartition(".")
                    setattr(part.get_submodule(parent), own, QuantisedLinear(layer, kind, device))


def is_quantised(network: nn.Module) -> bool:
    return any(isinstance(module, QuantisedLinear) for module in network.modules())


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers -127 to 127, and the scale of each row, float32."""
    scale = (weight.abs().amax(1, keepdim=True).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / scale).round().to(torch.int8), scale


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two weights a byte, and the largest absolute value of each block, float32."""
    packed, state = _bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax
