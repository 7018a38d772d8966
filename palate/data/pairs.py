"""Preference pairs: one noun, and one streaming reader for the files people keep them in."""

from __future__ import annotations

import csv
import glob
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from palate.data import votes
from palate.data.images import decode
from palate.errors import UserError, nearest

FOLDER_FILES = ("metadata.jsonl", "metadata.csv", "rankings.jsonl")
# Our name of a column, and the names it has in files. Pick-a-Pic v2: caption, jpg_0, jpg_1; imagefolder: *_file_name.
COLUMNS = {
    "prompt": ("prompt", "caption"),
    "chosen": ("chosen", "chosen_file_name"),
    "rejected": ("rejected", "rejected_file_name"),
    "image_0": ("image_0", "jpg_0"),
    "image_1": ("image_1", "jpg_1"),
    "label": ("label",),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "has_label": ("has_label",),
    "images": ("images",),
    "rankings": ("rankings",),
    "weight": ("weight",),
    "rater": ("rater",),
}
LAYOUTS = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "image_0", "image_1", "label"),
    ("prompt", "image_0", "image_1", "label_0", "label_1"),
    ("prompt", "images", "rankings"),
)
# After the row that is one too many, how far to look for others to tell about.
LISTED, LOOKAHEAD = 5, 1000


@dataclass(frozen=True)
class PreferencePair:
    """One vote: a prompt, two encoded pictures, and how probably the first is the better one."""

    prompt: str
    image_0: bytes
    image_1: bytes
    label: float  # probability that image_0 is the better one; 0.5 = tie
    weight: float = 1.0
    source: str = ""  # "file, row 17"
    rater: str = ""


class BadRow(NamedTuple):
    """A row that cannot be used; rows are counted from 1, without the header and blank lines, in each file anew."""

    row: int
    column: str
    reason: str
    file: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}, column {self.column}: {self.reason}"


@dataclass
class Counts:
    """What a reader has met so far. A row of rankings gives several pairs; all other rows give one."""

    rows: int = 0
    pairs: int = 0
    ties_dropped: int = 0
    ties_kept: int = 0
    unlabelled: int = 0  # rows of Pick-a-Pic with has_label = False
    bad: list[BadRow] = field(default_factory=list)


class _BadValueError(Exception):
    def __init__(self, column: str, reason: str) -> None:
        super().__init__(column, reason)
        self.column, self.reason = column, reason


@dataclass(frozen=True)
class _File:
    path: Path
    format: str  # "parquet" | "jsonl" | "csv" | "votes"
    names: dict[str, str]  # our name -> column of the file
    layout: tuple[str, ...]
    votes: Mapping[str, str]  # how a database of votes is read


