"""Files of preferences: where they are, what they are, and their rows by column."""

from __future__ import annotations

import csv
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from palate.base import hub
from palate.base.errors import UserError, nearest, said, short
from palate.base.jsonl import DECODER, decode
from palate.data import shards, values, votes
from palate.data.metadata import read_drawn
from palate.data.values import BadValueError, Home, Row, unpack

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER_FILES = ("metadata.jsonl", "metadata.csv", "rankings.jsonl")
ENDINGS = (".parquet", ".tar")
ARROW = ("state.json", "dataset_info.json")  # beside the *.arrow files of a folder that datasets' save_to_disk wrote
TEXTS = ("txt", "caption", "text")
OTHER_SPLITS = {"test", "validation", "valid", "val", "dev", "eval"}
DATA = (
    ".parquet",
    ".tar",
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".arrow",
    ".zip",
    ".gz",
    ".tgz",
    ".zst",
    ".bz2",
    ".xz",
    ".7z",
    ".rar",
)
EXPECTED = "parquet, JSONL, JSON, CSV, tar or arrow"
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
# What a row is must be told by every row alike: these never come without being known from the first rows of a file.
DECIDING = tuple(name for name in COLUMNS if name not in ("weight", "rater", "has_label", "are_different", "prompt_id"))
SAMPLE = {"jsonl": 256, "json": 256, "tar": 16}
"""Rows that are looked at for columns, of formats that name them row by row."""
CODINGS = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
COMPRESSED = (
    (b"\x1f\x8b", "gunzip"),
    (b"BZh", "bunzip2"),
    (b"\xfd7zXZ", "unxz"),
    (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"7z\xbc\xaf", "7z x"),
    (b"Rar!", "unrar x"),
)
# Whose values tell of a row without being read here.
APART = ("best", "uid_0", "uid_1", "prompt_id")
CHUNK, MAX_OBJECT = 1 << 16, 1 << 24
csv.field_size_limit(MAX_OBJECT)  # a column that nobody reads may hold pictures in base64


class DamagedError(UserError):
    """A file that is cut short or garbled, of which others of the same source say nothing."""


@dataclass(frozen=True)
class File:
    """A file that was recognised."""

    path: Path
    format: str  # "parquet" | "arrow" | "jsonl" | "json" | "csv" | "votes" | "tar" | "captions"
    names: dict[str, str]  # our name -> column of the file
    present: frozenset[str]  # columns of the file, or of its first rows
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
        return [Place(p) for p in _find_in_folder(path)]
    found = sorted(Path(name) for name in glob.glob(str(source), recursive=True) if Path(name).is_file())
    if found:
        return [Place(p) for p in found]
    name, _, split = str(source).partition(":")
    if hub.is_hub_id(name) and Path(name).suffix not in (*ENDINGS, ".jsonl", ".json", ".csv", ".db"):
        return _find_on_hub(name, split)
    raise UserError(
        f"{short(str(source), 120, quoted=False)} does not exist: expected a {EXPECTED} file of preference pairs, or a folder"
    )


def _find_in_folder(path: Path) -> list[Path]:
    known = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if known:
        return known[:1]
    if saved := _saved_to_disk(path):
        return saved
    if found := sorted(p for p in _files(path) if p.suffix.lower() in ENDINGS):
        return _to_train_on(found, path)
    found = sorted(p for name in FOLDER_FILES for p in path.glob(f"*/{name}"))
    if len(found) > 1:
        listed = ", ".join(str(p.parent) for p in found[:3])
        raise UserError(
            f"folder {path} holds {len(found)} sets of pictures; name one of them: {short(listed, 200, quoted=False)}"
        )
    if not found and Captioned.of(path).pairs:
        found = [path]
    if not found:
        raise UserError(
            f"folder {path} has no preference pairs: expected {', '.join(FOLDER_FILES)}, *.parquet, *.tar, or pictures with a "
            ".txt or .caption beside each, or with the prompt that A1111, ComfyUI or SwarmUI wrote into them; "
            f"{_what_there_is(path)}"
        )
    return found


