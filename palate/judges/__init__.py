"""Judges: scores of pictures, higher is better. One protocol, one loader, one function that scores a list of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from palate.errors import UserError, nearest
from palate.judges.pictures import to_tensor
from palate.judges.stream import score_stream

KINDS = ("aesthetic", "clipscore", "jpeg_compressibility", "jpeg_incompressibility", "pickscore")
"""What :func:`load_judge` can load."""


@runtime_checkable
class Judge(Protocol):
    """``(images (b, 3, h, w) in [0, 1], b prompts) -> (b,)`` float32 scores, higher is better.

    A judge that sees pictures only ignores the prompts. CLIP judges are differentiable with respect to the images.
    """

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]: ...


def check_judge(kind: str, folder: str | Path | None = None) -> None:
    """Refuse what :func:`load_judge` would refuse for want of a file, in no time: no weights are read."""
    if kind not in KINDS:
        raise UserError(f"unknown judge {kind!r}{nearest(kind, KINDS)}")
    if kind.startswith("jpeg"):
        return
    if folder is None:
        raise UserError(f"judge {kind!r} needs the folder of its CLIP model; none was given")
    from palate.judges.clip import check_clip

    check_clip(Path(folder))
    if kind == "aesthetic":
        from palate.judges.aesthetic import find_head

        find_head(folder)


def load_judge(kind: str, folder: str | Path | None = None, *, device: str | torch.device = "cpu") -> Judge:
    """Load a judge of one of the :data:`KINDS` from a folder on disk (the two JPEG judges need none).

    Raises :class:`UserError` for an unknown kind and for a folder in which something is missing.
    """
    if kind not in KINDS:
        raise UserError(f"unknown judge {kind!r}{nearest(kind, KINDS)}")
    if kind in ("jpeg_compressibility", "jpeg_incompressibility"):
        from palate.judges import jpeg

        return getattr(jpeg, kind)
    if folder is None:
        raise UserError(f"judge {kind!r} needs the folder of its CLIP model; none was given")
    if kind == "aesthetic":
        from palate.judges.aesthetic import AestheticJudge

        return AestheticJudge.load(folder, device=device)
    from palate.judges.clip import ClipJudge

    return ClipJudge.load(kind, folder, device=device)


def score(judge: Judge, images: Sequence[Image.Image], prompts: Sequence[str], batch_size: int = 32) -> Float[Tensor, " n"]:
    """Scores ``(n,)``, float32 on the CPU, of pictures with one prompt each; pictures may differ in size.

    A score that is not finite is NaN.
    """
    if len(images) != len(prompts):
        raise UserError(f"{len(images)} pictures came with {len(prompts)} prompts; give one prompt per picture")
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
