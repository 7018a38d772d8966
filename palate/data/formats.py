"""Files of preferences: where they are, what they are, and their rows by column."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.base import hub
from palate.base.errors import UserError, nearest
from palate.base.jsonl import decode
from palate.data import shards, votes
from palate.data.values import BadValueError, Home, Row

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER_FILES = ("metadata.jsonl", "metadata.csv", "rankings.jsonl")
ENDINGS = (".parquet", ".tar")
EXPECTED = "parquet, JSONL, JSON, CSV or tar"
# Our name of a column, and the names it has in files. Pick-a-Pic: caption, jpg_0, jpg_1; imagefolder: *file_name, text;
# HPD v2: file_path or image_path, human_preference, rank; ImageReward: generations, ranking, or image_path, rank.
COLUMNS = {
    "prompt": ("prompt", "caption", "text"),
    "chosen": ("chosen", "chosen_file_name"),
    "rejected": ("rejected", "rejected_file_name"),
    "image_0": ("image_0", "jpg_0"),
    "image_1": ("image_1", "jpg_1"),
    "label": ("label", "liked"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "best": ("best_image_uid",),
    "uid_0": ("image_0_uid",),
    "uid_1": ("image_1_uid",),
    "has_label": ("has_label",),
    "are_different": ("are_different",),
    "images": ("images", "file_names", "image_path", "file_path", "generations"),
    "rankings": ("rankings",),
    "ranking": ("ranking", "rank"),
    "scores": ("scores", "labels", "human_preference"),
    "prompt_id": ("prompt_id",),
    "image": ("image", "file_name"),
    "weight": ("weight",),
    "rater": ("rater",),
}
LAYOUTS = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "image_0", "image_1", "label"),
    ("prompt", "image_0", "image_1", "label_0", "label_1"),
    ("prompt", "image_0", "image_1", "best", "uid_0", "uid_1"),
    ("prompt", "images", "rankings"),
    ("prompt", "prompt_id", "images", "ranking"),  # one row a picture; the rows of a prompt follow one another
    ("prompt", "images", "ranking"),
    ("prompt", "images", "scores"),
    ("prompt", "image", "label"),
    ("prompt", "image"),
)
# Whose values tell of a row without being read here.
APART = ("best", "uid_0", "uid_1", "prompt_id")
CHUNK, MAX_OBJECT = 1 << 16, 1 << 24


class DamagedError(UserError):
    """A file that is cut short or garbled, of which others of the same source say nothing."""


@dataclass(frozen=True)
class File:
    """A file that was recognised."""

    path: Path
    format: str  # "parquet" | "jsonl" | "json" | "csv" | "votes" | "tar" | "captions"
    names: dict[str, str]  # our name -> column of the file
    layout: tuple[str, ...]
    home: Home
    votes: Mapping[str, str]  # how a database of votes is read

    @property
    def single(self) -> bool:
        """Whether a row shows one picture instead of a pair or more."""
        return "image" in self.layout


@dataclass(frozen=True)
class Place:
    """Where a file lies: on this machine, or in a data set of the hub, from where it is fetched when it is read."""

    path: Path
    repo: str | None = None

    @property
    def remote(self) -> bool:
        return self.repo is not None

    def local(self) -> Path:
        if self.repo is None:
            return self.path
        return hub.fetch(self.repo, self.path.as_posix(), kind="dataset", otherwise=f"{self.path} holds the next pairs")


# Finding ---------------------------------------------------------------------------------------------------------------


def find(source: str | Path) -> list[Place]:
    """The files of a source, by name. Raises ``UserError`` if there are none."""
    path = Path(source)
    if path.is_file():
        return [Place(path)]
    if path.is_dir():
        known = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        found = known[:1] or sorted(p for ending in ENDINGS for p in path.rglob(f"*{ending}"))
        if not found:
            found = sorted(p for name in FOLDER_FILES for p in path.glob(f"*/{name}"))
            if len(found) > 1:
                listed = ", ".join(str(p.parent) for p in found[:5])
                raise UserError(f"folder {path} holds several sets of pictures; name one of them: {listed}")
        if not found and next(_captioned(path), None) is not None:
            found = [path]
        if not found:
            raise UserError(
                f"folder {path} has no preference pairs: expected {', '.join(FOLDER_FILES)}, *.parquet, *.tar, or pictures "
                "with a .txt beside each"
            )
        return [Place(p) for p in found]
    found = sorted(Path(name) for name in glob.glob(str(source), recursive=True) if Path(name).is_file())
    if found:
        return [Place(p) for p in found]
    name, _, split = str(source).partition(":")
    if hub.is_hub_id(name) and Path(name).suffix not in (*ENDINGS, ".jsonl", ".json", ".csv", ".db"):
        return _find_on_hub(name, split)
    raise UserError(f"{source} does not exist: expected a {EXPECTED} file of preference pairs, or a folder")


def _find_on_hub(repo: str, split: str) -> list[Place]:
    """The files of a data set: of one split where their names tell of several, ``train`` unless another is named."""
    otherwise = f"If you meant a folder, {repo} does not exist; if a data set, name it as its page does, and log in if it asks"
    names = hub.files(repo, kind="dataset", otherwise=otherwise)
    if any(name in FOLDER_FILES for name in names):
        # Pictures as files of their own: all are fetched.
        return find(hub.snapshot(repo, ["*"], kind="dataset", otherwise=otherwise))
    described = sorted(name for name in names if Path(name).name in FOLDER_FILES)
    found = sorted(name for name in names if name.endswith(ENDINGS)) or described
    if not found:
        raise UserError(
            f"the data set {repo} holds no *.parquet, *.tar or metadata.jsonl; its own scripts are never run: download it, and "
            "name a file"
        )
    of_split = [name for name in found if (split or "train") in re.split(r"[^A-Za-z0-9]+", name)]
    if split and not of_split:
        raise UserError(f"the data set {repo} has no files of a split {split!r}: it holds {', '.join(found[:5])}")
    chosen = of_split or found
    if found is described:
        folder = hub.snapshot(
            repo, [f"{Path(name).parent.as_posix()}/*" for name in chosen], kind="dataset", otherwise=otherwise
        )
        return [Place(folder / name) for name in chosen]
    return [Place(Path(name), repo) for name in chosen]


def _captioned(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Pictures with a text of the same name beside them, by name."""
    for text in sorted(folder.rglob("*.txt")):
        for ending in shards.PICTURES:
            if (picture := text.with_suffix(f".{ending}")).is_file():
                yield picture, text
                break


