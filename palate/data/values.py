"""Single values of a data file, checked: a value that cannot be used is told with its column, never replaced."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from palate.base import errors
from palate.base.files import spellings
from palate.base.options import LARGEST, SMALLEST
from palate.data.images import decode_usable

WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0, "t": 1.0, "f": 0.0, "y": 1.0, "n": 0.0}
"""As CSV files and sidecar files write truth."""
BASE64 = ("iVBORw0KGgo", "/9j/4", "UklGR", "R0lGOD")
"""How PNG, JPEG, WebP and GIF begin as text in base64."""
PACKED = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")

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


def truth(column: str, value: object) -> bool:
    """True or false, however the program that wrote the file writes it: ``True``, ``"false"``, ``0.0``, ``"1"``, ``no``."""
    if value is None or value == "":
        raise BadValueError(column, "is missing: expected true or false in every row, or no such column")
    written = value.strip().lower() if isinstance(value, str) else value
    try:
        found = float(WORDS.get(written, written) if isinstance(written, str) else written)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if found not in (0.0, 1.0):
        raise BadValueError(column, f"must be true or false, found {short(value)}")
    return found == 1.0


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
    if found and highest == math.inf and not SMALLEST <= found <= LARGEST:
        raise BadValueError(column, f"is {short(value)}, which float32 does not hold: 0, or {SMALLEST:g} to {LARGEST:g}")
    return found


def label(names: Mapping[str, str], row: Row, layout: tuple[str, ...]) -> float:
    """How probably the first picture of a pair is the better one."""
    if "chosen" in layout:
        return 1.0
    if "label" in layout:
        return number(names["label"], row.get(names["label"]), highest=1.0)
    if "best" in layout:
        best, *uids = (row.get(names[name]) for name in ("best", "uid_0", "uid_1"))
        if best is None or best == "":
            raise BadValueError(names["best"], "is missing: expected one of the pair's pictures, or 'tie'")
        if (isinstance(best, str) and best.strip().lower() in ("tie", "none")) or uids[0] == uids[1]:
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

    An equal rank counts half to both. In a ``ranking`` a picture without a rank (null) lies behind all that have one, and two
    such are no pair: so a vote for the best of several is written. The layout of ``rankings`` is that of HPD v2's annotations
    (arXiv 2306.09341).
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
        _ranks(column, ranks, len(images), what="rank" if kind != "scores" else "number", partly=kind == "ranking")
        for ranks in (given if kind == "rankings" else [given])
    ]
    if kind == "scores":  # higher is better
        rankings = [[-score for score in scores] for scores in rankings]
    votes = []
    for i, j in itertools.combinations(range(len(images)), 2):
        halves = sum(2 * (ranks[i] < ranks[j]) + (ranks[i] == ranks[j]) for ranks in rankings)
        if any(min(ranks[i], ranks[j]) < math.inf for ranks in rankings):
            votes.append((i, j, halves / (2 * len(rankings))))
    return votes


def _ranks(column: str, ranks: object, count: int, *, what: str, partly: bool) -> Sequence[float]:
    if not isinstance(ranks, list) or len(ranks) != count:
        raise BadValueError(column, f"each must hold one {what} for each of {count} images: {short(ranks)}")
    partly = partly and any(rank is not None for rank in ranks)
    return [math.inf if rank is None and partly else number(column, rank) for rank in ranks]


def picture(column: str, value: object, home: Home, check: Callable[[bytes], str]) -> bytes:
    """The bytes of a picture, of which ``check`` (:func:`defect`, say) tells why it cannot be used, or nothing."""
    if isinstance(value, dict):  # struct<bytes, path>
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "":
        raise BadValueError(column, "is missing")
    where = ""
    if isinstance(value, str):
        where, value = f"{short(value)} ", _read_inside(column, value, home)
    if not isinstance(value, bytes):
        raise BadValueError(column, f"must be a picture's bytes or path, found {short(value)}")
    if reason := check(value):
        raise BadValueError(column, where + reason)
    return value


def _read_inside(column: str, name: str, home: Home) -> bytes:
    """A file's bytes; a data file from outside must not make us read other files than its own."""
    if reason := no_path(name):
        raise BadValueError(column, f"holds {short(name, 40)}, {reason}")
    if Path(name).is_absolute() or re.match(r"[A-Za-z]:[\\/]", name):
        raise BadValueError(column, _absolute(name, home))
    try:
        for written in spellings(name):
            for folder in (home.folder, home.second):
                if folder is not None and (path := folder / written).is_file():
                    if not path.resolve().is_relative_to(home.root.resolve()):
                        raise BadValueError(column, _outside(name, path))
                    return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise BadValueError(column, f"{short(name)} cannot be read ({errors.said(error, 60)})") from None
    raise BadValueError(column, _missing(name, home))


