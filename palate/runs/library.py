"""The recipes that come with Palate: names, files, and what each is for. Light: a list needs no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from palate.base.errors import UserError, nearest, short
from palate.base.options import parse

BUILT_IN = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Entry:
    """A recipe as the list shows it."""

    name: str
    about: str
    """The comment in its first line."""
    model: str
    """What it trains: ``mini-sd``, or a hub id."""

    def has(self, words: Sequence[str]) -> bool:
        """Whether every word stands in its name, comment or model, in any case."""
        return all(word.lower() in f"{self.name} {self.about} {self.model}".lower() for word in words)


def built_in() -> dict[str, Path]:
    """Names of the recipes that come with Palate."""
    return {path.stem: path for path in sorted(BUILT_IN.glob("*.yaml"), key=lambda path: path.stem)}


def find(name: str) -> Path:
    """A recipe by name or path."""
    known = built_in()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"no recipe file at {name}; 'palate recipes' lists those that come with Palate")
    raise UserError(f"no recipe named {short(name)}{nearest(name, known)}; or give the path of a .yaml file")


def about(path: Path) -> list[str]:
    """The comment with which a recipe begins, line by line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.lstrip("#").strip() for line in lines[:end]]


def entries() -> list[Entry]:
    """All recipes, the miniature's first, then by model."""
    found = []
    for name, path in built_in().items():
        text = path.read_text(encoding="utf-8")
        content = parse(text, str(path))
        assert isinstance(content, dict)
        found.append(Entry(name, text.partition("\n")[0].lstrip("# "), content["model"]["pretrained_model_name_or_path"]))
    return sorted(found, key=lambda entry: ("/" in entry.model, entry.model))
