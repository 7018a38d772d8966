"""``palate label``: judges' opinions as preference pairs that ``palate train`` reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from palate.base.errors import UserError
from palate.verbs import carry_out

if TYPE_CHECKING:
    from palate.runs.label import LabelOptions

USAGE = "palate label DIR|PAIRS [DIR ...] --judges '[pickscore]' --output pairs.parquet [--option value ...]"


def main(words: list[str]) -> int:
    from palate.runs.label import LabelOptions

    about = ("DIR: picture folders with two candidates or more a prompt, between them; PAIRS: a set.", "")
    return carry_out(
        words, LabelOptions, _label, usage=USAGE, about=about, first="picture folders or a set of pairs", several=True
    )


def _label(sources: list[str], options: LabelOptions) -> None:
    from palate.evaluation.manifest import is_picture_folder
    from palate.runs.label import label_folders, relabel

    folders = [Path(source).expanduser() for source in sources]
    odd = [folder for folder in folders if not is_picture_folder(folder)]
    if not odd:
        counts = label_folders(folders, options, progress=sys.stderr.isatty())
    elif len(sources) == 1:
        counts = relabel(sources[0], options, progress=sys.stderr.isatty())
    else:
        raise UserError(f"{odd[0]} has no manifest.jsonl; expected several picture folders, or one set of pairs")
    print(f"{counts.sentence()}; see {options.output}")
