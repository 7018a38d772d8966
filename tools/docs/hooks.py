"""What the documentation site is made of beside docs/: the README as its first page, and the options from their records."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from palate import spaces
from palate.base.options import OneOf, Range, as_yaml, default_of, field_docs, ranges
from palate.runs.methods import SPACES, objectives
from palate.runs.recipe import RECORDS
from palate.verbs.every import records
from palate.verbs.table import GROUPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Pages beside the README that belong to the site too."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no file in docs/."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", content=_from_root("README.md")))
    for name in ELSEWHERE:
        files.append(File.generated(config, name, content=_from_root(name)))
    files.append(File.generated(config, "options.md", content=options_page()))
    return files


def _from_root(name: str) -> str:
    """A page of the repository's root, with its links as they are from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text).replace('src="docs/', 'src="')


def options_page() -> str:
    """Every option of every verb, from the records that check them."""
    lines = ["# All options", "", "Made from the records that check them; `palate VERB --help` tells the same.", ""]
    lines += ["## palate train", "", *_named("objective", {name: function for name, (function, _) in objectives().items()})]
    lines += _named("space", {name: getattr(spaces, name) for name in SPACES})
    for name, kind in RECORDS.items():
        lines += [f"### {name}", "", " ".join(str(kind.__doc__).partition("\n\n")[0].split()), "", *_table(kind)]
    for verb in (verb for group in GROUPS.values() for verb in group if verb != "train"):
        for heading, kind in records(verb).items():
            lines += [f"## {heading or f'palate {verb}'}", "", *_table(kind)]
    return "\n".join(lines)


def _named(what: str, makers: dict[str, Callable[..., object]]) -> list[str]:
    rows = ["| name | keywords and their defaults |", "| --- | --- |"]
    for name, make in makers.items():
        found = [p for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
        told = [f"`{p.name}`, needed" if p.default is p.empty else f"`{p.name}: {as_yaml(p.default)}`" for p in found]
        rows.append(f"| `{name}` | {', '.join(told) or 'none'} |")
    return [f"### {what}", "", f"`--{what} NAME`, its keywords `--{what}.KEYWORD VALUE`.", "", *rows, ""]


def _table(kind: type) -> list[str]:
    about, admitted = field_docs(kind), ranges(kind)
    rows = ["| option | default | values | meaning |", "| --- | --- | --- | --- |"]
    for leaf in dataclasses.fields(kind):
        one = admitted.get(leaf.name)
        values = (
            ", ".join(f"`{c}`" for c in one.choices)
            if isinstance(one, OneOf)
            else one.expected
            if isinstance(one, Range)
            else ""
        )
        needed = leaf.default is leaf.default_factory is dataclasses.MISSING
        default = "needed" if needed else f"`{as_yaml(default_of(leaf))}`"
        meaning = about.get(leaf.name, "").replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{leaf.name}` | {default} | {values} | {meaning} |")
    return [*rows, ""]
