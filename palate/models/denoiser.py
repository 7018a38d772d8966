"""What the rest of Palate knows of a text-to-image diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.data.encode import Encoders
from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import Schedule
from palate.models.drawing import Drawing
from palate.models.parts import TextEncoder, Words
from palate.models.refiner import Refiner

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Card:
    """What a model card tells of a family."""

    pipeline: str
    """Class in diffusers."""
    network: str
    """Class in diffusers of what is trained."""
    tag: str
    """On model hubs."""


@dataclass(frozen=True)
class Kohya:
    """How kohya's scripts, and so ComfyUI and A1111, know a model."""

    name: Callable[[str], str]
    """A layer's name in diffusers -> that in a LoRA file."""
    version: str
    """As ``ss_base_model_version``."""
    architecture: str
    """As ``modelspec.architecture``."""
    prediction: str | None
    """As ``modelspec.prediction_type``; None for a rectified flow, of which it has no name."""
    implementation: str = "diffusers"
    """As ``modelspec.implementation``."""
    second: bool = False
    """As ``ss_v2``: Stable Diffusion 2.x."""
    parts: Callable[[str], tuple[str, ...]] | None = None
    """A layer's name in diffusers -> those of the layers that are one there, itself among them, in order; None: all are alone.
    ``name`` knows the first of them."""


@runtime_checkable
class Features(Protocol):
    """The first half of a network as a feature extractor, float32 both ways."""

    def __call__(
        self, network: nn.Module, x: Tensor, t: Tensor, cond: Conditioning, layers: str, *, gradient_checkpointing: bool = False
    ) -> list[Tensor]:
        """One tensor per layer, finest first, of latents ``x (b, c, h, w)`` at times ``t (b,)``; gradients flow to ``x``."""
        ...


@runtime_checkable
class Drawer(Protocol):
    """What drawing needs of a model, whether it is trained here or not."""

    name: str
    network: nn.Module
    default_resolution: int
    sampler: str
    """Class in diffusers."""

    def cut_prompts(self, prompts: list[str]) -> tuple[int, int]:
        """How many different prompts are longer than the text encoder reads, and how many tokens that is."""
        ...

    def check_shape(self, shape: Shape) -> None:
        """Raise ``UserError`` for a shape in which the network cannot draw, with the nearest ones in which it can."""
        ...

    def pipeline(self, network: nn.Module | None = None) -> Any:
        """A diffusers pipeline around these weights; LoRAs are put into it."""
        ...

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
        """One picture per prompt; picture i depends on ``prompts[i]``, ``negatives[i]``, ``shapes[i]`` and ``seeds[i]`` alone.

        Without a shape of its own a picture has that of the ``drawing``. A ``refiner`` finishes the pictures of an SDXL model.
        ``init[i] (3, h, w)`` in [-1, 1], of the picture's shape, is edited: noised to where the last ``strength`` of the steps
        begins, and denoised from there (SDEdit, arXiv 2108.01073); at 1 the picture is that of the prompt alone.

        Raises UserError for pictures that are not finite or all black; for what is edited and refined, or edited at a strength
        that leaves no step.
        """
        ...


@runtime_checkable
class Denoiser(Drawer, Protocol):
    """One family of models behind one set of verbs; everything particular to a family stays in its file.

    Encoding, decoding and predicting let gradients flow where the caller does; :meth:`generate` and :meth:`remember` do not.
    """

    device: torch.device
    schedule: Schedule
    part: ClassVar[str]
    """``unet`` or ``transformer``: the network's folder in a pipeline and in a run of all weights, and how LoRA names begin."""
    part_name: ClassVar[str]
    """What people call the network."""
    card: ClassVar[Card]
    lora_targets: ClassVar[dict[str, tuple[str, ...]]]
    """Layers of the network, by the name a recipe gives them."""
    texts: Sequence[TextEncoder]
    text_targets: ClassVar[Mapping[str, tuple[str, ...]]]
    """The same of the text encoders; empty if they cannot be trained with the network."""
    feature_layers: ClassVar[tuple[str, ...]]
    """Names that ``layers`` of the perceptual space may have."""

    @property
    def kohya(self) -> Kohya | None:
        """None: kohya's scripts have no layout for LoRAs of this family."""
        ...

    @property
    def caution(self) -> str:
        """What to tell before this model is trained, such as that it is distilled; empty if nothing."""
        ...

    @property
    def features(self) -> Features | None:
        """None: this family cannot be trained in the perceptual space."""
        ...

    @property
    def step(self) -> int:
        """Sides of its pictures are multiples of so many pixels."""
        ...

    @property
    def most(self) -> int:
        """Pixels of the longest side that it can draw."""
        ...

    def latent_shape(self, shape: Shape) -> tuple[int, ...]:
        """Of the latents of a picture, without the batch. Raises UserError as :meth:`check_shape`."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Prompts to what the network attends to, one row each."""
        ...

    def unconditional(self) -> Conditioning:
        """One row: what guidance leads away from, and what a left-out caption is: the empty prompt, or zeros for SDXL."""
        ...

    def words(self) -> Words:
        """What turns prompts into the tokens that a network trained with its text encoders is told."""
        ...

    def no_words(self, words: Words) -> dict[str, Tensor]:
        """The tokens that go with :meth:`unconditional`, one row."""
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

    def fingerprint(self) -> dict[str, str]:
        """Digests of the weights that encode pictures (``vae``) and prompts (``text``)."""
        ...

    def picture_conditions(
        self, size: tuple[int, int], shape: Shape, position: tuple[float, float], *, flip: bool
    ) -> dict[str, Tensor]:
        """What the network is told of a picture beside its prompt; see :class:`palate.data.encode.PictureConditions`.

        Families whose models may share a VAE give the same names: they share the entries of a cache.
        """
        ...

    def encoders(self) -> Encoders:
        """What :func:`palate.data.encode.encode` needs of a model; reads the weights of both encoders."""
        ...

    def encoding(self) -> AbstractContextManager[None]:
        """Inside, VAE and text encoders have the device to themselves: the network waits in main memory, and behind it they."""
        ...

    def release(self) -> None:
        """Let VAE and text encoder leave memory; they are read again when next needed."""
        ...

    def check_steps(self, num_inference_steps: int) -> None:
        """Raise ``UserError`` unless the sampler of :meth:`generate` can take so many steps; draws nothing."""
        ...

    def remember(self, prompts: list[str]) -> None:
        """Encode prompts now for :meth:`generate` later, when the text encoders may have left memory."""
        ...

    def save_lora(self, folder: str, layers: Mapping[str, dict[str, Tensor]], metadata: dict[str, object]) -> None:
        """Write a LoRA, whose matrices are given by part, in diffusers' layout."""
        ...


def features_of(denoiser: Denoiser) -> Features:
    """The family's features. Raises UserError if it has none."""
    found = denoiser.features
    if found is None:
        raise UserError(f"{denoiser.name} is of a family without a perceptual space: train it in the latent space")
    return found


def one_to_one(drawer: Drawer) -> Kohya | None:
    """Kohya's names for the family's layers, where each layer has one of its own; otherwise diffusers takes them apart."""
    kohya: Kohya | None = getattr(drawer, "kohya", None)
    return None if kohya is None or kohya.parts is not None else kohya
