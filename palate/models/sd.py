"""Stable Diffusion 1.x and 2.x: one text encoder, no added conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from palate.diffusion.denoising import Conditioning
from palate.models.denoiser import Card, Kohya
from palate.models.features import UNET_LAYERS, encoder_features
from palate.models.fit import Config, check_added, check_channels, check_text_width
from palate.models.latent import Latent
from palate.models.parts import Source, TextEncoder

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
LORA_TARGETS = {
    "attention": ATTENTION,
    "all": (
        *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    ),
}
"""Layers of a ``UNet2DConditionModel``, by the name a recipe gives them."""
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_TARGETS = {"attention": CLIP_ATTENTION, "all": (*CLIP_ATTENTION, "fc1", "fc2")}
"""Layers of CLIP's text encoders."""


class StableDiffusion(Latent):
    """A folder or hub id in the layout of ``StableDiffusionPipeline``.

    A conditioning holds ``encoder_hidden_states (b, length, c)``. Args: as :class:`palate.models.latent.Latent`.
    """

    part, part_name = "unet", "U-Net"
    card: ClassVar[Card] = Card("StableDiffusionPipeline", "UNet2DConditionModel", "stable-diffusion")
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = LORA_TARGETS
    text_targets = TEXT_TARGETS
    feature_layers: ClassVar[tuple[str, ...]] = UNET_LAYERS
    framed: ClassVar[bool] = True
    prompt_arguments: ClassVar[dict[str, str]] = {"encoder_hidden_states": "prompt_embeds"}

    def _text_encoders(self, source: Source, dtype: torch.dtype) -> tuple[TextEncoder, ...]:
        return (TextEncoder(source),)

    def _check_fit(self, network: Config) -> None:
        texts = self._clip_configs()
        check_channels(network, self.vae.config, self.part, self.name)
        check_text_width(network, texts, self.name)
        check_added(network, self.name, pooled=None)

    def _pipeline_options(self) -> dict[str, object]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return self._conditioned([text(prompts) for text in self.texts])

    def _conditioned(self, read: Sequence[Any]) -> Conditioning:
        return Conditioning({"encoder_hidden_states": read[0].last_hidden_state})

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        dtype: torch.dtype = network.conv_in.weight.dtype  # type: ignore[union-attr]
        cond = self._told(network, cond)
        return network(xt.to(dtype), t, cond.tensors["encoder_hidden_states"].to(dtype), return_dict=False)[0]

    def features(  # type: ignore[override]
        self, network: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, layers: str, *, gradient_checkpointing: bool = False
    ) -> list[Tensor]:
        text = cond.tensors["encoder_hidden_states"]
        return encoder_features(network, x, t, text, None, layers, gradient_checkpointing=gradient_checkpointing)

    @property
    def kohya(self) -> Kohya:
        """Layers have diffusers' names, with ``_`` for ``.``."""
        velocity = self.schedule.prediction_type == "v_prediction"
        second = int(self.network.config.cross_attention_dim) == 1024
        if second:
            version, architecture = (
                ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512")
            )
        else:
            version, architecture = "sd_v1", "stable-diffusion-v1"
        return Kohya(kohya_name, version, architecture, "v" if velocity else "epsilon", second=second)


def kohya_name(module: str) -> str:
    """A layer of a U-Net by the name that kohya's LoRAs have for it.

    >>> kohya_name("down_blocks.1.attentions.0.proj_in")
    'lora_unet_down_blocks_1_attentions_0_proj_in'
    """
    return "lora_unet_" + module.replace(".", "_")
