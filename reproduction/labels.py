"""Claim: labels of a judge serve as well as people's votes. Four judges label the same pairs, and four evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from runs import JUDGES, Run, locked, palate, table
from short import against_base, short


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    found = short("dpo", "miniature-dpo", seeds)
    for judge in JUDGES:
        data = {"train_data": file_of(judge)}
        found += short(f"labelled-{judge}", "miniature-dpo", seeds, data, before=partial(label, judge))
    return found


def file_of(judge: str) -> str:
    return f"labelled-{judge}.parquet"


def label(judge: str, root: Path) -> None:
    path = root / file_of(judge)
    with locked(path):
        if not path.is_file():
            palate(["label", "miniature-pairs", "--judges", f"[{judge}]", "--output", str(path)], root / "label.txt")


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    names = {"people's votes": "dpo"} | {judge: f"labelled-{judge}" for judge in JUDGES}
    rows = [[label, *against_base(measured, name, seeds)] for label, name in names.items()]
    return table(["labelled by", *JUDGES], [r for r in rows if len(r) > 1])
