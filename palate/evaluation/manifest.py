"""Picture folders: pictures, ``manifest.jsonl``, ``settings.json`` and ``scores/``, plain enough to be written by hand; without
a manifest, pictures that say themselves, or by a text beside them, what they show."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os.path import isfile  # pathlib's raises for a name that is too long
from pathlib import Path
from typing import TypeVar

from palate.base.errors import UserError, short
from palate.base.files import spellings
from palate.base.jsonl import JsonObject, append_lines, read_lines, read_object, write_object
from palate.base.shapes import Shape
from palate.data import formats
from palate.data.images import size_of
from palate.data.plain import PlainFolder, read_plain
from palate.data.shards import PICTURES, is_litter
from palate.data.values import no_path

MANIFEST, SETTINGS, SCORES = "manifest.jsonl", "settings.json", "scores"
Value = TypeVar("Value")
UNNAMED = "unnamed"  # the model of pictures of which nothing tells it
VERSIONS = "versions"  # in the settings: may differ between folders that are compared, which is told


@dataclass(frozen=True)
class Picture:
    """One line of a manifest."""

    file: str
    """Path relative to the folder, with ``/``."""
    prompt: str
    seed: int
    index: int
    """Which of the prompt's pictures, from 0."""
    model: str
    negative: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    init_image: str | None = None
    """What it was edited from: path relative to the folder, with ``/``."""
    shape: Shape | None = None
    """That its prompt asks for; of the folder's settings unless given."""

    @property
    def task(self) -> str:
        """What was asked for: the prompt, of what picture. Pictures of one task are no independent evidence."""
        return self.prompt if self.init_image is None else f"{self.prompt} (of {self.init_image})"

    @property
    def key(self) -> tuple[str, int, int]:
        """What pairs the pictures of two models: prompt, seed, index."""
        return self.prompt, self.seed, self.index

    def line(self) -> JsonObject:
        found: JsonObject = {"file": self.file, "prompt": self.prompt, "seed": self.seed, "index": self.index}
        found["model"] = self.model
        if self.negative is not None:
            found["negative"] = self.negative
        if self.init_image is not None:
            found["init_image"] = self.init_image
        if self.shape is not None:
            found |= {"width": self.shape.width, "height": self.shape.height}
        return {**found, "metadata": dict(self.metadata)} if self.metadata else found


