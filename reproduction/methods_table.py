"""All offline objectives in latent space, and SFT, DPO and CPO in perceptual space too, after equal training time.

    python reproduction/methods_table.py --seconds 90 --seeds 0 1 --output_dir out/methods

Every method trains with the settings of its recipe for as many steps as fit into ``--seconds`` at the pace measured on this
machine just before, and is then compared with the base model on the same unseen prompts and seeds. Runs that are finished are
not repeated. The table is written to ``<output_dir>/table.md`` and ``table.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from palate import recipe, run
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
}


def pace(name: str, folder: Path) -> float:
    """Seconds per step, from the later half of ten steps."""
    if not (folder / "log.jsonl").is_file():
        given = {
            "output_dir": str(folder),
            "max_train_steps": 10,
            "logging_steps": 1,
            "checkpointing_steps": None,
            "sample_steps": None,
            "eval_steps": None,
            "validation_fraction": 0.0,  # no measurements between the steps that are timed
            "evaluation_prompts": None,
            "validation_prompts": [],
        }
        run.train(recipe.load(name, given))
    seconds = [row["seconds"] for row in read_log(folder / "log.jsonl") if row["step"] >= 5]
    return (seconds[-1] - seconds[0]) / (len(seconds) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--prompts", type=int, default=192, help="unseen prompts of the comparison")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output_dir", type=Path, default=Path("out/methods"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    rows = []
    for method in given.methods:
        name = METHODS[method]
        per_step = pace(name, given.output_dir / f"pace-{name}")
        steps = max(1, round(given.seconds / per_step))
        for seed in given.seeds:
            folder = given.output_dir / f"{name}-seed{seed}"
            if not (folder / "metrics.json").is_file():
                changes = {
                    "output_dir": str(folder),
                    "seed": seed,
                    "max_train_steps": steps,
                    "sample_steps": None,
                    "eval_steps": None,
                    "checkpointing_steps": None,
                    "validation_prompts": [],
                    "num_evaluation_prompts": given.prompts,
                }
                run.train(recipe.load(name, changes), command=f"palate train {name} --seed {seed} --max_train_steps {steps}")
            found = json.loads((folder / "metrics.json").read_text())
            last = read_log(folder / "log.jsonl")[-1]
            judges = {c["judge"]: c["win_rate"] for c in found["comparisons"]}
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "steps": steps,
                    "seconds per step": per_step,
                    "held-out accuracy": last.get("held_out_accuracy"),
                    **{j: [w["rate"], w["low"], w["high"]] for j, w in judges.items()},
                    "diversity ratio": found["diversity"]["tuned"] / found["diversity"]["base"],
                }
            )
            write(given.output_dir, rows, given.seconds)


def write(folder: Path, rows: list[dict], seconds: float) -> None:
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    judges = [k for k in rows[0] if k.startswith("mini-")]
    head = ["method", "seed", "steps", "s/step", *judges, "held-out accuracy", "diversity"]
    lines = [f"Measured {time.strftime('%Y-%m-%d')}, {seconds:.0f} s of training each.", ""]
    lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        cells = [row["method"], str(row["seed"]), str(row["steps"]), f"{row['seconds per step']:.2f}"]
        cells += ["{:.0%} ({:.0%}-{:.0%})".format(*row[j]) for j in judges]
        accuracy = row["held-out accuracy"]
        cells += ["-" if accuracy is None else f"{accuracy:.2f}", f"{row['diversity ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
