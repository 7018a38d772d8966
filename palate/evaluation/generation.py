"""Pictures of many prompts into a picture folder: by one process or several, going on where an interrupted one stopped."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from palate.base.errors import UserError, short
from palate.base.files import write_atomically
from palate.base.jsonl import read_object, write_object
from palate.base.machine import part_of, processes
from palate.data.prompts import Prompt
from palate.evaluation.manifest import (
    MANIFEST,
    SETTINGS,
    Picture,
    append_manifest,
    read_manifest,
    write_settings,
)

if TYPE_CHECKING:
    from torch import nn

    from palate.models.denoiser import Drawer
    from palate.models.drawing import Drawing
    from palate.models.refiner import Refiner

Draw = Callable[[list[Picture]], Sequence[Image.Image]]
"""Some lines of a manifest to be -> their pictures."""
MODEL = "model.json"
"""What drew the pictures of a folder: that in which two folders differ."""
WEIGHTS = "weights"
"""There: the sketch of the network's weights, which may be others by now in a folder of the same name."""


@dataclass(frozen=True)
class Shard:
    """The share of one process of several: every ``of``-th picture, from ``number`` (0 is the first)."""

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Shard:
        """``1/4`` to ``4/4``; without a text, what ``torchrun`` or ``accelerate launch`` told this process."""
        if text is None:
            return cls(int(os.environ.get("RANK", "0")), processes())
        return cls(*part_of(text))


def picture_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of one picture, 32 bits: of these three alone, so that every model meets a prompt with the same noise."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index} {prompt}".encode()).digest()[:4], "big")


def plan(
    prompts: Sequence[Prompt],
    *,
    model: str,
    images_per_prompt: int = 1,
    seed: int = 0,
    negative: str | None = None,
    init_images: Sequence[str] | None = None,
) -> list[Picture]:
    """The manifest of what is to be drawn. A prompt that the list repeats is drawn anew: its index counts on.

    A prompt's own seed goes before ``seed``.

    init_images: of each prompt the name of the picture that is edited, as :func:`palate.evaluation.editing.find` gives it.
    """
    met: Counter[str] = Counter()
    found = []
    for number, prompt in enumerate(prompts):
        for further in range(images_per_prompt):
            index = met[prompt.text]
            met[prompt.text] += 1
            away = negative if prompt.negative is None else prompt.negative
            file = f"{number:05d}-{index:02d}.png"
            own = None if prompt.seed is None else (prompt.seed + further) % 2**64
            noise = picture_seed(seed, prompt.text, index) if own is None else own
            init_image = None if init_images is None else init_images[number]
            found.append(Picture(file, prompt.text, noise, index, model, away, prompt.metadata, init_image, prompt.shape))
    return found


def drawn_by(
    denoiser: Drawer,
    drawing: Drawing,
    *,
    network: nn.Module | None = None,
    refiner: Refiner | None = None,
    start: Callable[[list[Picture]], Sequence[Tensor]] | None = None,
    strength: float = 1.0,
) -> Draw:
    """What :func:`generate` draws with: a model, its own network or another.

    start: the pixels that pictures are edited from, as :func:`palate.evaluation.editing.starting` makes it.
    """

    def draw(pictures: list[Picture]) -> Sequence[Image.Image]:
        return denoiser.generate(
            [p.prompt for p in pictures],
            [p.seed for p in pictures],
            drawing,
            negatives=[p.negative for p in pictures],
            shapes=[p.shape for p in pictures],
            network=network,
            refiner=refiner,
            init=None if start is None else start(pictures),
            strength=strength,
        )

    return draw


def settings(
    denoiser: Drawer,
    drawing: Drawing,
    *,
    seed: int,
    versions: Mapping[str, str],
    mixed_precision: str | None = None,
    quantize: str | None = None,
    strength: float | None = None,
) -> dict[str, object]:
    """What must agree between two folders that are compared."""
    return {
        **({} if mixed_precision is None else {"mixed_precision": mixed_precision}),
        **({} if quantize is None else {"quantize": quantize}),
        "num_inference_steps": drawing.num_inference_steps,
        "guidance_scale": drawing.guidance_scale,
        "resolution": drawing.shape.told,
        **({} if strength is None else {"strength": strength}),
        "sampler": denoiser.sampler,
        "seed": seed,
        "versions": dict(versions),
    }


