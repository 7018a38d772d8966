"""All offline objectives in latent space, and SFT, DPO and CPO in perceptual space too, after equal training time.

    OMP_NUM_THREADS=1 python reproduction/methods_table.py --seconds 80 --seeds 0 --output_dir out/methods

Every method trains with the settings of its recipe for as many steps as fit into ``--seconds`` of processor time at the pace
measured on this machine just before, and is then compared with the base model on the same unseen prompts and seeds. Processor
time, because what else the machine does changes the time on the wall between the measurement and the training. Runs that are
finished are not repeated, so several processes may share the work: same ``--output_dir``, different ``--methods``. The table of
all finished runs is written to ``<output_dir>/table.md`` and ``table.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

from palate.runs import recipe
from palate.runs.compare import evaluate
from palate.runs.train import train
from palate.training.log import read_log

METHODS = {
    "SFT": "miniature-sft",
    "DPO": "miniature-dpo",
    "CPO": "miniature-cpo",
    "cDPO": "miniature-cdpo",
    "IPO": "miniature-ipo",
    "hinge": "miniature-hinge",
    "SDPO": "miniature-sdpo",
    "DSPO": "miniature-dspo",
    "MaPO": "miniature-mapo",
    "ORPO": "miniature-orpo",
    "KTO": "miniature-kto",
    "NCP-SFT": "miniature-ncp-sft",
    "NCP-DPO": "miniature-ncp-dpo",
    "NCP-CPO": "miniature-ncp-cpo",
    "DPO, beta auto": "miniature-dpo",
    "NCP-DPO, beta auto": "miniature-ncp-dpo",
}


def run_name(method: str, seed: int) -> str:
    return f"{method.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def pace(name: str, folder: Path) -> float:
    """Processor seconds per step, from the last six of eight steps: the log's clock is that of the processor meanwhile."""
    if not (kept := folder / f"pace-{name}.json").is_file():
        shutil.rmtree(out := folder / f"pace-{name}", ignore_errors=True)
        given = {
            "output_dir": str(out),
            "max_train_steps": 8,
            "logging_steps": 1,
            "checkpointing_steps": None,
            "sample_steps": None,
            "eval_steps": None,
            "validation_fraction": 0.0,
            "evaluation_prompts": None,
            "validation_prompts": [],
        }
        with mock.patch("time.monotonic", time.process_time):
            train(recipe.load(name, given))
        seconds = {row["step"]: row["seconds"] for row in read_log(out / "log.jsonl")}
        kept.write_text(json.dumps((seconds[8] - seconds[2]) / 6) + "\n")
    return json.loads(kept.read_text())


def measure(method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: train and compare."""
    name, auto = METHODS[method], method.endswith("beta auto")
    per_step = pace(name, given.output_dir)
    steps = max(1, round(given.seconds / per_step))
    folder = given.output_dir / run_name(method, seed)
    changes = {
        "output_dir": str(folder),
        "seed": seed,
        "max_train_steps": steps,
        "sample_steps": None,
        "eval_steps": None,
        "checkpointing_steps": None,
        "validation_prompts": [],
        "validation_fraction": 0.0,
        "num_evaluation_prompts": given.prompts,
        **({"objective.beta": "auto"} if auto else {}),
    }
    shutil.rmtree(folder, ignore_errors=True)
    beta = " --objective.beta auto" if auto else ""
    train(
        recipe.load(name, {**changes, "evaluation_prompts": None}),
        command=f"palate train {name} --seed {seed} --max_train_steps {steps}{beta}",
    )
    base, shared = folder / "evaluation" / "base", given.output_dir / f"base-seed{seed}"
    if shared.is_dir():
        shutil.copytree(shared, base)  # the same pictures for all; the comparison draws only what is missing
    evaluate(recipe.load(name, changes), command=f"palate evaluate {folder}")
    if not shared.is_dir():
        shutil.copytree(base, shared)
    found = json.loads((folder / "metrics.json").read_text())
    rates = {c["judge"]: [c["win_rate"][k] for k in ("rate", "low", "high")] for c in found["comparisons"]}
    return {
        "method": method,
        "seed": seed,
        "seconds": given.seconds,
        "steps": steps,
        "seconds per step": per_step,
        **rates,
        "diversity ratio": found["diversity"]["tuned"] / found["diversity"]["base"],
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80.0)
    parser.add_argument("--prompts", type=int, default=64, help="unseen prompts of the comparison")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=Path, default=Path("out/methods"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for method in given.methods:
            if not (row := given.output_dir / f"row-{run_name(method, seed)}.json").is_file():
                row.write_text(json.dumps(measure(method, seed, given)) + "\n")
            write(given.output_dir)


def write(folder: Path) -> None:
    rows = [json.loads(path.read_text()) for path in folder.glob("row-*.json")]
    rows.sort(key=lambda row: (list(METHODS).index(row["method"]), row["seed"]))
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    judges = [k for k in rows[0] if k.startswith("mini-")]
    head = ["method", "seed", "steps", "s/step", *judges, "diversity"]
    dates, seconds = (sorted({row[k] for row in rows}) for k in ("date", "seconds"))
    lines = [f"Measured {', '.join(dates)}, {', '.join(f'{s:g}' for s in seconds)} s of processor time each.", ""]
    lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        cells = [row["method"], str(row["seed"]), str(row["steps"]), f"{row['seconds per step']:.2f}"]
        cells += ["{:.0%} ({:.0%}-{:.0%})".format(*row[j]) for j in judges]
        cells.append(f"{row['diversity ratio']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
