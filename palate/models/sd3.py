"""Stable Diffusion 3 and 3.5: a rectified flow with a transformer that text and picture share (arXiv 2403.03206)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palate.base.shapes import MAX_SIDE, STEP, Shape
from palate.diffusion.denoising import Conditioning
from palate.models.denoiser import Card
from palate.models.features import TRANSFORMER_LAYERS, BlockFeatures
from palate.models.fit import Config, check_channels
from palate.models.latent import Latent
from palate.models.parts import Source, TextEncoder, large

T5_LENGTH = 256
"""Tokens that the T5 encoder reads, as the pipeline has it by default."""
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ATTENTION = tuple(f"attn.{name}" for name in PROJECTIONS)
LORA_TARGETS = {
    "attention": ATTENTION,
    "all": (
        *ATTENTION,
        *(f"attn2.{name}" for name in PROJECTIONS[:4]),  # the second attention of 3.5-medium's first blocks
        *(f"{part}.{layer}" for part in ("ff", "ff_context") for layer in ("net.0.proj", "net.2")),
    ),
}
"""Layers of a ``SD3Transformer2DModel``, by the name a recipe gives them."""


class StableDiffusion3(Latent):
    """A folder or hub id in the layout of ``StableDiffusion3Pipeline``, with or without the T5 encoder.

    A conditioning holds ``encoder_hidden_states (b, 77 + 256, d)``, those of both CLIP encoders side by side and padded with
    zeros to the width of T5's, then T5's, or zeros in their place; and ``pooled_projections (b, c)`` of both CLIP encoders.

    Args: as :class:`palate.models.latent.Latent`.
    """

    part, part_name = "transformer", "transformer"
    card: ClassVar[Card] = Card("StableDiffusion3Pipeline", "SD3Transformer2DModel", "stable-diffusion-3")
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = LORA_TARGETS
    feature_layers: ClassVar[tuple[str, ...]] = TRANSFORMER_LAYERS
    prompt_arguments: ClassVar[dict[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
    }
    text_recipe: ClassVar[str] = f"sd3 hidden -2 t5 {T5_LENGTH}"
    flow: ClassVar[bool] = True
    last_reads_on: ClassVar[bool] = True

    def _text_encoders(self, source: Source, dtype: torch.dtype) -> tuple[TextEncoder, ...]:
        clip = TextEncoder(source), TextEncoder(source, "_2")
        if not source.has("text_encoder_3"):
            return clip
        return *clip, TextEncoder(source, "_3", dtype=large(dtype, source.device), length=T5_LENGTH)

    def _check_fit(self, network: Config) -> None:
        check_channels(network, self.vae.config, self.part, self.name)

    def _pipeline_options(self) -> dict[str, object]:
        return {} if len(self.texts) == 3 else {"text_encoder_3": None, "tokenizer_3": None}

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        first, second = (text(prompts, hidden_states=True) for text in self.texts[:2])
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        width = int(self.network.config.joint_attention_dim)
        t5 = clip.new_zeros(len(prompts), T5_LENGTH, width)
        if len(self.texts) == 3:
            t5 = self.texts[2](prompts).last_hidden_state.float()
        hidden = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return Conditioning({"encoder_hidden_states": hidden, "pooled_projections": pooled})

    @property
    def step(self) -> int:
        return math.lcm(STEP, self.vae.factor * int(self.network.config.patch_size))

    @property
    def most(self) -> int:
        """There are positions for so many patches in a row, whatever the pictures it was trained on."""
        config = self.network.config
        return min(MAX_SIDE, self.vae.factor * int(config.patch_size) * int(config.pos_embed_max_size))

    def encode_images(self, images: Tensor) -> Tensor:
        self.latent_shape(Shape(*images.shape[-2:]))  # refuses what cannot be cut into patches
        return super().encode_images(images)

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        dtype: torch.dtype = network.pos_embed.proj.weight.dtype  # type: ignore[union-attr]
        given = {name: cond.tensors[name].to(dtype) for name in self.prompt_arguments}
        return network(xt.to(dtype), timestep=t, **given, return_dict=False)[0]

    @property
    def features(self) -> BlockFeatures:
        """A block gives text, then picture."""
        return BlockFeatures(self.predict, lambda network: list(network.transformer_blocks), lambda output, x, cond: output[1])
