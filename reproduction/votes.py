"""Question: how many votes does a result need? DPO on 50 to 800 single votes of simulated people, equal updates.

Each seed takes other votes. A vote is one rater's: noisy, of one taste among twelve, and now and then a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from runs import Run, pyplot, table
from short import against_base, short

from palate.miniature import world

SIZES = (50, 100, 200, 400, 800)


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    found = []
    for size in (50, 200, 800, 100, 400):
        for seed in seeds:
            file = f"votes-{size}-{seed}.parquet"
            found += short(f"votes-{size}", "miniature-dpo", [seed], {"train_data": file}, before=partial(some, size, seed))
    return found


def some(size: int, seed: int, root: Path) -> None:
    """So many rows of the voted pairs by chance."""
    import numpy as np
    import pyarrow.parquet as pq

    rows = pq.read_table(world.pairs())
    pq.write_table(
        rows.take(np.random.default_rng(seed).permutation(rows.num_rows)[:size]), root / f"votes-{size}-{seed}.parquet"
    )


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    found = {size: against_base(measured, f"votes-{size}", seeds) for size in SIZES}
    return table(["votes", "held out", "preference", "prompt", "looks"], [[n, *rates] for n, rates in found.items() if rates])


def plot(measured: Path, seeds: Sequence[int], path: Path) -> None:
    found = {size: rates for size in SIZES if (rates := against_base(measured, f"votes-{size}", seeds))}
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    for k, judge in enumerate(("mini-heldout", "mini-pickscore")):
        rates = [one[k] for one in found.values()]
        axis.plot(list(found), [r.rate for r in rates], marker="o", label=judge)
        axis.fill_between(list(found), [r.low for r in rates], [r.high for r in rates], alpha=0.15)
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set(
        xscale="log", xlabel="votes", ylabel="win rate against the base model", xticks=list(found), xticklabels=list(found)
    )
    axis.minorticks_off()
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
