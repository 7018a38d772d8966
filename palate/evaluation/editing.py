"""Pictures that others are edited from (SDEdit, arXiv 2108.01073): found, checked, and kept beside what was made of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from palate.base.errors import UserError, short
from palate.base.files import write_atomically
from palate.base.shapes import Shape
from palate.data.images import decode, framed
from palate.data.prompts import Prompt
from palate.evaluation.manifest import Picture

INIT = "init_image"
"""What a prompt's metadata call its picture."""
FOLDER = "init"
"""Where a picture folder keeps them."""


def find(prompts: Sequence[Prompt], home: str | Path, for_all: str | Path | None = None) -> tuple[list[str], dict[str, Path]]:
    """Of each prompt the name of its picture within a picture folder; and the file behind each name.

    A name holds a digest of the file, and the shape if the prompt has its own, so that edits of other pictures are never taken
    for each other. Without any picture both are empty.

    Args:
        home: the folder of the prompts, in which the paths of their ``init_image`` begin and stay.
        for_all: the picture of the prompts that name none.

    Raises:
        UserError: a prompt without a picture among others that have one; a file that is missing, no picture, or outside
            ``home``.
    """
    if for_all is None and not any(INIT in p.metadata for p in prompts):
        return [], {}
    digests: dict[Path, str] = {}
    found: list[tuple[str, Path]] = []
    for prompt in prompts:
        given = prompt.metadata.get(INIT)
        if given is None and for_all is None:
            raise UserError(
                f"prompt {short(prompt.text)} names no {INIT}, others do; add one, or give --init_image for the rest"
            )
        path = Path(for_all).expanduser() if given is None and for_all is not None else _inside(Path(home), given, prompt)
        if path not in digests:
            digests[path] = _digest(path, prompt)
        own = "" if prompt.shape is None else f"-{prompt.shape.width}x{prompt.shape.height}"
        found.append((f"{FOLDER}/{digests[path]}{own}.png", path))
    return [name for name, _ in found], dict(found)


def starting(files: Mapping[str, Path], folder: str | Path, shape: Shape) -> Callable[[list[Picture]], list[Tensor]]:
    """Pictures to be -> pixels ``(3, h, w)`` in [-1, 1] of what each is edited from, of its own shape or else ``shape``.

    The largest part in the middle of each file that has the shape's proportions, resized. What was edited is also written
    into the ``folder``.
    """

    def pixels(name: str, shape: Shape) -> Tensor:
        found = framed(decode(files[name].read_bytes()), shape)
        path = Path(folder) / name
        if not path.is_file():
            stream = io.BytesIO()
            levels = ((found + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
            Image.fromarray(levels).save(stream, "PNG")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, stream.getvalue())
        return found

    def start(pictures: list[Picture]) -> list[Tensor]:
        shapes = {p.init_image or "": p.shape or shape for p in pictures}
        once = {name: pixels(name, of) for name, of in shapes.items()}
        return [once[p.init_image or ""] for p in pictures]

    return start


def _inside(home: Path, given: object, prompt: Prompt) -> Path:
    if not isinstance(given, str) or not given or "\0" in given:
        raise UserError(f"{INIT} of prompt {short(prompt.text)} is {short(given)}; expected a path such as photos/cat.png")
    path = home / given
    if not path.resolve().is_relative_to(home.resolve()):
        raise UserError(
            f"{INIT} {short(given)} of prompt {short(prompt.text)} leads outside {home.resolve()}; put the picture inside"
        )
    return path


def _digest(path: Path, prompt: Prompt) -> str:
    """Of the file, after it has been decoded once: a damaged picture is told before weights are read."""
    where = f"{INIT} {path} of prompt {short(prompt.text)}"
    try:
        data = path.read_bytes()
        decode(data)
    except FileNotFoundError:
        raise UserError(f"{where} does not exist; expected a picture file") from None
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}); expected a picture file") from None
    except ValueError as error:
        raise UserError(f"{where} {error}; replace it, or remove the prompt") from None
    return hashlib.sha256(data).hexdigest()[:16]
