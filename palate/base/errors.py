"""Mistakes of the user, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What came, what was expected, what to do. The command line prints it on one line and exits with 2."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the closest known one, and all of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f" ({hint}choose from {', '.join(known)})"


def first_line(error: BaseException) -> str:
    """The beginning of a library's message; of an error without one, its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