class PairReader:
    """The pairs of a source as an iterable that may be iterated again; made by ``read_pairs``.

    Memory does not grow with the source: rows are read in small batches and forgotten (of parquet, a page of each column at
    a time, which holds up to 1024 rows as most writers set it). ``counts`` belongs to the latest iteration and is complete
    when that has ended.
    """

    def __init__(
        self, source: str, files: list[_File], keep_ties: bool, max_bad_rows: int, max_train_samples: int | None
    ) -> None:
        self.source, self.files, self.keep_ties = source, files, keep_ties
        self.max_bad_rows, self.max_train_samples = max_bad_rows, max_train_samples
        self.counts = Counts()

    def __iter__(self) -> Iterator[PreferencePair]:
        self.counts = counts = Counts()
        rows = ((file, number, row) for file in self.files for number, row in enumerate(_rows(file), start=1))
        for file, number, row in rows:
            for pair in self._read(file, number, row):
                counts.pairs += 1
                counts.ties_kept += pair.label == 0.5
                yield pair
                if counts.pairs == self.max_train_samples:
                    return
            if len(counts.bad) > self.max_bad_rows:
                for later in itertools.islice(rows, LOOKAHEAD):
                    self._read(*later)
                    if len(counts.bad) >= self.max_bad_rows + LISTED:
                        break
                raise self._too_many_bad_rows()
        if not counts.pairs:
            raise self._nothing()

    def _read(self, file: _File, number: int, row: Any) -> list[PreferencePair]:
        """The pairs of one row; counts the row, and what it lacks."""
        self.counts.rows += 1
        try:
            if isinstance(row, _BadValueError):
                raise row
            if row.get(file.names["has_label"]) is False:
                self.counts.unlabelled += 1
                return []
            return self._pairs(file, number, row)
        except _BadValueError as bad:
            self.counts.bad.append(BadRow(number, bad.column, bad.reason, file.path.name))
            return []

    def _pairs(self, file: _File, number: int, row: Mapping[str, Any]) -> list[PreferencePair]:
        names, folder = file.names, file.path.parent
        prompt = _prompt(names["prompt"], row.get(names["prompt"]))
        weight = _number(names["weight"], row.get(names["weight"]), default=1.0)
        rater = row.get(names["rater"])
        shared = {
            "prompt": prompt,
            "weight": weight,
            "source": f"{file.path.name}, row {number}",
            "rater": "" if rater is None else str(rater),
        }
        if "rankings" in file.layout:
            votes = _rankings(names, row)
            # All pictures are read even if only ties show them: a row is good or bad as a whole.
            pictures = [_picture(names["images"], image, folder) for image in row[names["images"]]]
            kept = [vote for vote in votes if self.keep_ties or vote[2] != 0.5]
            pairs = [PreferencePair(image_0=pictures[i], image_1=pictures[j], label=p, **shared) for i, j, p in kept]
            self.counts.ties_dropped += len(votes) - len(kept)
            return pairs
        chosen = "chosen" in file.layout
        label = 1.0 if chosen else _label(names, row, file.layout)
        if label == 0.5 and not self.keep_ties:
            self.counts.ties_dropped += 1
            return []
        columns = [names[name] for name in (("chosen", "rejected") if chosen else ("image_0", "image_1"))]
        image_0, image_1 = (_picture(column, row.get(column), folder) for column in columns)
        return [PreferencePair(image_0=image_0, image_1=image_1, label=label, **shared)]

    def _too_many_bad_rows(self) -> UserError:
        bad = self.counts.bad
        listed = "; ".join(str(row) for row in bad[:LISTED])
        return UserError(
            f"at least {len(bad)} bad rows in {self.source}, but max_bad_rows is {self.max_bad_rows}: {listed}"
            f"{'; ...' if len(bad) > LISTED else ''}. Repair them, or set max_bad_rows to skip that many"
        )

    def _nothing(self) -> UserError:
        counts = self.counts
        if counts.ties_dropped:
            return UserError(f"{self.source} has only ties ({counts.ties_dropped} pairs): keep them as half with ties: keep")
        met = f"{counts.rows} rows, {counts.unlabelled} without a label, {len(counts.bad)} bad"
        first = f"; the first bad one: {counts.bad[0]}" if counts.bad else ""
        return UserError(f"{self.source} is empty: no preference pairs ({met}{first}). Check that it is the file you meant")


def read_pairs(
    source: str | Path,
    *,
    ties: str = "drop",
    max_bad_rows: int = 0,
    max_train_samples: int | None = None,
    columns: Mapping[str, str] | None = None,
    vote_question: str = "overall",
    vote_weights: str = "equal",
) -> PairReader:
    """A streaming reader of preference pairs; formats are recognised by content and columns.

    ``source`` is a parquet, JSONL or CSV file, a folder or glob of parquet files (all
    of them, by name), or a folder with ``metadata.jsonl``,
    ``metadata.csv`` or ``rankings.jsonl``. Columns, besides the optional ``weight`` and ``rater``:

    - Pick-a-Pic v2: ``caption, jpg_0, jpg_1, label_0, label_1`` (labels 0, 0.5, 1; rows with ``has_label`` False are skipped)
    - ``prompt, chosen, rejected`` (or ``chosen_file_name, rejected_file_name``)
    - ``prompt, image_0, image_1, label`` (probability that ``image_0`` is the better one; 0.5 is a tie)
    - ``prompt, images, rankings`` (see ``pairs_from_rankings``)
    - or the ``votes.db`` of ``palate vote``: the votes on ``vote_question``, weighted by ``vote_weights`` (see ``vote_rows``)

    Pictures are bytes, ``struct<bytes, path>``, or paths relative to the file that do not leave its folder. ``columns`` maps
    names of this list to those in the file. Ties are dropped and counted unless ``ties="keep"``; a dropped tie's pictures
    are not looked at. Every other row is checked, pictures decoded to the end; up to ``max_bad_rows`` bad rows are skipped
    and listed in ``counts.bad``, never replaced. ``max_train_samples`` ends the stream after that many pairs.

    Raises ``UserError`` at once for a source that is missing, empty or lacks a column; while iterating for too many bad
    rows, and at the end if there was no pair.
    """
    if ties not in ("drop", "keep"):
        raise UserError(f"ties is {ties!r}{nearest(ties, ('drop', 'keep'))}")
    if max_bad_rows < 0:
        raise UserError(f"max_bad_rows is {max_bad_rows}, but it must be 0 or more")
    if max_train_samples is not None and max_train_samples < 1:
        raise UserError(f"max_train_samples is {max_train_samples}, but it must be 1 or more (leave it out to read all)")
    mapping = _own_names(columns or {})
    voting = {"question": vote_question, "weights": vote_weights}
    files = [_open(path, mapping, voting) for path in _find(source)]
    if vote_weights != "equal" and not any(file.format == "votes" for file in files):
        raise UserError(f"vote_weights is {vote_weights!r}, but {source} holds no votes of palate vote: leave it out")
    return PairReader(str(source), files, ties == "keep", max_bad_rows, max_train_samples)


