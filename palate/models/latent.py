"""What families of latent diffusion models share: a VAE, text encoders and a network behind one set of verbs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from palate.base.errors import UserError
from palate.base.shapes import MAX_SIDE, STEP, Shape, one_shape_each
from palate.data.encode import Encoders
from palate.data.images import framing
from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import FLOW, RectifiedFlow, Schedule, from_config
from palate.models.adapters import is_adapter
from palate.models.denoiser import Card, Features, Kohya
from palate.models.drawing import Drawing, check_strength
from palate.models.fit import Config, check_class, check_sampler, check_steps, text_config
from palate.models.parts import Remembered, Source, TextEncoder, TextParts, Vae, Words, assemble, to_picture, zeros_like
from palate.models.passes import as_forward
from palate.models.reading import reading_of, tokens_in
from palate.models.refiner import Refiner


class Latent(ABC):
    """A pipeline folder or hub id. See :class:`palate.models.denoiser.Denoiser`, of which a family gives the rest.

    Args:
        name: folder or hub id.
        dtype: of the frozen weights; prompts are encoded in float32 unless an encoder is :func:`large`, and pictures as
            :class:`Vae` says.
        device: where the network runs.
        home: where it lies until then; there too unless given.
        quantize: the number format of the network's frozen blocks, ``int8`` or ``nf4``; that of ``dtype`` unless given.
        outline: ``shapes`` or ``random``: read configurations alone, see :class:`palate.models.outline.Outline`.
    """

    part: ClassVar[str]
    part_name: ClassVar[str]
    card: ClassVar[Card]
    lora_targets: ClassVar[dict[str, tuple[str, ...]]]
    feature_layers: ClassVar[tuple[str, ...]] = ()
    prompt_arguments: ClassVar[dict[str, str]]
    """Of a conditioning's tensors -> the pipeline's argument for them; with ``negative_`` before it, for the negative."""
    text_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Layers of its text encoders that can be trained with the network, by the name a recipe gives them."""
    refined: ClassVar[bool] = False
    """Whether a refiner can finish its pictures."""
    edited: ClassVar[bool] = True
    """Whether pictures can be edited: whether there is a pipeline from image to image that takes latents."""
    zeros_for_empty_prompt: bool = False
    """Whether zeros stand for no prompt, instead of the empty one."""
    negated: bool = True
    """Whether its pictures are drawn with classifier-free guidance, which takes negative prompts."""
    vae_kind: ClassVar[type[Vae]] = Vae
    spaced: ClassVar[bool] = False
    """Whether the pipeline spaces the sampler's noise levels itself, evenly from 1 to 1 / n of n steps before the shift."""
    side: ClassVar[int] = 128
    """Of a picture at home, in latents, where the network's configuration does not tell."""
    patch: ClassVar[int] = 1
    """Side of what the network takes as one, in latents."""
    text_recipe: ClassVar[str] = ""
    """What beside the text encoders decides a conditioning, such as which of their layers; a part of the cache's keys."""
    last_reads_on: ClassVar[bool] = False
    """Whether the last text encoder reads prompts on where the others stop, so that it alone cuts them."""
    no_fp16: ClassVar[bool] = False
    """Whether its numbers are known to overflow in float16."""
    flow: ClassVar[bool] = False
    """Whether it is a rectified flow."""
    framed: ClassVar[bool] = False
    """Whether the cache holds SDXL's framing of every picture: that of Stable Diffusion too, which does not read it, for its
    models may share a VAE, and so a cache, with SDXL."""

    def __init__(
        self,
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        home: str | torch.device | None = None,
        quantize: str | None = None,
        outline: str | None = None,
        **source: str,
    ):
        import diffusers

        if self.no_fp16 and dtype == torch.float16:
            raise UserError(f"{name} is a {self.card.pipeline}, which overflows in float16: use mixed_precision bf16")
        self.name, self.device = name, torch.device(device)
        self.home = self.device if home is None else torch.device(home)
        self._source = _source(outline)(name, self.device, **source)
        self._scheduler_config = config = self._source.scheduler_config()
        self.sampler = str(config.get("_class_name", "unknown"))
        self.schedule = self._read_schedule(config)
        check_sampler(config, name, draws=not self.flow)  # a flow's steps are given their noise levels by the pipeline
        self.vae, self.texts = self.vae_kind(self._source, dtype, self.part_name), self._text_encoders(self._source, dtype)
        self._check_parts()
        kind = getattr(diffusers, self.card.network)
        self.network = self._source.read(kind, self.part, quantize=quantize, home=self.home, torch_dtype=dtype)
        side = _side(self.network.config.get("sample_size", self.side), self.vae.factor, name, self.part)
        self.default_resolution = side * self.vae.factor
        self._prompts = Remembered(self.encode_prompts, self.unconditional)

    def _read_schedule(self, config: Config) -> Schedule:
        """Of the sampler's configuration; a family whose pipeline gives the sampler its noise levels says so here."""
        found = from_config(config)
        if isinstance(found, RectifiedFlow) != self.flow:
            kind = f"a {FLOW}" if self.flow else "one of the DDPM, DDIM, PNDM or Euler kind"
            raise UserError(f"{self.name} has the sampler {self.sampler}, but a {self.card.pipeline} needs {kind}")
        return replace(found, last=None) if self.spaced and isinstance(found, RectifiedFlow) else found

    def _check_parts(self) -> None:
        """Raise ``UserError`` unless all parts are there and fit each other; reads configurations only."""
        import diffusers

        self._source.check_files([self.part, "vae", *(f"text_encoder{text.ending}" for text in self.texts)])
        network = self._source.config(getattr(diffusers, self.card.network), self.part)
        check_class(network, self.part, self.name, self.card.network)
        self._check_fit(network)

    @abstractmethod
    def _check_fit(self, network: Config) -> None:
        """Raise ``UserError`` unless the network takes what the other parts give, by their configurations."""

    def _clip_configs(self) -> list[Config]:
        """Of the text encoders, where all are CLIP's."""
        return [text_config(self.name, f"text_encoder{text.ending}", **self._source.plain) for text in self.texts]

    @abstractmethod
    def _text_encoders(self, source: Source, dtype: torch.dtype) -> tuple[TextEncoder, ...]:
        """In the order of the pipeline's parts; beside a network whose weights are of ``dtype``."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Conditioning: ...

    @abstractmethod
    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...

    def _pipeline_options(self) -> dict[str, object]:
        """What the pipeline's class takes beside VAE, network, text encoders and scheduler."""
        return {}

    @property
    def caution(self) -> str:
        """What to tell before this model is trained, such as that it is distilled; empty if nothing."""
        return ""

    @property
    def features(self) -> Features | None:
        return None

    @property
    def kohya(self) -> Kohya | None:
        return None

    def unconditional(self) -> Conditioning:
        return self._blank(self.encode_prompts)

    def _blank(self, encode: Callable[[list[str]], Conditioning]) -> Conditioning:
        empty = encode([""])
        return zeros_like(empty) if self.zeros_for_empty_prompt else empty

    # Text encoders that are trained with the network

    def words(self) -> Words:
        return Words(self.texts)

    def no_words(self, words: Words) -> dict[str, Tensor]:
        return words.nothing(empty=not self.zeros_for_empty_prompt)

    def _conditioned(self, read: Sequence[Any]) -> Conditioning:
        """What the network is told of what the text encoders gave; of families with ``text_targets``."""
        raise NotImplementedError

    def _told(self, network: nn.Module, cond: Conditioning) -> Conditioning:
        """What a network is told: of one that has text encoders of its own what these read, except for no prompt."""
        if (reading := reading_of(network)) is None:
            return cond
        tokens = tokens_in(cond)
        if not tokens:
            raise ValueError("a network that is trained with its text encoders needs the tokens of its prompts")
        first = next(iter(tokens.values()))
        unread, told = first[:, 0, 0] < 0, dict(cond.tensors)
        # They are a part of the network, but are called before it.
        read = as_forward(network, lambda _: self._conditioned(reading(tokens)).tensors, first)
        for name, tensor in read.items():
            told[name] = torch.where(unread.reshape(-1, *[1] * (tensor.ndim - 1)), told[name].to(tensor), tensor)
        return Conditioning(told)

    def _prompts_of(self, network: nn.Module) -> Remembered:
        """Prompts as a network is told them; its own text encoders may have learned since they were read last."""
        if (reading := reading_of(network)) is None:
            return self._prompts

        def encode(prompts: list[str]) -> Conditioning:
            return self._conditioned(reading(reading.words(prompts)))

        return Remembered(encode, lambda: self._blank(encode))

    @property
    def step(self) -> int:
        return math.lcm(STEP, self.vae.factor * self.patch)

    @property
    def most(self) -> int:
        return MAX_SIDE

    def check_shape(self, shape: Shape) -> None:
        if not shape.fits(self.step) or max(shape.height, shape.width) > self.most:
            up_to = f" up to {self.most}" if self.most < MAX_SIDE else ""
            raise UserError(
                f"pictures are {shape.width} x {shape.height}, but sides must be multiples of {self.step}{up_to} for "
                f"{self.name}: try {shape.near(self.step, self.most)}"
            )

    def latent_shape(self, shape: Shape) -> tuple[int, ...]:
        self.check_shape(shape)
        return self.network.config.in_channels, shape.height // self.vae.factor, shape.width // self.vae.factor

    @contextmanager
    def encoding(self) -> Iterator[None]:
        self.network.to("cpu")
        try:
            yield
        finally:
            for text in self.texts:
                text.wait()
            self.vae.wait()
            self.network.to(self.home)

    def release(self) -> None:
        for part in (self.vae, *self.texts):
            part.release()

    def use(self, device: str) -> None:
        """From now on encoders come to this device; what is loaded stays where it is."""
        self.device = self._source.device = torch.device(device)

    def fingerprint(self) -> dict[str, str]:
        texts = [text.digest() for text in self.texts]
        return {"vae": self.vae.digest(), "text": " ".join([*texts, self.text_recipe] if self.text_recipe else texts)}

    def picture_conditions(
        self, size: tuple[int, int], shape: Shape, position: tuple[float, float], *, flip: bool
    ) -> dict[str, Tensor]:
        return {"framing": framing(size, shape, position, flip=flip)} if self.framed else {}

    def encoders(self) -> Encoders:
        fingerprint = self.fingerprint()
        return Encoders(
            encode_images=self.encode_images,
            encode_text=lambda prompts: self.encode_prompts(prompts).tensors,
            image_fingerprint=fingerprint["vae"],
            text_fingerprint=fingerprint["text"],
            picture_conditions=self.picture_conditions,
        )

    def cut_prompts(self, prompts: list[str]) -> tuple[int, int]:
        prompts = list(dict.fromkeys(prompts))
        texts = self.texts[-1:] if self.last_reads_on else self.texts
        longer, limits = zip(*(text.longer(prompts) for text in texts), strict=True)
        return sum(any(of_prompt) for of_prompt in zip(*longer, strict=True)), min(limits)

    def encode_images(self, images: Tensor) -> Tensor:
        return self.vae.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)

    def pipeline(self, network: nn.Module | None = None) -> Any:
        reading = None if network is None else reading_of(network)
        trained = {} if reading is None else dict(reading.encoders.items())
        texts = [(text.pair[0], trained.get(f"text_encoder{text.ending}", text.pair[1])) for text in self.texts]
        return self._assembled(network, texts)

    def _assembled(self, network: nn.Module | None, texts: Sequence[TextParts], *, editing: bool = False) -> Any:
        """A pipeline with these tokenizers and text encoders; with ``editing`` that from image to image."""
        parts: dict[str, object] = {self.part: self.network if network is None else network}
        for text, (tokenizer, encoder) in zip(self.texts, texts, strict=True):
            parts |= {f"tokenizer{text.ending}": tokenizer, f"text_encoder{text.ending}": encoder}
        kind = self.card.pipeline.replace("Pipeline", "Img2ImgPipeline") if editing else self.card.pipeline
        return assemble(kind, self._scheduler_config, vae=self.vae.module, **parts, **self._pipeline_options())

    def remember(self, prompts: list[str]) -> None:
        self._prompts.add(prompts)

    def check_steps(self, num_inference_steps: int) -> None:
        if not self.flow:  # whose times are no whole numbers: there are as many as are asked for
            check_steps(self._scheduler_config, num_inference_steps)

    @torch.no_grad()
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
        self.check_steps(drawing.num_inference_steps)
        options: dict[str, object] = {} if refiner is None else {"denoising_end": refiner.start}
        editing = self._edits(init, strength, drawing)
        if editing:
            options["strength"] = strength
        self._check_refiner(refiner, editing=editing)
        away: list[str | None] = [None] * len(prompts) if negatives is None else list(negatives)
        if not len(prompts) == len(seeds) == len(away):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds and {len(away)} negative prompts")
        asked = [shape or drawing.shape for shape in shapes or [None] * len(prompts)]
        for shape in set(asked):
            self.check_shape(shape)
        if not self.negated and any(away):
            raise UserError(
                f"{self.name} is drawn without classifier-free guidance: a negative prompt has no effect, leave it out"
            )
        encoded = self._prompts_of(self.network if network is None else network)
        encoded.add([*prompts, *(n for n in away if n is not None)])
        absent = [(None, None)] * len(self.texts)  # the text encoders may have left memory
        pipeline = self._assembled(network, absent, editing=editing)
        images: dict[int, Image.Image] = {}
        with _evaluating(getattr(pipeline, self.part)):
            batches = one_shape_each(asked, drawing.batch_size)
            for rows in tqdm(batches, desc="generating", disable=not progress, leave=False):
                texts = [prompts[i] for i in rows], [away[i] for i in rows]
                told = encoded[texts[0]], encoded[texts[1]]
                generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in rows]
                begun = self.encode_images(torch.stack([init[i] for i in rows])) if init is not None and editing else None
                latents = self._denoised(pipeline, told, generators, drawing, asked[rows[0]], begun, options)
                if refiner is not None:
                    parts = {"vae": pipeline.vae, "scheduler": pipeline.scheduler}
                    latents = refiner.finish(latents, *texts, generators, drawing, **parts)
                images |= {i: to_picture(p, prompts[i]) for i, p in zip(rows, self.decode(latents).cpu(), strict=True)}
        return [images[i] for i in range(len(prompts))]

    def _edits(self, init: Sequence[Tensor] | None, strength: float, drawing: Drawing) -> bool:
        """Whether pictures are edited: not if there are none, or nothing of them is kept."""
        if init is None:
            return False
        if not self.edited:
            raise UserError(f"{self.name} is a {self.card.pipeline}, which edits no pictures here: draw from the prompt alone")
        check_strength(strength, drawing.num_inference_steps)
        return strength < 1

    def _check_refiner(self, refiner: Refiner | None, *, editing: bool) -> None:
        if refiner is not None and not self.refined:
            raise UserError(f"a refiner finishes pictures of an SDXL model, and {self.name} is none")
        if refiner is not None and editing:
            raise UserError("an edited picture is not refined: leave out the refiner")

    def _denoised(
        self,
        pipeline: Any,
        told: tuple[Conditioning, Conditioning],
        generators: list[torch.Generator],
        drawing: Drawing,
        shape: Shape,
        begun: Tensor | None,
        options: dict[str, object],
    ) -> Tensor:
        """Scaled latents of one batch. told: its prompts and negative prompts."""
        # Of a weight that no LoRA reaches, for those are float32.
        weight = next(x for name, x in getattr(pipeline, self.part).named_parameters() if not is_adapter(name))
        given, away = (texts.to(weight.device, weight.dtype) for texts in told)
        sides = {"height": shape.height, "width": shape.width}
        found = pipeline(
            **self._asked(given, away, drawing.guidance_scale),
            **(sides if begun is None else {"image": begun.to(weight.device, weight.dtype)}),
            num_inference_steps=drawing.num_inference_steps,
            generator=generators,
            output_type="latent",
            **options,
        ).images
        return self._scaled(found, shape)

    def _asked(self, given: Conditioning, away: Conditioning, guidance_scale: float) -> dict[str, object]:
        """The pipeline's arguments for prompts, negative prompts and guidance."""
        names = self.prompt_arguments.items()
        told: dict[str, object] = {argument: given.tensors[name] for name, argument in names}
        told |= {f"negative_{argument}": away.tensors[name] for name, argument in names}
        return told | {"guidance_scale": guidance_scale}

    def _scaled(self, found: Tensor, shape: Shape) -> Tensor:
        """Scaled latents, of what the pipeline gives as the latents of pictures of that shape."""
        return found

    def save_lora(self, folder: str, layers: Mapping[str, dict[str, Tensor]], metadata: dict[str, object]) -> None:
        import diffusers

        save = getattr(diffusers, self.card.pipeline).save_lora_weights
        save(folder, **{f"{part}_lora_layers": of_part for part, of_part in layers.items()}, **metadata)


def _source(outline: str | None) -> type[Source]:
    if outline is None:
        return Source
    from palate.models.outline import Outline

    return Outline


def _side(sample_size: object, factor: int, name: str, part: str) -> int:
    """Of a network's square latents, of which pictures have ``factor`` times as much."""
    if not isinstance(sample_size, int) or sample_size < 1 or sample_size * factor % 8:
        raise UserError(
            f"{part}/config.json of {name} tells no sample_size ({sample_size}); expected a whole number, such as 64, that "
            "gives pictures whose side is a multiple of 8"
        )
    return sample_size


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def few_steps(name: str, base: str) -> str:
    """What to tell before a distilled model is trained."""
    return (
        f"{name} is distilled to draw in few steps, and training leads away from that: train {base}, and put the LoRA into "
        "this one"
    )
