"""``palate recipes``: list recipes, show one, copy one to edit, or write what an editor checks them by."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from palate.base.errors import UserError, nearest, short
from palate.runs import library
from palate.verbs import asks_help

USAGE = "palate recipes [WORD ...] | show NAME | copy NAME [FILE] | schema [FILE]"
ABOUT = """\
Lists the recipes by the model they train; with words, those in which all of them stand: palate recipes sdxl 24gb

show    prints a recipe
copy    writes it into a file to edit, then: palate train FILE.yaml
schema  prints (or writes) a JSON schema of recipes, by which editors complete and check them"""
ACTIONS = {"show": (2, 2), "copy": (2, 3), "schema": (1, 2)}
"""And how many words there may be, with its own."""


def main(words: list[str]) -> int:
    if words and asks_help(words):
        print(f"{USAGE}\n\n{ABOUT}")
        return 0
    action = words[0] if words else ""
    if action not in ACTIONS:
        _list([] if words == ["list"] else words)
        return 0
    least, most = ACTIONS[action]
    if not least <= len(words) <= most:
        raise UserError(f"expected: {USAGE}")
    if action == "show":
        print(library.find(words[1]).read_text(), end="")
    elif action == "copy":
        source = library.find(words[1])
        target = _new(words[2] if len(words) == 3 else source.name, source.name)
        target.write_text(source.read_text())
        print(f"wrote {target}; edit it, then: palate train {target} --output_dir out")
    else:
        _schema(words[1] if len(words) == 2 else None)
    return 0


def _list(words: list[str]) -> None:
    entries = library.entries()
    found = [entry for entry in entries if entry.has(words)]
    if not found:
        known = {word for entry in entries for word in entry.name.split("-")}
        raise UserError(f"no recipe named {short(' '.join(words))}{nearest(words[-1], known)}; 'palate recipes' lists all")
    width = max(len(entry.name) for entry in found)
    for number, (model, group) in enumerate(itertools.groupby(found, lambda entry: entry.model)):
        print(f"{'' if number == 0 else chr(10)}{model}")
        for entry in group:
            print(f"  {entry.name:<{width}}  {entry.about}")


def _schema(file: str | None) -> None:
    from palate.runs.schema import schema

    text = json.dumps(schema(), indent=1) + "\n"
    if file is None:
        print(text, end="")
        return
    target = _new(file, "palate.schema.json")
    target.write_text(text)
    print(f"wrote {target}; name it in the first line of a recipe: # yaml-language-server: $schema={target}")


def _new(name: str, inside: str) -> Path:
    """The file that is to be written, ``inside`` a folder; it may not be there."""
    target = Path(name)
    if target.is_dir():
        target = target / inside
    if target.exists():
        raise UserError(f"{target} exists; name another file")
    return target
