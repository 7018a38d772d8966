"""``palate compare``: which of two or more folders of pictures is better, by the judges that scored them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from palate.base.errors import UserError
from palate.base.files import check_folder
from palate.base.machine import device
from palate.base.options import Seed, at_least, check_ranges
from palate.verbs import carry_out

USAGE = "palate compare BASE OTHER [OTHER ...] [--option value ...]: folders with manifest.jsonl and scores/"


@dataclass(frozen=True)
class Options:
    judges: tuple[str, ...] = ()
    """Whom to ask; all that have scored every folder unless named: ``'[pickscore:FOLDER, jpeg_compressibility]'``. What a
    named judge has not scored yet, it scores first."""
    trained_on: tuple[str, ...] = ()
    """Judges, or kinds of judges, whose taste training followed: they are marked and come last."""
    output_dir: str = "comparison"
    """Where comparison.json and report.html are written."""
    allow_different_settings: bool = False
    """Compare what the folders have in common although prompts, seeds or settings differ; what differs is told."""
    unseen: bool = False
    """The prompts were in none of the training pairs: the headline may say so."""
    draws: Annotated[int, at_least(100, 10**6)] = 10_000
    """Of the bootstrap and the sign-flip test."""
    seed: Seed = 0
    """Of the same."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(words: list[str]) -> int:
    return carry_out(words, Options, _compare, usage=USAGE, first="two folders or more", several=True)


def _compare(folders: list[str], options: Options) -> None:
    if len(folders) < 2:
        raise UserError(f"palate compare needs two folders or more: the base first; only {folders[0]} was given")

    check_folder(options.output_dir, "output_dir")
    from palate.evaluation.folders import compare_folders, write_result
    from palate.evaluation.manifest import read_all_scores
    from palate.evaluation.report import chapter_of, write_report
    from palate.evaluation.tables import table
    from palate.names.judges import find_judges, score_folders

    known = [read_all_scores(folder) for folder in folders]
    missing = [name for name in options.judges if any(name not in scores for scores in known)]
    if missing:
        score_folders(find_judges(missing).values(), folders, device=device(), progress=sys.stderr.isatty())
    result = compare_folders(
        folders,
        judges=options.judges,
        trained_on=options.trained_on,
        allow_different_settings=options.allow_different_settings,
        unseen=options.unseen,
        draws=options.draws,
        seed=options.seed,
    )
    out = Path(options.output_dir)
    write_result(out / "comparison.json", result)
    write_report(out / "report.html", [chapter_of(out)])
    print(table(result))
    print(f"\nwrote {out / 'comparison.json'} and {out / 'report.html'}")
