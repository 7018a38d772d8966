"""Results appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from palate.base.errors import UserError, first_line, short

LONGEST_NAME = 255
"""Bytes of a file's or folder's name, on nearly every disk."""


def write_atomically(path: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Write under a temporary name in the same folder (made if need be), then rename.

    content: the bytes, or what writes a file of the name it is given, where the whole is too large to be held twice.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content) if isinstance(content, bytes) else content(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def spellings(name: str) -> Iterator[str]:
    """A relative path as it stands, and as other systems may have it: separators, accents, capitals of its ending."""
    found: dict[str, None] = {}
    for written in (name, name.replace("\\", "/")):
        for form in (written, *(unicodedata.normalize(kind, written) for kind in ("NFC", "NFD"))):
            stem, point, ending = form.rpartition(".")
            found |= dict.fromkeys((form, stem + point + ending.lower(), stem + point + ending.upper()))
    yield from found


def check_folder(folder: str | Path, name: str) -> None:
    """Try whether a folder can be made and written to; nothing is made. ``name`` is that of its option.

    Raises:
        UserError: it cannot.
    """
    _check_named(folder, name)
    path = Path(folder).expanduser().absolute()
    try:
        # That which is there already: a folder made for the trial might be removed under another process.
        with tempfile.TemporaryFile(dir=nearest_there(path)) as probe:
            probe.write(b"palate")
    except OSError as error:
        why = error.strerror
    else:
        why = "the name is too long" if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts) else ""
    if why:
        shown = short(str(folder), 100, quoted=False)
        raise UserError(f"{name} {shown} cannot be written to ({why}): name another with --{name}")


def _check_named(place: str | Path, name: str) -> None:
    """No name would be the working directory's, which nobody means who gives an empty shell variable."""
    if not str(place).strip():
        raise UserError(f"{name} is {short(str(place))}: give it a name, or . for the working directory")


def nearest_there(place: str | Path) -> Path:
    """A file or folder, or what there is of the way to it."""
    path = Path(place).expanduser().absolute()
    for one in (path, *path.parents):
        with contextlib.suppress(OSError):
            one.lstat()
            return one
    return Path(path.anchor)


def check_file(file: str | Path, name: str) -> None:
    """As :func:`check_folder`, of the folder in which a file will be written."""
    _check_named(file, name)
    path = Path(file).expanduser()
    if path.is_dir():
        raise UserError(f"{name} {short(str(file), 100, quoted=False)} is a folder; expected the name of a file")
    check_folder(path.parent, name)


def replacing(final: Path, write: Callable[[str], object], name: str = ".") -> Path:
    """Let ``write`` make and fill a temporary folder, and put all of it in the place of ``final``, or its safetensors file
    ``name``, the metadata of which are put in order: so that the same weights make the same file."""
    partial = final.with_name(f".{final.name}-saving")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(str(partial))
        share(partial)
        if name != ".":
            _order_metadata(partial / name)
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(partial / name, final)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        raise UserError(f"{final} cannot be written ({first_line(error)}): free some space or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def share(folder: Path) -> None:
    """Let whoever may read a folder read its files, too: those that safetensors writes are for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _order_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file in place; the library writes them in another order every time."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        opened.seek(8)
        opened.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
