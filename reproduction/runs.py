"""What the scripts beside this one share: runs of `palate` in a few processes, their results as small files, and tables.

A run is trained, draws lists of prompts, and is judged; what is learned of it is ``measured/NAME.json`` (a run with rewards has
its curve in ``measured/curves`` too). These files are all that tables and figures read: what they hold is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from palate.evaluation.statistics import mean_difference
from palate.training.log import read_log

MEASURED = Path(__file__).parent / "measured"
PER_ROUND = 64
"""Pictures of a round in the miniature's recipes."""
SEEDS = (0, 1, 2)
"""Of long runs; those of :mod:`short` have more."""
JUDGES = ("mini-heldout", "mini-pickscore", "mini-clip", "mini-aesthetic")
"""Of pictures; the first neither labels nor rewards anything."""
SPLIT = ("train", "objects", "places", "combinations")
"""Six combinations of object and place that are trained on; other objects, another place, other combinations."""
SPLIT_JUDGES = ("jpeg_compressibility", "mini-clip", "mini-heldout")
SPLIT_PROMPTS = 48
DRAWN = ("--num_inference_steps", "10", "--guidance_scale", "2.5", "--seed", "1234", "--batch_size", "32")
"""As the comparison after a training draws, but from other noise: these pictures have a base of their own."""
QUIET: dict[str, Any] = {
    "evaluation_prompts": "null",
    "validation_prompts": "[]",
    "sample_steps": "null",
    "eval_steps": "null",
}
"""Nothing is drawn by the training itself."""


class Task(Protocol):
    """What can be missing: it ends with ``measured/NAME.json``. cost: processor seconds that it takes about."""

    @property
    def name(self) -> str: ...
    @property
    def cost(self) -> int: ...
    def finished(self, measured: Path) -> bool: ...
    def carry_out(self, root: Path, measured: Path) -> str: ...


@dataclass(frozen=True)
class Run:
    """One training run: its name (and folder), recipe and overrides; then lists of prompts on which it meets the base model.

    prompts: so many of each list. steps: of drawing.
    before: makes what the run needs, such as its data, in the folder of all runs; called in the run's own process.
    """

    name: str
    recipe: str
    options: dict[str, Any]
    lists: tuple[str, ...] = ()
    prompts: int = 64
    steps: int = 10
    judges: tuple[str, ...] = JUDGES
    cost: int = 60
    before: Callable[[Path], None] | None = field(default=None, compare=False)

    def finished(self, measured: Path) -> bool:
        alone = not self.lists and (measured / "curves" / f"{self.name}.jsonl").is_file()  # its curve is all that it gives
        return alone or (measured / f"{self.name}.json").is_file()

    def carry_out(self, root: Path, measured: Path) -> str:
        """Train, draw and judge what is not there yet; returns what to tell."""
        told = trained(self, root)
        write_curve(root / self.name, measured / "curves" / f"{self.name}.jsonl")
        told["scores"] = {prompts: compared(self, prompts, root, measured) for prompts in self.lists}
        write_json(measured / f"{self.name}.json", told)
        return f"{told['processor_seconds']} s of training"


@dataclass(frozen=True)
class Drawing:
    """Pictures of a model, or of it with the LoRAs of runs, and what judges say of them.

    model: a name, or a folder in the folder of all runs. prompts: a list, or a file in that folder. words: of ``generate``.
    loras: runs, each with the strength of its LoRA.
    before: as that of :class:`Run`.
    """

    name: str
    model: str
    prompts: str
    words: tuple[str, ...] = ()
    loras: tuple[tuple[Run, float], ...] = ()
    judges: tuple[str, ...] = JUDGES
    cost: int = 30
    before: Callable[[Path], None] | None = field(default=None, compare=False)

    def finished(self, measured: Path) -> bool:
        return (measured / f"{self.name}.json").is_file()

    def carry_out(self, root: Path, measured: Path) -> str:
        if self.before is not None:
            self.before(root)
        for run, _ in self.loras:
            with locked(root / run.name):
                trained(run, root)
        named = ", ".join(f"{root / run.name}:{scale:g}" for run, scale in self.loras)
        lora = ["--lora", f"[{named}]"] if named else []
        out, log = root / self.name, root / f"{self.name}.txt"
        shutil.rmtree(out, ignore_errors=True)
        palate(["generate", self.model, "--prompts", self.prompts, "--output_dir", str(out), *self.words, *lora, *DRAWN], log)
        judge(out, self.prompts, log, measured / f"{self.name}.json", self.judges)
        return "drawn and judged"