def pairs_from_rankings(jsonl: str | Path) -> Iterator[PreferencePair]:
    """All pairs of pictures that several people ranked: rows of ``prompt``, ``images`` (n paths), ``rankings``.

    Each ranking is a list of n ranks in the order of ``images``, 1 = best. Of every pair i < j, ``label`` is the share of
    annotators who rank i before j (an equal rank counts half to both), so exactly 0.5 is a tie; ties are kept. The layout
    is that of HPD v2's annotations (Wu et al. 2023, arXiv:2306.09341). Raises ``UserError`` for any bad row.
    """
    reader = read_pairs(jsonl, ties="keep")
    if any("rankings" not in file.layout for file in reader.files):
        raise UserError(f"{jsonl} has no rankings: expected the columns prompt, images, rankings; use read_pairs for votes")
    return iter(reader)


def _own_names(columns: Mapping[str, str]) -> dict[str, str]:
    """The user's mapping with Pick-a-Pic's and imagefolder's names replaced by ours."""
    ours = {alias: name for name, aliases in COLUMNS.items() for alias in aliases}
    for name in columns:
        if name not in ours:
            raise UserError(f"columns: unknown name {name!r} on the left{nearest(name, ours)}")
    return {ours[name]: column for name, column in columns.items()}


def _find(source: str | Path) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        known = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        found = known[:1] or sorted(path.rglob("*.parquet"))
        if not found:
            raise UserError(f"folder {path} has no preference pairs: expected {', '.join(FOLDER_FILES)} or *.parquet in it")
        return found
    found = sorted(Path(name) for name in glob.glob(str(source), recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"{source} does not exist: expected a parquet, JSONL or CSV file of preference pairs, or a folder")
    return found


def _open(path: Path, mapping: Mapping[str, str], voting: Mapping[str, str]) -> _File:
    """Recognise format and layout; the columns are checked before a single picture is read."""
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise UserError(f"{path} is empty: expected preference pairs as parquet, JSONL or CSV")
    if head.startswith(votes.HEAD):
        next(votes.vote_rows(path, **voting), None)  # refuses what is no database of votes
        present, file_format = list(votes.COLUMNS), "votes"
    elif head.startswith(b"PAR1"):
        present = _parquet_columns(path)
        file_format = "parquet"
    elif text.startswith(b"{"):
        first = next((row for row in _json_rows(path) if isinstance(row, dict)), None)
        if first is None:
            raise UserError(f"{path}: no line is a JSON object; expected JSONL, one object a line")
        present, file_format = list(first), "jsonl"
    elif text.startswith(b"["):
        raise UserError(f"{path} is a JSON list: expected JSONL, one object a line")
    else:
        present, file_format = _csv_header(path), "csv"
    names = _resolve(path, present, mapping)
    return _File(path, file_format, names, _layout(path, present, names), voting)


def _resolve(path: Path, present: list[str], mapping: Mapping[str, str]) -> dict[str, str]:
    for ours, theirs in mapping.items():
        if theirs not in present:
            raise UserError(f"{path}: columns maps {ours!r} to {theirs!r}, which is missing{nearest(theirs, present)}")
    return {
        name: mapping.get(name) or next((alias for alias in aliases if alias in present), name)
        for name, aliases in COLUMNS.items()
    }


def _layout(path: Path, present: list[str], names: Mapping[str, str]) -> tuple[str, ...]:
    missing = {layout: [name for name in layout if names[name] not in present] for layout in LAYOUTS}
    for layout, lacks in missing.items():
        if not lacks:
            return layout
    # Tell what the layout lacks of which most is there; a mere prompt tells nothing about the pictures' columns.
    closest = min(LAYOUTS, key=lambda layout: len(missing[layout]) / len(layout))
    name = missing[closest][0]
    raise UserError(
        f"{path}: column {' or '.join(map(repr, COLUMNS[name]))} is missing{nearest(name, present)}; expected "
        f"{', '.join(closest)}; if it has another name, say so with columns: {{{name}: ITS NAME}}"
    )


def _rows(file: _File) -> Iterator[Any]:
    if file.format == "parquet":
        return _parquet_rows(file)
    if file.format == "votes":
        return votes.vote_rows(file.path, **file.votes)
    return _json_rows(file.path) if file.format == "jsonl" else _csv_rows(file.path)


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a complete parquet file ({error}): copy or download it again") from None


def _parquet_rows(file: _File) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By default a whole row group is read ahead, which may be gigabytes of pictures.
        with pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as table:
            wanted = [name for name in table.schema_arrow.names if name in file.names.values()]
            for batch in table.iter_batches(batch_size=16, columns=wanted, use_threads=False):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.path} is damaged ({error}): copy or download it again") from None


