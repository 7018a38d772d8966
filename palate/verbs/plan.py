"""``palate plan``: what a recipe will take, before it is run."""

from __future__ import annotations

from dataclasses import fields

from palate.base.errors import UserError
from palate.base.options import checked, help_lines, overrides
from palate.verbs import asks_help

USAGE = "palate plan RECIPE [--memory GB] [--processes N] [--measure true] [--option value ...]"
ABOUT = """\
Tells what 'palate train RECIPE' with the same options will take of memory, by part, of time and of disk, and what would make
it fit. It reads the model's configurations and counts the rows of the data; no weights are read, nothing is trained or written.
The options of the recipe are those of 'palate train --help all', and besides:
"""


def main(words: list[str]) -> int:
    from palate.base.machine import is_main
    from palate.runs.plan import PlanOptions, plan

    if asks_help(words):
        print("\n".join([USAGE, "", *ABOUT.splitlines(), *help_lines(PlanOptions)]))
        return 0
    if words[0].startswith("--"):
        raise UserError("palate plan expects a recipe first, such as: palate plan sdxl-dpo-16gb --train_data pairs/")
    from palate.runs import recipe

    given = overrides(words[1:])
    own = {field.name: given.pop(field.name) for field in fields(PlanOptions) if field.name in given}
    options = checked(PlanOptions, own, "palate plan")
    if is_main():  # of several processes, all of which would tell the same
        print("\n".join(plan(recipe.load(words[0], given), options)))
    return 0
