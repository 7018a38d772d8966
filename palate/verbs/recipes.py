"""``palate recipes``: list recipes, show one, or copy one to edit."""

from __future__ import annotations

from pathlib import Path

from palate.base.errors import UserError
from palate.verbs import asks_help

USAGE = "palate recipes [list | show NAME | copy NAME [FILE]]"


def main(words: list[str]) -> int:
    from palate.runs import recipe

    if words and asks_help(words):
        print(USAGE)
        return 0
    if not words or words == ["list"]:
        for name, path in recipe.built_in().items():
            about = path.read_text().partition("\n")[0].lstrip("# ")
            print(f"{name:<24} {about}")
        return 0
    if words[0] == "show" and len(words) == 2:
        print(recipe.find(words[1]).read_text(), end="")
        return 0
    if words[0] == "copy" and len(words) in (2, 3):
        source = recipe.find(words[1])
        target = Path(words[2] if len(words) == 3 else source.name)
        if target.is_dir():
            target = target / source.name
        if target.exists():
            raise UserError(f"{target} exists; name another file")
        target.write_text(source.read_text())
        print(f"wrote {target}; edit it, then: palate train {target} --output_dir out")
        return 0
    raise UserError(f"expected: {USAGE}")
