"""What fixed draws cost in quality: DPO on few miniature pairs over many epochs, with 1, 4 and 16 draws a pair or fresh ones.

    OMP_NUM_THREADS=1 python reproduction/draws_per_pair.py --seeds 0 1 2 --output_dir out/draws

All runs are the recipe miniature-dpo on the first ``--pairs`` pairs: 80 updates of 8, so 32 pairs return 20 times, and 16
draws are all but fresh. Each is compared with the base model on the same unseen prompts. Finished runs are not repeated; the
table of those there are is written to ``<output_dir>/table.md`` after each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from palate.runs import recipe
from palate.runs.compare import evaluate
from palate.runs.train import train
from palate.training.log import read_log

DRAWS = {"1": 1, "4": 4, "16": 16, "fresh": None}


def measure(name: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run: train and compare."""
    folder, shared = given.output_dir / f"run-{name}-{seed}", given.output_dir / f"base-{seed}"
    changes = {
        "output_dir": str(folder),
        "cache_dir": str(given.output_dir / "cache"),
        "seed": seed,
        "max_train_samples": given.pairs,
        "train_batch_size": 8,
        "draws_per_pair": DRAWS[name],
        "validation_fraction": 0.0,
        "validation_prompts": [],
        "num_evaluation_prompts": given.prompts,
        "judges": ["mini-heldout", "mini-pickscore"],
        "sample_steps": None,
        "eval_steps": None,
        "checkpointing_steps": None,
    }
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    train(recipe.load("miniature-dpo", {**changes, "evaluation_prompts": None}))
    seconds = time.process_time() - began
    if shared.is_dir():
        shutil.copytree(shared, folder / "evaluation" / "base")  # the same pictures for all
    evaluate(recipe.load("miniature-dpo", changes))
    if not shared.is_dir():
        shutil.copytree(folder / "evaluation" / "base", shared)
    found = json.loads((folder / "metrics.json").read_text())
    last = read_log(folder / "log.jsonl")[-1]
    return {
        **{c["judge"]: c["win_rate"]["rate"] for c in found["comparisons"]},
        "diversity": found["diversity"]["tuned"] / found["diversity"]["base"],
        "accuracy": last["implicit_accuracy"],
        "seconds": seconds,
    }


def write(folder: Path) -> None:
    """The table of all rows there are: means over seeds, and each seed's own."""
    rows = {name: [json.loads(path.read_text()) for path in sorted(folder.glob(f"row-{name}-*.json"))] for name in DRAWS}
    heads = ("mini-heldout", "mini-pickscore", "accuracy", "diversity")
    lines = ["| draws a pair | runs | " + " | ".join(heads) + " | processor s |", "| --- " * (len(heads) + 3) + "|"]
    for name, found in rows.items():
        if not found:
            continue
        cells = []
        for head in heads:
            own = [row[head] for row in found]
            shape = "{:.2f}" if head == "diversity" else "{:.0%}"
            cells.append(f"{shape.format(statistics.mean(own))} ({', '.join(map(shape.format, own))})")
        seconds = statistics.mean(row["seconds"] for row in found)
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} | {seconds:.0f} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=48, help="unseen prompts of the comparison")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("out/draws"))
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for name in DRAWS:
            if not (row := given.output_dir / f"row-{name}-{seed}.json").is_file():
                row.write_text(json.dumps(measure(name, seed, given)) + "\n")
            write(given.output_dir)


if __name__ == "__main__":
    main()
