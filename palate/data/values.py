"""Single values of a data file, checked: a value that cannot be used is told with its column, never replaced."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from palate.data.images import decode

WORDS = {"true": 1.0, "false": 0.0}  # as CSV files and sidecar files write truth


Row = Mapping[str, object]
"""A row of a file by column; its values are what the file holds, and not checked yet."""


class BadValueError(Exception):
    """A value, line or file that cannot be used, and why."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(column, reason)
        self.column, self.reason = column, reason


class Home(NamedTuple):
    """Where the pictures of a data file lie."""

    folder: Path  # paths are relative to it
    root: Path  # and never lead out of this one
    second: Path | None = None  # tried for names that the first has not: HPD's train.json names pictures of train/


def prompt(column: str, value: object) -> str:
    """A prompt that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise BadValueError(column, f"must be a non-empty string, found {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadValueError(column, "is not valid Unicode (a lone surrogate)") from None
    return value


def number(column: str, value: object, *, default: float | None = None, highest: float = math.inf) -> float:
    """A finite number of 0 or more; ``default`` where there is none."""
    if value is None or value == "":
        if default is None:
            raise BadValueError(column, "is missing")
        return default
    limit = "0 or more" if highest == math.inf else f"in [0, {highest:g}]"
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower(), value)
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise BadValueError(column, f"must be a number {limit}, found {short(value)}") from None
    if not math.isfinite(found) or not 0 <= found <= highest:
        raise BadValueError(column, f"must be a number {limit}, found {short(value)}")
    return found


def label(names: Mapping[str, str], row: Row, layout: tuple[str, ...]) -> float:
    """How probably the first picture of a pair is the better one."""
    if "chosen" in layout:
        return 1.0
    if "label" in layout:
        return number(names["label"], row.get(names["label"]), highest=1.0)
    if "best" in layout:
        best, *uids = (row.get(names[name]) for name in ("best", "uid_0", "uid_1"))
        if best in ("tie", "none", "", None) or uids[0] == uids[1]:
            return 0.5
        if best not in uids:
            raise BadValueError(names["best"], f"must be one of the pair's pictures or 'tie', found {short(best)}")
        return float(best == uids[0])
    label_0, label_1 = (number(names[name], row.get(names[name]), highest=1.0) for name in ("label_0", "label_1"))
    if abs(label_0 + label_1 - 1) > 1e-6:
        raise BadValueError(names["label_1"], f"label_0 + label_1 must be 1, found {label_0:g} + {label_1:g}")
    return label_0


def comparisons(names: Mapping[str, str], row: Row, layout: tuple[str, ...]) -> list[tuple[int, int, float]]:
    """All pairs i < j of several pictures, with the share of raters who put i first: exactly 0.5 is a tie.

    An equal rank counts half to both. The layout of ``rankings`` is that of HPD v2's annotations (arXiv 2306.09341).
    """
    images = row.get(names["images"])
    if not isinstance(images, list) or len(images) < 2:
        raise BadValueError(names["images"], f"must be a list of two or more pictures, found {short(images)}")
    kind = next(name for name in ("rankings", "ranking", "scores") if name in layout)
    column, given = names[kind], row.get(names[kind])
    if not isinstance(given, list) or not given:
        what = "rankings" if kind == "rankings" else "numbers"
        raise BadValueError(column, f"must be a list of {what}, found {short(given)}")
    rankings = [
        _ranks(column, ranks, len(images), what="rank" if kind != "scores" else "number")
        for ranks in (given if kind == "rankings" else [given])
    ]
    if kind == "scores":  # higher is better
        rankings = [[-score for score in scores] for scores in rankings]
    votes = []
    for i, j in itertools.combinations(range(len(images)), 2):
        halves = sum(2 * (ranks[i] < ranks[j]) + (ranks[i] == ranks[j]) for ranks in rankings)
        votes.append((i, j, halves / (2 * len(rankings))))
    return votes


def _ranks(column: str, ranks: object, count: int, *, what: str) -> Sequence[float]:
    if not isinstance(ranks, list) or len(ranks) != count:
        raise BadValueError(column, f"each must hold one {what} for each of {count} images: {short(ranks)}")
    return [number(column, rank) for rank in ranks]


def picture(column: str, value: object, home: Home, *, look: bool = True) -> bytes:
    """The bytes of a picture; with ``look`` it is decoded to the end."""
    if isinstance(value, dict):  # struct<bytes, path>
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "":
        raise BadValueError(column, "is missing")
    where = ""
    if isinstance(value, str):
        where, value = f"{value!r} ", _read_inside(column, value, home)
    if not isinstance(value, bytes):
        raise BadValueError(column, f"must be a picture's bytes or path, found {short(value)}")
    if look and (reason := _defect(value)):
        raise BadValueError(column, where + reason)
    return value


def _read_inside(column: str, name: str, home: Home) -> bytes:
    """A file's bytes; a data file from outside must not make us read other files than its own."""
    inside = True
    try:
        for folder in (home.folder, home.second):
            if folder is not None and inside:
                path = (folder / name).resolve()
                inside = not Path(name).is_absolute() and path.is_relative_to(home.root.resolve())
                if inside and path.is_file():
                    return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise BadValueError(column, f"{name!r} cannot be read ({error})") from None
    if not inside:
        raise BadValueError(column, f"{name!r} leads outside the folder of the file; paths must be relative and stay inside")
    raise BadValueError(column, f"{name!r} does not exist (paths are relative to {home.folder})")


@lru_cache(maxsize=16)
def _defect(data: bytes) -> str:
    """Why a picture cannot be used, or nothing. Neighbouring rows often show the same picture: it is decoded once."""
    try:
        decode(data)
    except ValueError as error:
        return str(error)
    return ""


def short(value: object) -> str:
    """A value, or its beginning."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