def _saved_to_disk(path: Path) -> list[Path]:
    """The files of a folder that ``save_to_disk`` of the datasets library wrote, in order; of several splits the only one."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.parent for p in path.glob("*/state.json"))
        if len(splits) != 1:
            listed = ", ".join(map(str, splits[:3]))
            raise UserError(f"folder {path} holds {len(splits)} splits of a saved data set; name one of them: {listed}")
        return _saved_to_disk(splits[0])
    if not (path / "state.json").is_file():
        return []
    try:
        names = [part["filename"] for part in decode((path / "state.json").read_bytes())["_data_files"]]
        found = [path / name for name in names]
        if found and all(p.is_file() and p.parent == path for p in found):
            return found
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise UserError(f"folder {path} is a saved data set whose state.json does not name its arrow files: save it again")


def _to_train_on(found: list[Path], folder: Path) -> list[Path]:
    """Of files whose names tell of several splits those of ``train``, and such as tell of none."""
    words = {path: set(re.split(r"[^a-z0-9]+", path.relative_to(folder).as_posix().lower())) for path in found}
    if not any("train" in of_path for of_path in words.values()):
        return found
    return [path for path in found if "train" in words[path] or not words[path] & OTHER_SPLITS]


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.is_file() and not shards.is_litter(p.relative_to(folder).as_posix()))


def _what_there_is(folder: Path) -> str:
    """What a folder holds instead, and the one command that makes it usable where there is one."""
    names = [p.relative_to(folder).as_posix() for p in _files(folder)]
    if packed := sorted(name for name in names if name.lower().endswith((".zip", ".tar.gz", ".tgz", ".7z", ".rar"))):
        return f"it holds {short(packed[0], 60)}: {unpack(packed[0])}"
    if tables := sorted(name for name in names if name.lower().endswith(DATA)):
        return f"it holds {short(tables[0], 60)}: name that file"
    kinds = Counter(Path(name).suffix or "no ending" for name in names)
    listed = ", ".join(f"{n} with {short(end, 20, quoted=False)}" for end, n in kinds.most_common(4))
    return f"it holds {len(names)} files{': ' if listed else ''}{listed}"


def unread(source: str, places: Sequence[Place]) -> Counter[str]:
    """What lies in a folder beside the files that are read and looks like data, by reason; nothing for other sources."""
    folder, read = Path(source), {place.path for place in places}
    if not folder.is_dir() or any(place.remote or place.path.is_dir() for place in places):
        return Counter()
    near = {p for place in places for p in place.path.parent.iterdir()} | set(folder.iterdir())
    if any(path.suffix.lower() in ENDINGS for path in read):
        near |= {p for p in _files(folder) if p.suffix.lower() in ENDINGS}
    others = [p for p in near if p not in read and p.name.lower().endswith(DATA) and not shards.is_litter(p.name)]
    others = [p for p in others if p.is_file() and p.name not in (*ARROW, "dataset_dict.json", "dataset_infos.json")]
    return (
        Counter({f"other files of data, not read ({short(min(p.name for p in others), 40)})": len(others)})
        if others
        else Counter()
    )


def described(source: str, places: Sequence[Place]) -> Path | None:
    """The folder of pictures that a source is, if a table in it says what they are; None for other sources."""
    one = places[0].path if len(places) == 1 and not places[0].remote else Path()
    return one.parent if one.name in FOLDER_FILES and Path(source).is_dir() else None


def count_pictures(folder: Path) -> int:
    """How many pictures lie below a folder."""
    names = (Path(where, name).relative_to(folder).as_posix() for where, _, found in os.walk(folder) for name in found)
    return sum(Path(n).suffix.lower().removeprefix(".") in shards.PICTURES and not shards.is_litter(n) for n in names)


def shown(file: File, row: Row) -> Iterator[str]:
    """The pictures that a row names."""
    for name in ("chosen", "rejected", "image_0", "image_1", "image", "images"):
        value = row.get(file.names[name]) if name in file.layout else None
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))


def _find_on_hub(repo: str, split: str) -> list[Place]:
    """The files of a data set: of one split where their names tell of several, ``train`` unless another is named."""
    otherwise = f"If you meant a folder, {repo} does not exist; if a data set, name it as its page does, and log in if it asks"
    names = hub.files(repo, kind="dataset", otherwise=otherwise)
    if any(name in FOLDER_FILES for name in names):
        # Pictures as files of their own: all are fetched.
        return find(hub.snapshot(repo, ["*"], kind="dataset", otherwise=otherwise))
    described = sorted(name for name in names if Path(name).name in FOLDER_FILES)
    found = sorted(name for name in names if name.lower().endswith(ENDINGS)) or described
    if not found:
        raise UserError(
            f"the data set {repo} holds no *.parquet, *.tar or metadata.jsonl; its own scripts are never run: download it, and "
            "name a file"
        )
    of_split = [name for name in found if (split or "train") in re.split(r"[^A-Za-z0-9]+", name)]
    if split and not of_split:
        raise UserError(f"the data set {repo} has no files of a split {short(split)}: it holds {', '.join(found[:5])}")
    chosen = of_split or found
    if found is described:
        folder = hub.snapshot(
            repo, [f"{Path(name).parent.as_posix()}/*" for name in chosen], kind="dataset", otherwise=otherwise
        )
        return [Place(folder / name) for name in chosen]
    return [Place(Path(name), repo) for name in chosen]


@dataclass(frozen=True)
class Captioned:
    """Pictures with a text of the same name beside them, or their prompt in their own metadata; and what is neither."""

    pairs: list[tuple[Path, Path | None]]
    """Picture, and the text beside it; None where the picture itself tells."""
    silent: list[Path]
    """Pictures of which neither tells the prompt."""
    left_out: Counter[str]
    """What is not read, by reason."""

    @classmethod
    def of(cls, folder: Path) -> Captioned:
        """All below a folder, by name; endings count in capitals too."""
        pictures, texts = {}, {}
        for path in sorted(_files(folder)):
            ending = path.suffix.lower().removeprefix(".")
            kind = pictures if ending in shards.PICTURES else texts if ending in TEXTS else {}
            kind.setdefault(path.with_suffix(""), []).append(path)
        pairs: list[tuple[Path, Path | None]] = []
        silent: list[Path] = []
        left_out = Counter()
        for name, found in pictures.items():
            beside = sorted(texts.pop(name, ()), key=lambda path: TEXTS.index(path.suffix.lower()[1:]))
            if beside:
                pairs.append((found[0], beside[0]))
                left_out["further pictures of one name"] += len(found) - 1
                left_out["further texts of one name"] += len(beside) - 1
            elif name.name.startswith("grid-"):  # A1111 keeps them among its pictures, with the prompt of the first
                left_out["contact sheets"] += len(found)
            else:
                for picture in found:
                    tells = read_drawn(picture) is not None
                    pairs += [(picture, None)] if tells else []
                    silent += [] if tells else [picture]
        left_out["pictures without a prompt"] = len(silent)
        left_out["texts without a picture"] = sum(map(len, texts.values()))
        return cls(sorted(pairs, key=lambda pair: pair[1] or pair[0]), silent, +left_out)


def caption(picture: Path, text: Path | None) -> str:
    """The prompt of one of :class:`Captioned`'s pairs. Raises ``BadValueError`` for a text that cannot be read, or is blank."""
    if text is None:
        drawn = read_drawn(picture)
        return values.prompt("prompt", drawn and drawn.prompt)
    try:
        return values.prompt("prompt", text.read_text(encoding="utf-8-sig").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BadValueError("prompt", f"of {short(text.name)} cannot be read ({said(error)})") from None


# Recognising -----------------------------------------------------------------------------------------------------------


def open_file(place: Place, mapping: Mapping[str, str], voting: Mapping[str, str]) -> File:
    """Recognise format and layout; the columns are checked before a single picture is read."""
    path = place.local()
    if path.is_dir():
        names = {name: aliases[0] for name, aliases in COLUMNS.items()}
        present = frozenset(("prompt", "image"))
        return File(path, "captions", names, present, ("prompt", "image"), Home(path, path), voting)
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise DamagedError(f"{path} is empty: expected preference pairs as {EXPECTED}")
    _refuse_packed(path, head)
    if head.startswith(votes.HEAD):
        next(votes.vote_rows(path, **voting), None)  # refuses what is no database of votes
        present, file_format = list(votes.COLUMNS), "votes"
    elif head.startswith(b"PAR1"):
        present, file_format = _parquet_columns(path), "parquet"
    elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        present, file_format = _arrow_columns(path), "arrow"
    else:
        present, file_format = _first_columns(path, head, text)
    names = _resolve(path, present, mapping)
    layout = _layout(path, present, names)
    _refuse_twins(path, present, names, mapping)
    home = Home(path.parent, _root(path), path.parent / path.stem)
    return File(path, file_format, names, frozenset(present), layout, home, voting)


def _refuse_packed(path: Path, head: bytes) -> None:
    """Refuse what must be unpacked or converted first, with the command that does it."""
    for mark, command in COMPRESSED:
        if head.startswith(mark):
            raise UserError(f"{path} is compressed: unpack it first ({command} {short(path.name, 60)})")
    if head.startswith(b"PK\x03\x04"):
        if path.suffix.lower() in (".xlsx", ".ods"):
            raise UserError(f"{path} is a workbook: save its sheet as CSV in UTF-8 beside the pictures, and name that")
        raise UserError(f"{path} is a zip archive: {unpack(path.name)}, and name the folder that holds the pictures")
    for mark, coding in CODINGS:
        if head.startswith(mark):
            name = short(path.name, 60)
            raise UserError(f"{path} is text in {coding}, not UTF-8: convert it (iconv -f {coding} -t UTF-8 {name} -o NEW)")


def _root(path: Path) -> Path:
    """The folder that a file's pictures may not leave; in the hub's cache they are links to bytes beside the snapshots."""
    above = (p.parent for p in path.parents if p.name == "snapshots" and p.parent.name.startswith("datasets--"))
    return next(above, path.parent)


def _first_columns(path: Path, head: bytes, text: bytes) -> tuple[list[str], str]:
    """Columns and format of what is told by its first rows: a column that some of them lack is a column all the same."""
    if shards.is_tar(head):
        file_format, rows, what = "tar", shards.sample_rows(path), "sample could be read; expected a webdataset shard"
    elif text.startswith(b"{"):
        file_format, rows, what = "jsonl", _json_rows(path), "line is a JSON object; expected JSONL, one object a line"
    elif text.startswith(b"["):
        file_format, rows, what = "json", _list_rows(path), "entry is a JSON object; expected a list of objects"
    else:
        return _csv_header(path), "csv"
    sample = list(itertools.islice(rows, SAMPLE[file_format]))
    first = [row for row in sample if isinstance(row, dict)]
    if not first:
        first = [row for row in itertools.islice(rows, 1 << 20) if isinstance(row, dict)][:1]
    if not first:
        bad = next((row for row in sample if isinstance(row, BadValueError)), None)
        raise DamagedError(f"{path}: no {what}{f' (the first {bad.reason})' if bad else ''}")
    if len(first) == 1:
        _refuse_table(path, first[0])
    return list(dict.fromkeys(name for row in first for name in row)), file_format


def _refuse_table(path: Path, row: Mapping[str, object]) -> None:
    """Refuse a whole table in one JSON object, with the command that makes rows of it."""
    values, name = list(row.values()), short(path.name, 60)
    for key, value in row.items():
        if _plainly(key) not in {alias for aliases in COLUMNS.values() for alias in aliases} and _is_rows(value):
            how = f" (jq .{key} {name} > NEW)" if re.fullmatch(r"[A-Za-z_]\w{0,39}", key) else ""
            raise UserError(f"{path} holds its rows in {short(key, 40)}: save them alone{how}")
    if len(values) > 1 and (all(isinstance(v, list) for v in values) or all(isinstance(v, dict) for v in values)):
        raise UserError(f"{path} holds columns, not rows: save it with to_json(NAME, orient='records', lines=True) of pandas")


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and len(one) > 1 for one in value)