# Recognising -----------------------------------------------------------------------------------------------------------


def open_file(place: Place, mapping: Mapping[str, str], voting: Mapping[str, str]) -> File:
    """Recognise format and layout; the columns are checked before a single picture is read."""
    path = place.local()
    if path.is_dir():
        names = {name: aliases[0] for name, aliases in COLUMNS.items()}
        return File(path, "captions", names, ("prompt", "image"), Home(path, path), voting)
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise DamagedError(f"{path} is empty: expected preference pairs as {EXPECTED}")
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is compressed: unpack it with gunzip first")
    if head.startswith(votes.HEAD):
        next(votes.vote_rows(path, **voting), None)  # refuses what is no database of votes
        present, file_format = list(votes.COLUMNS), "votes"
    elif head.startswith(b"PAR1"):
        present, file_format = _parquet_columns(path), "parquet"
    else:
        present, file_format = _first_columns(path, head, text)
    names = _resolve(path, present, mapping)
    home = Home(path.parent, _root(path), path.parent / path.stem)
    return File(path, file_format, names, _layout(path, present, names), home, voting)


def _root(path: Path) -> Path:
    """The folder that a file's pictures may not leave; in the hub's cache they are links to bytes beside the snapshots."""
    above = (p.parent for p in path.parents if p.name == "snapshots" and p.parent.name.startswith("datasets--"))
    return next(above, path.parent)


def _first_columns(path: Path, head: bytes, text: bytes) -> tuple[list[str], str]:
    """Columns and format of what is told by its first row."""
    if shards.is_tar(head):
        file_format, rows, what = "tar", shards.sample_rows(path), "sample could be read; expected a webdataset shard"
    elif text.startswith(b"{"):
        file_format, rows, what = "jsonl", _json_rows(path), "line is a JSON object; expected JSONL, one object a line"
    elif text.startswith(b"["):
        file_format, rows, what = "json", _list_rows(path), "entry is a JSON object; expected a list of objects"
    else:
        return _csv_header(path), "csv"
    first = next((row for row in rows if isinstance(row, dict)), None)
    if first is None:
        raise DamagedError(f"{path}: no {what}")
    return list(first), file_format


def own_names(columns: Mapping[str, str]) -> dict[str, str]:
    """The user's mapping with the names that other layouts have replaced by ours."""
    ours = {alias: name for name, aliases in COLUMNS.items() for alias in aliases}
    for name in columns:
        if name not in ours:
            raise UserError(f"columns: unknown name {name!r} on the left{nearest(name, ours)}")
    return {ours[name]: column for name, column in columns.items()}


