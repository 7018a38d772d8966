"""The sections of a recipe: what each option is, and its range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from palate.base.errors import UserError
from palate.base.options import (
    FRACTION,
    GUIDANCE,
    POSITIVE,
    Batch,
    Count,
    OneOf,
    Quantize,
    Range,
    Rank,
    Seed,
    Steps,
    at_least,
    check_ranges,
)
from palate.base.shapes import Shape
from palate.data.options import Reading
from palate.models.adapters import KINDS, LYCORIS

SHARE_DROPPED = Range(at_least=0, below=1, expected="0 or more, and below 1")
ADAPTER_OPTIONS = {"lora_kind": "lora", "use_rslora": False, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}

HELD_OUT = "held-out"
"""As ``evaluation_prompts``: those of the data that are not trained on."""


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    pretrained_model_name_or_path: str = "mini-sd"
    """A pipeline folder, a hub id such as owner/model, or ``mini-sd``, ``mini-sdxl``, ``mini-sd3``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Ending of the weight files to read, such as ``fp16``."""
    quantize: Quantize = None
    """``int8``, or ``nf4`` (4 bits, needs bitsandbytes): the blocks' frozen weights take a half or a quarter of their memory
    in bf16. For a LoRA; docs/memory.md."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class _Source:
    """The first options of the data section: fields of a dataclass come in the order of its bases, the last one first."""

    train_data: str = "miniature-pairs"
    """Parquet, JSONL, JSON, CSV or tar file, a folder of them, a data set of the hub, ``votes.db``; ``miniature-pairs``,
    ``miniature-sdxl-pairs``, ``miniature-sd3-pairs``, ``miniature-mixed-pairs``."""
    more_train_data: dict[str, float] = field(default_factory=dict)
    """Further sets, named and read as ``train_data`` is, and how many times an epoch goes through each, such as
    ``{votes.db: 3, large.parquet: 0.2}``; through ``train_data`` once."""
    resolution: int | str | None = None
    """Pixels: ``1024`` for squares, or ``832x1216``, width x height; the model's own unless given."""
    buckets: bool = False
    """Train each picture, or pair, near its own proportions: on the nearest of several shapes that have about as many pixels as
    ``resolution``, instead of on that one."""
    bucket_step: Annotated[int, at_least(8, 1024)] | None = None
    """Sides of those shapes are multiples of it; 64 unless given."""
    bucket_aspect: Annotated[float, Range(at_least=1, at_most=10, expected="1 to 10")] = 2.5
    """Their longer side is at most so many times the shorter one."""


