"""The sections of a recipe: what each option is, and its range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from palate.base.errors import UserError, nearest
from palate.data.votes import QUESTIONS, WEIGHTS


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    pretrained_model_name_or_path: str = "mini-sd"
    """A diffusers pipeline folder, a hub id such as owner/model, or ``mini-sd``, ``mini-sdxl``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Ending of the weight files to read, such as ``fp16``."""


@dataclass(frozen=True)
class DataOptions:
    """Which pairs or pictures it learns from."""

    train_data: str = "miniature-pairs"
    """Parquet, JSONL, JSON, CSV or tar file, a folder of them, a data set of the hub such as owner/name, the ``votes.db`` of
    ``palate vote``, ``miniature-pairs`` or ``miniature-sdxl-pairs``."""
    resolution: int | None = None
    """Side of the pictures in pixels, a multiple of 8; the model's own unless given."""
    ties: str = "drop"
    """``drop``, or ``keep`` as a label of one half."""
    max_bad_rows: int = 0
    """So many unusable rows are listed and skipped; one more stops the run before training."""
    max_train_samples: int | None = None
    """Read no more pairs than this."""
    absolute_winners: bool = False
    """Keep the pairs whose better picture won all its comparisons under that prompt, as Noise-Conditioned Perception does."""
    deduplicate: bool = False
    """Of several pairs of the same two pictures under a prompt, keep the first."""
    max_pairs_per_prompt: int | None = None
    """Keep the first so many pairs of a prompt; all unless given."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to those of the file, such as ``{prompt: text}``."""
    vote_question: str = "overall"
    """Of ``votes.db``: the votes on ``overall``, ``appeal`` or ``following``."""
    vote_weights: str = "equal"
    """Of ``votes.db``: ``equal``, or ``agreement`` to weigh a vote by how far its rater agrees with others beyond chance."""
    center_crop: bool = True
    """Crop the middle square; false for a place drawn once per pair."""
    random_flip: bool = False
    """Mirror both pictures of a pair, every other time."""
    validation_fraction: float = 0.05
    """Share of the pairs held out, by prompt, to measure implicit accuracy; 0 for none."""
    validation_data: str | None = None
    """Pairs to measure it on instead, named as ``train_data`` is; what shares a prompt with them is not trained on."""
    cache_dir: str = "~/.cache/palate"
    """Encoded pictures and prompts are kept here and reused by later runs."""

    def __post_init__(self) -> None:
        choose("ties", self.ties, ("drop", "keep"))
        choose("vote_question", self.vote_question, QUESTIONS)
        choose("vote_weights", self.vote_weights, WEIGHTS)
        at_least(self, 0, "max_bad_rows")
        at_least(self, 1, "max_train_samples", "max_pairs_per_prompt")
        if self.resolution is not None:
            from palate.data.images import check_resolution

            check_resolution(self.resolution)
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction is {self.validation_fraction}; expected 0 (none) or more, and below 1")


@dataclass(frozen=True)
class PolicyOptions:
    """Which weights move."""

    train_method: str = "lora"
    """``lora``, or ``full`` for all weights of the U-Net."""
    pretrained_lora: str | None = None
    """A LoRA (file, or folder of a run) to train on: the model with it is the reference, and the result holds the whole change.
    Its own rank, strength and layers stand in place of the three options below."""
    rank: int = 16
    """Of the LoRA matrices."""
    lora_alpha: float | None = None
    """Strength of the LoRA is lora_alpha / rank; equal to rank unless given."""
    lora_layers: str = "attention"
    """``attention``, or ``all``: also the feed-forward and convolution layers, nearer to full training."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: a third slower, far less memory."""

    def __post_init__(self) -> None:
        choose("train_method", self.train_method, ("lora", "full"))
        choose("lora_layers", self.lora_layers, ("attention", "all"))
        if self.pretrained_lora is not None and self.train_method != "lora":
            raise UserError("pretrained_lora continues a LoRA, but train_method is full; use lora, or merge the LoRA first")
        at_least(self, 1, "rank")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise UserError(f"lora_alpha is {self.lora_alpha}; expected a positive number")


@dataclass(frozen=True)
class EvaluationOptions:
    """How base and tuned model are compared afterwards."""

    evaluation_prompts: str | None = None
    """A text or JSONL file, a list such as ``miniature-unseen``, or ``module:function``; no comparison without it."""
    num_evaluation_prompts: int | None = None
    """Only the first of them; all unless given."""
    images_per_prompt: int = 1
    """Pictures of each prompt, from different noise."""
    num_inference_steps: int = 25
    """Steps of the model's own sampler."""
    guidance_scale: float = 5.0
    """Of classifier-free guidance."""
    refiner: str | None = None
    """Folder or hub id of SDXL's refiner, which finishes the pictures of both models; none unless given."""
    refiner_start: float = 0.8
    """Share of the denoising that is done when the refiner takes over."""
    evaluation_seed: int = 1234
    """Picture i is drawn from noise of this seed + i, by both models."""
    evaluation_batch_size: int = 8
    """Pictures drawn at once."""
    judges: tuple[str, ...] = ()
    """``mini-heldout``, ``mini-pickscore``, ``mini-clip``, ``mini-aesthetic``; ``pickscore``, ``hpsv2.1``, ``imagereward`` and
    others with the published weights; ``kind:folder`` such as ``pickscore:models/PickScore_v1``; docs/judges.md lists all."""
    validation_prompts: tuple[str, ...] = ()
    """Shown in the sample pictures during training."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_evaluation_prompts", "images_per_prompt", "num_inference_steps", "evaluation_batch_size")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected 0 or more")
        if not 0 < self.refiner_start < 1:
            raise UserError(f"refiner_start is {self.refiner_start}; expected a number between 0 and 1")
        if self.evaluation_seed < 0:
            raise UserError(f"evaluation_seed is {self.evaluation_seed}; expected 0 or more")


def choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}{nearest(value, known)}")


def at_least(options: Any, least: int, *names: str) -> None:
    for name in names:
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{name} is {value}; expected at least {least}")