def _resolve(path: Path, present: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    for ours, theirs in mapping.items():
        if theirs not in present:
            raise UserError(f"{path}: columns maps {ours!r} to {theirs!r}, which is missing{nearest(theirs, present)}")
    return {
        name: mapping.get(name) or next((alias for alias in aliases if alias in present), name)
        for name, aliases in COLUMNS.items()
    }


def _layout(path: Path, present: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
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


# Rows ------------------------------------------------------------------------------------------------------------------


def rows(file: File, *, everything: bool = False) -> Iterator[Row | BadValueError]:
    """The rows of a file by column; a ``BadValueError`` in the place of what cannot be read.

    Of parquet only the columns that are known to :data:`COLUMNS`, or with ``everything`` also those of plain values.
    """
    kinds = {
        "parquet": lambda file: _parquet_rows(file, everything),
        "votes": lambda file: votes.vote_rows(file.path, **file.votes),
        "captions": lambda file: _caption_rows(file.path),
        "tar": lambda file: shards.sample_rows(file.path),
        "jsonl": lambda file: _json_rows(file.path),
        "json": lambda file: _list_rows(file.path),
        "csv": lambda file: _csv_rows(file.path),
    }
    found = kinds[file.format](file)
    return _grouped(found, file.names) if "prompt_id" in file.layout else found


def others(file: File, row: Row) -> dict[str, object]:
    """The plain values of a row (texts, numbers, dates) in columns that are not read as prompt, picture, label and the like."""
    if "prompt_id" in file.layout:
        return {}  # of a group only the first picture's are left
    read = {alias for name, aliases in COLUMNS.items() if name not in APART for alias in (*aliases, file.names[name])}
    return {
        name: value
        for name, value in row.items()
        if isinstance(name, str) and name and name.isprintable() and name not in read
        if value is not None and not isinstance(value, bytes | list | dict)
    }


def _grouped(found: Iterator[Row | BadValueError], names: Mapping[str, str]) -> Iterator[Row | BadValueError]:
    """Rows of one ranked picture each as rows of all pictures of a prompt."""
    group: dict[str, Any] | None = None
    for row in found:
        if isinstance(row, BadValueError):
            yield row
            continue
        if group is None or row.get(names["prompt_id"]) != group[names["prompt_id"]]:
            if group is not None:
                yield group
            group = {**row, names["images"]: [], names["ranking"]: []}
            group.setdefault(names["prompt_id"], None)
        for name in ("images", "ranking"):
            group[names[name]].append(row.get(names[name]))
    if group is not None:
        yield group


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path} is not a complete parquet file ({error}): copy or download it again") from None


def _parquet_rows(file: File, everything: bool) -> Iterator[Row | BadValueError]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    done = 0
    try:
        # By default a whole row group is read ahead, which may be gigabytes of pictures.
        with pq.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as table:
            schema = table.schema_arrow
            wanted = [f.name for f in schema if f.name in file.names.values() or (everything and _plain(f.type))]
            for batch in table.iter_batches(batch_size=16, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    done += 1
                    yield row
    except (pa.ArrowException, OSError) as error:
        yield BadValueError("(rest of file)", f"is damaged after {done} rows ({error}): copy or download it again")


def _plain(kind: pa.DataType) -> bool:
    from pyarrow import types

    kept_out = (types.is_nested, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return not any(is_kind(kind) for is_kind in kept_out)


def _caption_rows(folder: Path) -> Iterator[Row | BadValueError]:
    for picture, text in _captioned(folder):
        try:
            prompt = text.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            yield BadValueError("prompt", f"of {text.name} cannot be read ({error})")
        else:
            yield {"prompt": prompt, "image": picture.relative_to(folder).as_posix()}


def _json_rows(path: Path) -> Iterator[Row | BadValueError]:
    # Lines of bytes: a line that is not UTF-8 is then one bad row, not the end of the file.
    with path.open("rb") as stream:
        for line in stream:
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            try:
                row = decode(line)
            except ValueError as error:
                yield BadValueError("(whole line)", f"is {error}")
            else:
                yield row if isinstance(row, dict) else BadValueError("(whole line)", "is not a JSON object")


def _list_rows(path: Path) -> Iterator[Row | BadValueError]:
    """The entries of a JSON list, one at a time: HPD v2's is one line of hundreds of megabytes."""
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8-sig") as stream:
            text, place = stream.read(CHUNK).lstrip(), 1
            while True:
                while text[place : place + 1] in (*" \t\r\n,",):
                    place += 1
                if text[place : place + 1] == "]":
                    return
                try:
                    row, place = decoder.raw_decode(text, place)
                except ValueError as error:
                    text, place = text[place:], 0
                    # As much again as there is, so that an entry is not begun over and over.
                    more = stream.read(max(CHUNK, len(text))) if len(text) <= MAX_OBJECT else ""
                    if not more:
                        yield BadValueError("(rest of file)", f"is not JSON ({error})")
                        return
                    text += more
                else:
                    yield row if isinstance(row, dict) else BadValueError("(whole entry)", "is not a JSON object")
    except (UnicodeDecodeError, RecursionError) as error:
        yield BadValueError("(rest of file)", f"cannot be read as JSON in UTF-8 ({error})")


def _csv_rows(path: Path) -> Iterator[Row | BadValueError]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from csv.DictReader(stream)
    except (UnicodeDecodeError, csv.Error) as error:
        yield BadValueError("(rest of file)", f"is neither parquet nor JSONL, and cannot be read as CSV in UTF-8 ({error})")


def _csv_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream).fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is neither parquet nor JSONL, and cannot be read as CSV in UTF-8 ({error})") from None
