"""What a reward is, and how judges and functions from elsewhere become one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError
from palate.data.prompts import Prompt
from palate.judges import Judge
from palate.judges.guard import failure


@runtime_checkable
class Reward(Protocol):
    """``(images (b, 3, h, w) float32 in [0, 1], b prompts) -> (b,)`` scores, higher is better.

    The scores may be anything that reads as b numbers, and may come with something to keep: ``(scores, info)``.
    Whoever calls it checks the answer; see :func:`palate.online.bundle.RewardBundle`.
    """

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> object: ...


class RewardError(UserError):
    """A reward failed: names the reward, the prompt and the image. What was trained until then is sound."""


def from_judge(judge: Judge) -> Reward:
    """A judge as a reward: it reads the text of the prompts, not what their list tells of them."""

    def reward(images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> object:
        return judge(images.clone(), [prompt.text for prompt in prompts])  # one of the user's own may change them

    return reward


def from_function(function: Callable[..., object], *, name: str = "", device: str | torch.device = "cpu") -> Reward:
    """A function ``fn(images, prompts, metadata) -> scores`` or ``(scores, info)``, as ddpo-pytorch, TRL and flow_grpo call it.

    ``images`` is a float32 tensor ``(b, 3, h, w)`` in [0, 1], ``prompts`` a tuple of b texts, ``metadata`` a tuple of b
    dictionaries: positional, and copies, so that the function may change them.

    A function of two arguments is a judge, ``fn(images, prompts) -> scores``. A factory (ddpo-pytorch's
    ``jpeg_compressibility()``, flow_grpo's with a ``device``) or a class whose instances can be called so is recognised
    by the arguments it takes, and called once.

    Raises:
        UserError: it takes neither those arguments nor none.
    """
    called = name or getattr(function, "__qualname__", repr(function))
    if not _takes(function, 3):
        if _takes(function, 2):
            return from_judge(cast(Judge, function))
        if _takes(function, 0):
            made = _made(called, function)
        elif "device" in inspect.signature(function).parameters and _takes(function, 0, device=device):
            made = _made(called, function, device=device)
        else:
            raise UserError(
                f"reward {called} takes {inspect.signature(function)}; expected (images, prompts, metadata), "
                "or no argument if it makes such a function"
            )
        if not callable(made) or not _takes(made, 3):
            raise UserError(
                f"reward {called} takes no argument and made a {type(made).__name__}; "
                "expected a function of (images, prompts, metadata)"
            )
        function = made

    def reward(images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> object:
        return function(images.clone(), tuple(p.text for p in prompts), tuple(dict(p.metadata) for p in prompts))

    return reward


def _made(called: str, function: Callable[..., object], **named: object) -> object:
    try:
        return function(**named)
    except (UserError, torch.OutOfMemoryError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(
            f"reward {called} {failure(error)}: it is called once, without pictures, and makes the reward"
        ) from error


def _takes(function: Callable[..., object], count: int, **named: object) -> bool:
    """Whether ``count`` positional arguments (and those named) are enough and not too many."""
    try:
        inspect.signature(function).bind(*range(count), **named)
    except TypeError:
        return False
    except ValueError:  # of some functions written in C nothing is known
        return count == 3
    return True