@dataclass(frozen=True)
class DataOptions(Reading, _Source):
    """Which pairs or pictures it learns from, and how they are read."""

    center_crop: bool = True
    """Crop the middle square; false for a place drawn once per pair."""
    random_flip: bool = False
    """Mirror both pictures of a pair, every other time."""
    validation_fraction: Annotated[float, Range(at_least=0, below=1, expected="0 (none) or more, and below 1")] = 0.05
    """Share of the pairs held out, by prompt, to measure implicit accuracy; 0 for none."""
    validation_data: str | None = None
    """Pairs to measure it on instead, named as ``train_data`` is; what shares a prompt with them is not trained on."""
    cache_dir: str = "~/.cache/palate"
    """Encoded pictures and prompts are kept here and reused by later runs."""
    cache_precision: Annotated[str, OneOf("fp32", "fp16", "bf16")] = "fp32"
    """Of what is kept there: ``fp32``, or ``fp16`` or ``bf16`` for half the room; docs/caching.md has what they change."""
    cache_limit: Annotated[float, POSITIVE] | None = None
    """Gigabytes that the files of ``cache_dir`` may take: encoding stops before they take more. No limit unless given."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, share in self.more_train_data.items():
            if name == self.train_data:
                raise UserError(f"more_train_data names {name}, which train_data is: name each set once")
            if not 0 < share <= 1000:
                raise UserError(f"more_train_data gives {name} {share:g}; expected times an epoch, above 0 and up to 1000")
        if self.resolution is not None:
            Shape.of(self.resolution)


@dataclass(frozen=True)
class PolicyOptions:
    """Which weights move."""

    train_method: Annotated[str, OneOf("lora", "full")] = "lora"
    """``lora``, or ``full`` for all weights of the U-Net."""
    pretrained_lora: str | None = None
    """A LoRA (file, or folder of a run) to train on: the model with it is the reference, and the result holds the whole change.
    Its own rank, strength and layers stand in place of the three options below; text encoders that it lacks get new ones."""
    rank: Rank = 16
    """Of the LoRA matrices."""
    lora_alpha: Annotated[float, POSITIVE] | None = None
    """Strength of the LoRA is lora_alpha / rank; equal to rank unless given."""
    lora_layers: Annotated[str, OneOf("attention", "all")] = "attention"
    """``attention``, or ``all``: also the feed-forward and convolution layers, nearer to full training."""
    lora_kind: Annotated[str, OneOf(*KINDS)] = "lora"
    """``lora``; ``dora``, which also learns the length of every row of weights; ``loha`` or ``lokr``, which change weights in
    more directions with as few numbers, in LyCORIS's layout."""
    use_rslora: bool = False
    """Strength is lora_alpha / sqrt(rank): higher ranks learn as fast as low ones."""
    lora_dropout: Annotated[float, SHARE_DROPPED] = 0.0
    """Share of a LoRA's inputs that is left out at random in each update."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of layers whose name ends so, such as ``{to_v: 32}``; PEFT's regular expressions. The strength stays."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for lora_alpha."""
    train_text_encoder: bool = False
    """Train a LoRA of the text encoders, too, of the same rank and strength (SD, SDXL; not where the model draws what it learns
    from)."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: a third slower, far less memory."""
    compile: bool = False
    """Compile the blocks of the network that repeat (``torch.compile``): a minute or more at the first passes, faster ones
    after them; docs/speed.md."""

    def __post_init__(self) -> None:
        check_ranges(self)
        given = [name for name in ADAPTER_OPTIONS if getattr(self, name) not in (ADAPTER_OPTIONS[name], {})]
        if self.train_text_encoder and self.train_method != "lora":
            raise UserError(
                "train_text_encoder is a LoRA of the text encoders, but train_method is full: use lora, or leave it out"
            )
        if self.train_text_encoder and self.lora_kind != "lora":
            raise UserError(f"train_text_encoder is for lora_kind lora, not {self.lora_kind}: leave one of the two out")
        if given and self.train_method != "lora":
            raise UserError(f"{given[0]} is of a LoRA, but train_method is {self.train_method}: leave it out")
        if given and self.pretrained_lora is not None:
            raise UserError(f"pretrained_lora goes on as it is: leave {given[0]} out")
        if self.lora_kind in LYCORIS and (self.use_rslora or self.lora_dropout):
            name = "use_rslora" if self.use_rslora else "lora_dropout"
            raise UserError(f"{name} is of lora and dora, not of {self.lora_kind}: leave it out")
        for name in ("rank_pattern", "alpha_pattern"):
            if wrong := [key for key, value in getattr(self, name).items() if not value > 0]:
                raise UserError(f"{name} gives {wrong[0]!r} {getattr(self, name)[wrong[0]]}; expected a number above 0")
        if self.pretrained_lora is not None and self.train_method != "lora":
            raise UserError("pretrained_lora continues a LoRA, but train_method is full; use lora, or merge the LoRA first")


@dataclass(frozen=True)
class EvaluationOptions:
    """How base and tuned model are compared afterwards."""

    evaluation_prompts: str | None = HELD_OUT
    """``held-out``: the first prompts of the data that are held out, 8 to look at, or 64 where judges are named (in online
    training the last of the train prompts); a text or JSONL file, a list such as ``miniature-unseen``, or ``module:function``;
    null for no comparison."""
    num_evaluation_prompts: Count | None = None
    """Only the first of them; all unless given."""
    images_per_prompt: Annotated[int, at_least(1, 10**5)] = 1
    """Pictures of each prompt, from different noise."""
    num_inference_steps: Steps = 25
    """Steps of the model's own sampler."""
    guidance_scale: Annotated[float, GUIDANCE] = 5.0
    """Of classifier-free guidance."""
    refiner: str | None = None
    """Folder or hub id of SDXL's refiner, which finishes the pictures of both models; none unless given."""
    refiner_start: Annotated[float, FRACTION] = 0.8
    """Share of the denoising that is done when the refiner takes over."""
    evaluation_seed: Seed = 1234
    """Picture i is drawn from noise of this seed + i, by both models."""
    evaluation_batch_size: Batch = 8
    """Pictures drawn at once."""
    judges: tuple[str, ...] = ()
    """``mini-heldout``, ``mini-pickscore``, ``mini-clip``, ``mini-aesthetic``; ``pickscore``, ``hpsv2.1``, ``imagereward`` and
    others, or ``kind:folder`` such as ``pickscore:models/PickScore_v1``; see docs/judges.md."""
    validation_prompts: tuple[str, ...] = ()
    """Shown in the sample pictures during training: texts, or one text or JSONL file, whose lines may have seeds and sizes."""

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def validation_file(self) -> str | None:
        """The file that ``validation_prompts`` names, if it is one."""
        given = self.validation_prompts
        return given[0] if len(given) == 1 and given[0].endswith((".txt", ".jsonl")) else None
