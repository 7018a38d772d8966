"""``palate accuracy``: how often judges and tuned models prefer what people preferred."""

from __future__ import annotations

import sys

from palate.base.errors import UserError
from palate.base.options import checked, help_lines, overrides

USAGE = "palate accuracy PAIRS --judges '[pickscore]' --model RUN [--option value ...]"


def main(words: list[str]) -> int:
    from palate.runs.accuracy import AccuracyOptions, measure

    if not words or "-h" in words or "--help" in words:
        print("\n".join([USAGE, "", "PAIRS is a set of labelled pairs, as palate train reads it.", ""]))
        print("\n".join(help_lines(AccuracyOptions)))
        return 0
    if words[0].startswith("--"):
        raise UserError(f"palate accuracy expects a set of pairs first: {USAGE}")
    options = checked(AccuracyOptions, overrides(words[1:]), "palate accuracy")
    from palate.evaluation.tables import columns

    found, about = measure(words[0], options, progress=sys.stderr.isatty())
    for row in about["bad_rows"]:
        print(f"skipped {row}", file=sys.stderr)
    rows = [("who", "accuracy", "95 % interval", "own ties")]
    for one in found:
        rate = one.accuracy
        interval = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"
        rows.append((one.name, f"{100 * rate.rate:.1f} %", interval, str(rate.ties)))
    print("\n".join(columns(rows)))
    pairs = about["pairs"] - about["ties"]
    print(f"{pairs} pairs of {about['prompts']} prompts ({about['ties']} ties left out); see {options.output}")
    return 0