def read_manifest(folder: str | Path, *, check_files: bool = True, names: bool = False) -> list[Picture]:
    """The pictures of a folder in the order of its manifest; of one without, those of :func:`palate.data.plain.read_plain`.

    A last line that was cut short, as an interrupted run may leave it, is left out. ``names`` lets the files' names stand
    in for prompts that nothing else tells, where there is no manifest.

    Raises:
        UserError: neither manifest nor pictures with prompts, or an empty manifest; a line that is no JSON object or lacks
            something; a path that leaves the folder; a file or a key (prompt, seed, index) named twice; with
            ``check_files``, a file that does not exist.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        return numbered(plain_folder(folder, names=names))
    pictures: list[Picture] = []
    known: dict[object, int] = {}
    for number, row in read_lines(path, may_be_cut=True):
        picture = _as_on_disk(folder, _picture(f"{path}, line {number}", row))
        for what, value in (("file", picture.file), ("prompt, seed and index", picture.key)):
            if (before := known.setdefault(value, number)) != number:
                raise UserError(f"{path}, line {number}: the same {what} as line {before} ({short(value)}); remove one")
        pictures.append(picture)
    if not pictures:
        raise UserError(f"{path} names no pictures; expected one JSON object a line with file, prompt, seed, index, model")
    missing = [p.file for p in pictures if check_files and not isfile(folder / p.file)]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(pictures)} pictures in {MANIFEST}, the first is "
            f"{short(missing[0], quoted=False)}; generate them again, or remove their lines"
        )
    return pictures


def is_picture_folder(path: str | Path) -> bool:
    """Whether a folder has a manifest, or pictures and no file of preference pairs."""
    path = Path(path)
    if (path / MANIFEST).is_file() or not path.is_dir():
        return path.is_dir()
    try:
        places = formats.find(path)
        return all(place.path == path or formats.open_file(place, {}, {}).single for place in places)
    except UserError:
        return has_pictures(path)


def has_pictures(folder: Path) -> bool:
    """Whether there are pictures in a folder or below it, whatever tells their prompts."""
    found = (
        p
        for p in folder.rglob("*")
        if p.suffix.lower().removeprefix(".") in PICTURES and not is_litter(p.relative_to(folder).as_posix())
    )
    return any(p.is_file() for p in found)


def plain_folder(folder: Path, *, names: bool = False) -> PlainFolder:
    """The pictures of a folder without a manifest, whose prompts something tells. Errors as :func:`read_manifest`."""
    if not folder.is_dir() or not has_pictures(folder):
        raise UserError(f"{folder} has no {MANIFEST}; expected a folder that palate generate wrote, or one of pictures")
    found = read_plain(folder, names=names)
    if found.silent:
        raise UserError(
            f"{folder} has no {MANIFEST}, and nothing tells the prompts of {len(found.silent)} of its pictures, such as "
            f"{short(found.silent[0], quoted=False)}: write a .txt of the same name beside each, or {MANIFEST} "
            '({"file": "a.png", "prompt": "..."} a line)'
        )
    return found


def numbered(found: PlainFolder) -> list[Picture]:
    """Plain pictures as those of a manifest. Of one prompt and seed they are numbered by name; an unknown seed is 0."""
    number: Counter[tuple[str, int]] = Counter()
    pictures = list[Picture]()
    for plain in found.pictures:
        key = (plain.prompt, plain.seed or 0)
        pictures.append(Picture(plain.file, *key, number[key], plain.model or UNNAMED, plain.negative))
        number[key] += 1
    return pictures


def unlisted(folder: str | Path, pictures: Sequence[Picture]) -> list[str]:
    """Pictures beside those of the manifest that it does not name; those that others were edited from are none."""
    named = {name for p in pictures for name in (p.file, p.init_image)}
    folders = {Path(folder), *((Path(folder) / p.file).parent for p in pictures)}
    near = [path for place in folders if place.is_dir() for path in place.iterdir() if path.is_file()]
    found = (
        p for p in near if p.suffix.lower().removeprefix(".") in PICTURES and not is_litter(p.relative_to(folder).as_posix())
    )
    return sorted({p.relative_to(folder).as_posix() for p in found} - named)


def _as_on_disk(folder: Path, picture: Picture) -> Picture:
    """With the name that the file has here, where the manifest writes it as another system would."""
    found = next((name for name in spellings(picture.file) if isfile(folder / name)), picture.file)
    return replace(picture, file=found)


def append_manifest(folder: str | Path, pictures: Sequence[Picture]) -> None:
    """Add lines. Several processes may add to one manifest; a line cut short by an earlier interruption is removed."""
    append_lines(Path(folder) / MANIFEST, [picture.line() for picture in pictures])


def read_settings(folder: str | Path) -> JsonObject:
    """``settings.json``: what must agree between two folders that are compared; empty where there is none."""
    return read_object(Path(folder) / SETTINGS, optional=True)


def write_settings(folder: str | Path, settings: Mapping[str, object]) -> None:
    write_object(Path(folder) / SETTINGS, settings)


# Scores --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreFile:
    """What one judge said of the pictures of a folder."""

    judge: str
    kind: str
    fingerprint: str
    role: str
    serves: Sequence[str] = ()
    """Names of the judges behind its addresses, as their servers told."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """By file, higher is better."""
    bad: Mapping[str, str] = field(default_factory=dict)
    """Pictures without a score, and why."""
    of: Mapping[str, str] = field(default_factory=dict)
    """By file, what was scored: :func:`content` of picture and prompt; earlier versions did not write it."""

    def stale(self, folder: Path, picture: Picture) -> bool:
        """Whether picture or prompt is another one than was scored; a score that does not tell of which it is, is none."""
        return picture.file in self.of and self.of[picture.file] != content(folder / picture.file, picture.prompt)

    def header(self) -> dict[str, str]:
        """What all its scores have in common, whoever asked."""
        return {"judge": self.judge, "kind": self.kind, "fingerprint": self.fingerprint, "role": self.role}


def content(file: Path, prompt: str) -> str:
    """16 hexadecimal digits that change with a picture's bytes and with its prompt; empty where it cannot be read."""
    try:
        return hashlib.sha256(hashlib.sha256(file.read_bytes()).digest() + prompt.encode(errors="replace")).hexdigest()[:16]
    except (OSError, ValueError):
        return ""