def no_path(value: str) -> str:
    """Why a text names no file, where it tells so itself."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value):
        return "an address: download the pictures, and name the files"
    if "\0" in value:
        return "which cannot be read: it has a null character"
    if value.startswith(("data:", *BASE64)) or (len(value) > 200 and re.fullmatch(r"[A-Za-z0-9+/_=\s-]+", value)):
        return "which looks like a picture in base64: decode it, and save it as a file or as bytes in parquet"
    if len(value) > 1024:
        return f"a text of {len(value)} characters: expected the path of a picture"
    return ""


def _absolute(name: str, home: Home) -> str:
    if not Path(name).is_relative_to(home.folder.absolute()):
        return f"{short(name)} leads outside the folder of the file (an absolute path); paths must be relative and stay inside"
    inside = short(str(Path(name).relative_to(home.folder.absolute())))
    return f"{short(name)} is an absolute path; paths must be relative to the folder of the file: write {inside}"


def _leads_out(name: str) -> bool:
    """Whether ``..`` in a relative path leads above where it begins."""
    return os.path.normpath(name.replace("\\", "/")).startswith("..")


def _outside(name: str, path: Path) -> str:
    if _leads_out(name):
        return f"{short(name)} leads outside the folder of the file; paths must be relative and stay inside"
    if path.is_symlink():
        return f"{short(name)} is a link that leads outside the folder of the file: copy the picture there (cp -L)"
    return f"{short(name)} lies in a linked folder that leads outside the folder of the file: copy it there (cp -rL)"


def _missing(name: str, home: Home) -> str:
    if _leads_out(name):
        return f"{short(name)} leads outside the folder of the file; paths must be relative and stay inside"
    if (home.folder / name).is_dir():
        return f"{short(name)} is a folder; expected the path of a picture"
    if (link := home.folder / name).is_symlink():
        return f"{short(name)} is a link to {short(str(link.readlink()))}, which does not exist"
    if packed := _packed(home.folder):
        return f"{short(name)} does not exist; {short(packed, 40)} beside it may hold it: {unpack(packed)}"
    return f"{short(name)} does not exist (paths are relative to {home.folder})"


@lru_cache(maxsize=8)
def _packed(folder: Path) -> str:
    """The first archive in a folder; once a folder, which may hold a million pictures."""
    return min((p.name for p in folder.iterdir() if p.name.lower().endswith(PACKED)), default="") if folder.is_dir() else ""


def unpack(name: str) -> str:
    """The command that unpacks an archive of that name where it lies."""
    known = {".zip": "unzip", ".7z": "7z x", ".rar": "unrar x"}
    return f"unpack it ({next((c for end, c in known.items() if name.lower().endswith(end)), 'tar xf')} {short(name, 40)})"


@lru_cache(maxsize=16)
def defect(data: bytes) -> str:
    """Why a picture cannot be used, or nothing. Neighbouring rows often show the same picture: it is decoded once."""
    try:
        decode_usable(data)
    except ValueError as error:
        return str(error)
    return ""


def short(value: object, most: int = 60) -> str:
    """A value, or its beginning."""
    return errors.short(value, most)
