"""The first half of a U-Net or a transformer as a frozen feature extractor, in float32 whatever its weights are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from palate.diffusion.denoising import Conditioning

UNET_LAYERS = ("last_down", "mid", "all")
TRANSFORMER_LAYERS = ("quarter", "half", "all")

_WEIGHTED: frozenset[Callable[..., object]] = frozenset(
    {F.linear, torch.conv2d, F.conv2d, F.group_norm, F.layer_norm, F.rms_norm, torch.rms_norm}
)
_CASTS: frozenset[Callable[..., object]] = frozenset({Tensor.to, Tensor.type_as, Tensor.half, Tensor.bfloat16})
_HALF = (torch.float16, torch.bfloat16)


class Float32Weights(TorchFunctionMode):
    """Inside this context layers compute in float32: half-precision weights are cast one by one as they are used, and nothing
    is cast down, as transformers do with what meets half-precision weights.

    The step of Noise-Conditioned Perception moves a latent by less than half precision can hold, so its path must be
    float32; casting at use spares the float32 copy of the network that converting it would cost.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in _WEIGHTED:
            args = tuple(_float32(a) for a in args)
            kwargs = {k: _float32(v) for k, v in kwargs.items()}
        found = func(*args, **kwargs)
        if func in _CASTS and isinstance(found, Tensor) and found.dtype in _HALF:
            before = args[0]
            if isinstance(before, Tensor) and before.is_floating_point() and before.dtype not in _HALF:
                return before.to(found.device, torch.float32)
        return found


