"""The model being trained, and the frozen one it is measured against."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palate.diffusion.denoising import Conditioning
from palate.errors import UserError
from palate.models.denoiser import Denoiser


def twin(module: nn.Module, *, share: bool) -> nn.Module:
    """A second module tree; with ``share`` its parameters and buffers are the very tensors of the first.

    Adapters put into one tree later are not in the other, so a shared twin is the model without adapters at no memory.
    """
    memo: dict[int, Any] = {}
    if share:
        memo = {id(x): x for x in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


class Policy:
    """A denoiser in training: LoRA on frozen weights, or all weights beside a frozen copy.

    Args:
        denoiser: the model; its U-Net is changed in place.
        kind: ``lora`` or ``full``.
        rank: of the LoRA matrices.
        lora_alpha: strength; ``rank`` unless given, so that readers that ignore alpha get the trained strength.
        gradient_checkpointing: recompute activations in the backward pass to save memory.

    Trainable weights are float32 whatever the precision of the frozen ones.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        kind: str = "lora",
        rank: int = 16,
        lora_alpha: float | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ):
        if kind not in ("lora", "full"):
            raise UserError(f"policy kind is {kind!r}; expected 'lora' or 'full'")
        self.denoiser, self.kind = denoiser, kind
        self.rank, self.gradient_checkpointing = rank, gradient_checkpointing
        unet: Any = denoiser.unet
        unet.requires_grad_(False)
        if kind == "lora":
            from peft import LoraConfig

            if rank < 1:
                raise UserError(f"rank is {rank}; expected at least 1")
            self.frozen = twin(unet, share=True)
            config = LoraConfig(
                r=rank,
                lora_alpha=rank if lora_alpha is None else lora_alpha,  # type: ignore[arg-type]
                init_lora_weights="gaussian",
                target_modules=list(denoiser.lora_targets),
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                unet.add_adapter(config)
            for parameter in self.parameters():
                parameter.data = parameter.data.float()
        else:
            self.frozen = twin(unet, share=False)
            unet.float().requires_grad_(True)
        self.frozen.eval()
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()

    @property
    def schedule(self) -> Any:
        return self.denoiser.schedule

    @property
    def trainable_module(self) -> nn.Module:
        return self.denoiser.unet

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters."""
        return (p for p in self.denoiser.unet.parameters() if p.requires_grad)

    def __call__(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.denoiser.predict(self.denoiser.unet, xt, t, cond)

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What the model said before training; never with gradients."""
        with torch.no_grad():
            return self.denoiser.predict(self.frozen, xt, t, cond)

    def features(self, x: Tensor, t: Tensor, cond: Conditioning, layers: str) -> list[Tensor]:
        """Features of the frozen model's encoder half; gradients flow to ``x``, never to weights."""
        return self.denoiser.features(self.frozen, x, t, cond, layers, gradient_checkpointing=self.gradient_checkpointing)

    def state_dict(self) -> dict[str, Tensor]:
        """The trainable tensors by name."""
        return {n: p.detach() for n, p in self.denoiser.unet.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
            raise UserError(
                f"the saved weights do not fit this policy ({self.kind}, rank {self.rank}): "
                "continue with the model, policy kind and rank they were trained with"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def save(self, folder: str | Path) -> Path:
        """Write the result: ``pytorch_lora_weights.safetensors`` in diffusers' layout with alpha in its metadata, or
        the full U-Net as ``unet/``. Returns the path written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unet: Any = self.denoiser.unet
        if self.kind == "full":
            return _replace_folder(folder / "unet", unet.save_pretrained)
        from diffusers.training_utils import _collate_lora_metadata
        from peft import get_peft_model_state_dict

        partial = folder / ".saving"
        self.denoiser.save_lora(str(partial), get_peft_model_state_dict(unet), _collate_lora_metadata({"unet": unet}))
        written = partial / "pytorch_lora_weights.safetensors"
        final = folder / written.name
        written.replace(final)
        partial.rmdir()
        return final


def _replace_folder(final: Path, write: Any) -> Path:
    import shutil

    partial = final.with_name(f".{final.name}-saving")
    shutil.rmtree(partial, ignore_errors=True)
    write(str(partial))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final