# Carrying out ------------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """A command of palate did not come to its end; what it said is in a file."""


def work(tasks: Iterable[Task], root: Path, processes: int = 1, measured: Path = MEASURED) -> None:
    """Carry out what is missing, so many runs at once, and tell of each. It can be stopped at any moment and goes on there."""
    root, measured = root.resolve(), measured.resolve()
    for folder in (root, measured / "curves"):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), os.chdir, (root,)) as pool:
        missing = [task for task in tasks if not task.finished(measured)]
        try:
            for wait in (False, True):  # what other processes are at comes last
                done = [pool.submit(do, task, root, measured, wait) for task in missing]
                for one in done:
                    if told := one.result():
                        print(told, flush=True)
                missing = [task for task, one in zip(missing, done, strict=True) if one.result() is None]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print("stopped; the same command goes on", flush=True)


def do(task: Task, root: Path, measured: Path, wait: bool = True) -> str | None:
    """Carry out one task, if it is missing; where another process has it in hand, wait for its end, or return None."""
    with locked(root / task.name, wait=wait) as free:
        if not free:
            return None
        if task.finished(measured):
            return f"{task.name}: was finished"
        try:
            return f"{task.name}: {task.carry_out(root, measured)}"
        except StoppedError as stop:
            return f"{task.name}: {stop}"


def trained(run: Run, root: Path) -> dict[str, Any]:
    """Weights of a run in its folder, made unless they are there; returns what is known of its training."""
    out, clock = root / run.name, root / f"{run.name}.seconds"
    if run.before is not None:
        run.before(root)
    command = ["train", run.recipe, *(word for name, value in run.options.items() for word in (f"--{name}", str(value)))]
    if not (out / "pytorch_lora_weights.safetensors").is_file():
        resumed = any(out.glob("checkpoint-*"))
        if not resumed:
            shutil.rmtree(out, ignore_errors=True)
            clock.unlink(missing_ok=True)
        how = ["--resume_from_checkpoint", "latest"] if resumed else []
        palate([*command, "--output_dir", str(out), *how], root / f"{run.name}.txt", clock)
    log = read_log(out / "log.jsonl")
    return {
        "command": " ".join(["palate", *command]),
        "steps": max(line["step"] for line in log),
        "processor_seconds": seconds_of(clock) if clock.is_file() else None,
        **risen(log),
    }


