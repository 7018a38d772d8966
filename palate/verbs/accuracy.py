"""``palate accuracy``: how often judges and tuned models prefer what people preferred."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from palate.verbs import carry_out

if TYPE_CHECKING:
    from palate.runs.accuracy import AccuracyOptions

USAGE = "palate accuracy PAIRS --judges '[pickscore]' --model RUN [--option value ...]"


def main(words: list[str]) -> int:
    from palate.runs.accuracy import AccuracyOptions

    about = ("PAIRS is a set of labelled pairs, as palate train reads it.", "")
    return carry_out(words, AccuracyOptions, _measure, usage=USAGE, about=about, first="a set of pairs")


def _measure(first: list[str], options: AccuracyOptions) -> None:
    from palate.evaluation.tables import columns
    from palate.runs.accuracy import measure

    found, about = measure(first[0], options, progress=sys.stderr.isatty())
    for row in about["bad_rows"]:
        print(f"skipped {row}", file=sys.stderr)
    for reason, number in about["left_out"].items():
        print(f"{number} {reason}", file=sys.stderr)
    rows = [("who", "accuracy", "95 % interval", "own ties")]
    for one in found:
        rate = one.accuracy
        interval = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"
        rows.append((one.name, f"{100 * rate.rate:.1f} %", interval, str(rate.ties)))
    print("\n".join(columns(rows)))
    pairs = about["pairs"] - about["ties"]
    print(f"{pairs} pairs of {about['prompts']} prompts ({about['ties']} ties left out); see {options.output}")
