"""How often margins order pairs as the labels do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from palate.base.errors import UserError
from palate.evaluation.statistics import WinRate, win_rate


def accuracy(
    margins: Sequence[float], labels: Sequence[float], prompts: Sequence[str], *, draws: int = 10_000, seed: int = 0
) -> WinRate:
    """Share of pairs whose margin (first minus second) has the sign of ``label - 0.5``; a margin of 0 counts one half.

    Pairs labelled 0.5 do not count (Diffusion-DPO, Table 2, on pairs without ties). The interval is a cluster bootstrap over
    prompts.

    Raises:
        UserError: no pair has a winner.
    """
    label, margin = np.asarray(labels, dtype=np.float64), np.asarray(margins, dtype=np.float64)
    rows = np.flatnonzero(label != 0.5)
    if not len(rows):
        raise UserError(f"all {len(label)} pairs are ties: accuracy needs pairs with a better picture")
    right = np.where(label > 0.5, margin, -margin)[rows]
    return win_rate(np.zeros(len(rows)), right, [prompts[i] for i in rows], draws=draws, seed=seed)
