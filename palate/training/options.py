"""What the loop can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from palate.base.errors import UserError
from palate.base.options import NOT_NEGATIVE, POSITIVE, Batch, Count, OneOf, Range, Seed, at_least, check_ranges

OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
TIME_DENSITIES = ("uniform", "logit_normal", "shifted", "grid")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
REPORTERS = ("none", "tensorboard", "wandb", "trackio")
SNR_GAMMA = Range(above=0, below=math.inf, expected="a positive number such as 5, or null for none")
NORM = Range(above=0, expected="a positive number, or null for no limit")
TIME = Range(at_least=0, below=10**6, expected="a time of the schedule, 0 to 999 in most")
SHARE_KEPT = Range(at_least=0, below=1, expected="0 or more and below 1")
DECAY = Range(above=0, below=1, expected="between 0 and 1, such as 0.999, or null for none")


@dataclass(frozen=True)
class TrainOptions:
    """What the loop can be told; names as in the training scripts of diffusers.

    Raises:
        UserError: a value out of range or an unknown name.
    """

    output_dir: str = "output"
    """Folder of logs and checkpoints."""
    push_to_hub: str | None = None
    """``owner/name``: afterwards, upload weights and model card to this repository, private if it is new. Token: HF_TOKEN."""
    seed: Seed = 0
    """Decides order, times and noise."""
    optimizer: Annotated[str, OneOf(*OPTIMIZERS, or_class=True)] = "adamw"
    """``adamw``; with less memory ``adamw_8bit`` (needs bitsandbytes and a GPU) or ``adafactor`` (fixed step, no momentum); or
    any class of optimizers as ``package.module:Class``, which gets ``lr`` and the options below."""
    optimizer_options: dict[str, object] = field(default_factory=dict[str, object])
    """Keywords of the optimizer's class, such as ``{fused: true}`` for ``adamw`` on a GPU, or ``{weight_decay: 0.01}``."""
    learning_rate: Annotated[float, POSITIVE] = 1e-5
    """Of the optimizer, after warm-up."""
    lr_scheduler: Annotated[str, OneOf(*LR_SCHEDULERS)] = "constant_with_warmup"
    """``constant``, ``constant_with_warmup``, ``linear`` (to 0) or ``cosine`` (to 0)."""
    lr_warmup_steps: Annotated[int, at_least(0)] = 0
    """Steps over which the learning rate rises; as in diffusers, the first update is made at 0."""
    train_batch_size: Batch = 4
    """Pairs per process in one forward pass."""
    gradient_accumulation_steps: Count = 1
    """Forward and backward passes per update."""
    t_min: Annotated[int, TIME] = 0
    """Least time drawn; content and colours are decided at late times, texture at early ones."""
    t_max: Annotated[int, TIME] | None = None
    """Greatest time drawn; the schedule's last unless given."""
    time_density: Annotated[str, OneOf(*TIME_DENSITIES)] = "uniform"
    """How times are drawn between these bounds: ``uniform``, ``logit_normal`` (most in the middle), ``shifted`` (most where
    there is much noise), or ``grid``: the times at which online training samples."""
    time_mean: float = 0.0
    """Of ``logit_normal``: the mean of the logit of t / T; above 0 for more noise."""
    time_std: Annotated[float, POSITIVE] = 1.0
    """Of ``logit_normal``: the standard deviation of the logit."""
    time_shift: Annotated[float, POSITIVE] = 3.0
    """Of ``shifted``: u of 0 to 1 becomes time_shift u / (1 + (time_shift - 1) u); 1 is ``uniform``."""
    snr_gamma: Annotated[float, SNR_GAMMA] | None = None
    """Min-SNR weighting of the errors by time, 5 in the paper; all times alike unless given."""
    caption_dropout: Annotated[float, Range(at_least=0, at_most=1, expected="a share from 0 to 1")] = 0.0
    """Share of items trained without their prompt, as classifier-free guidance wants it; both pictures of a pair together."""
    draws_per_pair: Count | None = None
    """So many draws of time and noise for each pair, or picture, one an epoch, then the first again; what the reference says of
    them is kept in ``cache_dir``, for later epochs and runs. Fresh draws in every epoch unless given."""
    keep_targets: bool = False
    """Keep the perceptual space's embedded targets too: a pass of its encoder less, for 4 bytes a feature, picture and draw."""
    max_train_steps: Count | None = None
    """Updates; overrides ``num_train_epochs``."""
    num_train_epochs: Count = 1
    """Passes over the data, rounded up to whole updates."""
    mixed_precision: Annotated[str, OneOf(*MIXED_PRECISIONS)] = "no"
    """Precision of the forward pass; trainable weights and errors stay float32."""
    shard_model: bool = False
    """Several processes hold a part of weights, gradients, optimizer, average and reference each (FSDP2), instead of all: for
    full training and large networks. Of pairs or pictures, not online; docs/scale.md."""
    adam_beta1: Annotated[float, SHARE_KEPT] = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Annotated[float, SHARE_KEPT] = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-2
    """Of AdamW and Adafactor, decoupled; other classes have ``optimizer_options``."""
    adam_epsilon: Annotated[float, POSITIVE] = 1e-8
    """Of AdamW; with 0 a weight without gradient would become NaN."""
    max_grad_norm: Annotated[float, NORM] | None = 1.0
    """Gradients of a larger norm are scaled down to it; null for no limit."""
    ema_decay: Annotated[float, DECAY] | None = None
    """Average the weights exponentially, such as 0.999, and use the average for samples, evaluation and the saved result."""
    logging_steps: Count = 10
    """Steps between two lines of the log; each is the mean since the last."""
    report_to: Annotated[str, OneOf(*REPORTERS)] = "none"
    """Where numbers, sample pictures and settings go beside ``log.jsonl``, ``train.log`` and ``report.html``.
    ``WANDB_MODE=offline`` keeps those of wandb on this machine."""
    sample_steps: Count | None = None
    """Steps between two sets of sample pictures; null for only before the first and after the last."""
    eval_steps: Count | None = None
    """Steps between two measurements on what is held out; null for only before the first and after the last."""
    early_stopping_patience: Count | None = None
    """Stop when the accuracy on held-out pairs has not risen in so many measurements (``eval_steps``); the best weights lie
    in ``best/``. Null for all steps."""
    checkpointing_steps: Count | None = 500
    """Steps between two checkpoints; one more at the end. Null for none, except where a run is interrupted."""
    checkpoints_total_limit: Count | None = None
    """Checkpoints kept, the latest; null for all."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or ``latest`` for the last one in ``output_dir``."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.t_max is not None and self.t_max < self.t_min:
            raise UserError(f"t_min is {self.t_min} and t_max {self.t_max}; expected 0 <= t_min <= t_max")
        if (share := self.learning_rate * self.adam_weight_decay) >= 1:
            raise UserError(
                f"adam_weight_decay is {self.adam_weight_decay:g}, which at learning_rate {self.learning_rate:g} takes "
                f"{share:g} of every weight in every step: 0.01 is usual"
            )
        if self.keep_targets and self.draws_per_pair is None:
            raise UserError(
                "keep_targets keeps what returns with draws_per_pair: give that a number, or leave keep_targets out"
            )
        owned = {"time_mean": "logit_normal", "time_std": "logit_normal", "time_shift": "shifted"}
        for name, density in owned.items():
            if getattr(self, name) != getattr(type(self), name) and self.time_density != density:
                raise UserError(f"{name} does nothing under time_density {self.time_density}: it is for {density}")
        if self.shard_model and self.optimizer != "adamw":
            raise UserError(f"shard_model cuts up what AdamW keeps, not {self.optimizer}: use optimizer adamw")
        if self.shard_model and self.mixed_precision == "fp16":
            raise UserError("shard_model has no loss scaler, which fp16 needs: use mixed_precision bf16")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise UserError("lr_scheduler constant has no warm-up: use constant_with_warmup, or lr_warmup_steps 0")
