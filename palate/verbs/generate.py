"""``palate generate``: pictures of many prompts into a folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from palate.base.errors import UserError
from palate.base.files import check_folder
from palate.base.options import FRACTION, GUIDANCE, Batch, Count, Quantize, Seed, Steps, at_least, check_ranges
from palate.base.shapes import Shape
from palate.verbs import carry_out

USAGE = "palate generate MODEL --prompts P --output_dir DIR [--option value ...]"


@dataclass(frozen=True)
class GenerateOptions:
    """What is drawn, and how."""

    prompts: str
    """A text or JSONL file; ``partiprompts``, ``hpsv2``, ``pickapic``, ``drawbench``, ``geneval``, or one of these with its
    file, ``partiprompts:FILE``; a built-in list such as ``animals`` or ``miniature-unseen``."""
    output_dir: str
    """The picture folder; what it holds already is kept, and only what is missing is drawn."""
    lora: tuple[str, ...] = ()
    """LoRA files or folders, each with a scale if not 1: ``'[style.safetensors:0.8, out/run]'``."""
    refiner: str | None = None
    """Folder or hub id of SDXL's refiner, which finishes the pictures."""
    refiner_start: Annotated[float, FRACTION] = 0.8
    """Share of the denoising that is done when the refiner takes over."""
    model_name: str | None = None
    """What the manifest calls the model; its folder's name and its LoRAs unless given."""
    images_per_prompt: Annotated[int, at_least(1, 10**5)] = 1
    """Pictures of each prompt, from different noise."""
    num_prompts: Count | None = None
    """Only the first of them; all unless given."""
    seed: Seed = 0
    """With the prompt and the picture's number it decides the noise, the same for every model."""
    num_inference_steps: Steps = 25
    """Steps of the model's own sampler."""
    guidance_scale: Annotated[float, GUIDANCE] = 5.0
    """Of classifier-free guidance."""
    init_image: str | None = None
    """A picture that is edited instead of drawing from noise alone, of all prompts that name none: a line of a JSONL file may
    hold its own ``init_image``, a path in that file's folder. Its middle is taken, in the proportions of what is drawn."""
    strength: float | None = None
    """Of editing, up to 1: the share of the steps that is done, and so of the picture that changes; 0.8 unless given."""
    negative_prompt: str | None = None
    """What no picture should show; a prompt's own ``negative`` goes before it."""
    resolution: int | str | None = None
    """Of the pictures in pixels: ``1024`` is a square, ``832x1216`` width x height, multiples of 8; that of the run, or the
    model's own, unless given. A line of a JSONL file may hold its own ``width`` and ``height``."""
    batch_size: Batch = 8
    """Pictures drawn at once."""
    mixed_precision: str = "no"
    """``no``, ``fp16`` or ``bf16``."""
    quantize: Quantize = None
    """``int8``, or ``nf4`` (4 bits, needs bitsandbytes): weights of blocks take a half or a quarter of their memory in bf16."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Ending of the weight files to read, such as ``fp16``."""
    shard: str | None = None
    """``I/N``: the I-th of N shares, ``1/4`` to ``4/4``; under ``torchrun`` or ``accelerate launch`` that of the process."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.strength is not None:
            from palate.models.drawing import check_strength

            check_strength(self.strength, self.num_inference_steps)
        if self.resolution is not None:
            Shape.of(self.resolution)


def main(words: list[str]) -> int:
    about = ("MODEL is a pipeline folder, a hub id, mini-sd, or the folder of a finished run.", "")
    return carry_out(words, GenerateOptions, _generate, usage=USAGE, about=about, first="a model")


def _generate(first: list[str], options: GenerateOptions) -> None:
    from palate.base.machine import versions

    check_folder(options.output_dir, "output_dir")
    from palate.models.quantised import check_quantize

    check_quantize(options.quantize)
    from palate.evaluation import editing
    from palate.evaluation.generation import WEIGHTS, Shard, begun, drawn_by, generate, plan, settings
    from palate.models.drawing import Drawing
    from palate.models.families import cut_warning
    from palate.models.parts import sketch
    from palate.names.prompts import find_prompts
    from palate.runs.models import find_model

    model = find_model(
        first[0],
        loras=options.lora,
        refiner=options.refiner,
        refiner_start=options.refiner_start,
        revision=options.revision,
        variant=options.variant,
        label=options.model_name,
    )
    prompts = find_prompts(options.prompts)[: options.num_prompts]
    home = Path(options.prompts).expanduser()
    init_images, files = editing.find(prompts, home.parent if home.is_file() else Path(), options.init_image)
    strength = (0.8 if options.strength is None else options.strength) if files else None
    if options.strength is not None and not files:
        raise UserError("strength is of editing, and there is nothing to edit: add --init_image FILE, or leave it out")
    if files and options.refiner is not None:
        raise UserError("an edited picture is not refined: leave out --refiner")
    if options.refiner is None and options.refiner_start != type(options).refiner_start:
        raise UserError("refiner_start does nothing without a refiner: name one with --refiner, or leave it out")
    if files:
        from palate.models.families import check_model

        check_model(model.base, revision=model.revision)
    pictures = plan(
        prompts,
        model=model.label,
        images_per_prompt=options.images_per_prompt,
        seed=options.seed,
        negative=options.negative_prompt,
        init_images=init_images or None,
    )
    shard, about = Shard.parse(options.shard), model.about()
    told = options.resolution or (model.recipe.data.resolution if model.recipe is not None else None)
    shape = None if told is None else Shape.of(told)
    known = {
        "strength": strength,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "mixed_precision": options.mixed_precision,
        "quantize": options.quantize,
    }
    # Whether the folder may be gone on with is mostly known before any weights are read.
    begun(options.output_dir, pictures, known if shape is None else {**known, "resolution": shape.told}, about)
    denoiser, network, refiner = model.load(mixed_precision=options.mixed_precision, quantize=options.quantize)
    if options.quantize is None:  # which rounds in its own way on every machine
        about = {**about, WEIGHTS: sketch(network)}
    shape = shape or Shape.square(denoiser.default_resolution)
    for one in {shape, *(p.shape for p in pictures if p.shape is not None)}:
        denoiser.check_shape(one)
    drawing = Drawing(options.num_inference_steps, options.guidance_scale, shape, options.batch_size)
    start = editing.starting(files, options.output_dir, shape) if files else None
    if told := cut_warning(denoiser, (text for p in pictures for text in (p.prompt, p.negative))):
        print(told, file=sys.stderr)
    try:
        drawn = generate(
            drawn_by(
                denoiser, drawing, network=network, refiner=refiner, start=start, strength=1.0 if strength is None else strength
            ),
            pictures,
            options.output_dir,
            settings=settings(
                denoiser,
                drawing,
                seed=options.seed,
                versions=versions(),
                mixed_precision=options.mixed_precision,
                quantize=options.quantize,
                strength=strength,
            ),
            model=about,
            batch_size=options.batch_size,
            shard=shard,
            progress=sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command draws what is missing") from None
    mine = len(pictures[shard.number :: shard.of])
    print(f"drew {drawn} of {mine} pictures of {model.label}, {mine - drawn} were there; see {options.output_dir}")