def risen(log: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times the reference's error on winners, and on losers, that of the policy is over the last tenth of a training.

    Of the same draws, so that it is 1 where nothing was learned; empty without a reference or losers.
    """
    lines = [line for line in log if "winner_advantage" in line and "loser_error" in line]
    last, found = lines[-max(1, len(lines) // 10) :], {}
    for side in ("winner", "loser") if lines else ():
        own = sum(line[f"{side}_error"] for line in last)
        found[f"{side}_error_rise"] = round(own / (own + sum(line[f"{side}_advantage"] for line in last)), 4)
    return found


def compared(run: Run, prompts: str, root: Path, measured: Path) -> dict[str, list[float]]:
    """Scores of the tuned model's pictures by each judge; the base model's are a file of their own, which runs share."""
    from palate.runs import recipe

    model = run.options.get("pretrained_model_name_or_path") or recipe.load(run.recipe).model.pretrained_model_name_or_path
    drawn, base = root / run.name / "evaluation", root / base_name(model, prompts, run.prompts)
    words = ["--evaluation_prompts", prompts, "--num_evaluation_prompts", str(run.prompts)]
    words += ["--num_inference_steps", str(run.steps), "--judges", f"[{', '.join(run.judges)}]"]
    shutil.rmtree(drawn, ignore_errors=True)
    with contextlib.nullcontext() if base.is_dir() else locked(base):
        if base.is_dir():
            shutil.copytree(base, drawn / "base")  # the comparison draws only what is missing
        palate(["evaluate", str(root / run.name), *words], root / f"{run.name}.txt")
        if not base.is_dir():
            write_json(measured / f"{base.name}.json", {"scores": {prompts: scores(drawn / "base", run.judges)}})
            shutil.copytree(drawn / "base", part := base.with_suffix(".part"), dirs_exist_ok=True)
            part.rename(base)
    return scores(drawn / "tuned", run.judges)


def base_name(model: str, prompts: str, count: int) -> str:
    return f"base-{model}-{prompts}-{count}"


def palate(words: list[str], log: Path, clock: Path | None = None) -> None:
    """One command in this process, what it says into a file, its processor seconds added to those of another."""
    from palate.cli import main

    began = time.process_time()
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        failed = main(words)
    if clock is not None:
        clock.write_text(f"{(seconds_of(clock) if clock.is_file() else 0) + time.process_time() - began:.1f}\n")
    if failed:
        raise StoppedError(f"{words[0]} stopped, see {log}")


def seconds_of(clock: Path) -> float:
    return float(clock.read_text())


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """One process at a time; yields whether it is this one, which it is not if another is inside and none may wait."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def judge(folder: Path, prompts: str, log: Path, result: Path, judges: Sequence[str] = JUDGES) -> None:
    """Have the pictures of a folder scored, and keep that as the result of a list of prompts."""
    palate(["score", str(folder), "--judges", f"[{', '.join(judges)}]"], log)
    write_json(result, {"scores": {prompts: scores(folder, judges)}})


def scores(folder: Path, judges: Sequence[str]) -> dict[str, list[float]]:
    """Of the pictures of a folder in their order."""
    found = {}
    for judge in judges:
        lines = [json.loads(line) for line in (folder / "scores" / f"{judge}.jsonl").read_text().splitlines()[1:]]
        found[judge] = [round(line["score"], 4) for line in sorted(lines, key=lambda line: line["file"])]
    return found


def write_json(path: Path, what: dict[str, Any]) -> None:
    path.with_suffix(".part").write_text(json.dumps(what) + "\n")
    path.with_suffix(".part").rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """A result; empty if it is missing."""
    return json.loads(path.read_text()) if path.is_file() else {}


def options(doc: str | None, seeds: Sequence[int] | None = SEEDS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("out/reproduction"), help="of runs, pictures and logs")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="results; a run that has one here is not repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="of runs: 0 1 2, or for short ones 0 1 2 3 4")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, one thread each")
    return parser


# Curves ------------------------------------------------------------------------------------------------------------------


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


def read_curve(measured: Path, name: str) -> list[dict[str, Any]]:
    path = measured / "curves" / f"{name}.jsonl"
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
    judged = [values for values in judged if len(values) > 1]  # a run that was ended by hand has no last measurement
    before, after = (statistics.mean(values[i] for values in judged) if judged else float("nan") for i in (0, -1))
    cells = [reward, method, rounds * PER_ROUND, f"{first:.2f}", f"{last:.2f} ({each})", f"{last - first:+.2f}"]
    return table_line([*cells, f"{before:.1f}", f"{after:.1f}"])


BUDGETS = (0.1, 0.3, 0.5, 1.0, 2.0, 4.0)
"""Of KL divergence from the model before training, in nats per latent element, along the way of a picture."""


