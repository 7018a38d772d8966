"""The model being trained, and the frozen one it is measured against."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from palate.base.errors import UserError
from palate.base.files import replacing
from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import Schedule
from palate.models.adapters import Adapter, is_adapter, twin
from palate.models.denoiser import Denoiser, features_of
from palate.models.lora import load_lora, save_lora
from palate.models.parts import Words, digest, sketch
from palate.models.passes import as_forward
from palate.models.reading import PLACE, Reading, apart, reading_of

OLD = "old/"
"""Names of the old policy's tensors begin so."""
COMPILED = 64
"""Forms of a block that are compiled: by widths, batches and shapes, with gradients and without. PyTorch's limit is 8."""


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        yield


class Policy:
    """A denoiser in training: LoRA on frozen weights, or all weights beside a frozen copy.

    Args:
        denoiser: the model; its network is changed in place.
        kind: ``lora`` or ``full``.
        rank: of the LoRA matrices.
        adapter: LoRA or a variant of it, and its patterns.
        lora_layers: ``attention`` (the published recipes), or ``all`` for the linear and convolution layers of all blocks.
        lora_alpha: strength; ``rank`` unless given, so that readers that ignore alpha get the trained strength.
        texts: whether its text encoders get matrices of their own, too (``lora`` only); batches then hold tokens.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        pretrained_lora: folder or file of a LoRA to continue: its matrices are trained on, and the reference is the model with
            the LoRA as it was. Its own rank, strength and layers stand in place of those given.

    Trainable weights are float32 whatever the precision of the frozen ones.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        kind: str = "lora",
        rank: int = 16,
        lora_alpha: float | None = None,
        lora_layers: str = "attention",
        adapter: Adapter | None = None,
        texts: bool = False,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        pretrained_lora: str | Path | None = None,
    ):
        if kind not in ("lora", "full"):
            raise UserError(f"policy kind is {kind!r}; expected 'lora' or 'full'")
        self.denoiser, self.kind = denoiser, kind
        self.rank, self.gradient_checkpointing = rank, gradient_checkpointing
        network: Any = denoiser.network
        network.requires_grad_(False)
        if kind == "full":
            if pretrained_lora is not None:
                raise UserError("pretrained_lora continues a LoRA; with train_method full there is none: use lora")
            self.frozen = twin(network, share=False)
            network.float().requires_grad_(True)
        elif pretrained_lora is not None:
            load_lora(denoiser, network, pretrained_lora, texts=texts)
            self.frozen = twin(network, share=True).requires_grad_(False)
            self.rank = network.peft_config["default"].r
            if texts and reading_of(network) is None:
                self._read_along(Adapter(), self.rank, None, lora_layers, seed)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(is_adapter(name))
        else:
            if rank < 1:
                raise UserError(f"rank is {rank}; expected at least 1")
            self.frozen = twin(network, share=True)
            adapter = adapter or Adapter()
            with _seeded(seed):
                network.add_adapter(adapter.config(rank, lora_alpha, denoiser.lora_targets[lora_layers]))
            if texts:
                self._read_along(adapter, rank, lora_alpha, lora_layers, seed)
            for parameter in self.parameters():
                parameter.data = parameter.data.float()
        self.frozen.eval()
        self._old: nn.Module | None = None
        self.old_decay = 1.0
        self.compiled = False
        if gradient_checkpointing:
            with apart(network):
                network.enable_gradient_checkpointing()
        network.train()

    def _read_along(self, adapter: Adapter, rank: int, alpha: float | None, layers: str, seed: int) -> None:
        """Text encoders with fresh matrices for the network."""
        from peft import inject_adapter_in_model

        reading = Reading(self.denoiser.texts)
        plain = replace(adapter, rank_pattern={}, alpha_pattern={})  # whose patterns are of the network's layers
        for number, encoder in enumerate(reading.encoders.values()):
            with _seeded(seed + 1 + number):
                inject_adapter_in_model(plain.config(rank, alpha, self.denoiser.text_targets[layers]), encoder, "default")
        self.denoiser.network.add_module(PLACE, reading)

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def trainable_module(self) -> nn.Module:
        return self.denoiser.network

    @property
    def modules(self) -> list[nn.Module]:
        """The network in training and those beside it, which share tensors."""
        return [self.denoiser.network, self.frozen, *([] if self._old is None else [self._old])]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters."""
        return (p for p in self.denoiser.network.parameters() if p.requires_grad)

    def __call__(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.denoiser.predict(self.denoiser.network, xt, t, cond)

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What the model said before training; never with gradients."""
        with torch.no_grad():
            return self.denoiser.predict(self.frozen, xt, t, cond)

    def reference_digest(self) -> str:
        """Of all that decides what the reference and the perceptual encoder say; reads every weight."""
        network: Any = self.denoiser.network
        config = sorted((key, value) for key, value in network.config.items() if not key.startswith("_"))
        marginals = [x.numpy().tobytes() for x in self.schedule.marginals(torch.arange(self.schedule.num_train_timesteps))]
        return digest(self.frozen, type(network).__name__, config, self.schedule.prediction_type, marginals)

    def weights_sketch(self) -> str:
        """Which weights are frozen beside the trained ones."""
        return sketch(self.frozen)

    def compile_blocks(self) -> None:
        """From now on the blocks that repeat are compiled where they are first used, for each shape (``torch.compile``).

        Raises:
            UserError: the network does not tell which blocks repeat.
        """
        from torch._dynamo import config as limits

        network: Any = self.denoiser.network
        if not getattr(network, "_repeated_blocks", None):
            raise UserError(f"compile: a {type(network).__name__} does not say which of its blocks repeat; leave it out")
        limits.recompile_limit = max(limits.recompile_limit, COMPILED)
        self.compiled = True
        for module in self.modules:
            cast("Any", module).compile_repeated_blocks()

    def track_old(self, decay: float) -> None:
        """From now on keep a policy that lags behind, ``old``, at the cost of a second LoRA.

        It begins as the policy is now. With each :meth:`advance_old` it keeps ``decay`` of itself, 0 <= decay <= 1, and takes
        the rest from the policy; with 1 it stays as it began.
        """
        if self.kind == "full":
            raise UserError("a policy that lags behind is a second LoRA beside the same weights: use train_method lora")
        if not 0 <= decay <= 1:
            raise UserError(f"the decay of the old policy is {decay}; expected 0 to 1")
        self._old, self.old_decay = twin(self.denoiser.network, share=True).requires_grad_(False).eval(), decay
        if self.compiled:
            cast("Any", self._old).compile_repeated_blocks()

    def old(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What the policy said some updates ago; never with gradients. Raises ValueError without :meth:`track_old`."""
        if self._old is None:
            raise ValueError("no old policy is kept: call track_old first")
        with torch.no_grad():
            return self.denoiser.predict(self._old, xt, t, cond)

    @torch.no_grad()
    def advance_old(self, decay: float | None = None) -> None:
        """The old policy follows; it keeps ``decay`` of itself, unless given as much as :meth:`track_old` was told."""
        for now, old in zip(self.parameters(), self._old_weights().values(), strict=True):
            old.lerp_(now, 1 - (self.old_decay if decay is None else decay))

    def _old_weights(self) -> dict[str, Tensor]:
        if self._old is None:
            return {}
        return {OLD + name: p.detach() for name, p in self._old.named_parameters() if is_adapter(name)}

    def features(self, x: Tensor, t: Tensor, cond: Conditioning, layers: str) -> list[Tensor]:
        """Features of the frozen model's encoder half; gradients flow to ``x``, never to weights."""
        features, again = features_of(self.denoiser), self.gradient_checkpointing

        def found(x: Tensor) -> list[Tensor]:
            return features(self.frozen, x, t, cond, layers, gradient_checkpointing=again)

        return as_forward(self.frozen, found, x)

    def state_dict(self) -> dict[str, Tensor]:
        """The trainable tensors by name, and those of the old policy if one is kept."""
        return {n: p.detach() for n, p in self.denoiser.network.named_parameters() if p.requires_grad} | self._old_weights()

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
        the whole network in the folder of its part, such as ``unet/``. Returns the path written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        network: Any = self.denoiser.network
        if self.kind == "full":
            return replacing(folder / self.denoiser.part, network.save_pretrained)
        return save_lora(self.denoiser, network, folder)


class Finished:
    """A trained network beside the one it came from, as a :class:`Policy` is called, for measuring only.

    Args:
        network: the tuned one.
        base: the one before training: a twin made before any LoRA was put in.
    """

    def __init__(self, denoiser: Denoiser, network: nn.Module, base: nn.Module):
        self.denoiser, self._network, self._base = denoiser, network.eval(), base.eval()

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def words(self) -> Words | None:
        """What makes the tokens that batches must hold, if text encoders were trained too."""
        reading = reading_of(self._network)
        return None if reading is None else reading.words

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._network.parameters()

    @torch.no_grad()
    def __call__(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.denoiser.predict(self._network, xt, t, cond)

    @torch.no_grad()
    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.denoiser.predict(self._base, xt, t, cond)

    def features(self, x: Tensor, t: Tensor, cond: Conditioning, layers: str) -> list[Tensor]:
        return features_of(self.denoiser)(self._base, x, t, cond, layers)
