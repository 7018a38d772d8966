"""``palate export``: what was trained, in the layouts of other programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from palate.verbs import carry_out

if TYPE_CHECKING:
    from palate.runs.export import ExportOptions

USAGE = "palate export RUN|LORA --format FORMAT --output FILE|DIR [--option value ...]"


def main(words: list[str]) -> int:
    from palate.runs.export import ExportOptions

    return carry_out(words, ExportOptions, _export, usage=USAGE, first="the folder of a run, or a LoRA,")


def _export(first: list[str], options: ExportOptions) -> None:
    from palate.runs.export import export

    for line in export(first[0], options, progress=sys.stderr.isatty()):
        print(line)
