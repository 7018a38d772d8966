"""What ``palate train --help`` tells: the few options that most runs need, or all; of a recipe, with its values."""

from __future__ import annotations

import textwrap
from pathlib import Path

from palate.base.options import as_yaml, help_lines, indented
from palate.runs import library
from palate.runs.methods import SPACES, objectives
from palate.runs.recipe import OPTIONS, RECORDS, Recipe, load

FEW = {
    "what learns from what": (
        "pretrained_model_name_or_path",
        "train_data",
        "train_prompts",
        "rewards",
    ),
    "how": (
        "resolution",
        "learning_rate",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "rank",
        "mixed_precision",
        "seed",
    ),
    "where to, and what is shown": (
        "output_dir",
        "resume_from_checkpoint",
        "evaluation_prompts",
        "judges",
        "report_to",
    ),
}
"""Options that most runs set, by heading."""


def train_help(name: str | None = None, *, everything: bool = False) -> str:
    """The help of ``palate train``.

    name: of a recipe or its file, whose values are shown; of no recipe, it is as if it were not given.
    """
    recipe = load(name) if name is not None and _is_there(name) else None
    lines = [f"palate train {name} [--option value ...]" if recipe else "palate train RECIPE [--option value ...]", ""]
    if recipe is not None:
        lines += [*library.about(library.find(str(name))), ""]
    else:
        lines += [
            "RECIPE is a file.yaml, or one of those that 'palate recipes' lists:",
            "  palate train miniature-dpo --output_dir out/first                        the embedded model, minutes on a CPU",
            "  palate train sdxl-dpo-24gb --train_data my_pairs/ --output_dir out/mine  your own pairs of pictures",
            "  palate train ddpo-sd15-24gb --rewards aesthetic --output_dir out/nicer   no pairs, but a reward",
            "",
        ]
    given = {name: getattr(getattr(recipe, section), name) for name, section in OPTIONS.items()} if recipe else {}
    if not everything:
        for heading, names in FEW.items():
            lines += [heading]
            for option in names:
                lines += help_lines(RECORDS[OPTIONS[option]], given, [option])
            lines += [""]
        return "\n".join([*lines, *_method(recipe), "", _more(name if recipe else None)])
    for section, kind in RECORDS.items():
        lines += [section, *help_lines(kind, given), ""]
    return "\n".join([*lines, *_method(recipe)])


def _is_there(name: str) -> bool:
    return name in library.built_in() or (name.endswith((".yaml", ".yml")) and Path(name).is_file())


def _method(recipe: Recipe | None) -> list[str]:
    names = " | ".join((*objectives(), "package.module:function"))
    told = [
        "objective and space",
        *textwrap.wrap(f"--objective {names}", 120, initial_indent="  ", subsequent_indent=" " * 14),
    ]
    if recipe is None:
        told += indented(
            "Its keywords follow a point: --objective.beta 2000, or auto: chosen from the spread of errors, and shown."
        )
    else:
        told += indented(f"Here {as_yaml(recipe.objective)}; its keywords follow a point: --objective.beta 2000.")
    here = f" (here: {as_yaml(recipe.space)})" if recipe else ""
    return [
        *told,
        f"  --space {' | '.join(SPACES)}{here}",
        *indented("Where errors are measured. Keywords likewise: --space.layers mid."),
    ]


def _more(name: str | None) -> str:
    if name is None:
        return "All options: palate train --help all. Those of a recipe with its values: palate train RECIPE --help"
    return f"All options of it: palate train {name} --help all. To edit a copy: palate recipes copy {name}"
