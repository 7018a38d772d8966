"""Stable Diffusion 1.x and 2.x: one text encoder, no added conditions."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from palate.base.errors import UserError
from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import from_config
from palate.models.features import encoder_features
from palate.models.parts import Remembered, Source, TextEncoder, Vae, assemble, draw_pictures

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
LORA_TARGETS = {
    "attention": ATTENTION,
    "all": (
        *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    ),
}
"""Layers of a ``UNet2DConditionModel``, by the name a recipe gives them."""


class StableDiffusion:
    """A folder or hub id in the layout of ``StableDiffusionPipeline``. See :class:`palate.models.denoiser.Denoiser`.

    Args:
        name: folder or hub id.
        dtype: of the frozen weights; prompts are always encoded in float32, and pictures as :class:`Vae` says.
        device: where the U-Net runs.
    """

    family = "sd"
    part: ClassVar[str] = "unet"
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = LORA_TARGETS

    def __init__(self, name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **source: str):
        from diffusers import UNet2DConditionModel

        self.name, self.device = name, torch.device(device)
        read = Source(name, self.device, **source)
        self.scheduler_config = read.scheduler_config()
        self.schedule = from_config(self.scheduler_config)
        self.vae, self.text = Vae(read, dtype), TextEncoder(read)
        self.vae_scale_factor = self.vae.factor
        self.network = read.read(UNet2DConditionModel, "unet", torch_dtype=dtype)
        self.default_resolution = int(self.network.config.sample_size) * self.vae_scale_factor
        self._prompts = Remembered(self.encode_prompts, self.unconditional)

    def release(self) -> None:
        self.vae.release()
        self.text.release()

    def fingerprint(self) -> dict[str, str]:
        return {"vae": self.vae.digest(), "text": self.text.digest()}

    def encoders(self) -> dict[str, Any]:
        fingerprint = self.fingerprint()
        return {
            "encode_images": self.encode_images,
            "encode_text": lambda prompts: self.encode_prompts(prompts).tensors,
            "image_fingerprint": fingerprint["vae"],
            "text_fingerprint": fingerprint["text"],
        }

    def cut_prompts(self, prompts: list[str]) -> tuple[int, int]:
        longer, limit = self.text.longer(list(dict.fromkeys(prompts)))
        return sum(longer), limit

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return Conditioning({"encoder_hidden_states": self.text(prompts).last_hidden_state})

    def unconditional(self) -> Conditioning:
        return self.encode_prompts([""])

    def encode_images(self, images: Tensor) -> Tensor:
        return self.vae.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        dtype = network.conv_in.weight.dtype  # type: ignore[union-attr]
        return network(xt.to(dtype), t, cond.tensors["encoder_hidden_states"].to(dtype), return_dict=False)[0]

    def features(
        self, network: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, layers: str, *, gradient_checkpointing: bool = False
    ) -> list[Tensor]:
        text = cond.tensors["encoder_hidden_states"]
        return encoder_features(network, x, t, text, None, layers, gradient_checkpointing=gradient_checkpointing)

    def pipeline(self, network: nn.Module | None = None) -> Any:
        return self._pipeline(network, *self.text.pair)

    def _pipeline(self, network: nn.Module | None, tokenizer: Any, text_encoder: Any, *, editing: bool = False) -> Any:
        return assemble(
            "StableDiffusionImg2ImgPipeline" if editing else "StableDiffusionPipeline",
            self.scheduler_config,
            vae=self.vae.module,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=self.network if network is None else network,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def remember(self, prompts: list[str]) -> None:
        self._prompts.add(prompts)

    def generate(
        self, prompts: list[str], seeds: list[int], *, network: nn.Module | None = None, refiner: Any = None, **drawing: Any
    ) -> list[Image.Image]:
        if refiner is not None:
            raise UserError(f"a refiner finishes pictures of an SDXL model, but {self.name} is of Stable Diffusion 1.x or 2.x")
        make = partial(self._pipeline, network, None, None)  # the text encoder may have left memory
        names = {"encoder_hidden_states": "prompt_embeds"}
        return draw_pictures(make, self._prompts, names, self.vae, prompts, seeds, **drawing)

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        from diffusers import StableDiffusionPipeline

        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **metadata)
