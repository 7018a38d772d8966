"""Mistakes of the user, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import cast


class UserError(Exception):
    """What came, what was expected, what to do. The command line prints it on one line and exits with 2."""


LISTED = 160
"""Characters that a list of all choices may take; of a longer one the nearest are named."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the closest known one, and all of them, or where they are many, three."""
    name, known = str(name)[:100], sorted(short(str(choice), 60, quoted=False) for choice in choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(", ".join(known)) <= LISTED:
        return f" ({hint}choose from {', '.join(known)})"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return f" ({hint}the nearest of {len(known)} are {', '.join(near)})"


def short(value: object, most: int = 80, *, quoted: bool = True) -> str:
    """A value as a message shows it: on one line, and of a long one the beginning."""
    # Of what may be megabytes only the beginning is written out.
    beginning = value[: 4 * most] if isinstance(value, str | bytes) else value
    try:
        text = repr(beginning) if quoted else " ".join(str(beginning).split())
    except ValueError:  # a whole number of more digits than Python writes
        text = "a very large number"
    return text if len(text) <= most else text[: most - 3] + "..."


def broken(value: object) -> bool:
    """Whether a text in it is no valid Unicode: half a character (a lone surrogate), which no file can hold.

    JSON may name one, cut out of the middle of an emoji; and Python makes them of names that are not in UTF-8.
    """
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if not one.isascii() and any("\ud800" <= letter <= "\udfff" for letter in one):
                return True
        elif isinstance(one, Mapping):
            waiting += [part for pair in cast("Mapping[object, object]", one).items() for part in pair]
        elif isinstance(one, list | tuple):
            waiting += cast("Sequence[object]", one)
    return False


def said(error: BaseException, most: int = 160) -> str:
    """What a library or a function of the user's says of its failure, on one line; its type where it says nothing."""
    return short(str(error), most, quoted=False) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The beginning of a library's message, on one line; of an error without one, its type.

    Where a line ends with a colon the reason stands on the next, which is told too. What is longer than 200 characters loses
    its middle: paths stand there, and reasons at the end.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = next((number for number, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    text = " ".join(lines[: told + 1])
    return text if len(text) <= 200 else f"{text[:120]}...{text[-77:]}"
