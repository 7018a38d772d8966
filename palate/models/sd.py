"""Stable Diffusion 1.x and 2.x: one text encoder, no added conditions."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import Schedule
from palate.errors import UserError
from palate.models.features import encoder_features


class StableDiffusion:
    """A folder or hub id in the layout of ``StableDiffusionPipeline``. See :class:`palate.models.denoiser.Denoiser`.

    Args:
        name: folder or hub id.
        dtype: of the frozen weights; pictures and prompts are always encoded in float32.
        device: where the U-Net runs.
    """

    family = "sd"
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")

    def __init__(self, name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **source: Any):
        from diffusers import UNet2DConditionModel
        from diffusers.schedulers import SchedulerMixin

        self.name, self.device, self._source = name, torch.device(device), source
        self._vae: Any = None
        self._text: Any = None
        self._prompts: dict[str, Tensor] = {}
        self.unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=dtype, **source)
        self.unet.to(self.device).eval()
        self.scheduler_config, _ = SchedulerMixin.load_config(
            name, subfolder="scheduler", return_unused_kwargs=True, **{k: v for k, v in source.items() if k != "variant"}
        )
        self.schedule = Schedule.from_config(self.scheduler_config)
        vae_config = self._vae_class().load_config(
            name, subfolder="vae", **{k: v for k, v in source.items() if k != "variant"}
        )
        self.vae_scale_factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        self.default_resolution = int(self.unet.config.sample_size) * self.vae_scale_factor

    @staticmethod
    def _vae_class() -> Any:
        from diffusers import AutoencoderKL

        return AutoencoderKL

    @property
    def vae(self) -> Any:
        if self._vae is None:
            vae = self._vae_class().from_pretrained(self.name, subfolder="vae", torch_dtype=torch.float32, **self._source)
            self._vae = vae.to(self.device).eval().requires_grad_(False)
        return self._vae

    @property
    def text(self) -> tuple[Any, Any]:
        """Tokenizer and text encoder."""
        if self._text is None:
            from transformers import CLIPTextModel, CLIPTokenizer

            plain = {k: v for k, v in self._source.items() if k != "variant"}
            tokenizer = CLIPTokenizer.from_pretrained(self.name, subfolder="tokenizer", **plain)
            encoder = CLIPTextModel.from_pretrained(self.name, subfolder="text_encoder", dtype=torch.float32, **self._source)
            self._text = tokenizer, encoder.to(self.device).eval().requires_grad_(False)
        return self._text

    def release(self) -> None:
        self._vae = self._text = None

    def fingerprint(self) -> dict[str, str]:
        tokenizer, encoder = self.text
        words = f"{tokenizer.model_max_length} {tokenizer.backend_tokenizer.to_str()}"
        return {
            "vae": _digest(self.vae, self.vae.config["scaling_factor"], self.vae.config.get("shift_factor")),
            "text": _digest(encoder, words, getattr(encoder.config, "use_attention_mask", False)),
        }

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        tokenizer, encoder = self.text
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(self.device) if getattr(encoder.config, "use_attention_mask", False) else None
        hidden = encoder(tokens.input_ids.to(self.device), attention_mask=mask).last_hidden_state
        return Conditioning({"encoder_hidden_states": hidden})

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(images.to(self.device, torch.float32)).latent_dist
        return (posterior.mean - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)

    def predict(self, unet: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        dtype = unet.conv_in.weight.dtype  # type: ignore[union-attr]
        return unet(xt.to(dtype), t, cond.tensors["encoder_hidden_states"].to(dtype), return_dict=False)[0]

    def features(
        self, unet: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, layers: str, *, gradient_checkpointing: bool = False
    ) -> list[Tensor]:
        text = cond.tensors["encoder_hidden_states"]
        return encoder_features(unet, x, t, text, None, layers, gradient_checkpointing=gradient_checkpointing)

    def pipeline(self, unet: nn.Module | None = None) -> Any:
        import diffusers

        tokenizer, text_encoder = self.text
        scheduler = getattr(diffusers, self.scheduler_config["_class_name"]).from_config(self.scheduler_config)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=self.unet if unet is None else unet,  # type: ignore[arg-type]
            scheduler=scheduler,
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def remember(self, prompts: list[str]) -> None:
        """Encode prompts (and the empty one) for :meth:`generate`, so that it needs no text encoder for them later."""
        wanted = [p for p in dict.fromkeys([*prompts, ""]) if p not in self._prompts]
        for start in range(0, len(wanted), 64):
            part = wanted[start : start + 64]
            self._prompts.update(zip(part, self.encode_prompts(part).tensors["encoder_hidden_states"].cpu(), strict=True))

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        unet: nn.Module | None = None,
        num_inference_steps: int,
        guidance_scale: float,
        resolution: int,
        batch_size: int = 8,
        progress: bool = False,
    ) -> list[Image.Image]:
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        pipeline = self.pipeline(unet)
        dtype = pipeline.unet.conv_in.weight.dtype
        self.remember(prompts)
        images: list[Image.Image] = []
        was_training = pipeline.unet.training
        pipeline.unet.eval()
        try:
            for start in tqdm(range(0, len(prompts), batch_size), desc="generating", disable=not progress, leave=False):
                part = prompts[start : start + batch_size]
                text = torch.stack([self._prompts[p] for p in part]).to(self.device, dtype)
                empty = self._prompts[""].expand_as(text).to(self.device, dtype)
                generators = [torch.Generator("cpu").manual_seed(s) for s in seeds[start : start + batch_size]]
                latents = pipeline(
                    prompt_embeds=text,
                    negative_prompt_embeds=empty,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    height=resolution,
                    width=resolution,
                    generator=generators,
                    output_type="latent",
                ).images
                for picture in self.decode(latents).cpu():
                    array = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
                    images.append(Image.fromarray(array))
        finally:
            pipeline.unet.train(was_training)
        return images

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        from diffusers import StableDiffusionPipeline

        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, **metadata)


def _digest(module: nn.Module, *settings: Any) -> str:
    """Digest of weights and of what else decides the module's result."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_resolution(denoiser: Any, resolution: int) -> int:
    """Refuse sizes the VAE and U-Net cannot halve evenly."""
    if resolution <= 0 or resolution % 8:
        raise UserError(f"resolution is {resolution}; expected a positive multiple of 8, such as {denoiser.default_resolution}")
    return resolution
