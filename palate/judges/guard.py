"""Functions from elsewhere, judges and rewards alike: one place where their answers are read and their failures told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from numbers import Number
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from palate.base.errors import UserError, said, short


class AnswerError(Exception):
    """An answer that does not read as one score for each picture: the end of a sentence that the function's name begins."""


class JudgeError(UserError):
    """A judge of the user's own failed: names the judge, the prompt and the picture.

    row: which picture of those it was given, from 0; None where no single one is to blame.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def read_answer(answer: object, count: int) -> tuple[Float32[Tensor, " count"], object]:
    """What a judge or reward said of ``count`` pictures: the scores, and what came with them (None if nothing did).

    An answer is anything that reads as that many numbers, a tensor, an array, or a list or tuple of numbers or tensors
    of one number each, of whatever precision and device, with or without gradients; or ``(scores, info)``. A tensor stays
    where it is and keeps its gradient. Scores that are not finite are left to the caller.

    Raises:
        AnswerError: anything else, and another number of scores.
    """
    scores, info = answer, None
    if isinstance(answer, tuple) and len(cast("tuple[object, ...]", answer)) == 2:
        first, second = cast("tuple[object, object]", answer)
        if not (count == 2 and _is_number(first) and _is_number(second)):
            scores, info = first, second
    if scores is None:
        raise AnswerError("returned nothing")
    if inspect.iscoroutine(scores):
        scores.close()  # otherwise Python complains of it later, wherever that may be
        raise AnswerError("is async, and is not waited for: give a plain function")
    found = _tensor(scores)
    if tuple(found.shape) not in {(count,), (count, 1), *([()] if count == 1 else [])}:
        raise AnswerError(f"returned scores of shape {tuple(found.shape)} where ({count},) was expected")
    return found.reshape(count).to(torch.float32), info


def undisturbed(call: Callable[[], object]) -> object:
    """What a function of the user's own returns. What it leaves of torch's default dtype all else would be computed with.

    Raises:
        AnswerError: it left another one than it found, which is put back.
    """
    before = torch.get_default_dtype()
    try:
        return call()
    finally:
        if (own := torch.get_default_dtype()) is not before:
            torch.set_default_dtype(before)
            kind = str(own).removeprefix("torch.")
            raise AnswerError(
                f"set torch's default dtype to {kind}, and so that of all else here: name it for each tensor instead"
            )


def _is_number(value: object) -> bool:
    return (isinstance(value, int | float | np.number) or (isinstance(value, Tensor) and value.numel() == 1)) and not (
        isinstance(value, complex | np.complexfloating)
    )


def _tensor(scores: object) -> Tensor:
    if isinstance(scores, dict):
        names = ", ".join(short(name, 20) for name in list(cast("dict[object, object]", scores))[:3])
        raise AnswerError(f"returned a dict ({names}{', ...' if len(scores) > 3 else ''}); expected the scores alone")
    try:
        if isinstance(scores, list | tuple) and any(isinstance(one, Tensor) for one in cast("Sequence[object]", scores)):
            # Stacked by hand: NumPy knows neither bfloat16 nor gradients nor the GPU.
            scores = torch.stack([torch.as_tensor(one).detach().cpu().double() for one in cast("Sequence[Tensor]", scores)])
        found = scores if isinstance(scores, Tensor) else torch.as_tensor(_array(scores))
        found = found.to_dense() if found.layout != torch.strided else found
        found = found.dequantize() if found.is_quantized else found
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise AnswerError(f"returned {type(scores).__name__}, which does not read as numbers") from None
    if found.is_complex():
        raise AnswerError("returned complex numbers")
    if found.is_meta:
        raise AnswerError("returned a tensor without values (on the device meta)")
    return found


def _array(scores: object) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if isinstance(scores, np.ma.MaskedArray):  # what is masked is no score
        return cast("np.ma.MaskedArray[tuple[int, ...], np.dtype[np.generic]]", scores).astype(np.float64).filled(np.nan)
    found = np.asarray(scores)
    if found.dtype == object and all(isinstance(one, Number) for one in found.flat):  # of pandas, say
        return found.astype(np.complex128 if any(isinstance(one, complex) for one in found.flat) else np.float64)
    return found


def culprit(ask: Callable[[slice], object], count: int) -> int | None:
    """Which of ``count`` pictures a function raises on, found by halving; None if it does not raise on a single one.

    ask: gives the function a part of the pictures.
    """
    low, high = 0, count
    while True:
        middle = max((low + high) // 2, low + 1)
        try:
            ask(slice(low, middle))
        except KeyboardInterrupt:
            raise
        except BaseException:
            if middle - low == 1:
                return low
            high = middle
        else:
            low = middle
            if low >= high:
                return None


def failure(error: BaseException) -> str:
    """What a function did that raised: the end of a sentence that its name begins."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({short(error.code, 120)})"
    return f"raised {type(error).__name__}: {said(error)}"


class Guarded:
    """A function of the user's own as a judge: it gets copies of the pictures, its answers are read by :func:`read_answer`.

    Raises:
        JudgeError: the function raises, calls ``sys.exit``, or answers something else.
    """

    def __init__(self, function: Callable[..., object], name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        def ask(part: slice) -> object:
            return self.function(images[part].clone(), list(prompts[part]))

        everything = slice(0, len(images))
        try:
            answer = undisturbed(lambda: ask(everything))
        except AnswerError as error:
            raise self._failed(str(error), prompts, None) from None
        except (UserError, torch.OutOfMemoryError, MemoryError, KeyboardInterrupt):
            raise
        except BaseException as error:  # also what is no Exception: sys.exit, cancelled tasks, those of test frameworks
            raise self._failed(failure(error), prompts, culprit(ask, len(images))) from error
        try:
            return read_answer(answer, len(images))[0]
        except AnswerError as error:
            raise self._failed(str(error), prompts, None) from None

    def _failed(self, problem: str, prompts: Sequence[str], row: int | None) -> JudgeError:
        b = len(prompts)
        row = 0 if b == 1 else row
        which = f"picture {row} of {b}" if row is not None else f"pictures 0 to {b - 1}, of which the first"
        return JudgeError(f"judge {self.name} {problem}: {which} (prompt {short(prompts[row or 0])})", row)
