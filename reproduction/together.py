"""Everything together: votes, then a reward on top, against each alone; and how far that is from the renderer's own pictures.

NCP-DPO on votes at its tuned best; then DDPO-IS with ``mini-pickscore`` as its reward, 512 queries, at the best of three rates
on prompts of the voted pairs (with a seed that serves no result). Unseen prompts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from runs import (
    DRAWN,
    PER_ROUND,
    QUIET,
    Drawing,
    Run,
    Task,
    gain,
    judge,
    locked,
    most_points,
    palate,
    read_scores,
    table,
    versus,
)
from short import NUMBER, PROMPTS, UNSEEN, drawn_base
from tuning import DECIDES, SEED, SEEN, tuned
from worldmaking import render

QUERIES = 512
REWARD: dict[str, Any] = {
    **QUIET,
    "rewards": "[mini-pickscore]",
    "held_out_rewards": "[]",
    "rounds": QUERIES // PER_ROUND,
    "lr_warmup_steps": 0,
    "objective.clip_range": 0.01,
    "checkpointing_steps": "null",
}
RATES = (1e-4, 3e-4, 1e-3)
BASE, SEEN_BASE, CEILING = drawn_base(UNSEEN), drawn_base(SEEN), "renders"
NAMES = {
    "votes alone (NCP-DPO)": "drawn-votes",
    "a reward alone (DDPO-IS)": "drawn-reward-alone",
    "votes, then the reward": "drawn-reward-on-top",
}


@dataclass(frozen=True)
class Renders:
    """The renderer's pictures of the unseen prompts, judged."""

    name: str = CEILING
    cost: int = 15

    def finished(self, measured: Path) -> bool:
        return (measured / f"{self.name}.json").is_file()

    def carry_out(self, root: Path, measured: Path) -> str:
        from palate.data.prompts import read_prompts
        from palate.miniature import world

        out, log = root / self.name, root / f"{self.name}.txt"
        shutil.rmtree(out, ignore_errors=True)
        palate(["generate", "mini-sd", "--prompts", UNSEEN, "--output_dir", str(out), *NUMBER, *DRAWN], log)
        for number, prompt in enumerate(read_prompts(world.unseen_prompts())[:PROMPTS]):
            render(prompt.text, number).save(out / f"{number:05d}-00.png")  # in the place of the model's
        judge(out, UNSEEN, log, measured / f"{self.name}.json")
        return "rendered and judged"


def runs(measured: Path, seeds: Sequence[int]) -> list[Task]:
    found: list[Task] = [Renders(), BASE, SEEN_BASE]
    found += [tried(rate, SEED) for rate in RATES]
    if (rate := chosen_rate(measured)) is None:
        return found
    for seed in seeds:
        alone = Run(f"reward-alone-{seed}", "miniature-ddpo-is", REWARD | {"seed": seed, "learning_rate": rate}, cost=100)
        found.append(Drawing(f"drawn-{alone.name}", "mini-sd", UNSEEN, NUMBER, ((alone, 1.0),), cost=130))
    for first in tuned(measured, "ncp-dpo", seeds):
        seed, model = first.options["seed"], f"{first.name}-pipeline"
        options = REWARD | {"seed": seed, "learning_rate": rate, "pretrained_model_name_or_path": model}
        run = Run(f"reward-on-top-{seed}", "miniature-ddpo-is", options, cost=100, before=partial(merge, run=first))
        found += [first, Drawing(f"drawn-votes-{seed}", "mini-sd", UNSEEN, NUMBER, ((first, 1.0),))]
        found.append(Drawing(f"drawn-{run.name}", model, UNSEEN, NUMBER, ((run, 1.0),), cost=130))
    return found


def tried(rate: float, seed: int) -> Drawing:
    name = f"reward-{rate:g}-{seed}"
    run = Run(name, "miniature-ddpo-is", REWARD | {"seed": seed, "learning_rate": rate}, cost=100)
    return Drawing(f"drawn-{name}", "mini-sd", SEEN, NUMBER, ((run, 1.0),), cost=130)


def chosen_rate(measured: Path) -> float | None:
    """Whose pictures gain most of the reward; None until all are tried."""
    return most_points([(rate, gain(measured, SEEN_BASE.name, tried(rate, SEED).name, SEEN, DECIDES)) for rate in RATES])


def merge(root: Path, run: Run) -> None:
    out = root / f"{run.name}-pipeline"
    with locked(out):
        if not out.is_dir():
            palate(["export", str(root / run.name), "--format", "pipeline", "--output", str(out)], root / f"{run.name}.txt")


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = []
    for label, name in NAMES.items():
        means = [found.mean(axis=0) for seed in seeds if (found := read_scores(measured, f"{name}-{seed}", UNSEEN)) is not None]
        if rates := versus(measured, [(BASE.name, f"{name}-{seed}") for seed in seeds], UNSEEN):
            points = [f"{sum(column) / len(means):.2f}" for column in zip(*means, strict=True)]
            rows.append([label, *(f"{mean}: {rate}" for mean, rate in zip(points, rates, strict=True))])
    for label, name in (("the base model", BASE.name), ("the renderer", CEILING)):
        if (found := read_scores(measured, name, UNSEEN)) is not None:
            rows.append([label, *(f"{mean:.2f}" for mean in found.mean(axis=0))])
    rates = [[f"{rate:g}", *versus(measured, [(SEEN_BASE.name, tried(rate, SEED).name)], SEEN)] for rate in RATES]
    lines = table(
        ["reward alone, seen prompts", "held out", "preference (rewarded)", "prompt", "looks"],
        [r for r in rates if r[1:]],
    )
    return [*lines, "", *table(["trained on", "held out", "preference (rewarded)", "prompt", "looks"], rows)]
