"""What the loop can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from palate.base.errors import UserError, nearest

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")


MIXED_PRECISIONS = ("no", "fp16", "bf16")


REPORTERS = ("none", "tensorboard")


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
    seed: int = 0
    """Decides order, times and noise."""
    optimizer: str = "adamw"
    """``adamw``; with less memory ``adamw_8bit`` (needs bitsandbytes and a GPU) or ``adafactor`` (fixed step, no momentum)."""
    learning_rate: float = 1e-5
    """Of the optimizer, after warm-up."""
    lr_scheduler: str = "constant_with_warmup"
    """``constant``, ``constant_with_warmup``, ``linear`` (to 0) or ``cosine`` (to 0)."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises; as in diffusers, the first update is made at 0."""
    train_batch_size: int = 4
    """Pairs per process in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per update."""
    t_min: int = 0
    """Least time drawn; content and colours are decided at late times, texture at early ones."""
    t_max: int | None = None
    """Greatest time drawn; the schedule's last unless given."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the errors by time, 5 in the paper; all times alike unless given."""
    caption_dropout: float = 0.0
    """Share of items trained without their prompt, as classifier-free guidance wants it; both pictures of a pair together."""
    max_train_steps: int | None = None
    """Updates; overrides ``num_train_epochs``."""
    num_train_epochs: int = 1
    """Passes over the data, rounded up to whole updates."""
    mixed_precision: str = "no"
    """``no``, ``fp16`` or ``bf16``: precision of the forward pass. Trainable weights and errors stay float32."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_weight_decay: float = 1e-2
    """Of every optimizer, decoupled."""
    adam_epsilon: float = 1e-8
    """Of AdamW."""
    max_grad_norm: float | None = 1.0
    """Gradients of a larger norm are scaled down to it; None for no limit."""
    ema_decay: float | None = None
    """Average the weights exponentially, such as 0.999, and use the average for samples, evaluation and the saved result."""
    logging_steps: int = 10
    """Steps between two lines of the log; each is the mean since the last."""
    report_to: str = "none"
    """``none`` or ``tensorboard``; ``log.jsonl`` and ``train.log`` are always written."""
    sample_steps: int | None = None
    """Steps between two calls of ``on_sample``; None for only before the first and after the last."""
    eval_steps: int | None = None
    """Steps between two calls of ``on_evaluate``; None for only before the first and after the last."""
    checkpointing_steps: int | None = 500
    """Steps between two checkpoints; one more at the end. None for none, except where a run is interrupted."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept, the latest; None for all."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or ``latest`` for the last one in ``output_dir``."""

    def __post_init__(self) -> None:
        choices = {
            "optimizer": OPTIMIZERS,
            "lr_scheduler": LR_SCHEDULERS,
            "mixed_precision": MIXED_PRECISIONS,
            "report_to": REPORTERS,
        }
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} is {value!r}{nearest(str(value), known)}")
        counts = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs", "logging_steps")
        for name in (*counts, "sample_steps", "eval_steps", "checkpointing_steps", "checkpoints_total_limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; expected at least 1")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"max_grad_norm is {self.max_grad_norm}; expected a positive number, or null for no limit")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate is {self.learning_rate}; expected a positive number")
        if self.t_min < 0 or (self.t_max is not None and self.t_max < self.t_min):
            raise UserError(f"t_min is {self.t_min} and t_max {self.t_max}; expected 0 <= t_min <= t_max")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}; expected between 0 and 1, such as 0.999, or null for none")
        if self.snr_gamma is not None and not 0 < self.snr_gamma < math.inf:
            raise UserError(f"snr_gamma is {self.snr_gamma}; expected a positive number such as 5, or null for none")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout is {self.caption_dropout}; expected a share from 0 to 1")
        if self.lr_warmup_steps < 0:
            raise UserError(f"lr_warmup_steps is {self.lr_warmup_steps}; expected 0 or more")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise UserError("lr_scheduler constant has no warm-up: use constant_with_warmup, or lr_warmup_steps 0")


OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor")
