"""What families of latent diffusion models share: a VAE, text encoders and a network behind one set of verbs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from palate.base.errors import UserError
from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import from_config
from palate.models.denoiser import Card
from palate.models.parts import Remembered, Source, TextEncoder, Vae, assemble, draw_pictures


class Latent:
    """A pipeline folder or hub id. See :class:`palate.models.denoiser.Denoiser`, of which a family gives the rest.

    Args:
        name: folder or hub id.
        dtype: of the frozen weights; prompts are always encoded in float32, and pictures as :class:`Vae` says.
        device: where the network runs.
    """

    part: ClassVar[str]
    part_name: ClassVar[str]
    card: ClassVar[Card]
    lora_targets: ClassVar[dict[str, tuple[str, ...]]]
    prompt_arguments: ClassVar[dict[str, str]]
    """Of a conditioning's tensors -> the pipeline's argument for them; with ``negative_`` before it, for the negative."""
    refined: ClassVar[bool] = False
    """Whether a refiner can finish its pictures."""

    def __init__(self, name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **source: str):
        import diffusers

        self.name, self.device = name, torch.device(device)
        self._source = Source(name, self.device, **source)
        self.scheduler_config = self._source.scheduler_config()
        self.schedule = from_config(self.scheduler_config)
        self.vae, self.texts = Vae(self._source, dtype, self.part_name), self._text_encoders(self._source)
        self.network = self._source.read(getattr(diffusers, self.card.network), self.part, torch_dtype=dtype)
        self.default_resolution = int(self.network.config.sample_size) * self.vae.factor
        self._prompts = Remembered(self.encode_prompts, self.unconditional)

    def _text_encoders(self, source: Source) -> tuple[TextEncoder, ...]:
        """In the order of the pipeline's parts."""
        raise NotImplementedError

    def _pipeline_options(self) -> dict[str, Any]:
        """What the pipeline's class takes beside VAE, network, text encoders and scheduler."""
        raise NotImplementedError

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        raise NotImplementedError

    def unconditional(self) -> Conditioning:
        return self.encode_prompts([""])

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.network.config.in_channels, height // self.vae.factor, width // self.vae.factor

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
        longer, limits = zip(*(text.longer(prompts) for text in self.texts), strict=True)
        return sum(any(of_prompt) for of_prompt in zip(*longer, strict=True)), min(limits)

    def encode_images(self, images: Tensor) -> Tensor:
        return self.vae.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)

    def pipeline(self, network: nn.Module | None = None) -> Any:
        return self._assembled(network, [text.pair for text in self.texts])

    def _assembled(self, network: nn.Module | None, texts: Sequence[tuple[Any, Any]], *, editing: bool = False) -> Any:
        """A pipeline with these tokenizers and text encoders; with ``editing`` that from image to image."""
        parts: dict[str, Any] = {self.part: self.network if network is None else network}
        for text, (tokenizer, encoder) in zip(self.texts, texts, strict=True):
            parts |= {f"tokenizer{text.ending}": tokenizer, f"text_encoder{text.ending}": encoder}
        kind = self.card.pipeline.replace("Pipeline", "Img2ImgPipeline") if editing else self.card.pipeline
        return assemble(kind, self.scheduler_config, vae=self.vae.module, **parts, **self._pipeline_options())

    def remember(self, prompts: list[str]) -> None:
        self._prompts.add(prompts)

    def generate(
        self, prompts: list[str], seeds: list[int], *, network: nn.Module | None = None, refiner: Any = None, **drawing: Any
    ) -> list[Image.Image]:
        if refiner is not None and not self.refined:
            raise UserError(f"a refiner finishes pictures of an SDXL model, and {self.name} is none")
        make = partial(self._assembled, network, [(None, None)] * len(self.texts))  # they may have left memory
        return draw_pictures(
            make, self.part, self._prompts, self.prompt_arguments, self.vae, prompts, seeds, refiner=refiner, **drawing
        )

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        import diffusers

        save = getattr(diffusers, self.card.pipeline).save_lora_weights
        save(folder, **{f"{self.part}_lora_layers": layers}, **metadata)
