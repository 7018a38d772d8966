"""JSON objects and JSONL (one object a line) on disk: what is damaged is told with its file and line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from palate.base.errors import UserError, broken, short
from palate.base.files import write_atomically

JsonObject = dict[str, Any]
"""A JSON object; what its values are is checked by whoever reads them."""


BROKEN = "a text that is not valid Unicode (a lone surrogate)"


def _once(pairs: list[tuple[str, Any]]) -> JsonObject:
    """An object, unless a name comes twice: JSON leaves open which value counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {short(next(name for name in names if names.count(name) > 1), 40)} twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def decode(text: str | bytes) -> Any:
    """Any JSON value, in UTF-8.

    Raises:
        ValueError: "not JSON" or "not in UTF-8", and why.
    """
    try:
        return DECODER.decode(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not in UTF-8 (byte {error.object[error.start]:#x}), in which JSON is written") from None
    except (ValueError, RecursionError) as error:  # nested a thousand deep is no ValueError
        raise ValueError(f"not JSON ({error})") from None


def lines(text: str) -> list[tuple[int, str]]:
    """The lines of ``text`` that are not blank, stripped, with their numbers from 1."""
    # Not splitlines(): it also breaks at characters that may stand inside a prompt.
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def read_object(path: str | Path, *, optional: bool = False, otherwise: str = "write it again, or delete it") -> JsonObject:
    """A file that holds one JSON object; with ``optional``, an empty one where there is no file.

    Raises:
        UserError: anything else; ``otherwise``, what to do, ends the message.
    """
    path = Path(path)
    if optional and not path.exists():
        return {}
    try:
        found = decode(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {otherwise}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, expected one JSON object; {otherwise}")
    if broken(cast("object", found)):
        raise UserError(f"{path} holds {BROKEN}; {otherwise}")
    return cast("JsonObject", found)


def write_object(path: str | Path, content: Mapping[str, Any]) -> None:
    """One JSON object, indented, atomically."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_lines(
    path: str | Path, *, may_be_cut: bool = False, expected: str = "JSON objects in UTF-8, one a line"
) -> Iterator[tuple[int, JsonObject]]:
    """The objects of a JSONL file with the numbers of their lines; blank lines are skipped.

    Args:
        may_be_cut: leave out a damaged last line that has no end, as a killed process leaves it.
        expected: ends the message where the file cannot be read.

    Raises:
        UserError: no such file, or a line that is no JSON object.
    """
    path = Path(path)
    try:
        told = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); expected {expected}") from error
    for number, line in enumerate(told, start=1):
        if not line.strip():
            continue
        try:
            row = decode(line)  # one by one: what was cut short may end inside a character
        except ValueError as error:
            if may_be_cut and number == len(told):
                return
            raise UserError(f"{path}, line {number}: {error}; mend or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, one a line, found {short(row)}")
        if broken(cast("object", row)):
            raise UserError(f"{path}, line {number}: holds {BROKEN}; mend or remove the line")
        yield number, row


def dump_line(row: Mapping[str, Any]) -> str:
    """One line of JSONL, with its end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def append_lines(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines in one write, after removing what a killed process may have left of a line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        _mend(stream)
        stream.write("".join(map(dump_line, rows)).encode())
        stream.flush()
        os.fsync(stream.fileno())


def _mend(stream: BinaryIO) -> None:
    end = stream.seek(0, os.SEEK_END)
    if end == 0:
        return
    stream.seek(end - 1)
    if stream.read(1) == b"\n":
        return
    stream.seek(0)
    content = stream.read()
    last = content.rpartition(b"\n")[2]
    try:
        decode(last)
    except ValueError:
        stream.truncate(len(content) - len(last))
        return
    stream.write(b"\n")  # written by hand, without the end of its last line