def guards(curve: list[dict[str, Any]], decides: str, others: Sequence[str]) -> list[list[Any]]:
    """Where each guard would have ended a run without any, and what the held-out judges say there: rows of a table.

    A budget ends training when a round's pictures have cost more, with the weights that drew them; until then the run is the
    one without it. Held-out judges are asked every few rounds: the last time before the end counts.
    """
    watched, rounds = ([line for line in curve if key in line] for key in (f"held_out/{decides}", "reward_mean"))
    ends: dict[str, float] = {"none": float("inf")}
    for budget in BUDGETS:
        if over := [line["reward_queries"] - PER_ROUND for line in rounds if line["kl_path"] > budget]:
            ends[f"KL budget {budget:g}"] = over[0]
    ends["the held-out best is kept"] = max(watched, key=lambda line: line[f"held_out/{decides}"])["reward_queries"]
    rows = []
    for guard, end in ends.items():
        there = [line for line in watched if line["reward_queries"] <= end][-1]
        reward = [line["reward_mean"] for line in rounds if line["reward_queries"] - PER_ROUND <= end][-1]
        points = [f"{there[f'held_out/{judge}']:.1f}" for judge in (decides, *others)]
        rows.append([guard, min(end, rounds[-1]["reward_queries"]), f"{reward:.2f}", *points])
    return rows


# Other prompts than those that were trained on ----------------------------------------------------------------------------


def on_splits(name: str, recipe: str, options: dict[str, Any], cost: int = 400) -> Run:
    """A run on the first list of :data:`SPLIT`, judged on all of them."""
    lists = tuple(f"miniature-gen-{part}" for part in SPLIT)
    return Run(name, recipe, options | {"train_prompts": lists[0]}, lists, SPLIT_PROMPTS, judges=SPLIT_JUDGES, cost=cost)


def split_table(measured: Path, model: str, names: Sequence[str]) -> list[str]:
    """Of each judge and list the base model's mean, and the difference that each run, one a seed, made."""
    rows = []
    for k, judge in enumerate(SPLIT_JUDGES):
        for part in SPLIT:
            prompts = f"miniature-gen-{part}"
            base, *found = (
                read_scores(measured, name, prompts, SPLIT_JUDGES)
                for name in (base_name(model, prompts, SPLIT_PROMPTS), *names)
            )
            if base is None:
                continue
            rows.append(
                [judge, part, f"{base[:, k].mean():.2f}", mean_change(base[:, k], [one for one in found if one is not None], k)]
            )
    return table(["judge", "prompts", "base", "change by each seed (95 % over prompts)"], rows)


def mean_change(base: np.ndarray, runs: Sequence[np.ndarray], judge: int) -> str:
    """Of each run the mean difference to the base model's ``(pictures,)`` by one of its judges, with 95 % over prompts."""
    each = [mean_difference(base, run[:, judge], range(len(base))) for run in runs]
    return "; ".join(f"{one.difference:+.2f} ({one.low:+.2f} to {one.high:+.2f})" for one in each)


# Tables ------------------------------------------------------------------------------------------------------------------


def read_scores(measured: Path, name: str, prompts: str, judges: Sequence[str] = JUDGES) -> np.ndarray | None:
    """``(pictures, judges)`` of a finished run or base model, or None."""
    if not (result := read_json(measured / f"{name}.json")):
        return None
    found = result["scores"][prompts]
    return np.array([found[judge] for judge in judges]).T


Pairs = Sequence[tuple[str, str]]
"""Names of runs (or of a base model) that are compared: one pair a seed, the second the one that should be better."""


def versus(measured: Path, pairs: Pairs, prompts: str, judges: Sequence[str] = JUDGES) -> list[Preference]:
    """Of each judge how often it prefers the second of each pair to the first. Those that are finished count; none gives []."""
    if (found := sides(measured, pairs, prompts, judges)) is None:
        return []
    before, after = found
    points, gains = (after > before) + 0.5 * (after == before), (after - before).mean(axis=(0, 1))
    return [Preference.of(points[:, :, k], float(gains[k])) for k in range(len(judges))]


