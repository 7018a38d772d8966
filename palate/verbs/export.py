"""``palate export``: what was trained, in the layouts of other programs."""

from __future__ import annotations

import sys

from palate.base.errors import UserError
from palate.base.options import checked, help_lines, overrides

USAGE = "palate export RUN|LORA --format FORMAT --output FILE|DIR [--option value ...]"


def main(words: list[str]) -> int:
    from palate.runs import export

    if not words or "-h" in words or "--help" in words:
        print("\n".join([USAGE, "", *help_lines(export.ExportOptions)]))
        return 0
    if words[0].startswith("--"):
        raise UserError(f"palate export expects the folder of a run, or a LoRA, first: {USAGE}")
    options = checked(export.ExportOptions, overrides(words[1:]), "palate export")
    for line in export.export(words[0], options, progress=sys.stderr.isatty()):
        print(line)
    return 0
