"""``palate label``: judges' opinions as preference pairs that ``palate train`` reads."""

from __future__ import annotations

import sys
from pathlib import Path

from palate.base.errors import UserError
from palate.base.options import checked, help_lines, overrides

USAGE = "palate label DIR|PAIRS [DIR ...] --judges '[pickscore]' --output pairs.parquet [--option value ...]"


def main(words: list[str]) -> int:
    from palate.runs import label

    if not words or "-h" in words or "--help" in words:
        print("\n".join([USAGE, "", "DIR: picture folders with two candidates or more a prompt, between them; PAIRS: a set."]))
        print("\n".join(["", *help_lines(label.LabelOptions)]))
        return 0
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    sources, options = words[:first], checked(label.LabelOptions, overrides(words[first:]), "palate label")
    if not sources:
        raise UserError(f"palate label expects picture folders or a set of pairs first: {USAGE}")
    folders = [Path(source).expanduser() for source in sources]
    if all((folder / "manifest.jsonl").is_file() for folder in folders):
        counts = label.label_folders(folders, options, progress=sys.stderr.isatty())
    elif len(sources) == 1:
        counts = label.relabel(sources[0], options, progress=sys.stderr.isatty())
    else:
        odd = next(folder for folder in folders if not (folder / "manifest.jsonl").is_file())
        raise UserError(f"{odd} has no manifest.jsonl; expected several picture folders, or one set of pairs")
    print(f"{counts.sentence()}; see {options.output}")
    return 0