def score_path(folder: str | Path, judge: str) -> Path:
    """Where a judge's scores lie: its name with all but letters, digits, points and hyphens replaced."""
    return Path(folder) / SCORES / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', judge).strip('.')}.jsonl"


def read_scores(path: str | Path) -> ScoreFile:
    """One score file. Of several lines about one picture the last counts.

    Raises:
        UserError: no such file, a missing header, or a line that is no score.
    """
    path = Path(path)
    lines = read_lines(path, may_be_cut=True)
    header = next(lines, (1, {}))[1]
    if not all(isinstance(header.get(name), str) for name in ("judge", "kind", "fingerprint", "role")):
        raise UserError(f"{path}: its first line must be an object with judge, kind, fingerprint, role; score again")
    scores: dict[str, float] = {}
    bad: dict[str, str] = {}
    of: dict[str, str] = {}
    for number, row in lines:
        file, score = row.get("file"), row.get("score")
        is_score = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if not isinstance(file, str) or not (is_score or (score is None and "error" in row)):
            raise UserError(f'{path}, line {number}: expected {{"file": ..., "score": number}}, found {short(row)}')
        for known in (scores, bad, of):
            known.pop(file, None)
        if isinstance(row.get("of"), str):
            of[file] = row["of"]
        if isinstance(score, int | float):
            scores[file] = float(score)
        else:
            bad[file] = str(row["error"])
    told = {name: header[name] for name in ("judge", "kind", "fingerprint", "role")}
    serves = header.get("serves")
    serves = tuple(map(str, serves)) if isinstance(serves, list) else ()
    return ScoreFile(**told, serves=serves, scores=scores, bad=bad, of=of)


def read_all_scores(folder: str | Path) -> dict[str, ScoreFile]:
    """All score files of a folder by the judge's name, sorted."""
    found = [read_scores(path) for path in sorted((Path(folder) / SCORES).glob("*.jsonl"))]
    return {scores.judge: scores for scores in found}


def append_scores(
    path: str | Path, lines: Sequence[tuple[str, float | str]], header: ScoreFile, of: Mapping[str, str] | None = None
) -> None:
    """Add scores, or why there is none, by file, and of what they are; the header comes first in a new file."""
    rows = [
        {"file": file, "score": found, **({"of": of[file]} if of and of.get(file) else {})}
        if isinstance(found, float)
        else {"file": file, "score": None, "error": found}
        for file, found in lines
    ]
    path = Path(path)
    begun = path.is_file() and b"\n" in path.read_bytes()[:4096]  # otherwise a header cut short, which is removed
    first = {**header.header(), **({"serves": list(header.serves)} if header.serves else {})}
    append_lines(path, rows if begun else [first, *rows])


# Folders that are compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One folder: what it shows and what judges said of it."""

    name: str
    folder: Path
    pictures: Mapping[tuple[str, int, int], Picture]
    settings: Mapping[str, object]
    scores: Mapping[str, ScoreFile]


def read_side(folder: str | Path) -> Side:
    """A picture folder with its scores.

    Raises:
        UserError: no manifest, missing pictures, or a damaged score file.
    """
    folder = Path(folder)
    pictures = read_manifest(folder)
    names = sorted({p.model for p in pictures})
    name = names[0] if len(names) == 1 and names[0] != UNNAMED else folder.name
    return Side(name, folder, {p.key: p for p in pictures}, read_settings(folder), read_all_scores(folder))


