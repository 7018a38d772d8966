"""``palate evaluate``: compare base and tuned model of a finished run again."""

from __future__ import annotations

import shlex
from pathlib import Path

from palate.base.errors import UserError
from palate.base.options import help_lines, overrides
from palate.verbs import asks_help

USAGE = "palate evaluate RUN [--option value ...]"


def main(words: list[str]) -> int:
    if asks_help(words):
        from palate.runs.sections import EvaluationOptions

        print("\n".join([USAGE, "", "RUN is the folder of a finished run.", "", *help_lines(EvaluationOptions)]))
        return 0
    if words[0].startswith("-"):
        raise UserError(f"palate evaluate expects the folder of a finished run first: {USAGE}")
    from palate.runs import recipe
    from palate.runs.compare import evaluate

    folder = Path(words[0])
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds no recipe.yaml; expected the output folder of palate train")
    made = recipe.load(str(folder / "recipe.yaml"), {**overrides(words[1:]), "output_dir": str(folder)})
    evaluate(made, command=shlex.join(["palate", "evaluate", *words]))
    return 0
