"""Webdataset shards: tar files whose neighbouring members make up one sample, streamed one sample at a time."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from palate.base.errors import said
from palate.base.jsonl import decode
from palate.data.values import BadValueError, short

PICTURES = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "ppm", "pgm", "tga")
TEXTS = {"txt": "prompt", "text": "prompt", "caption": "prompt"}
MAX_MEMBER = 1 << 28
"""Bytes of the largest member that is read: memory must not depend on what a file claims."""


LITTER = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")


def is_litter(name: str) -> bool:
    """Whether a file of that path is hidden, or what systems and programs leave beside others: macOS, Windows,
    Jupyter, Office, downloads that did not end."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return any(part.startswith((".", "~$")) or part in LITTER for part in parts) or name.endswith((".tmp", ".part"))


def is_tar(head: bytes) -> bool:
    """Whether a file begins like a tar archive."""
    return head[257:262] == b"ustar"


def sample_rows(path: Path) -> Iterator[dict[str, object] | BadValueError]:
    """The samples of a shard as rows by column; what follows damage is given up, and said in a last bad row.

    Members belong together by their name up to the first dot of its last part. What follows that dot is the column:

    - ``jpg``: the column ``image``; ``jpg_0``, ``0.jpg`` or ``image_0.jpg``: ``image_0``; ``chosen.png``: ``chosen``
    - ``txt`` (also ``text``, ``caption``): ``prompt``
    - ``json``: an object, whose entries are columns
    - anything else, such as ``label``: a short text
    """
    row: dict[str, object] = {}
    key, done = None, 0
    try:
        # Opened for seeking, not as a stream ("r|"): only so can the end mark be looked for afterwards.
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as shard:
            while (member := shard.next()) is not None:
                shard.members.clear()  # tarfile would keep the headers of all
                if not member.isfile() or is_litter(member.name):
                    continue
                head, _, name = member.name.rpartition("/")
                base, _, extension = name.partition(".")
                if key is not None and key != (head, base):
                    yield row
                    row, done = {}, done + 1
                key = (head, base)
                _add(row, _columns(extension, member, shard), member.name)
            if not _ends(shard, stream):
                raise tarfile.ReadError("no end mark")
            more = _goes_on(stream)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        # The sample that was being read may be half of one.
        yield BadValueError("(rest of file)", f"is damaged after {done} samples ({said(error)}): copy or download it again")
        return
    if key is not None:
        yield row
    if more:
        yield BadValueError(
            "(rest of file)", "is a second archive, of which nothing is read: tar --concatenate makes one of both"
        )


def _add(row: dict[str, object], columns: dict[str, object], name: str) -> None:
    """A member's columns to those of its sample; of two members that give the same column neither counts."""
    for column, value in columns.items():
        twice = column in row and row[column] != value
        row[column] = BadValueError(column, f"is given twice, again by {short(name)}") if twice else value


def _ends(shard: tarfile.TarFile, stream: BinaryIO) -> bool:
    """Whether reading ended at an end mark: tarfile itself takes a damaged header for the end, without a word."""
    stream.seek(shard.offset)
    block = stream.read(tarfile.BLOCKSIZE)
    return len(block) == tarfile.BLOCKSIZE and not any(block)


def _goes_on(stream: BinaryIO) -> bool:
    """Whether another archive follows the end mark, as ``cat`` puts several together."""
    while block := stream.read(1 << 20):
        if any(block):
            return b"ustar" in block
    return False


def _columns(extension: str, member: tarfile.TarInfo, shard: tarfile.TarFile) -> dict[str, object]:
    if member.size > MAX_MEMBER:
        return {extension: BadValueError(extension, f"holds {member.size} bytes, at most {MAX_MEMBER} are read")}
    stream = shard.extractfile(member)
    data = b"" if stream is None else stream.read()
    if len(data) != member.size:
        raise EOFError(f"{member.name} is cut short")
    if (name := picture_column(extension)) is not None:
        return {name: data}
    try:
        if extension.lower() == "json":
            content = decode(data)
            if isinstance(content, dict):
                return content
            raise ValueError("is not an object")
        text = data.decode("utf-8-sig").strip()
    except (ValueError, RecursionError) as error:
        # What is said in JSON could have been of any column.
        column = "" if extension.lower() == "json" else TEXTS.get(extension.lower(), extension)
        return {column: BadValueError(extension, f"of {short(member.name)} cannot be read ({said(error)})")}
    return {TEXTS.get(extension.lower(), extension): text}


def picture_column(extension: str) -> str | None:
    """The column of a picture, by the end of its file's name; None for what is no picture."""
    parts = [part for word in extension.lower().split(".") for part in word.split("_")]
    rest = [part for part in parts if part not in PICTURES]
    if len(rest) == len(parts):
        return None
    name = "_".join(part for part in rest if part != "image")
    return f"image_{name}" if name.isdigit() else name or "image"