def own_names(columns: Mapping[str, str]) -> dict[str, str]:
    """The user's mapping with the names that other layouts have replaced by ours."""
    ours = {alias: name for name, aliases in COLUMNS.items() for alias in aliases}
    for name in columns:
        if name not in ours:
            raise UserError(f"columns: unknown name {short(name)} on the left{nearest(name, ours)}")
    return {ours[name]: column for name, column in columns.items()}


def _resolve(path: Path, present: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Our names to the columns of a file; blanks and capitals in them make no difference."""
    plain = {_plainly(column): column for column in reversed(present)} | {column: column for column in present}
    for ours, theirs in mapping.items():
        if theirs not in present and _plainly(theirs) not in plain:
            raise UserError(
                f"{path}: columns maps {short(ours)} to {short(theirs)}, which is missing{nearest(theirs, present)}"
            )
    given = {ours: theirs if theirs in present else plain[_plainly(theirs)] for ours, theirs in mapping.items()}
    return {
        name: given.get(name) or next((plain[alias] for alias in aliases if alias in plain), name)
        for name, aliases in COLUMNS.items()
    }


def _refuse_twins(path: Path, present: Sequence[str], names: Mapping[str, str], mapping: Mapping[str, str]) -> None:
    """Refuse columns of one name, of which only one would be read, unless the user has said which."""
    for ours, theirs in names.items():
        alike = [column for column in present if _plainly(column) == _plainly(theirs)]
        if len(alike) > 1 and (mapping.get(ours) != theirs or alike.count(theirs) > 1):
            raise UserError(f"{path} has {len(alike)} columns {short(theirs, 40)}: rename all but one")


def unread_opinions(file: File) -> Counter[str]:
    """Columns that also tell which picture is better, beside those by which the rows are read."""
    telling = ("chosen", "label", "label_0", "rankings", "ranking", "scores")
    others = [file.names[name] for name in telling if name not in file.layout and file.names[name] in file.present]
    return Counter(
        {f"columns of opinions, not read ({short(', '.join(others), 40, quoted=False)})": len(others)} if others else {}
    )


def _plainly(column: object) -> str:
    """``Image 0`` and `` image_0`` as ``image_0``."""
    return re.sub(r"[\s-]+", "_", str(column).strip()).lower()


def late(file: File, row: Row) -> str | None:
    """A column that would tell what the rows are, comes in this row, and was in none of the first; None if there is no such."""
    if file.format not in SAMPLE or file.present.issuperset(row):
        return None
    known = {alias for name in DECIDING for alias in COLUMNS[name]}
    return next((name for name in row if name not in file.present and _plainly(name) in known), None)


def _layout(path: Path, present: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    missing = {layout: [name for name in layout if names[name] not in present] for layout in LAYOUTS}
    for layout, lacks in missing.items():
        if not lacks:
            return layout
    # Tell what the layout lacks of which most is there; a mere prompt tells nothing about the pictures' columns.
    closest = min(LAYOUTS, key=lambda layout: len(missing[layout]) / len(layout))
    name = missing[closest][0]
    known = {names[n] for layout in LAYOUTS for n in layout if n != "prompt"}.intersection(present)
    if not known and set(present) - set(names.values()):
        shown = ", ".join(short(column, 30) for column in present[:4])
        raise UserError(
            f"{path}: none of its columns ({shown}{' and more' if len(present) > 4 else ''}) is known to hold pictures; if it "
            "holds pairs, say which: columns: {prompt: ITS NAME, chosen: ITS NAME, rejected: ITS NAME}; if single pictures: "
            "columns: {prompt: ITS NAME, image: ITS NAME}"
        )
    raise UserError(
        f"{path}: column {' or '.join(map(repr, COLUMNS[name]))} is missing{nearest(name, [str(c) for c in present])}; "
        f"expected {', '.join(closest)}; if it has another name, say so with columns: {{{name}: ITS NAME}}"
    )


# Rows ------------------------------------------------------------------------------------------------------------------


def rows(file: File, *, everything: bool = False) -> Iterator[Row | BadValueError]:
    """The rows of a file by column; a ``BadValueError`` in the place of what cannot be read.

    Of parquet only the columns that are known to :data:`COLUMNS`, or with ``everything`` also those of plain values.
    """
    kinds = {
        "parquet": lambda file: _parquet_rows(file, everything),
        "arrow": lambda file: _arrow_rows(file, everything),
        "votes": lambda file: votes.vote_rows(file.path, **file.votes),
        "captions": lambda file: _caption_rows(file.path),
        "tar": lambda file: shards.sample_rows(file.path),
        "jsonl": lambda file: _json_rows(file.path),
        "json": lambda file: _list_rows(file.path),
        "csv": lambda file: _csv_rows(file.path),
    }
    found = kinds[file.format](file)
    return _grouped(found, file.names) if "prompt_id" in file.layout else found


def count_rows(file: File) -> int | None:
    """About how many rows a file has, as far as that is told without reading pictures; None of a shard or a list in JSON."""
    if file.format == "parquet":
        import pyarrow.parquet as pq

        return pq.ParquetFile(file.path).metadata.num_rows
    if file.format == "arrow":
        import pyarrow as pa

        try:
            return sum(batch.num_rows for batch in _arrow_batches(file.path)[1])
        except (pa.ArrowException, OSError):  # damaged further on, which reading tells
            return None
    if file.format in ("jsonl", "csv"):
        with file.path.open("rb") as stream:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b"")) + 1
    return sum(1 for _ in rows(file)) if file.format in ("votes", "captions") else None


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
    seen = set[int]()
    for row in found:
        if isinstance(row, BadValueError):
            yield row
            continue
        column, number = names["prompt_id"], row.get(names["prompt_id"])
        if number is None or number == "" or isinstance(number, list | dict):
            yield BadValueError(column, f"must name the prompt that a picture is of, found {short(number)}")
            continue
        if group is None or number != group[column]:
            if group is not None:
                yield group
            if (known := hash(number)) in seen:
                yield BadValueError(column, f"{short(number, 40)} comes again further down: sort the rows by {column}")
            seen.add(known)
            group = {**row, names["images"]: [], names["ranking"]: []}
        elif row.get(names["prompt"]) != group[names["prompt"]]:
            yield BadValueError(column, f"{short(number, 40)} stands for two prompts: every prompt has an id of its own")
            continue
        for name in ("images", "ranking"):
            group[names[name]].append(row.get(names[name]))
    if group is not None:
        yield group


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except Exception as error:  # on damaged files Arrow raises nearly anything
        raise DamagedError(f"{path} is not a complete parquet file ({said(error)}): copy or download it again") from None


def _parquet_rows(file: File, everything: bool) -> Iterator[Row | BadValueError]:
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
    except Exception as error:
        yield BadValueError("(rest of file)", f"is damaged after {done} rows ({said(error)}): copy or download it again")


def _arrow_batches(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of an arrow file, or of the stream that ``save_to_disk`` writes; read as they are asked for."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        reader = pa.ipc.open_file(source)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        return stream.schema, iter(stream)


def _arrow_columns(path: Path) -> list[str]:

    try:
        return list(_arrow_batches(path)[0].names)
    except Exception as error:
        raise DamagedError(f"{path} is not a complete arrow file ({said(error)}): copy or save it again") from None


def _arrow_rows(file: File, everything: bool) -> Iterator[Row | BadValueError]:

    done = 0
    try:
        schema, batches = _arrow_batches(file.path)
        wanted = [f.name for f in schema if f.name in file.names.values() or (everything and _plain(f.type))]
        for batch in batches:
            batch.validate(full=True)
            for start in range(0, batch.num_rows, 16):
                for row in batch.select(wanted).slice(start, 16).to_pylist():
                    done += 1
                    yield row
    except Exception as error:
        yield BadValueError("(rest of file)", f"is damaged after {done} rows ({said(error)}): copy or save it again")


def _plain(kind: pa.DataType) -> bool:
    from pyarrow import types

    kept_out = (types.is_nested, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return not any(is_kind(kind) for is_kind in kept_out)


def _caption_rows(folder: Path) -> Iterator[Row | BadValueError]:
    for picture, text in Captioned.of(folder).pairs:
        try:
            yield {"prompt": caption(picture, text), "image": picture.relative_to(folder).as_posix()}
        except BadValueError as bad:
            yield bad


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
    try:
        with path.open(encoding="utf-8-sig") as stream:
            text, place = stream.read(CHUNK).lstrip(), 1
            while True:
                while text[place : place + 1] in (*" \t\r\n,",):
                    place += 1
                if text[place : place + 1] == "]":
                    return
                try:
                    row, place = DECODER.raw_decode(text, place)
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
            table = _csv_table(stream)
            while True:
                last = table.reader.line_num
                try:
                    row = next(table)
                except StopIteration:
                    return
                except csv.Error as error:  # a quote that is not closed takes in the lines that follow
                    to = table.reader.line_num
                    lines = f"lines {last + 1} to {to}" if to > last + 1 else f"line {to}"
                    yield BadValueError("(whole line)", f"is no CSV ({said(error)}; {lines}): double quotes within quotes")
                    continue
                more = row.pop(None, [])  # type: ignore[call-overload]
                if any(more):  # the last column would be cut short
                    yield BadValueError(
                        "(whole line)", f"has {len(more)} fields more than the header: quote texts that hold it"
                    )
                else:
                    yield row
    except (UnicodeDecodeError, csv.Error) as error:
        yield BadValueError("(rest of file)", _no_csv(path, error))


def _csv_header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return list(_csv_table(stream).fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} {_no_csv(path, error)}") from None


def _no_csv(path: Path, error: Exception) -> str:
    with path.open("rb") as stream:
        is_text = isinstance(error, UnicodeDecodeError) and b"\0" not in stream.read(CHUNK)
    name = short(path.name, 60)
    how = f"; if it is text in another encoding, convert it (iconv -f WINDOWS-1252 -t UTF-8 {name} -o NEW)" if is_text else ""
    return f"is neither parquet nor JSONL, and cannot be read as CSV in UTF-8 ({said(error)}){how}"


def _csv_table(stream: TextIO) -> csv.DictReader[str]:
    """The rows of an open CSV file. Columns are separated as Excel's first line ``sep=;`` says, or by that of comma, semicolon,
    tab and bar by which the header gives most columns that we know."""
    known = {alias for aliases in COLUMNS.values() for alias in aliases}
    header = stream.readline(CHUNK)

    def count(delimiter: str) -> int:
        return sum(_plainly(name) in known for name in next(csv.reader([header], delimiter=delimiter), []))

    told = re.fullmatch(r"sep=(.)\r?\n?", header)
    if told is None:
        stream.seek(0)
    return csv.DictReader(stream, delimiter=told[1] if told else max(",;\t|", key=count), strict=True)
