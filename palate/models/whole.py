"""Whether the files of a pipeline's parts are all there and whole, by names and heads alone: before any weights are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from palate.base.errors import UserError, first_line, short
from palate.base.jsonl import read_object

SHARD = re.compile(r"-\d{5}-of-\d{5}")
POINTER = b"version https://git-lfs"


def variant_of(name: str) -> str:
    """What a file of weights or its index is a variant of: ``fp16`` for model.fp16.safetensors; empty for none."""
    middle = name.replace(".safetensors", "").replace(".bin", "").replace(".index", "").replace(".json", "").partition(".")[2]
    return SHARD.sub("", middle)


def is_weights(name: str) -> bool:
    """Whether a file holds weights that PyTorch reads, by its name."""
    return name.endswith((".safetensors", ".bin")) and not name.startswith("openvino")


def found_by_name(names: Sequence[str], part: str, where: str, variant: str | None) -> tuple[str, bool]:
    """The file of a part that is read, and whether it is an index of several. Raises ``UserError`` if none has the right name.

    Args:
        names: of all files of the part, of which some hold weights of the variant.
        where: part and model, as messages call it.
        variant: of which the files are read; None for the plain ones.
    """
    # transformers' names, and diffusers'.
    stems = ("model", "pytorch_model") if part.startswith("text_encoder") else ("diffusion_pytorch_model",)
    middle = f".{variant}" if variant else ""
    wanted = [
        (name, indexed)
        for ending in (".safetensors", ".bin")
        for stem in stems
        for name, indexed in ((f"{stem}{middle}{ending}", False), (f"{stem}{ending}.index{middle}.json", True))
    ]
    for name, indexed in wanted:
        if name in names:
            return name, indexed
    held = [name for name in names if is_weights(name) and variant_of(name) == (variant or "")]
    first, (single, _), (index, _) = short(held[0], 60, quoted=False), *wanted[:2]
    if SHARD.search(held[0]):
        raise UserError(f"{where} lacks {index}, which tells what {first} and the others hold: download it again")
    raise UserError(f"{where} has its weights in {first}, but {single} is looked for: rename it")


def check_heads(folder: Path, name: str, indexed: bool, where: str) -> None:
    """Raise ``UserError`` unless the file, or all that it lists, are on this disk, and begin and end as they should."""
    listed = [name]
    if indexed:
        held = read_object(folder / name, otherwise="download it again").get("weight_map")
        listed = sorted({str(one) for one in held.values()}) if isinstance(held, dict) else []
        if lost := [one for one in listed if not (folder / one).exists()]:
            raise UserError(
                f"{where} lacks {len(lost)} of the {len(listed)} files that {name} names, the first is "
                f"{short(lost[0], 60, quoted=False)}: download it again"
            )
    for one in listed:
        _check_head(folder / one, f"{where} cannot be loaded: {one}")


def _check_head(path: Path, what: str) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"{what} is a link to {short(str(path.readlink()))}, which does not exist")
    if not path.is_file():
        raise UserError(f"{what} is a folder; expected a file of weights")
    with path.open("rb") as stream:
        head = stream.read(len(POINTER))
    if head == POINTER:
        raise UserError(f"{what} is a pointer of Git LFS, not the weights: run 'git lfs pull' there, or download it again")
    if not head:
        raise UserError(f"{what} is empty; download it again")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{what} is damaged ({first_line(error)}); download it again") from error
