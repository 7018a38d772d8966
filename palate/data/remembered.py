"""What was read of a source, remembered: while its files are as they were, its pictures need not be read again."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from palate.base.files import spellings
from palate.data import formats
from palate.data.buckets import Fitted
from palate.data.cache import TensorCache
from palate.data.formats import DamagedError, File
from palate.data.items import Items
from palate.data.options import Reading
from palate.data.pairs import BadRow, Counts, Reader

WHOLE = ("parquet", "arrow", "tar")
"""Formats that hold the pictures themselves, as a rule."""
PICTURES = ("chosen", "rejected", "image_0", "image_1", "images", "image")


def signature(reader: Reader) -> str | None:
    """A digest of all that decides what a reader gives: its options, its rows, the size and times of its files of pictures.

    Of files that hold the pictures themselves their own size and times stand for the rows. None if it cannot be told: of a
    damaged file.
    """
    options = {option.name: getattr(reader.reading, option.name) for option in dataclasses.fields(Reading)}
    found = hashlib.sha256(json.dumps([options, sorted(reader.unseen.items())]).encode())
    for file in reader.files():
        if isinstance(file, DamagedError):
            return None
        found.update(f"\n{file.path.name} {file.format} {file.layout} ".encode())
        found.update(_state(file.path).encode() if file.format in WHOLE else b"")
        for line in () if file.format in WHOLE else _lines(file):
            found.update(line.encode(errors="surrogatepass"))
    return found.hexdigest()


def recall(cache: TensorCache, key: str, reader: Reader) -> tuple[Items[Any], Fitted] | None:
    """The items that were remembered under a key, what their pictures lost, and the reader's counts as they were; None if there
    are none."""
    found = cache.get(key)
    if found is None:
        return None
    counts = json.loads(found.pop("counts").numpy().tobytes())
    fitted = Fitted.of(counts.pop("fitted", {}))
    bad = [BadRow(*row) for row in counts.pop("bad")]
    reader.counts = Counts(**{**counts, "left_out": Counter(counts["left_out"]), "bad": bad})
    return Items(found), fitted


def remember(cache: TensorCache, key: str, items: Items[Any], fitted: Fitted, reader: Reader) -> None:
    """Keep what was read under a key, unless pictures were read that its signature does not tell of."""
    if not (reader.followed and any(isinstance(file, File) and file.format in WHOLE for file in reader.files())):
        # asdict() would count the entries of a Counter
        counts = json.dumps({**vars(reader.counts), "fitted": fitted.told()}).encode()
        cache.put(key, {**items.tensors, "counts": torch.tensor(np.frombuffer(counts, np.uint8))})
        cache.flush()


def _lines(file: File) -> Iterator[str]:
    for row in formats.rows(file):
        yield f"\n{row}" if isinstance(row, Exception) else f"\n{sorted(row.items(), key=str)}"
        for name in PICTURES if not isinstance(row, Exception) else ():
            yield from (_picture_state(file, value) for value in _texts(row.get(file.names[name])))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _picture_state(file: File, name: str) -> str:
    """Of the first file that a name may stand for; empty where there is none, or it is no name."""
    folders = [folder for folder in (file.home.folder, file.home.second) if folder is not None]
    states = (_state(folder / written) for written, folder in itertools.product(spellings(name), folders))
    return next(filter(None, states), "") if len(name) <= 1024 and "\0" not in name else ""


def _state(path: os.PathLike[str]) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f" {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
