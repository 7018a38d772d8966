"""What preference training does to a rectified flow: DPO, NCP-DPO and KTO from votes; NFT, Flow-GRPO and DDPO-IS from a reward.

    python reproduction/flow.py offline online generalisation overoptimisation table --processes 2

All on ``mini-sd3``, with the settings of the recipes ``miniature-flow-*`` and every seed of ``--seeds``:

- offline: from the votes on its own pictures, then compared with the base model on unseen prompts.
- online: mean reward of each round against reward queries, for small files alone, watched by a judge of prompt following;
  DDPO-IS is the recipe of Flow-GRPO with noise in the first five of eight steps instead of a moving window of two.
- generalisation: NFT for small files on six combinations of object and place, compared on those and on others.
- overoptimisation: Flow-GRPO for the aesthetic judge far beyond what is good for it, without and with a KL budget.
- table: ``table.md`` and ``curves.png`` of all that is finished.

Every run is `palate train` in a process of its own with one thread; finished runs are not repeated, interrupted ones go on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from runs import PER_ROUND, Run, draw_curves, pyplot, read_curve, rewards_of, row, table_line, work

from palate.evaluation.statistics import paired

OFFLINE = {"DPO": "miniature-flow-dpo", "NCP-DPO": "miniature-flow-ncp-dpo", "KTO": "miniature-flow-kto"}
WHOLE_PATH = {"window_size": 5, "window_end": "null"}
ONLINE: dict[str, tuple[str, dict[str, Any]]] = {
    "NFT": ("miniature-flow-nft", {}),
    "Flow-GRPO": ("miniature-flow-grpo", {}),
    "DDPO-IS": ("miniature-flow-grpo", WHOLE_PATH),
}
JUDGES = ("mini-heldout", "mini-pickscore", "mini-clip", "mini-aesthetic")
SPLIT = ("train", "objects", "places", "combinations")
QUIET = {"evaluation_prompts": "null", "eval_steps": "null"}
"""Compared afterwards, or never."""


def name_of(part: str, method: str, seed: int) -> str:
    return f"{part}-{method}-{seed}"


def offline(given: argparse.Namespace) -> list[Run]:
    size = {"num_evaluation_prompts": given.prompts}
    return [
        Run(
            name_of("offline", method, seed),
            recipe,
            {"seed": seed, **QUIET, **size},
            {"unseen": "miniature-unseen"},
            judges=f"[{', '.join(JUDGES)}]",
            base="base",
        )
        for seed in given.seeds
        for method, recipe in OFFLINE.items()
    ]


def rewarded(reward: str, watched_by: str, seed: int, queries: int) -> dict[str, Any]:
    watch = {"held_out_rewards": f"[{watched_by}]", "held_out_pictures": 16}
    return {"rewards": f"[{reward}]", **watch, **QUIET, "seed": seed, "rounds": queries // PER_ROUND, "lr_warmup_steps": 0}


def online(given: argparse.Namespace) -> list[Run]:
    return [
        Run(
            name_of("online", method, seed),
            recipe,
            {**rewarded("jpeg_compressibility", "mini-clip", seed, given.queries), **changes},
        )
        for seed in given.seeds
        for method, (recipe, changes) in ONLINE.items()
    ]


def generalisation(given: argparse.Namespace) -> list[Run]:
    options = {"train_prompts": "miniature-gen-train", "num_evaluation_prompts": given.prompts}
    return [
        Run(
            name_of("generalisation", "NFT", seed),
            "miniature-flow-nft",
            {**rewarded("jpeg_compressibility", "mini-clip", seed, given.queries), **options},
            {part: f"miniature-gen-{part}" for part in SPLIT},
            base="base-gen",
        )
        for seed in given.seeds
    ]


def overoptimisation(given: argparse.Namespace) -> list[Run]:
    pushed = rewarded("mini-aesthetic", "mini-heldout, mini-clip", given.seeds[0], 2 * given.queries) | {"eval_steps": 4}
    guards: dict[str, dict[str, Any]] = {"none": {}, "kl_budget": {"kl_budget": 1.0}}
    return [
        Run(name_of("overoptimisation", guard, given.seeds[0]), "miniature-flow-grpo", {**pushed, **change})
        for guard, change in guards.items()
    ]


PARTS = {"offline": offline, "online": online, "generalisation": generalisation, "overoptimisation": overoptimisation}


# Tables ------------------------------------------------------------------------------------------------------------------


def scores(folder: Path) -> np.ndarray:
    """Of the pictures of a folder in their order, ``(n, judges)``."""
    columns = []
    for judge in JUDGES:
        lines = [json.loads(line) for line in (folder / "scores" / f"{judge}.jsonl").read_text().splitlines()[1:]]
        columns.append([line["score"] for line in sorted(lines, key=lambda line: line["file"])])
    return np.array(columns).T


def offline_table(given: argparse.Namespace) -> list[str]:
    """Win rates over all seeds with intervals over prompts (each prompt's seeds stay together), then each seed's."""
    lines = [table_line(["method", "seeds", *JUDGES]), table_line(["---"] * (len(JUDGES) + 2))]
    for method in OFFLINE:
        folders = [given.output_dir / name_of("offline", method, seed) for seed in given.seeds]
        folders = [folder / "evaluation" for folder in folders if (folder / "metrics-unseen.json").is_file()]
        if not folders:
            continue
        base, tuned = (np.concatenate([scores(folder / side) for folder in folders]) for side in ("base", "tuned"))
        prompts = np.tile(np.arange(len(base) // len(folders)), len(folders))
        pooled = paired(base, tuned, prompts)[0]
        each = [paired(scores(f / "base"), scores(f / "tuned"), prompts[: len(base) // len(folders)])[0] for f in folders]
        cells = [
            f"{rate.rate:.0%} ({rate.low:.0%}-{rate.high:.0%}); {', '.join(f'{one[k].rate:.0%}' for one in each)}"
            for k, rate in enumerate(pooled)
        ]
        lines.append(table_line([method, len(folders), *cells]))
    return lines


def online_table(given: argparse.Namespace) -> list[str]:
    head = ["reward", "method", "queries", "first round", "last two: mean (each seed)", "change", "held out, before", "after"]
    lines = [table_line(head), table_line(["---"] * len(head))]
    for method in ONLINE:
        curves = [read_curve(given.output_dir, name_of("online", method, seed)) for seed in given.seeds]
        if curves := [curve for curve in curves if curve]:
            lines.append(row("compress", method, curves))
    return lines


def generalisation_table(given: argparse.Namespace) -> list[str]:
    lines = [table_line(["prompts", "judge", "base", "change of each seed (95 % over prompts)"]), table_line(["---"] * 4)]
    for part in SPLIT:
        paths = [given.output_dir / name_of("generalisation", "NFT", seed) / f"metrics-{part}.json" for seed in given.seeds]
        found = [json.loads(path.read_text())["comparisons"] for path in paths if path.is_file()]
        for same in zip(*found, strict=True):
            changes = ["{difference:+.2f} ({low:+.2f} to {high:+.2f})".format(**one["difference"]) for one in same]
            lines.append(table_line([part, same[0]["judge"], f"{same[0]['mean_base']:.2f}", "; ".join(changes)]))
    return lines


def overoptimisation_table(given: argparse.Namespace) -> list[str]:
    names = ("held_out/mini-heldout", "held_out/mini-clip")
    lines = [table_line(["guard", "queries", "reward", *(f"{n}, first, best, last" for n in names)]), table_line(["---"] * 5)]
    for run in overoptimisation(given):
        if curve := read_curve(given.output_dir, run.name):
            queries, means = rewards_of(curve)
            judged = [[line[name] for line in curve if name in line] for name in names]
            ends = [f"{values[0]:.2f}, {max(values):.2f}, {values[-1]:.2f}" for values in judged]
            guard = run.name.split("-")[1]
            lines.append(table_line([guard, queries[-1] + PER_ROUND, f"{means[0]:.2f} to {means[-1]:.2f}", *ends]))
    return lines


def plot(given: argparse.Namespace) -> None:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for method in ONLINE:
        curves = [read_curve(given.output_dir, name_of("online", method, seed)) for seed in given.seeds]
        if curves := [curve for curve in curves if curve]:
            draw_curves(axis, method, curves)
    axis.set(xlabel="reward queries", ylabel="mean reward of the round: - kB")
    axis.legend()
    figure.tight_layout()
    figure.savefig(given.output_dir / "curves.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "table"])
    parser.add_argument("--output_dir", type=Path, default=Path("out/flow"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=96, help="unseen prompts of a comparison")
    parser.add_argument("--queries", type=int, default=512, help=f"reward queries of a run, a multiple of {PER_ROUND}")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, one thread each")
    given = parser.parse_args()
    if given.queries % PER_ROUND:
        parser.error(f"--queries is {given.queries}; expected a multiple of {PER_ROUND}")
    for part in given.parts:
        if part != "table":
            work(PARTS[part](given), given.output_dir, given.processes)
            continue
        tables = [offline_table(given), online_table(given), generalisation_table(given), overoptimisation_table(given)]
        (given.output_dir / "table.md").write_text("\n\n".join("\n".join(lines) for lines in tables) + "\n")
        plot(given)
        print((given.output_dir / "table.md").read_text())


if __name__ == "__main__":
    main()
