"""``palate evaluate``: compare base and tuned model of a finished run again."""

from __future__ import annotations

import shlex
from pathlib import Path

from palate.base.errors import UserError
from palate.base.options import help_lines, overrides
from palate.verbs import asks_help

USAGE = "palate evaluate RUN [--option value ...]"
BESIDE = (
    *("pretrained_model_name_or_path", "revision", "variant", "pretrained_lora", "train_data", "cache_dir"),
    *("quantize", "mixed_precision", "resolution"),
)
"""Of what training was told: where things lie on this machine, and how pictures are drawn. The rest made the weights."""


def main(words: list[str]) -> int:
    if asks_help(words):
        from palate.runs.sections import EvaluationOptions

        about = ["RUN is the folder of a finished run. Where its model lies elsewhere by now, or for other pictures, also:"]
        about.append(", ".join(BESIDE))
        print("\n".join([USAGE, "", *about, "", *help_lines(EvaluationOptions)]))
        return 0
    if not words[0].strip():
        raise UserError(f"palate evaluate was given an empty name; expected {USAGE}")
    if words[0].startswith("-"):
        raise UserError(f"palate evaluate expects the folder of a finished run first: {USAGE}")
    from palate.runs import recipe
    from palate.runs.compare import evaluate

    folder = Path(words[0])
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} holds no recipe.yaml; expected the output folder of palate train")
    given = overrides(words[1:])
    for key in given:
        name = key.rpartition(".")[2]
        known = recipe.OPTIONS.get(name, "evaluation")  # of what is unknown the recipe tells
        if key.startswith(("objective", "space")) or (known != "evaluation" and name not in BESIDE):
            raise UserError(
                f"--{key} is of training, which is over; palate evaluate takes what its help lists, such as --judges, and "
                + ", ".join(BESIDE)
            )
    made = recipe.load(str(folder / "recipe.yaml"), {**given, "output_dir": str(folder)})
    evaluate(made, command=shlex.join(["palate", "evaluate", *words]))
    return 0
