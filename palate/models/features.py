"""The encoder half of a U-Net as a frozen feature extractor, in float32 whatever the precision of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

_WEIGHTED: frozenset[Callable[..., object]] = frozenset({F.linear, torch.conv2d, F.conv2d, F.group_norm, F.layer_norm})


class Float32Weights(TorchFunctionMode):
    """Inside this context layers compute in float32: half-precision weights are cast one by one as they are used.

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
        return func(*args, **kwargs)


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

    def run(x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, enabled=False), Float32Weights(), _exact_products():
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
                return (hidden,)
            middle = unet.mid_block(hidden, emb, encoder_hidden_states=text)  # type: ignore[operator]
            return (middle,) if layers == "mid" else (*found, middle)

    if gradient_checkpointing and torch.is_grad_enabled():
        return list(checkpoint(run, x, t, encoder_hidden_states, use_reentrant=False))
    return list(run(x, t, encoder_hidden_states))
