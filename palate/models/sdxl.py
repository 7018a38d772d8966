"""Stable Diffusion XL: two text encoders, a pooled embedding, and the size and crop of every picture (arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from palate.diffusion.denoising import Conditioning
from palate.models.denoiser import Card, Kohya
from palate.models.features import UNET_LAYERS, encoder_features
from palate.models.fit import Config, check_added, check_channels, check_text_width
from palate.models.latent import Latent
from palate.models.parts import Source, TextEncoder
from palate.models.sd import LORA_TARGETS, TEXT_TARGETS
from palate.models.sd import kohya_name as as_kohya


class StableDiffusionXL(Latent):
    """A folder or hub id in the layout of ``StableDiffusionXLPipeline``.

    A conditioning holds ``encoder_hidden_states (b, length, c1 + c2)``, ``text_embeds (b, d)`` and, where pictures have one,
    their ``framing (b, 6)``: original height and width, top and left of the crop, target height and width (section 2.2).
    Without a framing the picture counts as whole and of its own size, as in the pipeline.

    Args: as :class:`palate.models.latent.Latent`.
    """

    part, part_name = "unet", "U-Net"
    card: ClassVar[Card] = Card("StableDiffusionXLPipeline", "UNet2DConditionModel", "stable-diffusion-xl")
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = LORA_TARGETS
    text_targets = TEXT_TARGETS
    feature_layers: ClassVar[tuple[str, ...]] = UNET_LAYERS
    framed: ClassVar[bool] = True
    prompt_arguments: ClassVar[dict[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "text_embeds": "pooled_prompt_embeds",
    }
    refined = True

    def __init__(self, name: str, **options: Any):
        from diffusers import StableDiffusionXLPipeline

        super().__init__(name, **options)
        config = self._source.config(StableDiffusionXLPipeline, None)
        self.zeros_for_empty_prompt = bool(config.get("force_zeros_for_empty_prompt", True))

    def _text_encoders(self, source: Source, dtype: torch.dtype) -> tuple[TextEncoder, ...]:
        return TextEncoder(source), TextEncoder(source, "_2")

    def _check_fit(self, network: Config) -> None:
        texts = self._clip_configs()
        check_channels(network, self.vae.config, self.part, self.name)
        check_text_width(network, texts, self.name)
        check_added(network, self.name, pooled=int(texts[1]["projection_dim"]))

    def _pipeline_options(self) -> dict[str, object]:
        return {"force_zeros_for_empty_prompt": self.zeros_for_empty_prompt, "add_watermarker": False}

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Outputs of the last layer but one of both encoders, side by side, and the pooled embedding of the second."""
        return self._conditioned([text(prompts, hidden_states=True) for text in self.texts])

    def _conditioned(self, read: Sequence[Any]) -> Conditioning:
        first, second = read
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Conditioning({"encoder_hidden_states": hidden, "text_embeds": second.text_embeds})

    def _added(self, cond: Conditioning, x: Tensor) -> dict[str, Tensor]:
        framing = cond.tensors.get("framing")
        if framing is None:
            height, width = (side * self.vae.factor for side in x.shape[-2:])
            framing = torch.tensor([height, width, 0, 0, height, width], device=x.device).expand(len(x), 6)
        return {"text_embeds": cond.tensors["text_embeds"], "time_ids": framing}

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        dtype: torch.dtype = network.conv_in.weight.dtype  # type: ignore[union-attr]
        cond = self._told(network, cond)
        added = self._added(cond, xt)
        added["text_embeds"] = added["text_embeds"].to(dtype)
        text = cond.tensors["encoder_hidden_states"].to(dtype)
        return network(xt.to(dtype), t, text, added_cond_kwargs=added, return_dict=False)[0]

    def features(  # type: ignore[override]
        self, network: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, layers: str, *, gradient_checkpointing: bool = False
    ) -> list[Tensor]:
        text, added = cond.tensors["encoder_hidden_states"], self._added(cond, x)
        return encoder_features(network, x, t, text, added, layers, gradient_checkpointing=gradient_checkpointing)

    @property
    def kohya(self) -> Kohya:
        """Layers have the names of the original code."""
        return Kohya(
            partial(kohya_name, layers_per_block=int(self.network.config.layers_per_block)),
            version="sdxl_base_v1-0",
            architecture="stable-diffusion-xl-v1-base",
            prediction="v" if self.schedule.prediction_type == "v_prediction" else "epsilon",
            implementation="https://github.com/Stability-AI/generative-models",
        )


# Names of layers ------------------------------------------------------------------------------------------------------------

OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def kohya_name(module: str, layers_per_block: int) -> str:
    """A layer of diffusers' U-Net by the name that kohya's LoRAs of SDXL have for it: that of the original code.

    There blocks are numbered through. (In diffusers, down block b has ``layers_per_block`` layers and a downsampler, up block
    b one layer more; ``input_blocks.0`` is ``conv_in``.)

    >>> kohya_name("down_blocks.1.attentions.0.proj_in", 2)
    'lora_unet_input_blocks_4_1_proj_in'
    """
    return as_kohya(_original(module, layers_per_block))


def _original(module: str, layers_per_block: int) -> str:
    if module in OUTER:
        return OUTER[module]
    part, *rest = module.split(".")
    block = 0 if part == "mid_block" else int(rest.pop(0))
    kind, layer, inner = rest[0], int(rest[1]), ".".join(rest[2:])
    if kind == "resnets":
        inner = RESNET[inner]
    if part == "mid_block":  # resnet, attention, resnet
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{inner}"
    first = block * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if kind == "upsamplers":  # after the resnet and the attention, which the up blocks with an upsampler have in SDXL
        return f"output_blocks.{first + layers_per_block}.2.{inner}"
    place = 1 if kind == "attentions" else 0
    return (
        f"input_blocks.{first + layer + 1}.{place}.{inner}"
        if part == "down_blocks"
        else (f"output_blocks.{first + layer}.{place}.{inner}")
    )
