"""Any number of pictures past a judge in constant memory: decoded by threads, scored in batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError, short
from palate.data.images import decode_usable, to_tensor
from palate.judges.guard import AnswerError, JudgeError, read_answer

if TYPE_CHECKING:
    from palate.judges import Judge

HELD = 4
"""Pictures of odd sizes wait for others of their size, so many batches of them at most."""


@dataclass(frozen=True)
class BadPicture:
    """A picture without a score, and why: the end of a sentence that its name begins."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@runtime_checkable
class _InTwoSteps(Protocol):
    """A judge that lets threads prepare what it reads; see :class:`palate.judges.Judge`."""

    preprocess: Callable[[Tensor], Tensor]

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor: ...


def score_files(
    judge: Judge, items: Iterable[tuple[str | Path, str]], *, batch_size: int = 32, workers: int = 4
) -> Iterator[tuple[int, float | BadPicture]]:
    """Scores of picture files with a prompt each, as ``(index of the item, score or what is wrong)``.

    ``items`` may be endless: at any moment about ``2 * batch_size + workers`` pictures are in memory, already resized where
    the judge says how (its ``preprocess``). Otherwise pictures of one size form a batch and are given at most
    ``4 * batch_size`` pictures to find each other. Every item is answered once; those of one batch come together, so the
    order of the indices is that of the items only where nothing had to wait.

    Bad pictures do not stop the others: missing, empty, truncated, no picture, too large, a placeholder. An animation counts
    by its first frame, transparency is laid on white, 16 bits a sample are reduced to 8
    (:func:`palate.data.images.decode_usable`).

    Args:
        judge: a :class:`palate.judges.Judge`; if it has ``preprocess(images) -> pixels`` and ``score_pixels(pixels, prompts)``
            the former is done by the threads.
        items: path and prompt.
        batch_size: pictures scored at once.
        workers: threads that read and decode.

    Raises:
        UserError: what the judge itself raises, or a batch size or number of workers below 1. A :class:`JudgeError` has the
            index of an item as its ``row``.
    """
    loads = ((lambda path=path: to_tensor([decode_usable(_read(path))]), prompt) for path, prompt in items)
    return score_stream(judge, loads, batch_size=batch_size, workers=workers)


def score_stream(
    judge: Judge, items: Iterable[tuple[Callable[[], Tensor], str]], *, batch_size: int, workers: int
) -> Iterator[tuple[int, float | BadPicture]]:
    """As :func:`score_files`, of functions that return a picture ``(1, 3, h, w)`` in [0, 1] or raise ``ValueError``."""
    if batch_size < 1 or workers < 1:
        raise UserError(f"batch size {batch_size} with {workers} workers; expected at least 1 of each")
    return _scores(judge, items, batch_size, workers)


def _scores(
    judge: Judge, items: Iterable[tuple[Callable[[], Tensor], str]], batch_size: int, workers: int
) -> Iterator[tuple[int, float | BadPicture]]:
    preprocess, call = (judge.preprocess, judge.score_pixels) if isinstance(judge, _InTwoSteps) else (None, judge)
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor, str]]] = {}  # by size

    def batch(size: tuple[int, ...]) -> Iterator[tuple[int, float | BadPicture]]:
        rows = waiting.pop(size)
        try:
            with torch.no_grad():
                answer = call(torch.cat([x for _, x, _ in rows]), [prompt for _, _, prompt in rows])
            scores = read_answer(answer, len(rows))[0].tolist()
        except JudgeError as error:
            error.row = rows[error.row or 0][0]
            raise
        except AnswerError as error:
            raise JudgeError(f"the judge {error}: picture {rows[0][0]} (prompt {short(rows[0][2])})", rows[0][0]) from None
        for (index, _, _), score in zip(rows, scores, strict=True):
            yield index, score if math.isfinite(score) else BadPicture(f"was scored {score} by the judge")

    for index, loaded, prompt in _ahead(items, preprocess, workers, batch_size + workers):
        if isinstance(loaded, BadPicture):
            yield index, loaded
            continue
        size = tuple(loaded.shape)
        waiting.setdefault(size, []).append((index, loaded, prompt))
        if len(waiting[size]) == batch_size:
            yield from batch(size)
        elif sum(map(len, waiting.values())) >= HELD * batch_size:
            yield from batch(max(waiting, key=lambda size: len(waiting[size])))
    for size in list(waiting):
        yield from batch(size)


def _ahead(
    items: Iterable[tuple[Callable[[], Tensor], str]], preprocess: Callable[[Tensor], Tensor] | None, workers: int, ahead: int
) -> Iterator[tuple[int, Float[Tensor, "1 3 h w"] | BadPicture, str]]:
    """The pictures in order, up to ``ahead`` of them being loaded before they are asked for."""

    def load(of: Callable[[], Tensor]) -> Tensor | BadPicture:
        try:
            with torch.no_grad():
                return of() if preprocess is None else preprocess(of())
        except ValueError as error:
            return BadPicture(str(error))
        except MemoryError:
            return BadPicture("does not fit into memory")

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        queue: deque[tuple[int, Future[Tensor | BadPicture], str]] = deque()
        numbered = ((index, load_one, prompt) for index, (load_one, prompt) in enumerate(items))
        queue.extend((index, pool.submit(load, one), prompt) for index, one, prompt in islice(numbered, ahead))
        while queue:
            index, future, prompt = queue.popleft()
            yield index, future.result(), prompt
            queue.extend((index, pool.submit(load, one), prompt) for index, one, prompt in islice(numbered, 1))
    finally:  # also when the caller stops early
        pool.shutdown(cancel_futures=True)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError("does not exist") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
