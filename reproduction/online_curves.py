"""Reward against reward queries on the miniature world: DDPO-IS, DDPO-SF, RWR and sparse RWR; what carries over; what breaks.

    python reproduction/online_curves.py tune curves generalisation overoptimisation plot --output_dir out/online --processes 2

Parts, in the order in which they should run:

- tune: the learning rates of ``RATES`` for each method on compressibility, with a seed that no curve uses and half the queries.
  The best mean reward of the last two rounds is kept in ``tuned.json``; without it, the curves take the recipes' own rates.
- curves: every method on every reward with every seed, all with the same number of reward queries.
- generalisation: DDPO-IS for compressibility on six combinations of object and place (``miniature-gen-train``), compared with
  the base model on those, on other objects, on another place and on other combinations.
- overoptimisation: DDPO-IS for the aesthetic judge, far beyond what is good for it, watched by a judge that it never sees;
  alone, with a KL penalty and with a KL budget.
- plot: figures, picture grids and ``table.md`` of all that is finished.

Every run is `palate train` in a process of its own with one thread; finished runs are not repeated, interrupted ones go on. The
command of each is in its ``run.json``, its curve in ``curves/RUN.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate.training.log import read_log

METHODS = {
    "DDPO-IS": "miniature-ddpo-is",
    "DDPO-SF": "miniature-ddpo-sf",
    "RWR": "miniature-rwr",
    "RWR-sparse": "miniature-rwr-sparse",
}
REWARDS = {
    "compress": "jpeg_compressibility",
    "incompress": "jpeg_incompressibility",
    "aesthetic": "mini-aesthetic",
    "alignment": "mini-clip",
}
RATES = (3e-4, 1e-3, 3e-3)
TUNING_SEED = 100
SPLIT = ("train", "objects", "places", "combinations")
PER_ROUND = 64
GUARDS: dict[str, dict[str, Any]] = {"free": {}, "penalty": {"kl_weight": 0.1}, "budget": {"kl_budget": 1.0}}


@dataclass(frozen=True)
class Run:
    """One training run: its name (and folder), recipe and overrides; then evaluations, each a list of prompts by name."""

    name: str
    recipe: str
    options: dict[str, Any]
    evaluations: dict[str, str] = field(default_factory=dict)


def options(reward: str, seed: int, queries: int, rate: float | None, watch: bool = True) -> dict[str, Any]:
    """What all runs have in common; the comparison after training is left out, it would take longer than the training."""
    held_out = "mini-heldout" if reward == "alignment" else "mini-clip"
    common: dict[str, Any] = {"rewards": REWARDS[reward], "held_out_rewards": f"[{held_out}]" if watch else "[]", "seed": seed}
    common |= {"held_out_pictures": 16}
    common |= {"rounds": queries // PER_ROUND, "evaluation_prompts": "null", "eval_steps": "null"}
    return common | ({} if rate is None else {"learning_rate": rate})


def tuning(given: argparse.Namespace) -> list[Run]:
    return [
        Run(f"tune-{method}-{rate:g}", METHODS[method], options("compress", TUNING_SEED, given.queries // 2, rate, watch=False))
        for method in given.methods
        for rate in RATES
    ]


def curves(given: argparse.Namespace) -> list[Run]:
    rates = tuned(given.output_dir)
    return [
        Run(f"{reward}-{method}-{seed}", METHODS[method], options(reward, seed, given.queries, rates.get(method)))
        for seed in given.seeds
        for reward in given.rewards
        for method in given.methods
    ]


def generalisation(given: argparse.Namespace) -> list[Run]:
    rate = tuned(given.output_dir).get("DDPO-IS")
    lists = {part: f"miniature-gen-{part}" for part in SPLIT}
    return [
        Run(
            f"generalisation-{seed}",
            METHODS["DDPO-IS"],
            options("compress", seed, given.queries, rate) | {"train_prompts": "miniature-gen-train"},
            lists,
        )
        for seed in given.seeds
    ]


def overoptimisation(given: argparse.Namespace) -> list[Run]:
    rate = tuned(given.output_dir).get("DDPO-IS")
    runs = []
    for name, guard in GUARDS.items():
        pushed = options("aesthetic", given.seeds[0], 3 * given.queries, rate)
        pushed |= {"held_out_rewards": "[mini-heldout, mini-clip]", "eval_steps": 4, "held_out_pictures": 32, **guard}
        runs.append(Run(f"overoptimisation-{name}", METHODS["DDPO-IS"], pushed))
    return runs


PARTS = {"tune": tuning, "curves": curves, "generalisation": generalisation, "overoptimisation": overoptimisation}


def carry_out(run: Run, root: Path) -> str:
    """Train, and evaluate, what is not there yet; returns what to tell."""
    out = root / run.name
    words = ["train", run.recipe, "--output_dir", str(out)]
    words += [word for name, value in run.options.items() for word in (f"--{name}", str(value))]
    told = []
    if not (out / "pytorch_lora_weights.safetensors").is_file():
        if any(out.glob("checkpoint-*")):
            words += ["--resume_from_checkpoint", "latest"]
        else:
            shutil.rmtree(out, ignore_errors=True)
        if not palate(words, root / f"{run.name}.txt"):
            return f"{run.name}: failed, see {root / run.name}.txt"
        told.append("trained")
    write_curve(out, root / "curves" / f"{run.name}.jsonl")
    for part, prompts in run.evaluations.items():
        if not (result := out / f"metrics-{part}.json").is_file():
            asked = ["--evaluation_prompts", prompts, "--judges", "[jpeg_compressibility, mini-clip, mini-heldout]"]
            if not palate(["evaluate", str(out), *asked], root / f"{run.name}.txt"):
                return f"{run.name}: evaluation on {prompts} failed, see {root / run.name}.txt"
            shutil.copy(out / "metrics.json", result)
            shutil.copy(out / "before_after.png", out / f"before_after-{part}.png")
            told.append(f"evaluated on {prompts}")
    return f"{run.name}: {', '.join(told) or 'was finished'}"


def palate(words: list[str], log: Path) -> bool:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with log.open("a") as file:
        command = [sys.executable, "-m", "palate", *words]
        return subprocess.run(command, env={**os.environ, **threads}, stdout=file, stderr=file).returncode == 0


def write_curve(out: Path, path: Path) -> None:
    """One line a round, and one for each measurement of held-out rewards."""
    kept = (
        "step",
        "reward_queries",
        "reward_mean",
        "reward_std",
        "kl_path",
        "diversity",
        "seconds",
        "effective_samples",
        "kept",
    )
    lines = []
    for record in read_log(out / "log.jsonl"):
        line = {k: v for k, v in record.items() if k in kept or k.startswith(("reward/", "held_out/", "parted"))}
        if "reward_mean" in line or any(k.startswith("held_out/") for k in line):
            lines.append(json.dumps(line))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read_curve(root: Path, name: str) -> list[dict[str, Any]]:
    path = root / "curves" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def rewards_of(curve: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Queries before each round (the pictures of a round show the model that drew them) and its mean reward."""
    rounds = [line for line in curve if "reward_mean" in line]
    return [line["reward_queries"] - PER_ROUND for line in rounds], [line["reward_mean"] for line in rounds]


