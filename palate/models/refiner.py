"""SDXL's second stage: another U-Net that takes over the last part of the denoising (arXiv 2307.01952, section 2.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palate.diffusion.denoising import Conditioning
from palate.models.fit import (
    check_added,
    check_channels,
    check_class,
    check_sampler,
    check_text_width,
    text_config,
)
from palate.models.parts import Remembered, Source, TextEncoder, zeros_like

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from palate.models.drawing import Drawing


TIME_IDS = {True: 5, False: 6}
"""How many numbers beside the text the U-Net takes, by ``requires_aesthetics_score``: size, crop, and score or target size."""


def check_parts(source: Source) -> None:
    """Raise ``UserError`` unless all parts are there and fit each other; reads configurations only."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel

    source.check_files(["unet", "text_encoder_2"])
    check_sampler(source.scheduler_config(), source.name, draws=True)
    network = source.config(UNet2DConditionModel, "unet")
    check_class(network, "unet", source.name, "UNet2DConditionModel")
    check_channels(network, {}, "unet", source.name)  # latents are those of SDXL, of four channels
    text = text_config(source.name, "text_encoder_2", **source.plain)
    check_text_width(network, [text], source.name)
    scored = bool(source.config(StableDiffusionXLImg2ImgPipeline, None).get("requires_aesthetics_score", False))
    check_added(network, source.name, int(text["projection_dim"]), TIME_IDS[scored])


class Refiner:
    """A folder or hub id in the layout of ``StableDiffusionXLImg2ImgPipeline`` with the second text encoder alone.

    Args:
        name: folder or hub id.
        start: the share of the denoising that the base model does, in (0, 1); 0.8 in the published ensemble.
        dtype: of the U-Net's weights.
    """

    def __init__(
        self,
        name: str,
        *,
        start: float = 0.8,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **source: str,
    ):
        from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel

        self.name, self.start = name, start
        read = Source(name, device, **source)
        check_parts(read)
        self._text = TextEncoder(read, "_2")
        self._unet = read.read(UNet2DConditionModel, "unet", torch_dtype=dtype)
        self._prediction_type = read.scheduler_config().get("prediction_type", "epsilon")
        config = read.config(StableDiffusionXLImg2ImgPipeline, None)
        self._options = {
            "requires_aesthetics_score": bool(config.get("requires_aesthetics_score", False)),
            "force_zeros_for_empty_prompt": bool(config.get("force_zeros_for_empty_prompt", True)),
        }
        self._prompts = Remembered(self._encode, self._unconditional)

    def _encode(self, prompts: list[str]) -> Conditioning:
        found = self._text(prompts, hidden_states=True)
        return Conditioning({"hidden": found.hidden_states[-2], "pooled": found.text_embeds})

    def _unconditional(self) -> Conditioning:
        empty = self._encode([""])
        return zeros_like(empty) if self._options["force_zeros_for_empty_prompt"] else empty

    def finish(
        self,
        latents: Tensor,
        prompts: list[str],
        negatives: list[str | None],
        generators: list[torch.Generator],
        drawing: Drawing,
        *,
        vae: AutoencoderKL,
        scheduler: Any,
    ) -> Tensor:
        """Scaled latents ``(b, c, h, w)`` that the base model denoised up to ``start``, denoised to the end.

        vae, scheduler: the base's; both stages must take the same steps.
        """
        from diffusers import StableDiffusionXLImg2ImgPipeline

        pipeline = StableDiffusionXLImg2ImgPipeline(
            vae=vae,
            text_encoder=None,  # type: ignore[arg-type]
            text_encoder_2=None,  # type: ignore[arg-type]
            tokenizer=None,  # type: ignore[arg-type]
            tokenizer_2=None,  # type: ignore[arg-type]
            unet=self._unet,
            scheduler=type(scheduler).from_config({**scheduler.config, "prediction_type": self._prediction_type}),
            add_watermarker=False,
            **self._options,
        )
        pipeline.set_progress_bar_config(disable=True)
        self._prompts.add([*prompts, *(n for n in negatives if n is not None)])
        dtype, device = self._unet.dtype, self._unet.device
        given, away = (self._prompts[texts].to(device, dtype).tensors for texts in (prompts, negatives))
        return pipeline(
            prompt_embeds=given["hidden"],
            pooled_prompt_embeds=given["pooled"],
            negative_prompt_embeds=away["hidden"],
            negative_pooled_prompt_embeds=away["pooled"],
            image=latents.to(device, dtype),
            denoising_start=self.start,
            num_inference_steps=drawing.num_inference_steps,
            guidance_scale=drawing.guidance_scale,
            generator=generators,
            output_type="latent",
        ).images
