"""Question: 400 votes on 400 pairs, or several on each of fewer; and what do ties cost? DPO, equal updates.

People are the simulated ones who voted on the miniature's pairs, each vote one of twelve by chance. They call a tie what they
can hardly tell apart; ties teach nothing and are dropped. Several votes on a pair make a majority. Each seed takes other pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from runs import Run, table
from short import against_base, short

VOTES = 400
MARGIN = 0.12
VARIANTS = {
    "one on each of 400": (1, MARGIN),
    "three on each of 133, the majority": (3, MARGIN),
    "nine on each of 44, the majority": (9, MARGIN),
    "one on each of 400, no ties allowed": (1, 0.0),
    "one on each of 400, a tie four times as readily": (1, 4 * MARGIN),
}
"""Raters of a pair, and what felt difference is a tie to them."""


def named(variant: str) -> str:
    raters, margin = VARIANTS[variant]
    return f"raters-{raters}-margin-{margin:g}"


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [
        run
        for variant in VARIANTS
        for seed in seeds
        for run in short(
            named(variant),
            "miniature-dpo",
            [seed],
            {"train_data": f"{named(variant)}-{seed}.parquet"},
            before=partial(vote, variant, seed),
        )
    ]


def vote(variant: str, seed: int, root: Path) -> None:
    """So many of the voted pairs by chance, voted on anew."""
    import numpy as np
    import pyarrow.parquet as pq
    from worldmaking import People

    from palate.miniature import world

    raters, margin = VARIANTS[variant]
    rng = np.random.default_rng(seed)
    table = pq.read_table(world.pairs())
    rows = table.take(rng.permutation(table.num_rows)[: VOTES // raters]).to_pylist()
    people = People()
    for row in rows:
        votes = people.votes(row["caption"], (row["jpg_0"], row["jpg_1"]), raters, margin, rng)
        first = 0.5 + 0.5 * np.sign(np.mean(votes) - 0.5)
        row |= {"label_0": float(first), "label_1": float(1 - first)}
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), root / f"{named(variant)}-{seed}.parquet")


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = [[variant, *against_base(measured, named(variant), seeds)] for variant in VARIANTS]
    return table(["votes", "held out", "preference", "prompt", "looks"], [row for row in rows if row[1:]])