def generate(
    draw: Draw,
    pictures: Sequence[Picture],
    folder: str | Path,
    *,
    settings: Mapping[str, object],
    model: Mapping[str, object] | None = None,
    batch_size: int = 8,
    shard: Shard | None = None,
    progress: bool = False,
) -> int:
    """Draw what the folder lacks of ``pictures`` (of this ``shard``), a batch at a time; returns how many were drawn.

    Each picture appears whole or not at all, and its line in the manifest after it, so the folder can be read at any time.

    Args:
        settings: what must agree between two folders that are compared; ``settings.json``. ``versions`` in it may differ
            between the beginning and the end of one folder, nothing else may.
        model: what draws; ``model.json``.

    Raises:
        UserError: the folder was begun with other settings or another model, or holds other pictures of these names.
    """
    folder, shard = Path(folder), shard or Shard()
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected at least 1")
    before = read_object(folder / SETTINGS, optional=True)
    done = begun(folder, pictures, {**dict.fromkeys(before), **settings}, model or {})
    folder.mkdir(parents=True, exist_ok=True)
    write_object(folder / MODEL, model or {})
    if not (folder / SETTINGS).is_file():
        write_settings(folder, settings)
    wanted = [p for p in pictures[shard.number :: shard.of] if p.file not in done or not (folder / p.file).is_file()]
    bar = tqdm(total=len(wanted), desc="generating", unit=" pictures", disable=not progress)
    with bar:
        for start in range(0, len(wanted), batch_size):
            part = list(wanted[start : start + batch_size])
            images = draw(part)
            for picture, image in zip(part, images, strict=True):
                stream = io.BytesIO()
                image.save(stream, "PNG")
                write_atomically(folder / picture.file, stream.getvalue())
            append_manifest(folder, [p for p in part if p.file not in done])
            bar.update(len(part))
    return len(wanted)


def holds(folder: str | Path, pictures: Sequence[Picture], settings: Mapping[str, object], model: Mapping[str, object]) -> bool:
    """Whether a folder has exactly these pictures, drawn with the same settings by the same model."""
    folder = Path(folder)
    try:
        same = read_object(folder / SETTINGS) == settings and read_object(folder / MODEL) == model
        return same and read_manifest(folder) == list(pictures)
    except UserError:  # it is not there, or not whole
        return False


def begun(
    folder: str | Path, pictures: Sequence[Picture], settings: Mapping[str, object], model: Mapping[str, object]
) -> set[str]:
    """The files that the folder's manifest names already, of a folder that may be gone on with; reads no pictures.

    settings: those that are known by now; of the others nothing is said. None is a setting that the folder must not have.

    Raises:
        UserError: as :func:`generate`.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    for name, given in ((SETTINGS, settings), (MODEL, model)):
        if (folder / name).is_file():
            before = read_object(folder / name)
            wanted = {**before, **given} if name == MODEL else given
            differ = [k for k in wanted if k != "versions" and before.get(k) != given.get(k)]
            if None in (before.get(WEIGHTS), given.get(WEIGHTS)):  # not looked at by then, or yet
                differ = [k for k in differ if k != WEIGHTS]
            if differ:
                k = differ[0]
                raise UserError(
                    f"{folder} was begun with {k} {short(before.get(k))}, now {short(given.get(k))} is asked for; "
                    "name another folder, or give the same options to go on"
                )
    if not (folder / MANIFEST).is_file() or not (folder / MANIFEST).stat().st_size:
        return set()
    names = {p.file: p for p in pictures}
    there = read_manifest(folder, check_files=False)
    for old in there:
        new = names.get(old.file)
        if new is not None and new.prompt != old.prompt:
            raise UserError(f"{folder}/{old.file} shows {short(old.prompt)}, not {short(new.prompt)}; name another folder")
        for name in ("seed", "index", "negative"):
            if new is not None and getattr(new, name) != getattr(old, name):
                was, now = (short(getattr(picture, name)) for picture in (old, new))
                raise UserError(f"{folder}/{old.file} was drawn with {name} {was}, not {now}; name another folder")
        if new is not None and new.shape != old.shape:
            was, now = (shape or "the folder's own size" for shape in (old.shape, new.shape))
            raise UserError(f"{folder}/{old.file} was drawn at {was}, not {now}; name another folder")
        if new is not None and new.init_image != old.init_image:
            raise UserError(f"{folder}/{old.file} was edited from {old.init_image}, not {new.init_image}; name another folder")
    keys = {p.key: p for p in there}
    taken = next((p for p in pictures if p.key in keys and keys[p.key].file != p.file), None)
    if taken is not None:
        raise UserError(f"{folder} already holds {short(taken.prompt)} as {keys[taken.key].file}; name another folder")
    return {p.file for p in there}
