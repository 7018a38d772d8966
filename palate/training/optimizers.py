"""What turns gradients into updates, and the running average of the weights they make."""

# torch types what makes averages in part only.
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from palate.base.errors import UserError, first_line, said, short
from palate.base.options import foreign

if TYPE_CHECKING:
    from palate.training.options import TrainOptions


def make_optimizer(weights: Sequence[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer that ``options.optimizer`` names, in the state in which it trains.

    Raises:
        UserError: it needs a package that is not installed, or refuses its options or these weights.
    """
    kind, own = _kind(options)
    given = {"lr": options.learning_rate, **own, **options.optimizer_options}
    try:
        optimizer = kind(weights, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        told = ", ".join(f"{name} {short(value)}" for name, value in given.items())
        raise UserError(f"optimizer {options.optimizer} with {told}: {said(error)}") from error
    if averages_itself(optimizer) and options.ema_decay is not None:
        raise UserError(f"optimizer {options.optimizer} averages the weights itself: leave ema_decay out")
    switch(optimizer, train=True)
    return optimizer


def _kind(options: TrainOptions) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, object]]:
    """The class, and what of our options it is told beside the rate."""
    if ":" in options.optimizer:
        kind = foreign(options.optimizer)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise UserError(f"optimizer {options.optimizer} is not a class of torch optimizers; expected package.module:Class")
        return kind, {}
    if options.optimizer == "adafactor":
        # Adafactor (arXiv 1804.04235) as Diffusion-DPO trains SDXL with it: no relative step, no scaling by the parameter.
        # torch multiplies the rate by max(eps2, rms of the parameter) and has no switch for it: eps2 = 1 makes that 1 for all
        # weights of an rms up to 1, which only some scales of normalisation layers exceed, and those by little.
        return torch.optim.Adafactor, {"eps": (1e-15, 1.0), "weight_decay": options.adam_weight_decay}
    return torch.optim.AdamW if options.optimizer == "adamw" else _adamw_8bit(), {
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }


def averages_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it trains with other weights than those that are its result, as schedule-free ones do (arXiv 2405.15682)."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def switch(optimizer: torch.optim.Optimizer, *, train: bool) -> None:
    """The weights become those that are trained, or those that are the result, where the two differ."""
    if averages_itself(optimizer):
        getattr(optimizer, "train" if train else "eval")()


def check_optimizer(options: TrainOptions) -> None:
    """Raise ``UserError`` if the package that an optimizer needs is missing."""
    _kind(options)


def _adamw_8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"optimizer adamw_8bit needs bitsandbytes ({first_line(error)}): pip install 'palate[8bit]', "
            "or use adamw or adafactor"
        ) from error
    return cast("Callable[..., torch.optim.Optimizer]", AdamW8bit)


class Average:
    """Exponential moving average of weights (EMA), as diffusers' ``EMAModel`` has it.

    After update n it keeps min(decay, n / (n + 9)) of itself, after the first nothing: so a short run forgets where it began.
    """

    def __init__(self, weights: Sequence[nn.Parameter], decay: float):
        self.weights, self.decay = list(weights), decay
        self.tensors = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, n: int) -> None:
        """Take in the weights after update ``n`` (from 1)."""
        average: Callable[[list[Tensor], list[Tensor], int], None] = get_ema_multi_avg_fn(
            min(self.decay, n / (n + 9)) if n > 1 else 0.0
        )
        average(self.tensors, [weight.detach() for weight in self.weights], n)

    def state_dict(self) -> list[Tensor]:
        return self.tensors

    def load_state_dict(self, tensors: Sequence[Tensor]) -> None:
        for own, given in zip(self.tensors, tensors, strict=True):
            own.copy_(given)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights, in place: whoever shares the weights sees the average."""
        for weight, average in zip(self.weights, self.tensors, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Inside, the weights are the average."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def lr_factor(name: str, step: int, *, warmup: int, total: int) -> float:
    """Learning rate of update ``step`` (from 0) relative to its full value, as diffusers' scheduler of that name."""
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}.get(name, 1.0)
