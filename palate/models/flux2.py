"""FLUX.2 klein: joint and single blocks over patches of latents, Qwen3 as text encoder, its own VAE."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palate.base.shapes import Shape
from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import RectifiedFlow, Schedule
from palate.models.denoiser import Card, Kohya
from palate.models.features import TRANSFORMER_LAYERS, BlockFeatures
from palate.models.fit import Config, check_channels
from palate.models.flux import kohya_name, together
from palate.models.latent import Latent, few_steps
from palate.models.parts import Source, TextEncoder, Vae, large
from palate.models.qwen import chat, hidden_states

LAYERS = (9, 18, 27)
"""Of Qwen3, side by side."""


class PatchVae(Vae):
    """Scaled latents are patches of 2 x 2, each channel normalised by the VAE's own statistics."""

    kind: ClassVar[str] = "AutoencoderKLFlux2"

    def __init__(self, source: Source, dtype: torch.dtype, part_name: str):
        super().__init__(source, dtype, part_name)
        self.factor *= 2

    def scaled(self, raw: Tensor) -> Tensor:
        mean, std = self._statistics(raw)
        return (F.pixel_unshuffle(raw, 2) - mean) / std

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return F.pixel_shuffle(latents * std + mean, 2)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.module.bn
        std = (norm.running_var + self.module.config.batch_norm_eps).sqrt()
        return norm.running_mean.view(1, -1, 1, 1).to(like), std.view(1, -1, 1, 1).to(like)


class Flux2Klein(Latent):
    """A folder or hub id in the layout of ``Flux2KleinPipeline``; latents are of its patches, a sixteenth of the side.

    A conditioning holds ``encoder_hidden_states (b, 512, 3 c)``; the padding is attended to, as in the pipeline.
    Args: as :class:`palate.models.latent.Latent`.
    """

    part, part_name = "transformer", "transformer"
    card: ClassVar[Card] = Card("Flux2KleinPipeline", "Flux2Transformer2DModel", "flux2")
    prompt_arguments: ClassVar[dict[str, str]] = {"encoder_hidden_states": "prompt_embeds"}
    feature_layers: ClassVar[tuple[str, ...]] = TRANSFORMER_LAYERS
    text_recipe = f"layers {LAYERS}"
    vae_kind = PatchVae
    side, flow, spaced, edited = 64, True, True, False

    def __init__(self, name: str, **options: Any):
        import diffusers

        super().__init__(name, **options)
        index = self._source.config(getattr(diffusers, self.card.pipeline), None)
        self.is_distilled = bool(index.get("is_distilled", False))
        self.negated = not self.is_distilled

    def _read_schedule(self, config: Config) -> Schedule:
        """With the pipeline's own shift, where the sampler asks for one."""
        found = super()._read_schedule(config)
        assert isinstance(found, RectifiedFlow)
        return replace(found, patch=1, shift=empirical_shift if callable(found.shift) else found.shift)

    def _check_fit(self, network: Config) -> None:
        check_channels(network, self.vae.config, self.part, self.name, pack=2)

    def _text_encoders(self, source: Source, dtype: torch.dtype) -> tuple[TextEncoder, ...]:
        return (TextEncoder(source, dtype=large(dtype, source.device), length=512, template=chat(thinking=False)),)

    def _pipeline_options(self) -> dict[str, object]:
        return {"is_distilled": self.is_distilled}

    @property
    def caution(self) -> str:
        return few_steps(self.name, "FLUX.2-klein-base") if self.is_distilled else ""

    @property
    def lora_targets(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        return lora_targets(self.network.config.num_single_layers)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        (text,) = self.texts
        return Conditioning({"encoder_hidden_states": hidden_states(text, prompts, LAYERS)[0]})

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """A token is a latent; ids are (picture, row, column, place in the prompt)."""
        dtype: torch.dtype = network.x_embedder.weight.dtype  # type: ignore[union-attr]
        text, (height, width) = cond.tensors["encoder_hidden_states"].to(dtype), xt.shape[-2:]
        found = network(
            hidden_states=xt.to(dtype).flatten(2).mT,
            timestep=(t / 1000).float(),
            encoder_hidden_states=text,
            img_ids=_grid(1, height, width, 1, device=xt.device),
            txt_ids=_grid(1, 1, 1, text.shape[1], device=xt.device),
            return_dict=False,
        )[0]
        return found.mT.unflatten(2, (height, width))

    @property
    def features(self) -> BlockFeatures:
        """Joint blocks, which give text, then picture, then single ones, which give both as one."""
        return BlockFeatures(
            self.predict,
            lambda network: [*network.transformer_blocks, *network.single_transformer_blocks],
            lambda output, x, cond: output[1] if isinstance(output, tuple) else output[:, -x[0, 0].numel() :],
        )

    def _scaled(self, found: Tensor, shape: Shape) -> Tensor:
        return self.vae.scaled(found)

    @property
    def kohya(self) -> Kohya:
        size = "9b" if self.network.config.num_attention_heads == 32 else "4b"
        code = "https://github.com/black-forest-labs/flux2"
        return Kohya(kohya_name, "flux2", f"Flux.2-klein-{size}", None, code, parts=together)


def lora_targets(singles: int) -> dict[str, tuple[str, ...]]:
    """Of a network with so many single blocks. In joint ones ``to_out`` is a list of layers, in single ones a layer: these are
    named one by one."""
    named = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(singles)]
    attention = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", *named)
    joint = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in", "linear_out")
    return {"attention": attention, "all": (*attention, *joint)}


def _grid(*sides: int, device: torch.device) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))


def empirical_shift(tokens: int, num_inference_steps: int) -> float:
    """e^mu, with mu as the authors fitted it to the number of tokens and of steps (``compute_empirical_mu`` of diffusers).

    >>> round(math.log(empirical_shift(4096, 200)), 4)
    1.15
    """
    many = 0.00016927 * tokens + 0.45666666  # of 200 steps
    few = 8.73809524e-05 * tokens + 1.89833333  # of 10
    share = 0 if tokens > 4300 else (200 - num_inference_steps) / 190
    return math.exp(many + share * (few - many))