def tuned(root: Path) -> dict[str, float]:
    path = root / "tuned.json"
    return {method: found["chosen"] for method, found in json.loads(path.read_text()).items()} if path.is_file() else {}


def choose(given: argparse.Namespace) -> None:
    """The best learning rate of each method whose tuning is complete."""
    found = json.loads(path.read_text()) if (path := given.output_dir / "tuned.json").is_file() else {}
    for method in given.methods:
        ends = {}
        for rate in RATES:
            _, means = rewards_of(read_curve(given.output_dir, f"tune-{method}-{rate:g}"))
            if means:
                ends[rate] = statistics.mean(means[-2:])
        if len(ends) == len(RATES):
            found[method] = {"chosen": max(ends, key=lambda rate: ends[rate]), "reward": {f"{r:g}": e for r, e in ends.items()}}
    path.write_text(json.dumps(found, indent=1) + "\n")


# Figures -----------------------------------------------------------------------------------------------------------------


def plot(given: argparse.Namespace) -> None:
    root = given.output_dir
    table = ["| reward | method | seeds | first round | last round | change |", "| --- | --- | --- | --- | --- | --- |"]
    table += plot_curves(given, root)
    table += ["", *generalisation_table(given, root), "", *plot_overoptimisation(root)]
    (root / "table.md").write_text("\n".join(table) + "\n")
    grids(given, root)
    print(f"wrote {root / 'table.md'}, its figures and grids")


