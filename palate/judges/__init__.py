"""Judges: scores of pictures, higher is better. One protocol, one loader, one stream of pictures past a judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from palate.data.images import to_tensor
from palate.judges.kinds import KINDS, find_place, module_of, options_of
from palate.judges.pictures import one_each
from palate.judges.stream import score_stream

__all__ = ["KINDS", "Judge", "check_judge", "load_judge", "score"]


@runtime_checkable
class Judge(Protocol):
    """``(images (b, 3, h, w) in [0, 1], b prompts) -> (b,)`` float32 scores, higher is better.

    A judge that sees pictures only ignores the prompts. CLIP judges and ImageReward are differentiable with respect to the
    images. A judge may also have ``preprocess(images) -> pixels (b, 3, H, W)`` of one size for pictures of any size, and
    ``score_pixels(pixels, prompts)``; its call is the one after the other.
    """

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]: ...


def check_judge(kind: str, where: str | Path | None = None, **options: object) -> Path | str | None:
    """Refuse what :func:`load_judge` would refuse for want of a file, without reading weights.

    Returns:
        The folder (of a hub id: fetched by now), URL or nothing that the judge is made from.
    """
    return _prepare(kind, where, options)[0]


def load_judge(kind: str, where: str | Path | None = None, *, device: str | torch.device = "cpu", **options: object) -> Judge:
    """Load a judge of one of the :data:`KINDS`.

    Args:
        kind: such as ``pickscore``; docs/judges.md lists them.
        where: folder on disk, hub id, or URL where the kind allows one; the published weights unless given.
        device: of its weights.
        options: fields of the ``Options`` of its module, such as ``dtype="bfloat16"``.

    Raises:
        UserError: an unknown kind or option, and a folder in which something is missing.
    """
    return _prepare(kind, where, options)[1](device)


def _prepare(
    kind: str, where: str | Path | None, given: Mapping[str, object]
) -> tuple[Path | str | None, Callable[[str | torch.device], Judge]]:
    """What a judge is made from, found to be complete, and what makes it on a device."""
    options, place = options_of(kind, given), find_place(kind, where)
    return place, module_of(kind).prepare(kind, place, options)


def score(judge: Judge, images: Sequence[Image.Image], prompts: Sequence[str], batch_size: int = 32) -> Float[Tensor, " n"]:
    """Scores ``(n,)``, float32 on the CPU, of pictures with one prompt each; pictures may differ in size.

    A score that is not finite is NaN.
    """
    one_each(images, prompts)
    stream = score_stream(
        judge,
        ((lambda image=image: to_tensor([image]), prompt) for image, prompt in zip(images, prompts, strict=True)),
        batch_size=batch_size,
        workers=2,
    )
    scores = torch.full((len(images),), float("nan"))
    for index, found in stream:
        if isinstance(found, float):
            scores[index] = found
    return scores
