"""Stable Diffusion XL: two text encoders, a pooled embedding, and the size and crop of every picture (arXiv 2307.01952)."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import from_config
from palate.models.features import encoder_features
from palate.models.parts import Remembered, Source, TextEncoder, Vae, assemble, draw_pictures, zeros_like
from palate.models.sd import LORA_TARGETS


class StableDiffusionXL:
    """A folder or hub id in the layout of ``StableDiffusionXLPipeline``. See :class:`palate.models.denoiser.Denoiser`.

    A conditioning holds ``encoder_hidden_states (b, length, c1 + c2)``, ``text_embeds (b, d)`` and, where pictures have one,
    their ``framing (b, 6)``: original height and width, top and left of the crop, target height and width (section 2.2).
    Without a framing the picture counts as whole and of its own size, as in the pipeline.

    Args: as :class:`palate.models.sd.StableDiffusion`.
    """

    family = "sdxl"
    part: ClassVar[str] = "unet"
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = LORA_TARGETS

    def __init__(self, name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **source: str):
        from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

        self.name, self.device = name, torch.device(device)
        read = Source(name, self.device, **source)
        self.scheduler_config = read.scheduler_config()
        self.schedule = from_config(self.scheduler_config)
        self.vae = Vae(read, dtype)
        self.texts = TextEncoder(read), TextEncoder(read, "CLIPTextModelWithProjection", "_2")
        self.vae_scale_factor = self.vae.factor
        self.network = read.read(UNet2DConditionModel, "unet", torch_dtype=dtype)
        self.default_resolution = int(self.network.config.sample_size) * self.vae_scale_factor
        self.zeros_for_empty_prompt = bool(
            read.config(StableDiffusionXLPipeline, None).get("force_zeros_for_empty_prompt", True)
        )
        self._prompts = Remembered(self.encode_prompts, self.unconditional)

    def release(self) -> None:
        for part in (self.vae, *self.texts):
            part.release()

    def fingerprint(self) -> dict[str, str]:
        return {"vae": self.vae.digest(), "text": " ".join(text.digest() for text in self.texts)}

    def encoders(self) -> dict[str, Any]:
        fingerprint = self.fingerprint()
        return {
            "encode_images": self.encode_images,
            "encode_text": lambda prompts: self.encode_prompts(prompts).tensors,
            "image_fingerprint": fingerprint["vae"],
            "text_fingerprint": fingerprint["text"],
        }

    def cut_prompts(self, prompts: list[str]) -> tuple[int, int]:
        prompts = list(dict.fromkeys(prompts))
        (first, a), (second, b) = (text.longer(prompts) for text in self.texts)
        return sum(x or y for x, y in zip(first, second, strict=True)), min(a, b)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Outputs of the last layer but one of both encoders, side by side, and the pooled embedding of the second."""
        first, second = (text(prompts, hidden_states=True) for text in self.texts)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Conditioning({"encoder_hidden_states": hidden, "text_embeds": second.text_embeds})

    def unconditional(self) -> Conditioning:
        """Zeros, or the empty prompt if the pipeline's ``force_zeros_for_empty_prompt`` is false."""
        empty = self.encode_prompts([""])
        return zeros_like(empty) if self.zeros_for_empty_prompt else empty

    def encode_images(self, images: Tensor) -> Tensor:
        return self.vae.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)

    def _added(self, cond: Conditioning, x: Tensor) -> dict[str, Tensor]:
        framing = cond.tensors.get("framing")
        if framing is None:
            height, width = (side * self.vae_scale_factor for side in x.shape[-2:])
            framing = torch.tensor([height, width, 0, 0, height, width], device=x.device).expand(len(x), 6)
        return {"text_embeds": cond.tensors["text_embeds"], "time_ids": framing}

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        dtype = network.conv_in.weight.dtype  # type: ignore[union-attr]
        added = self._added(cond, xt)
        added["text_embeds"] = added["text_embeds"].to(dtype)
        text = cond.tensors["encoder_hidden_states"].to(dtype)
        return network(xt.to(dtype), t, text, added_cond_kwargs=added, return_dict=False)[0]

    def features(
        self, network: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, layers: str, *, gradient_checkpointing: bool = False
    ) -> list[Tensor]:
        text, added = cond.tensors["encoder_hidden_states"], self._added(cond, x)
        return encoder_features(network, x, t, text, added, layers, gradient_checkpointing=gradient_checkpointing)

    def pipeline(self, network: nn.Module | None = None) -> Any:
        return self._pipeline(network, *(text.pair for text in self.texts))

    def _pipeline(
        self, network: nn.Module | None, first: tuple[Any, Any], second: tuple[Any, Any], *, editing: bool = False
    ) -> Any:
        return assemble(
            "StableDiffusionXLImg2ImgPipeline" if editing else "StableDiffusionXLPipeline",
            self.scheduler_config,
            vae=self.vae.module,
            text_encoder=first[1],
            text_encoder_2=second[1],
            tokenizer=first[0],
            tokenizer_2=second[0],
            unet=self.network if network is None else network,
            force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
            add_watermarker=False,
        )

    def remember(self, prompts: list[str]) -> None:
        self._prompts.add(prompts)

    def generate(
        self, prompts: list[str], seeds: list[int], *, network: nn.Module | None = None, **drawing: Any
    ) -> list[Image.Image]:
        make = partial(self._pipeline, network, (None, None), (None, None))  # the text encoders may have left memory
        names = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
        return draw_pictures(make, self._prompts, names, self.vae, prompts, seeds, **drawing)

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        from diffusers import StableDiffusionXLPipeline

        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers, **metadata)
