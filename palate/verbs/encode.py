"""``palate encode``: fill the cache of a recipe before it is trained."""

from __future__ import annotations

from dataclasses import dataclass

from palate.base.errors import UserError
from palate.base.machine import part_of
from palate.base.options import checked, help_lines, overrides
from palate.verbs import asks_help

USAGE = "palate encode RECIPE [--shard I/N] [--option value ...]"
ABOUT = """\
Encodes the pictures and prompts that 'palate train RECIPE' with the same options learns from, into its cache_dir. What is
there already is not encoded again, so it can be stopped and goes on; training may run beside it. The options of the recipe
are those of 'palate train --help all', and besides:
"""


@dataclass(frozen=True)
class EncodeOptions:
    """Which part is encoded."""

    shard: str = "1/1"
    """``I/N``: the I-th of N parts (1/4, 2/4, ...), for as many machines that share ``cache_dir``, or whose files (``*.arrow``)
    are copied into one folder afterwards. All processes of a machine share its part: ``accelerate launch -m palate encode``."""


def main(words: list[str]) -> int:
    if asks_help(words):
        print("\n".join([USAGE, "", *ABOUT.splitlines(), *help_lines(EncodeOptions)]))
        return 0
    if words[0].startswith("--"):
        raise UserError("palate encode expects a recipe first, such as: palate encode miniature-dpo --cache_dir DIR")
    from palate.runs import recipe

    given = overrides(words[1:])
    part = part_of(
        checked(EncodeOptions, {name: given.pop(name) for name in ("shard",) if name in given}, "palate encode").shard
    )
    made = recipe.load(words[0], given)
    from palate.runs.encode import encode

    told = encode(made, part)
    from palate.base.machine import is_main

    if is_main():
        print(told)
    return 0
