"""Stable Diffusion 1.x and 2.x: one text encoder, no added conditions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import Schedule
from palate.errors import UserError
from palate.hub import first_line
from palate.models.features import encoder_features


class StableDiffusion:
    """A folder or hub id in the layout of ``StableDiffusionPipeline``. See :class:`palate.models.denoiser.Denoiser`.

    Args:
        name: folder or hub id.
        dtype: of the frozen weights; pictures and prompts are always encoded in float32.
        device: where the U-Net runs.
    """

    family = "sd"
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_k", "to_q", "to_v", "to_out.0"),
        "all": (
            *("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
        ),
    }

    def __init__(self, name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **source: str):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        self.name, self.device = name, torch.device(device)
        self._source = source
        self._plain = {k: v for k, v in source.items() if k != "variant"}  # configurations and tokenizers have no variants
        self._vae: Any = None
        self._text: Any = None
        self._prompts: dict[str, Tensor] = {}
        # Any scheduler's configuration can be read by any class.
        self.scheduler_config = dict(DDPMScheduler.load_config(name, subfolder="scheduler", **self._plain))
        self.schedule = Schedule.from_config(self.scheduler_config)
        vae_config = AutoencoderKL.load_config(name, subfolder="vae", **self._plain)
        self.vae_scale_factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        self.unet = self._read(UNet2DConditionModel, "unet", torch_dtype=dtype)
        self.default_resolution = int(self.unet.config.sample_size) * self.vae_scale_factor

    @property
    def vae(self) -> Any:
        if self._vae is None:
            from diffusers import AutoencoderKL

            self._vae = self._read(AutoencoderKL, "vae", torch_dtype=torch.float32)
        return self._vae

    @property
    def text(self) -> tuple[Any, Any]:
        """Tokenizer and text encoder."""
        if self._text is None:
            from transformers import CLIPTextModel, CLIPTokenizer

            try:
                tokenizer = CLIPTokenizer.from_pretrained(self.name, subfolder="tokenizer", **self._plain)
            except (OSError, ValueError) as error:
                raise UserError(f"the tokenizer of {self.name} cannot be loaded: {first_line(error)}") from error
            if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a missing folder
                raise UserError(f"the tokenizer of {self.name} has no words; expected vocab.json and merges.txt in tokenizer/")
            encoder = self._read(CLIPTextModel, "text_encoder", dtype=torch.float32)
            # Of a tokenizer without a limit, model_max_length is a huge number.
            tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            self._text = tokenizer, encoder
        return self._text

    def _read(self, kind: Any, part: str, **options: Any) -> Any:
        """A frozen part of the pipeline on the device, refused if any weight is missing: libraries fill in random ones."""
        try:
            module, found = kind.from_pretrained(self.name, subfolder=part, output_loading_info=True, **options, **self._source)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{part} of {self.name} cannot be loaded: {first_line(error)}{self._variants(part)}") from error
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise UserError(f"{part} of {self.name} lacks {len(missing)} weights, the first is {missing[0]}; download it again")
        return module.to(self.device).eval().requires_grad_(False)

    def _variants(self, part: str) -> str:
        """Advice where a folder holds only weights such as diffusion_pytorch_model.fp16.safetensors."""
        found = {path.name.split(".")[1] for path in Path(self.name, part).glob("*.*.safetensors")}
        found = {name for name in found if not name.startswith("safetensors")} - {self._source.get("variant", "")}
        return f"; its files are of variant {' and '.join(sorted(found))}: add --variant {min(found)}" if found else ""

    def release(self) -> None:
        self._vae = self._text = None

    def fingerprint(self) -> dict[str, str]:
        tokenizer, encoder = self.text
        words = f"{tokenizer.model_max_length} {tokenizer.backend_tokenizer.to_str()}"
        return {
            "vae": _digest(self.vae, self.vae.config["scaling_factor"], self.vae.config.get("shift_factor")),
            "text": _digest(encoder, words, getattr(encoder.config, "use_attention_mask", False)),
        }

    def encoders(self) -> dict[str, Any]:
        fingerprint = self.fingerprint()
        return {
            "encode_images": self.encode_images,
            "encode_text": lambda prompts: self.encode_prompts(prompts).tensors,
            "image_fingerprint": fingerprint["vae"],
            "text_fingerprint": fingerprint["text"],
        }

    def cut_prompts(self, prompts: list[str]) -> tuple[int, int]:
        tokenizer, _ = self.text
        unique = list(dict.fromkeys(prompts))
        ids = tokenizer(unique, truncation=False, padding=False, verbose=False).input_ids if unique else []
        limit = tokenizer.model_max_length
        return sum(len(tokens) > limit for tokens in ids), limit

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
        return self._pipeline(unet, *self.text)

    def _pipeline(self, unet: nn.Module | None, tokenizer: Any, text_encoder: Any) -> Any:
        import diffusers

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
        self.remember(prompts)
        pipeline = self._pipeline(unet, None, None)  # the text encoder may have left memory and is not needed again
        dtype = pipeline.unet.conv_in.weight.dtype
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
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
