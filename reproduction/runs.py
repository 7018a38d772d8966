"""What the scripts beside this one share: `palate` run by run in processes of their own, and the curves of online training."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate.training.log import read_log

PER_ROUND = 64
"""Pictures of a round in the miniature's recipes."""
JUDGES = "[jpeg_compressibility, mini-clip, mini-heldout]"


@dataclass(frozen=True)
class Run:
    """One training run: its name (and folder), recipe and overrides; then evaluations, each a list of prompts by name.

    base: where the base model's pictures for an evaluation are kept for the runs that share them.
    """

    name: str
    recipe: str
    options: dict[str, Any]
    evaluations: dict[str, str] = field(default_factory=dict)
    judges: str = JUDGES
    base: str | None = None


def work(runs: Iterable[Run], root: Path, processes: int = 1) -> None:
    """Carry out what is missing, so many runs at once, and tell of each. It can be stopped at any moment and goes on there."""
    root.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(processes) as pool:
        for told in pool.map(lambda run: carry_out(run, root), runs):
            print(told, flush=True)


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
            asked = ["--evaluation_prompts", prompts, "--judges", run.judges]
            drawn, shared = out / "evaluation" / "base", root / f"{run.base}-{part}"
            if run.base and shared.is_dir() and not drawn.is_dir():
                shutil.copytree(shared, drawn)  # the comparison draws only what is missing
            if not palate(["evaluate", str(out), *asked], root / f"{run.name}.txt"):
                return f"{run.name}: evaluation on {prompts} failed, see {root / run.name}.txt"
            shutil.copy(out / "metrics.json", result)
            if run.base and not shared.is_dir():
                shutil.copytree(drawn, shared, dirs_exist_ok=True)
            shutil.copy(out / "before_after.png", out / f"before_after-{part}.png")
            told.append(f"evaluated on {prompts}")
    return f"{run.name}: {', '.join(told) or 'was finished'}"


def palate(words: list[str], log: Path) -> bool:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with log.open("a") as file:
        command = [sys.executable, "-m", "palate", *words]
        return subprocess.run(command, env={**os.environ, **threads}, stdout=file, stderr=file).returncode == 0


def write_curve(out: Path, path: Path) -> None:
    """One line a round, and one for each measurement of held-out rewards; nothing of a run without rewards."""
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
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def read_curve(root: Path, name: str) -> list[dict[str, Any]]:
    path = root / "curves" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def rewards_of(curve: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Queries before each round (the pictures of a round show the model that drew them) and its mean reward."""
    rounds = [line for line in curve if "reward_mean" in line]
    return [line["reward_queries"] - PER_ROUND for line in rounds], [line["reward_mean"] for line in rounds]


def draw_curves(axis: Any, method: str, curves: Sequence[list[dict[str, Any]]]) -> None:
    """Mean reward of a round against the queries before it: the mean over the seeds, and the range of them."""
    found = [rewards_of(curve) for curve in curves]
    rounds = min(len(queries) for queries, _ in found)
    queries, columns = found[0][0][:rounds], list(zip(*(means[:rounds] for _, means in found), strict=True))
    (line,) = axis.plot(queries, [statistics.mean(c) for c in columns], label=method)
    axis.fill_between(queries, [min(c) for c in columns], [max(c) for c in columns], alpha=0.2, color=line.get_color())


def row(reward: str, method: str, curves: list[list[dict[str, Any]]]) -> str:
    """Rewards of the first and the last two rounds that all seeds have, and the held-out judge before and after them."""
    means = [means for _, means in map(rewards_of, curves)]
    rounds = min(map(len, means))
    ends = [statistics.mean(m[:rounds][-2:]) for m in means]
    first, last = statistics.mean(m[0] for m in means), statistics.mean(ends)
    each = ", ".join(f"{end:.2f}" for end in ends)
    equal = [curve for curve, m in zip(curves, means, strict=True) if len(m) == rounds]  # longer ones were judged later
    judged = [[line[k] for line in curve for k in line if k.startswith("held_out/")] for curve in equal]
    before, after = (statistics.mean(values[i] for values in judged) for i in (0, -1))
    cells = [reward, method, rounds * PER_ROUND, f"{first:.2f}", f"{last:.2f} ({each})", f"{last - first:+.2f}"]
    return table_line([*cells, f"{before:.1f}", f"{after:.1f}"])


def table_line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