def _json_rows(path: Path) -> Iterator[Any]:
    # Lines of bytes: a line that is not UTF-8 is then one bad row, not the end of the file.
    with path.open("rb") as stream:
        for line in stream:
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield _BadValueError("(whole line)", f"is not JSON ({error})")
            else:
                yield row if isinstance(row, dict) else _BadValueError("(whole line)", "is not a JSON object")


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from csv.DictReader(stream)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is neither parquet nor JSONL, and cannot be read as CSV in UTF-8 ({error})") from None


def _csv_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream).fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is neither parquet nor JSONL, and cannot be read as CSV in UTF-8 ({error})") from None


def _prompt(column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _BadValueError(column, f"must be a non-empty string, found {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadValueError(column, "is not valid Unicode (a lone surrogate)") from None
    return value


def _number(column: str, value: Any, *, default: float | None = None, highest: float = math.inf) -> float:
    if value is None or value == "":
        if default is None:
            raise _BadValueError(column, "is missing")
        return default
    limit = "0 or more" if highest == math.inf else f"in [0, {highest:g}]"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _BadValueError(column, f"must be a number {limit}, found {_short(value)}") from None
    if not math.isfinite(number) or not 0 <= number <= highest:
        raise _BadValueError(column, f"must be a number {limit}, found {_short(value)}")
    return number


def _label(names: Mapping[str, str], row: Mapping[str, Any], layout: tuple[str, ...]) -> float:
    if "label" in layout:
        return _number(names["label"], row.get(names["label"]), highest=1.0)
    label_0, label_1 = (_number(names[name], row.get(names[name]), highest=1.0) for name in ("label_0", "label_1"))
    if abs(label_0 + label_1 - 1) > 1e-6:
        raise _BadValueError(names["label_1"], f"label_0 + label_1 must be 1, found {label_0:g} + {label_1:g}")
    return label_0


def _rankings(names: Mapping[str, str], row: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    images, rankings = row.get(names["images"]), row.get(names["rankings"])
    if not isinstance(images, list) or len(images) < 2:
        raise _BadValueError(names["images"], f"must be a list of two or more pictures, found {_short(images)}")
    if not isinstance(rankings, list) or not rankings:
        raise _BadValueError(names["rankings"], f"must be a list of rankings, found {_short(rankings)}")
    for ranks in rankings:
        if not isinstance(ranks, list) or len(ranks) != len(images):
            raise _BadValueError(
                names["rankings"], f"each must hold one rank for each of {len(images)} images: {_short(ranks)}"
            )
        for rank in ranks:
            _number(names["rankings"], rank)
    votes = []
    for i, j in itertools.combinations(range(len(images)), 2):
        halves = sum(2 * (ranks[i] < ranks[j]) + (ranks[i] == ranks[j]) for ranks in rankings)
        votes.append((i, j, halves / (2 * len(rankings))))
    return votes


def _picture(column: str, value: Any, folder: Path) -> bytes:
    """The bytes of a picture that decodes."""
    if isinstance(value, dict):  # struct<bytes, path>
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "":
        raise _BadValueError(column, "is missing")
    where = ""
    if isinstance(value, str):
        where, value = f"{value!r} ", _read_inside(column, value, folder)
    if not isinstance(value, bytes):
        raise _BadValueError(column, f"must be a picture's bytes or path, found {_short(value)}")
    if reason := _defect(value):
        raise _BadValueError(column, where + reason)
    return value


def _read_inside(column: str, name: str, folder: Path) -> bytes:
    """A file's bytes; a data file from outside must not make us read other files than its own."""
    try:
        path = (folder / name).resolve()
        inside = not Path(name).is_absolute() and path.is_relative_to(folder.resolve())
        if inside and path.is_file():
            return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise _BadValueError(column, f"{name!r} cannot be read ({error})") from None
    if not inside:
        raise _BadValueError(column, f"{name!r} leads outside the folder of the file; paths must be relative and stay inside")
    raise _BadValueError(column, f"{name!r} does not exist (paths are relative to {folder})")


@lru_cache(maxsize=16)
def _defect(data: bytes) -> str:
    """Why a picture cannot be used, or nothing. Neighbouring rows often show the same picture: it is decoded once."""
    try:
        decode(data)
    except ValueError as error:
        return str(error)
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