def _float32(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def _exact_products() -> Iterator[None]:
    """TF32 keeps as few digits as float16 and would undo the float32 path; it is off in here, on CUDA."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def encoder_features(
    unet: nn.Module,
    x: Tensor,
    t: Tensor,
    encoder_hidden_states: Tensor,
    added_cond_kwargs: dict[str, Tensor] | None,
    layers: str,
    *,
    gradient_checkpointing: bool = False,
) -> list[Tensor]:
    """Features of the down-sampling half of a ``UNet2DConditionModel`` (Noise-Conditioned Perception, sec. 4: ``f``).

    Args:
        x: latents ``(b, c, h, w)``, float32.
        t: times ``(b,)``.
        layers: ``last_down`` (output of the last down block), ``mid`` (output of the mid block) or ``all`` (input
            convolution, every down block, mid block).

    Returns:
        float32 tensors ``(b, c_i, h_i, w_i)``. Gradients flow to ``x``.
    """

    halves = [*unet.down_blocks, unet.mid_block]  # type: ignore[misc]
    with _in_float32(x), _recomputed(_parts(halves) if gradient_checkpointing else []):
        text = encoder_hidden_states.float()
        emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))  # type: ignore[operator]
        added = {k: _float32(v) for k, v in (added_cond_kwargs or {}).items()}
        aug = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)  # type: ignore[operator]
        emb = emb if aug is None else emb + aug
        hidden = unet.conv_in(x)  # type: ignore[operator]
        found = [hidden]
        for block in unet.down_blocks:  # type: ignore[union-attr]
            if getattr(block, "has_cross_attention", False):
                hidden, _ = block(hidden_states=hidden, temb=emb, encoder_hidden_states=text)
            else:
                hidden, _ = block(hidden_states=hidden, temb=emb)
            found.append(hidden)
        if layers == "last_down":
            return [hidden]
        middle = unet.mid_block(hidden, emb, encoder_hidden_states=text)  # type: ignore[operator]
        return [middle] if layers == "mid" else [*found, middle]


@contextmanager
def _in_float32(like: Tensor) -> Iterator[None]:
    with torch.autocast(like.device.type, enabled=False), Float32Weights(), _exact_products():
        yield


def _parts(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """What a U-Net's blocks are made of, residual and transformer blocks, in any order."""
    lists = [getattr(block, "resnets", []) for block in blocks]
    lists += [part.transformer_blocks for block in blocks for part in getattr(block, "attentions", [])]
    return [part for parts in lists for part in parts]


@contextmanager
def _recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, each of the blocks keeps its inputs alone and is computed once more in the backward pass, in float32 again.

    Block by block, for in float32 it is not the activations alone that are kept: each layer keeps its weights' float32 copy.
    """

    def wrapped(forward: Callable[..., object]) -> Callable[..., object]:
        def run(*args: Any, **kwargs: Any) -> object:
            with Float32Weights(), _exact_products():
                return forward(*args, **kwargs)

        return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)

    blocks = blocks if torch.is_grad_enabled() else []
    for block in blocks:
        block.forward = wrapped(block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Enough(Exception):  # noqa: N818  no error, but the way out
    """Raised where the last block that is asked for has run."""


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Iterator[list[object]]:
    """What the blocks give, in their order; the run inside ends after the last one."""
    found: list[object] = []

    def keep(block: nn.Module, _: object, output: object) -> None:
        found.append(output)
        if block is blocks[-1]:
            raise _Enough

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def block_features(
    predict: Callable[[Tensor], object],
    x: Tensor,
    blocks: Sequence[nn.Module],
    image_tokens: Callable[[Any], Tensor],
    layers: str,
    *,
    gradient_checkpointing: bool = False,
) -> list[Tensor]:
    """Features of the first blocks of a transformer: our extension of Noise-Conditioned Perception, which knows U-Nets alone.

    A transformer has no down-sampling half; its first half stands for it. Every token is divided by its root mean square over
    channels, so that a change of its length alone, such as that of a few channels far larger than the rest, does not count.

    Args:
        predict: runs the transformer's own forward pass, blocks in their order, on latents like ``x``; it is stopped early.
        x: latents ``(b, c, h, w)``, float32.
        image_tokens: of what a block gives, those of the picture, ``(b, n, c)``.
        layers: the output of the block at a ``quarter`` or at ``half`` of their number, or ``all``: at a sixth, a third and
            half of it (the layers of the latent reward models for SD3.5).

    Returns:
        float32 tensors ``(b, n, c)``, first block first. Gradients flow to ``x``.
    """
    depths = _depths(layers, len(blocks))
    counted = blocks[: depths[-1]] if gradient_checkpointing else []
    with _in_float32(x), _recomputed(counted), outputs_of([blocks[depth - 1] for depth in depths]) as found:
        predict(x)
    return [F.rms_norm(tokens.float(), tokens.shape[-1:], eps=1e-6) for tokens in map(image_tokens, found)]


@dataclass(frozen=True)
class BlockFeatures:
    """:func:`block_features` of a family, as :class:`palate.models.denoiser.Features`.

    Args:
        predict: the family's own (network, x, t, cond) -> output.
        blocks: of a network those that are counted, in the order they run in.
        image_tokens: (what a block gives, x, cond) -> the tokens of the picture.
    """

    predict: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    blocks: Callable[[Any], Sequence[nn.Module]]
    image_tokens: Callable[[Any, Tensor, Conditioning], Tensor]

    def __call__(
        self, network: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, layers: str, *, gradient_checkpointing: bool = False
    ) -> list[Tensor]:
        return block_features(
            lambda x: self.predict(network, x, t, cond),
            x,
            self.blocks(network),
            lambda output: self.image_tokens(output, x, cond),
            layers,
            gradient_checkpointing=gradient_checkpointing,
        )


def _depths(layers: str, blocks: int) -> list[int]:
    """After how many blocks, each at least one.

    >>> _depths("quarter", 24), _depths("half", 24), _depths("all", 24), _depths("all", 2)
    ([6], [12], [4, 8, 12], [1])
    """
    parts = {"quarter": (4,), "half": (2,), "all": (6, 3, 2)}[layers]
    return sorted({max(1, blocks // part) for part in parts})
