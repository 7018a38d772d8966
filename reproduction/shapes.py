"""Pairs of several shapes, trained on in their own shapes or as squares: which model is preferred where pictures are oblong?

    python reproduction/shapes.py

``palate train miniature-buckets`` and the same with ``--resolution 64 --buckets false``, at equal steps, for every seed of
``--seeds``. Both are compared with the base model and with each other on unseen prompts, drawn tall and wide in turn.

Every run is `palate train` in a process of its own with one thread; finished runs are not repeated, interrupted ones go on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from runs import Run, work

ARMS = {"shapes": {}, "squares": {"resolution": 64, "buckets": "false"}}
QUIET = {"evaluation_prompts": "null", "eval_steps": "null"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/shapes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=96, help="unseen prompts of a comparison")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, one thread each")
    given = parser.parse_args()
    runs = [
        Run(
            f"{arm}-{seed}",
            "miniature-buckets",
            {"seed": seed, "num_evaluation_prompts": given.prompts, **QUIET, **options},
            {"unseen": "miniature-unseen-mixed"},
            judges="[mini-heldout, mini-pickscore, mini-clip, mini-aesthetic]",
            base="base",
        )
        for seed in given.seeds
        for arm, options in ARMS.items()
    ]
    work(runs, given.output_dir, given.processes)


if __name__ == "__main__":
    main()
