"""``palate report``: runs and comparisons as one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palate.verbs import carry_out

USAGE = "palate report FOLDER [FOLDER ...] [--option value ...]: of palate train or palate compare"


@dataclass(frozen=True)
class Options:
    output: str | None = None
    """The file to write; report.html in the folder unless given, or in the working directory for several folders."""


def main(words: list[str]) -> int:
    return carry_out(words, Options, _report, usage=USAGE, first="a folder or more", several=True)


def _report(folders: list[str], options: Options) -> None:
    from palate.evaluation.report import chapter_of, write_report

    chapters = [chapter_of(folder) for folder in folders]
    first = Path(folders[0])
    beside = (first if first.is_dir() else first.parent) if len(folders) == 1 else Path()
    path = Path(options.output).expanduser() if options.output else beside / "report.html"
    write_report(path, chapters)
    print(f"wrote {path}")
