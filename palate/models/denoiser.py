"""What the rest of Palate knows of a text-to-image diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import Schedule
from palate.models.refiner import Refiner


@runtime_checkable
class Denoiser(Protocol):
    """One family of models behind one set of verbs; everything particular to a family stays in its file."""

    name: str
    family: str
    schedule: Schedule
    network: nn.Module
    part: str
    """``unet`` or ``transformer``: the network's folder in a pipeline and in a run of all weights, and how LoRA names begin."""
    lora_targets: dict[str, tuple[str, ...]]
    vae_scale_factor: int
    default_resolution: int

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Prompts to what the network attends to, one row each."""
        ...

    def unconditional(self) -> Conditioning:
        """One row: what guidance leads away from, and what a left-out caption is: the empty prompt, or zeros for SDXL."""
        ...

    def cut_prompts(self, prompts: list[str]) -> tuple[int, int]:
        """How many different prompts are longer than the text encoder reads, and how many tokens that is."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Pictures ``(b, 3, h, w)`` in [-1, 1] to scaled latents (the posterior's mean), float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to pictures ``(b, 3, h, w)`` in [0, 1], float32; UserError if they are not finite."""
        ...

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Output of ``network`` (the model's own or a twin of it) at latents ``xt (b, c, h, w)`` and times ``t (b,)``."""
        ...

    def features(
        self, network: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, layers: str, *, gradient_checkpointing: bool = False
    ) -> list[Tensor]:
        """Features of the encoder half of ``network``, float32."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Digests of the weights that encode pictures (``vae``) and prompts (``text``)."""
        ...

    def encoders(self) -> dict[str, Any]:
        """What ``palate.data.encode.encode_pairs`` needs of a model: both encoders and their digests, by argument."""
        ...

    def release(self) -> None:
        """Let VAE and text encoder leave memory; they are read again when next needed."""
        ...

    def remember(self, prompts: list[str]) -> None:
        """Encode prompts now for :meth:`generate` later, when the text encoders may have left memory."""
        ...

    def pipeline(self, network: nn.Module | None = None) -> Any:
        """A diffusers pipeline around these weights."""
        ...

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        negatives: Sequence[str | None] | None = None,
        network: nn.Module | None = None,
        refiner: Refiner | None = None,
        init: Tensor | None = None,
        strength: float = 1.0,
        num_inference_steps: int,
        guidance_scale: float,
        resolution: int,
        batch_size: int = 8,
        progress: bool = False,
    ) -> list[Image.Image]:
        """One picture per prompt; picture i depends on ``prompts[i]``, ``negatives[i]`` and ``seeds[i]`` alone.

        A ``refiner`` finishes the pictures of an SDXL model. ``init (b, 3, resolution, resolution)`` in [-1, 1] is edited:
        noised to where the last ``strength`` of the steps begins, and denoised from there (SDEdit, arXiv 2108.01073); at 1 the
        picture is that of the prompt alone.

        Raises UserError for pictures that are not finite or all black.
        """
        ...

    def save_lora(self, folder: str, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write a LoRA in diffusers' layout."""
        ...


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
