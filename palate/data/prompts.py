"""Prompts from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """What is asked for, and what its list tells about it."""

    text: str
    negative: str | None = None
    """What the picture should not show; the caller's own default unless given."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Such as ``category`` and ``challenge``; handed to rewards, and kept in manifests."""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file (one a line) or of a JSONL file (one object with "prompt" a line), in order.

    JSONL is recognised by its ending or by a first line that is a JSON object. Blank lines are skipped, duplicates kept.
    Raises ``UserError`` for a missing, unreadable or empty file, and for a line of JSONL without a prompt.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected a text file with one prompt a line, or JSONL with 'prompt'") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a file of prompts") from None
    # Not splitlines(): it also breaks at characters that may stand inside a prompt.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path} has no prompts: write one a line")
    if path.suffix == ".jsonl" or _is_object(lines[0][1]):
        return [_prompt(path, number, line) for number, line in lines]
    if path.suffix == ".json":
        raise UserError(f"{path} is JSON, but not one object a line: convert it to JSONL with 'prompt', or to plain text")
    if path.suffix in (".tsv", ".csv", ".parquet"):
        raise UserError(f"{path} is a table: write its column of prompts to a text file, one prompt a line")
    return [line for _, line in lines]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _prompt(path: Path, number: int, line: str) -> str:
    if not _is_object(line):
        raise UserError(f'{path}, line {number}: not a JSON object; expected one such as {{"prompt": "a red boat"}} a line')
    row = json.loads(line)
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        columns = ", ".join(sorted(row)) or "none"
        raise UserError(f"{path}, line {number}: 'prompt' must be a non-empty string, found {prompt!r} (columns: {columns})")
    return prompt.strip()
