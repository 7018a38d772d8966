"""``palate train``: align a model."""

from __future__ import annotations

import shlex

from palate.base.errors import UserError
from palate.base.options import overrides
from palate.verbs import asks_help


def main(words: list[str]) -> int:
    if asks_help(words):
        from palate.runs.help import train_help

        named = words[0] if words and not words[0].startswith("-") else None
        print(train_help(named, everything="all" in words))
        return 0
    if words[0].startswith("--"):
        raise UserError("palate train expects a recipe first, such as: palate train miniature-dpo --output_dir out")
    from palate.runs import recipe

    made = recipe.load(words[0], overrides(words[1:]))
    from palate.runs.train import train

    train(made, command=shlex.join(["palate", "train", *words]))
    return 0
