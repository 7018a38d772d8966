"""What is told of a library's message."""

from __future__ import annotations

import pytest

from palate.base.errors import first_line


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("no such file", "no such file"),
        ("\n  damaged header \n at byte 7\n", "damaged header"),
        ("The following keys are unknown: \n\n a.b, c.d\nmore", "The following keys are unknown: a.b, c.d"),
        ("Errors:\nin one part:\nsize mismatch\nin another", "Errors: in one part: size mismatch"),
        ("nothing follows:", "nothing follows:"),
        ("", "ValueError"),
        (" \n\t\n", "ValueError"),
        ("tabs\tand\r\nlines", "tabs and"),
    ],
)
def test_a_reason_is_not_cut_off_its_beginning(message, told):
    assert first_line(ValueError(message)) == told


@pytest.mark.parametrize("length", [199, 200, 201, 30_000])
def test_a_long_message_keeps_its_beginning_and_its_end(length):
    message = "cannot open " + "x" * (length - 22) + " (damaged)"
    told = first_line(ValueError(message))
    assert len(told) == min(length, 200)
    assert told.startswith("cannot open ")
    assert told.endswith("(damaged)")