def plot_curves(given: argparse.Namespace, root: Path) -> list[str]:
    plt = pyplot()
    figure, axes = plt.subplots(1, len(given.rewards), figsize=(4.2 * len(given.rewards), 3.6), squeeze=False)
    rows = []
    for axis, reward in zip(axes[0], given.rewards, strict=True):
        for method in given.methods:
            found = [rewards_of(read_curve(root, f"{reward}-{method}-{seed}")) for seed in given.seeds]
            found = [curve for curve in found if curve[0]]
            if not found:
                continue
            rounds = min(len(queries) for queries, _ in found)
            queries, columns = found[0][0][:rounds], list(zip(*(means[:rounds] for _, means in found), strict=True))
            middle = [statistics.mean(c) for c in columns]
            (line,) = axis.plot(queries, middle, label=method)
            axis.fill_between(queries, [min(c) for c in columns], [max(c) for c in columns], alpha=0.2, color=line.get_color())
            first, last, each = middle[0], middle[-1], ", ".join(f"{c:.3f}" for c in columns[-1])
            rows.append(f"| {reward} | {method} | {len(found)} | {first:.3f} | {last:.3f} ({each}) | {last - first:+.3f} |")
        axis.set(title=f"{reward} ({REWARDS[reward]})", xlabel="reward queries", ylabel="mean reward of the round")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(root / "curves.png", dpi=130)
    return rows


def generalisation_table(given: argparse.Namespace, root: Path) -> list[str]:
    rows = ["| seed | prompts | judge | base | tuned | difference (95 %) |", "| --- | --- | --- | --- | --- | --- |"]
    for seed in given.seeds:
        for part in SPLIT:
            path = root / f"generalisation-{seed}" / f"metrics-{part}.json"
            for one in json.loads(path.read_text())["comparisons"] if path.is_file() else []:
                change = "{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**one["difference"])
                means = f"{one['mean_base']:.3f} | {one['mean_tuned']:.3f}"
                rows.append(f"| {seed} | {part} | {one['judge']} | {means} | {change} |")
    return rows


def plot_overoptimisation(root: Path) -> list[str]:
    plt = pyplot()
    names = ("reward_mean", "held_out/mini-heldout", "held_out/mini-clip", "kl_path")
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6))
    rows = [
        "| guard | queries | reward | held out, last | held out, best | at | alarm at |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for guard in GUARDS:
        curve = read_curve(root, f"overoptimisation-{guard}")
        if not curve:
            continue
        for axis, name in zip(axes, names, strict=True):
            points = [(line["reward_queries"], line[name]) for line in curve if name in line]
            axis.plot(*zip(*points, strict=True), label=guard)
            axis.set(title=name, xlabel="reward queries")
        judged = [line for line in curve if names[1] in line]
        best = max(judged, key=lambda line: line[names[1]])
        alarm = next((str(line["reward_queries"]) for line in curve if "parted" in line), "never")
        last = [line for line in curve if "reward_mean" in line][-1]
        rows.append(
            f"| {guard} | {last['reward_queries']} | {last['reward_mean']:.3f} | {judged[-1][names[1]]:.3f} | "
            f"{best[names[1]]:.3f} | {best['reward_queries']} | {alarm} |"
        )
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(root / "overoptimisation.png", dpi=130)
    return rows


def grids(given: argparse.Namespace, root: Path) -> None:
    """The last sample pictures of the first seed's runs: before and after, the same noise."""
    names = [f"{reward}-{method}-{given.seeds[0]}" for reward in given.rewards for method in given.methods]
    for name in [*names, *(f"overoptimisation-{guard}" for guard in GUARDS)]:
        shown = sorted((root / name / "samples").glob("step-*.png"))
        if shown:
            shutil.copy(shown[-1], root / f"grid-{name}.png")


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "plot"])
    parser.add_argument("--output_dir", type=Path, default=Path("out/online"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--queries", type=int, default=768, help=f"reward queries of a run, a multiple of {2 * PER_ROUND}")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, one thread each")
    given = parser.parse_args()
    if given.queries % (2 * PER_ROUND):
        parser.error(f"--queries is {given.queries}; expected a multiple of {2 * PER_ROUND}")
    given.output_dir.mkdir(parents=True, exist_ok=True)
    for part in given.parts:
        if part == "plot":
            plot(given)
            continue
        with ThreadPoolExecutor(given.processes) as pool:
            for told in pool.map(lambda run: carry_out(run, given.output_dir), PARTS[part](given)):
                print(told, flush=True)
        if part == "tune":
            choose(given)


if __name__ == "__main__":
    main()
