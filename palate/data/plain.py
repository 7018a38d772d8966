"""Folders of plain pictures, whoever made them: what each shows, as a text beside it, a table, its program or its name says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from palate.base.errors import UserError
from palate.data import formats, values
from palate.data.metadata import read_drawn
from palate.data.values import BadValueError


@dataclass(frozen=True)
class Plain:
    """A picture with its words."""

    file: str
    """Path relative to the folder, with ``/``."""
    prompt: str
    told_by: str
    """``a text beside``, ``a table``, ``the picture itself`` or ``its name``."""
    negative: str | None = None
    seed: int | None = None
    model: str | None = None


@dataclass(frozen=True)
class PlainFolder:
    """The pictures of a folder and all below it, by name, and those of which nothing tells the prompt."""

    pictures: list[Plain]
    silent: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """Who told the prompts."""
        told = Counter(p.told_by for p in self.pictures)
        return ", ".join(f"{count} by {who}" for who, count in told.items())


def read_plain(folder: str | Path, *, names: bool = False) -> PlainFolder:
    """The pictures of a folder without a manifest; with ``names``, those of which nothing else tells are called by their file.

    Raises:
        UserError: no pictures; preference pairs; a text or table that cannot be read, or leads outside the folder.
    """
    folder = Path(folder)
    tables = [folder / name for name in formats.FOLDER_FILES if (folder / name).is_file()]
    found = _of_table(folder, tables[0]) if tables else _of_files(folder, names)
    if not found.pictures and not found.silent:
        raise UserError(f"{folder} holds no pictures")
    return found


def words_of_name(stem: str) -> str:
    """``00012-345-a_red-boat (2)`` as ``a red boat``; a name without words as it is."""
    counted = re.sub(r"^(?:\d+\s*[-_]+\s*)+|(?:\s*[-_]+\s*\(?\d+\)?|\s*\(\d+\))+[-_]*$", "", stem)
    words = re.sub(r"[\s_]+|(?<=\w)-(?=\w)", " ", counted).strip()
    return words if re.search(r"[^\W\d_]", words) else stem


def _of_files(folder: Path, names: bool) -> PlainFolder:
    captioned = formats.Captioned.of(folder)
    pictures = []
    for picture, text in captioned.pairs:
        try:
            prompt = formats.caption(picture, text)
        except BadValueError as bad:
            raise UserError(f"{picture}: its prompt {bad.reason}") from None
        pictures.append(_plain(folder, picture, prompt, "a text beside" if text else "the picture itself"))
    silent = {p.relative_to(folder).as_posix(): p.stem for p in captioned.silent}
    if names:
        pictures += [Plain(file, words_of_name(stem), "its name") for file, stem in silent.items()]
        silent = {}
    return PlainFolder(sorted(pictures, key=lambda p: p.file), list(silent))


def _of_table(folder: Path, table: Path) -> PlainFolder:
    file = formats.open_file(formats.Place(table), {}, {})
    if not file.single:
        raise UserError(f"{table} names preference pairs; expected single pictures, with their prompts")
    return PlainFolder(list(_rows(folder, file)))


def _rows(folder: Path, file: formats.File) -> Iterator[Plain]:
    for number, row in enumerate(formats.rows(file), start=1):
        try:
            if isinstance(row, BadValueError):
                raise row
            prompt = values.prompt(file.names["prompt"], row.get(file.names["prompt"]))
            name = row.get(file.names["image"])
            path = folder / name if isinstance(name, str) else folder
            if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
                raise BadValueError(file.names["image"], "names no picture in the folder")
        except BadValueError as bad:
            raise UserError(f"{file.path}, row {number}, column {bad.column}: {bad.reason}") from None
        yield _plain(folder, path, prompt, "a table")


def _plain(folder: Path, picture: Path, prompt: str, told_by: str) -> Plain:
    file, drawn = picture.relative_to(folder).as_posix(), read_drawn(picture)
    if drawn is None:
        return Plain(file, prompt, told_by)
    return Plain(file, prompt, told_by, drawn.negative, drawn.seed, drawn.model)
