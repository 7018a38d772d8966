"""Question: what do pairs of several shapes teach that the same pairs as squares do not? Judged on oblong pictures.

``miniature-buckets`` and the same with ``--resolution 64 --buckets false``, at equal updates, drawn tall and wide in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runs import Run, base_name, table, versus
from short import PROMPTS, short

MIXED = "miniature-unseen-mixed"
FORMS = {"own shapes": {}, "squares": {"resolution": 64, "buckets": "false"}}


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [
        run
        for form, given in FORMS.items()
        for run in short(named(form), "miniature-buckets", seeds, given, prompts=MIXED, cost=240)
    ]


def named(form: str) -> str:
    return f"shapes-{form.split()[-1]}"


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    base = base_name("mini-sd", MIXED, PROMPTS)
    own, squares = ([f"{named(form)}-{seed}" for seed in seeds] for form in FORMS)
    rows = [
        [form, *versus(measured, [(base, run) for run in names], MIXED)]
        for form, names in zip(FORMS, (own, squares), strict=True)
    ]
    rows += [["own shapes against squares", *versus(measured, list(zip(squares, own, strict=True)), MIXED)]]
    return table(["trained on", "held out", "preference", "prompt", "looks"], [r for r in rows if len(r) > 1])