def differences(sides: Sequence[Side], allowed: bool) -> list[str]:
    """What differs between neighbours although it should not; ``UserError`` unless ``allowed``. Scores are not looked at."""
    found = []
    for a, b in pairwise(sides):
        lost, more = (next((k for k in x.pictures if k not in y.pictures), None) for x, y in ((a, b), (b, a)))
        for holder, other, key in ((a, b, lost), (b, a, more)):
            if key is not None:
                count = sum(k not in other.pictures for k in holder.pictures)
                found.append(
                    f"{count} of {len(holder.pictures)} pictures in {holder.folder} have no partner in {other.folder}, "
                    f"such as prompt {short(key[0])}, seed {key[1]}, index {key[2]}"
                )
        away = next((k for k in a.pictures if k in b.pictures and a.pictures[k].negative != b.pictures[k].negative), None)
        if away is not None:
            found.append(f"the negative prompts of {short(away[0])} differ in {a.folder} and {b.folder}")
        away = next((k for k in a.pictures if k in b.pictures and a.pictures[k].init_image != b.pictures[k].init_image), None)
        if away is not None:
            found.append(f"{short(away[0])} was edited from different pictures in {a.folder} and {b.folder}")
        sizes = [(k, *(_size(s.folder / s.pictures[k].file) for s in (a, b))) for k in a.pictures if k in b.pictures]
        apart = [(k, one, other) for k, one, other in sizes if one and other and one != other]
        if apart:
            key, one, other = apart[0]
            which = f"such as {short(key[0])}: {one} in {a.folder} and {other} in {b.folder}"
            found.append(f"{len(apart)} of {len(sizes)} pictures differ in size, {which}")
        for name in sorted((set(a.settings) | set(b.settings)) - {VERSIONS}):
            left, right = a.settings.get(name), b.settings.get(name)
            if left != right:
                found.append(f"{name} is {short(left)} in {a.folder} and {short(right)} in {b.folder}")
    if found and not allowed:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise UserError(
            f"the sides were not made alike: {'; '.join(found[:3])}{more}; generate them with the same prompts, seeds and "
            "settings, or compare what they share with --allow_different_settings true"
        )
    notes = [f"Not made alike: {text}." for text in found]
    if any(a.settings.get(VERSIONS) != b.settings.get(VERSIONS) for a, b in pairwise(sides)):
        notes.append("The sides were drawn with different versions of the libraries; see their settings.json.")
    return notes


def _size(file: Path) -> Shape | None:
    """Of its header; None where that cannot be read, which whoever looks at the picture will tell."""
    try:
        width, height = size_of(file)
    except ValueError:
        return None
    return Shape(height, width)


def _picture(where: str, row: JsonObject) -> Picture:
    def needed(name: str, kind: type[Value], otherwise: object = None) -> Value:
        value = otherwise if row.get(name) is None else row[name]
        if value is None and name not in row:
            has = short(", ".join(row), 100, quoted=False) or "nothing"
            raise UserError(f"{where}: {name} is missing; expected file, prompt and seed, found {has}")
        value = _whole(value) if kind is int else value
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            what = "text" if kind is str else "a whole number"
            raise UserError(f"{where}: {name} must be {what}, found {short(row.get(name))}")
        return value

    file, prompt = needed("file", str), needed("prompt", str)
    init_image = needed("init_image", str) if row.get("init_image") is not None else None
    for path in (file, init_image or ""):
        if reason := no_path(path):
            raise UserError(f"{where}: a picture is named {short(path, 40)}, {reason}")
        parts = path.replace("\\", "/").split("/")
        if path.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in path:
            raise UserError(f"{where}: {short(path)} leads outside the folder; paths must be relative and stay inside")
    negative, metadata = row.get("negative"), row.get("metadata") or {}
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{where}: negative must be text, found {short(negative)}")
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: metadata must be an object, found {short(metadata)}")
    return Picture(
        file=file,
        prompt=prompt,
        seed=needed("seed", int),
        index=needed("index", int, 0),
        model=needed("model", str, UNNAMED),
        negative=negative,
        metadata=metadata,
        init_image=init_image,
        shape=_shape(row),
    )


def _shape(row: JsonObject) -> Shape | None:
    """None also for what other programs write there: the file itself tells its size."""
    width, height = (_whole(row.get(name)) for name in ("width", "height"))
    return Shape(height, width) if isinstance(width, int) and isinstance(height, int) else None


def _whole(value: object) -> object:
    """A whole number as other programs write it, ``1.0`` or ``"1"``; anything else as it is."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return value
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        return int(value)  # all its digits, beyond what a float holds
    return int(number) if math.isfinite(number) and number.is_integer() else value
