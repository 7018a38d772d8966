"""Families that Palate draws with but does not train: any text-to-image pipeline that diffusers knows by itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from palate.base.errors import UserError, first_line, short
from palate.base.shapes import Shape, one_shape_each
from palate.models.drawing import Drawing
from palate.models.fit import check_sampler
from palate.models.parts import Source, check_finite
from palate.models.refiner import Refiner


class OtherPipeline:
    """A folder or hub id of a pipeline such as PixArt, Sana or Qwen-Image, with what drawing needs of a denoiser.

    Args: as :class:`palate.models.latent.Latent`.

    Raises:
        UserError: no text-to-image pipeline, or parts of it cannot be read.
    """

    def __init__(self, name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **source: str):
        from diffusers import AutoPipelineForText2Image

        self.name = name
        self._check(name, source.get("revision"))
        try:
            self._pipeline = AutoPipelineForText2Image.from_pretrained(
                name, torch_dtype=dtype, use_safetensors=True, **source
            ).to(device)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(f"{name} cannot be loaded to draw with: {first_line(error)}") from error
        self._pipeline.set_progress_bar_config(disable=True)
        for part, module in self._pipeline.components.items():
            if isinstance(module, nn.Module):
                check_finite(module, f"{part} of {name}")
        self._takes = set(inspect.signature(self._pipeline.__call__).parameters)
        parts = self._pipeline.components
        self.network: nn.Module = parts.get("transformer") or parts["unet"]
        self.sampler = str(self._pipeline.scheduler.config.get("_class_name", "unknown"))
        side = getattr(self._pipeline, "default_sample_size", None) or self.network.config.sample_size
        self.default_resolution = int(side) * int(getattr(self._pipeline, "vae_scale_factor", 1))

    def _check(self, name: str, revision: str | None) -> None:
        """Raise ``UserError`` where its scheduler is of a class that this diffusers has not."""
        source = Source(name, "cpu", **({} if revision is None else {"revision": revision}))
        try:
            config = source.scheduler_config()
        except (OSError, ValueError):
            return  # some families have their scheduler elsewhere; the pipeline tells what it lacks
        check_sampler(config, name)

    def cut_prompts(self, prompts: list[str]) -> tuple[int, int]:
        """None: such pipelines warn of prompts that they cut."""
        return 0, 0

    def check_shape(self, shape: Shape) -> None:
        """Nothing is known of it before the pipeline has drawn: :meth:`generate` looks at what came."""

    def pipeline(self, network: nn.Module | None = None) -> Any:
        """What LoRAs are put into."""
        if not hasattr(self._pipeline, "load_lora_weights"):
            raise UserError(f"{type(self._pipeline).__name__} takes no LoRA; leave out --lora")
        return self._pipeline

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        drawing: Drawing,
        *,
        negatives: Sequence[str | None] | None = None,
        shapes: Sequence[Shape | None] | None = None,
        network: nn.Module | None = None,
        refiner: Refiner | None = None,
        init: Sequence[Tensor] | None = None,
        strength: float = 1.0,
        progress: bool = False,
    ) -> list[Image.Image]:
        """As :meth:`palate.models.denoiser.Drawer.generate`, with the pipeline's own network; nothing is edited or refined."""
        if refiner is not None or init is not None:
            raise UserError(f"{type(self._pipeline).__name__} neither edits nor refines pictures here")
        options: dict[str, object] = {
            "num_inference_steps": drawing.num_inference_steps,
            "guidance_scale": drawing.guidance_scale,
            "height": drawing.shape.height,
            "width": drawing.shape.width,
        }
        asked = [shape or drawing.shape for shape in shapes or [None] * len(prompts)]
        if missing := set(options) - self._takes:
            raise UserError(f"{type(self._pipeline).__name__} takes no {min(missing)}; draw with it in diffusers itself")
        away = [n or "" for n in negatives or [""] * len(prompts)]
        if any(away) and "negative_prompt" not in self._takes:
            raise UserError(f"{type(self._pipeline).__name__} takes no negative prompt; leave it out")
        images: dict[int, Image.Image] = {}
        for rows in one_shape_each(asked, drawing.batch_size):
            shape = asked[rows[0]]
            options |= {"height": shape.height, "width": shape.width}
            if any(away):
                options["negative_prompt"] = [away[i] for i in rows]
            generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in rows]
            drawn = self._pipeline([prompts[i] for i in rows], generator=generators, **options).images
            if drawn[0].size != (shape.width, shape.height):
                w, h = drawn[0].size
                raise UserError(f"{type(self._pipeline).__name__} draws {w}x{h} where {shape} is asked for: ask for {w}x{h}")
            images |= dict(zip(rows, drawn, strict=True))
        for i, prompt in enumerate(prompts):
            image = images[i]
            if image.convert("L").getextrema() == (0, 0):
                raise UserError(
                    f"the picture of {short(prompt)} is black: the model is damaged, or overflows at this precision"
                )
        return [images[i] for i in range(len(prompts))]