def sides(measured: Path, pairs: Pairs, prompts: str, judges: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores ``(pairs, pictures, judges)`` of the first and of the second of each pair that is finished; None without any."""
    found = [[read_scores(measured, name, prompts, judges) for name in pair] for pair in pairs]
    found = [(a, b) for a, b in found if a is not None and b is not None]
    if not found:
        return None
    before, after = (np.stack(side) for side in zip(*found, strict=True))
    return before, after


def gain(measured: Path, base: str, run: str, prompts: str, judge: str) -> float | None:
    """How many points of a judge a run's pictures are above the base's, in the mean; None where one is missing."""
    found = sides(measured, [(base, run)], prompts, [judge])
    return None if found is None else float((found[1] - found[0]).mean())


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the mean of values ``(seeds, prompts)``: a bootstrap that draws seeds and prompts anew independently."""
    seeds, prompts = drawn_anew(*values.shape)
    low, high = np.quantile(((seeds @ values) * prompts).sum(axis=1), [0.025, 0.975])
    # The last digits differ between machines, and a half would be rounded up on one and down on another.
    return round(float(low), 9), round(float(high), 9)


@functools.cache
def drawn_anew(*numbers: int) -> list[np.ndarray]:
    """Of so many seeds, and prompts, the share that each has in 10,000 draws."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(n, np.full(n, 1 / n), size=10_000) / n for n in numbers]


def mean_gain(gains: np.ndarray, digits: int = 2) -> str:
    """The mean of gains ``(seeds, prompts)``, its interval, and each seed's own."""
    ends = [f"{end:+.{digits}f}" for end in (float(gains.mean()), *interval(gains))]
    each = ", ".join(f"{gain:+.{digits}f}" for gain in gains.mean(axis=1))
    return f"{ends[0]} ({ends[1]} to {ends[2]}); {each}"


Tried = TypeVar("Tried")


def most_points(tried: Sequence[tuple[Tried, float | None]]) -> Tried | None:
    """Of settings and the points each made the one with most, the first of equals; None until all are measured."""
    known = [(setting, points) for setting, points in tried if points is not None]
    return max(known, key=lambda one: one[1])[0] if len(known) == len(tried) else None


@dataclass(frozen=True)
class Preference:
    """A win rate over all seeds, a 95 % interval from a bootstrap over prompts *and* seeds, and each seed's own rate.

    gain: mean difference of the judge's points, for a win rate does not tell by how much.
    """

    rate: float
    low: float
    high: float
    each: tuple[float, ...]
    gain: float

    @classmethod
    def of(cls, points: np.ndarray, gain: float) -> Preference:
        """points: ``(seeds, prompts)``, 1 for a win, 1/2 for a tie."""
        return cls(float(points.mean()), *interval(points), tuple(points.mean(axis=1).tolist()), gain)

    def __str__(self) -> str:
        each = ", ".join(f"{100 * rate:.0f}" for rate in self.each)
        return f"{100 * self.rate:.0f} % ({100 * self.low:.0f}-{100 * self.high:.0f}); {each}; {self.gain:+.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return [table_line(head), table_line(["---"] * len(head)), *map(table_line, rows)]


def table_line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def sheet(folders: dict[str, Path], path: Path, *, columns: int = 12, every: int = 1) -> None:
    """Pictures of folders, each a row with its label, every so many of them; nothing where a folder has too few."""
    from PIL import Image, ImageDraw

    rows = {label: sorted(folder.glob("*.png"))[: columns * every : every] for label, folder in folders.items()}
    if not all(len(files) == columns for files in rows.values()):
        return
    side, margin = 66, 120
    made = Image.new("RGB", (margin + columns * side, len(rows) * side), "white")
    for number, (label, files) in enumerate(rows.items()):
        ImageDraw.Draw(made).text((4, number * side + side // 2 - 6), label, fill="black")
        for column, file in enumerate(files):
            with Image.open(file) as image:
                made.paste(image.convert("RGB"), (margin + column * side, number * side))
    made.save(path, quality=90)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
