"""What ``palate VERB`` does: one module a verb, each with ``main(words) -> int``, a few lines over a library call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from palate.base.errors import UserError

Options = TypeVar("Options")


def asks_help(words: Sequence[str]) -> bool:
    """Whether the words after a verb ask how it is used."""
    return not words or "-h" in words or "--help" in words


def carry_out(
    words: Sequence[str],
    kind: type[Options],
    work: Callable[[list[str], Options], None],
    *,
    usage: str,
    about: Sequence[str] = (),
    first: str | None = None,
    several: bool = False,
) -> int:
    """Print the help of a verb, or call ``work`` with what comes before the options, and the options checked.

    Args:
        usage: ``palate VERB WHAT [--option value ...]``, the first line of the help.
        about: lines between it and the options, the dataclass ``kind``.
        first: what comes before the options, named in the message where it is missing; the help is printed there without it.
        several: whether more than one word may come before the options.

    Raises:
        UserError: nothing before the options, or a mistake in them.
    """
    from palate.base.options import checked, help_lines, overrides  # which loads YAML; palate --help does without

    command = " ".join(usage.split()[:2])
    before = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    before = before if several else before[:1]
    if asks_help(words) or (not before and first is None):
        print("\n".join([usage, "", *about, *help_lines(kind)]))
        return 0
    if not before:
        raise UserError(f"{command} expects {first} first: {usage}")
    if not all(word.strip() for word in before):
        raise UserError(f"{command} was given an empty name; expected {usage}")
    work(before, checked(kind, overrides(words[len(before) :]), command))
    return 0
