"""``palate evaluate``: compare base and tuned model of a finished run again."""

from __future__ import annotations

import shlex
from pathlib import Path

from palate.base.errors import UserError
from palate.base.options import overrides


def main(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        raise UserError("palate evaluate expects the folder of a finished run")
    from palate.runs import recipe
    from palate.runs.compare import evaluate

    folder = Path(words[0])
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds no recipe.yaml; expected the output folder of palate train")
    made = recipe.load(str(folder / "recipe.yaml"), {**overrides(words[1:]), "output_dir": str(folder)})
    evaluate(made, command=shlex.join(["palate", "evaluate", *words]))
    return 0
