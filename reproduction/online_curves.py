"""Reward against reward queries on the miniature world: DDPO-IS, DDPO-SF, RWR and sparse RWR; what carries over; what breaks.

    python reproduction/online_curves.py tune curves generalisation overoptimisation others recipes plot --processes 2

Parts, in the order in which they should run:

- tune: each of ``RATES`` for every method on every reward, with a seed that no curve uses and 256 queries. The rate with the
  best mean reward of the last two rounds is what the curves take.
- curves: every method on every reward with every seed, all with the same number of reward queries; then each of these models
  draws the same unseen prompts as the base model, and all judges score them.
- generalisation: DDPO-IS for compressibility on six combinations of object and place (``miniature-gen-train``), compared with
  the base model on those, on other objects, on another place and on other combinations.
- overoptimisation: DDPO-IS for the aesthetic judge, far beyond what is good for it, watched by a judge that it never sees;
  at two learning rates, without and with a KL budget.
- others: what the same rollouts also serve, for compressibility: online DPO and RWR, in latent and in perceptual space.
- recipes: those of DDPO, GRPO, NFT and AWM as they stand, small files and prompts at once, drawn as the curves are.
- plot: figures, picture grids and ``table.md`` of all that is finished.

The recipes of RWR and sparse RWR show them pictures drawn as they are compared, with guidance in ten steps: shown those of
DDPO, drawn in eight without, they learn to draw softer ones, whatever is rewarded.

Every run has one thread; finished runs are not repeated, interrupted ones go on. Figures and ``table.md`` are written to
``--output_dir``.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from runs import (
    JUDGES,
    PER_ROUND,
    QUIET,
    Drawing,
    Run,
    Task,
    draw_curves,
    guards,
    mean_gain,
    most_points,
    on_splits,
    pyplot,
    read_curve,
    read_scores,
    rewards_of,
    row,
    sides,
    split_table,
    table,
    versus,
    work,
)
from runs import options as arguments
from short import NUMBER, UNSEEN, drawn_base

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
UNWATCHED = {"kl_samples": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "DDPO-IS": {"objective.clip_range": 0.01},
    "DDPO-SF": {},
    "RWR": UNWATCHED,
    "RWR-sparse": UNWATCHED,
}
RATES = (3e-4, 1e-3, 3e-3)
TUNING_SEED, TUNING_QUERIES = 100, 256
BEFORE = drawn_base(UNSEEN)
ALL_JUDGES = BEFORE.judges
RECIPES = ("ddpo-is", "grpo", "nft", "awm")
PUSHED, KL_BUDGET = (1e-3, 3e-3), 1.0
GUARDS: dict[str, dict[str, Any]] = {
    f"{rate:g}{name}": {"learning_rate": rate, **guard}
    for rate in PUSHED
    for name, guard in (("", {}), ("-budget", {"kl_budget": KL_BUDGET}))
}


def options(reward: str, seed: int, queries: int, setting: dict[str, Any], watch: bool = True) -> dict[str, Any]:
    """What all runs have in common; the comparison after training is left out, it would take longer than the training."""
    held_out = "mini-heldout" if reward == "alignment" else "mini-clip"
    common: dict[str, Any] = {"rewards": REWARDS[reward], "held_out_rewards": f"[{held_out}]" if watch else "[]", "seed": seed}
    common |= {"held_out_pictures": 16, "lr_warmup_steps": 0}  # the first update of a warm-up has a learning rate of 0
    if seed:  # one seed's pictures are enough to look at
        common |= {"validation_prompts": "[]"}
    common |= {"rounds": queries // PER_ROUND, "evaluation_prompts": "null", "eval_steps": "null"}
    return common | setting


def trial(method: str, reward: str, rate: float) -> Run:
    setting = SETTINGS[method] | {"learning_rate": rate}
    options_ = options(reward, TUNING_SEED, TUNING_QUERIES, setting, False)
    return Run(f"tune-{reward}-{method}-{rate:g}", METHODS[method], options_)


def tuning(given: argparse.Namespace) -> list[Task]:
    return [trial(method, reward, rate) for reward in given.rewards for method in given.methods for rate in RATES]


def tried(measured: Path, method: str, reward: str) -> list[tuple[float, float | None]]:
    """Each rate, and the mean reward of the last two rounds with it, None where it was not tried to the end."""
    found = [(rate, rewards_of(read_curve(measured, trial(method, reward, rate).name))[1]) for rate in RATES]
    return [(rate, statistics.mean(means[-2:]) if means else None) for rate, means in found]


def tuned(measured: Path, method: str, reward: str) -> dict[str, Any]:
    """The setting of a method for a reward at its best rate, once all are tried; until then at the recipe's."""
    rate = most_points(tried(measured, method, reward))
    return SETTINGS[method] | ({} if rate is None else {"learning_rate": rate})


def curve(given: argparse.Namespace, method: str, reward: str, seed: int) -> Run:
    setting = tuned(given.measured, method, reward)
    return Run(f"{reward}-{method}-{seed}", METHODS[method], options(reward, seed, given.queries, setting), cost=100)


def curves(given: argparse.Namespace) -> list[Task]:
    runs = [curve(given, m, r, seed) for seed in given.seeds for r in given.rewards for m in given.methods]
    drawings = [Drawing(f"drawn-{run.name}", "mini-sd", UNSEEN, NUMBER, ((run, 1.0),), judges=ALL_JUDGES) for run in runs]
    return [BEFORE, *runs, *drawings]


def generalisation(given: argparse.Namespace) -> list[Task]:
    setting = tuned(given.measured, "DDPO-IS", "compress")
    return [
        on_splits(f"generalisation-{seed}", METHODS["DDPO-IS"], options("compress", seed, given.queries, setting))
        for seed in given.seeds
    ]


def overoptimisation(given: argparse.Namespace) -> list[Task]:
    runs: list[Task] = []
    for name, guard in GUARDS.items():
        pushed = options("aesthetic", given.seeds[0], 2 * given.queries, SETTINGS["DDPO-IS"])
        pushed |= {"held_out_rewards": "[mini-heldout, mini-clip]", "eval_steps": 4, "held_out_pictures": 32, **guard}
        runs.append(Run(f"overoptimisation-{name}", METHODS["DDPO-IS"], pushed))
    return runs


def others(given: argparse.Namespace) -> list[Run]:
    # Drawn as DDPO draws.
    as_ddpo = {"sample_guidance_scale": 1.0, "sample_num_steps": 8}
    perceptual = {"space": "perceptual", "guidance_in_training": "false"}
    kinds = {
        "online-DPO": ("compress", "miniature-online-dpo", {}),
        "online-NCP-DPO": ("compress", "miniature-online-dpo", {**perceptual, "objective.beta": 7e5}),
        "RWR-perceptual": ("compress", METHODS["RWR"], {**perceptual, **as_ddpo, "learning_rate": 1e-4}),
    }
    return [
        Run(f"others-{name}", recipe, options(reward, given.seeds[0], given.queries, setting))
        for name, (reward, recipe, setting) in kinds.items()
    ]


def recipes(given: argparse.Namespace) -> list[Task]:
    runs = [
        Run(f"recipe-{name}-{seed}", f"miniature-{name}", {**QUIET, "seed": seed, "held_out_rewards": "[]"}, cost=250)
        for seed in given.seeds
        for name in RECIPES
    ]
    return [
        BEFORE,
        *(Drawing(f"drawn-{run.name}", "mini-sd", UNSEEN, NUMBER, ((run, 1.0),), judges=ALL_JUDGES) for run in runs),
    ]


PARTS = {
    "tune": tuning,
    "curves": curves,
    "generalisation": generalisation,
    "overoptimisation": overoptimisation,
    "others": others,
    "recipes": recipes,
}


# Figures -----------------------------------------------------------------------------------------------------------------


def plot(given: argparse.Namespace) -> None:
    root = given.output_dir
    root.mkdir(parents=True, exist_ok=True)
    head = ["reward", "method", "queries", "first round", "last two: mean (each seed)", "change", "held out, before", "after"]
    lines = [*table(head, []), *plot_curves(given, root)]
    for run in others(given):
        if curve := read_curve(given.measured, run.name):
            reward = next(name for name, judge in REWARDS.items() if judge == run.options["rewards"])
            lines.append(row(reward, run.name.removeprefix("others-"), [curve]))
    lines += ["", *drawn(given), "", *recipes_table(given), "", *tuning_table(given)]
    lines += ["", *split_table(given.measured, "mini-sd", [f"generalisation-{seed}" for seed in given.seeds])]
    lines += ["", *plot_overoptimisation(given.measured, root), ""]
    pushed = {name: read_curve(given.measured, f"overoptimisation-{name}") for name in map("{:g}".format, PUSHED)}
    saved = [[name, *r] for name, curve in pushed.items() if curve for r in guards(curve, "mini-heldout", ["mini-clip"])]
    lines += table(["rate", "guard", "queries", "reward", "mini-heldout", "mini-clip"], saved)
    (root / "table.md").write_text("\n".join(lines) + "\n")
    grids(given, root)
    print(f"wrote {root / 'table.md'}, its figures and grids")


def drawn(given: argparse.Namespace) -> list[str]:
    """What each model's pictures of unseen prompts gained by every judge, its own reward's in bold; and how often preferred."""
    rows, base = [], read_scores(given.measured, BEFORE.name, UNSEEN, ALL_JUDGES)
    if base is not None:
        rows.append(["", "the base model", *(f"{mean:.2f}" for mean in base.mean(axis=0)), ""])
    for reward in given.rewards:
        own = ALL_JUDGES.index(REWARDS[reward].replace("incompress", "compress"))
        for method in given.methods:
            pairs = [(BEFORE.name, f"drawn-{reward}-{method}-{seed}") for seed in given.seeds]
            found = [read_scores(given.measured, name, UNSEEN, ALL_JUDGES) for _, name in pairs]
            gains = [(one - base).mean(axis=0) for one in found if one is not None and base is not None]
            if gains:
                cells = [", ".join(f"{gain:+.2f}" for gain in column) for column in zip(*gains, strict=True)]
                cells[own] = f"**{cells[own]}**"
                rows.append([reward, method, *cells, *versus(given.measured, pairs, UNSEEN, JUDGES[:1])])
    return table(["reward", "method", *ALL_JUDGES, "mini-heldout prefers"], rows)


def recipes_table(given: argparse.Namespace) -> list[str]:
    """Of each recipe and judge the mean gain on unseen prompts with 95 % over prompts and seeds, and each seed's."""
    rows = []
    for name in RECIPES:
        pairs = [(BEFORE.name, f"drawn-recipe-{name}-{seed}") for seed in given.seeds]
        if (both := sides(given.measured, pairs, UNSEEN, ALL_JUDGES)) is not None:
            gains = (both[1] - both[0]).transpose(2, 0, 1)
            rows.append([name, *map(mean_gain, gains)])
    return table(["recipe", *ALL_JUDGES], rows)


def tuning_table(given: argparse.Namespace) -> list[str]:
    rows = []
    for reward in given.rewards:
        for method in given.methods:
            means = tried(given.measured, method, reward)
            if (chosen := most_points(means)) is not None:
                rows.append([reward, method, *(f"**{mean:.2f}**" if rate == chosen else f"{mean:.2f}" for rate, mean in means)])
    return table(["reward", "method", *(f"{rate:g}" for rate in RATES)], rows)


def plot_curves(given: argparse.Namespace, root: Path) -> list[str]:
    plt = pyplot()
    figure, axes = plt.subplots(1, len(given.rewards), figsize=(4.2 * len(given.rewards), 3.6), squeeze=False)
    rows = []
    for axis, reward in zip(axes[0], given.rewards, strict=True):
        for method in given.methods:
            curves = [read_curve(given.measured, f"{reward}-{method}-{seed}") for seed in given.seeds]
            curves = [curve for curve in curves if curve]
            if not curves:
                continue
            draw_curves(axis, method, curves)
            rows.append(row(reward, method, curves))
        axis.set(title=f"{reward} ({REWARDS[reward]})", xlabel="reward queries", ylabel="mean reward of the round")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(root / "curves.png", dpi=130)
    return rows


def plot_overoptimisation(measured: Path, root: Path) -> list[str]:
    plt = pyplot()
    names = ("reward_mean", "held_out/mini-heldout", "held_out/mini-clip", "kl_path")
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6))
    rows = [
        "| guard | queries | reward | mini-heldout, last | mini-heldout, best | at | alarm at |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for guard in GUARDS:
        curve = read_curve(measured, f"overoptimisation-{guard}")
        if not curve:
            continue
        for axis, name in zip(axes, names, strict=True):
            before = 0 if name.startswith("held_out/") else PER_ROUND  # a round's pictures show the model that drew them
            points = [(line["reward_queries"] - before, line[name]) for line in curve if name in line]
            axis.plot(*zip(*points, strict=True), label=guard, marker=".")
            axis.set(title=name, xlabel="reward queries")
        judged = [line for line in curve if names[1] in line]
        best = max(judged, key=lambda line: line[names[1]])
        alarm = next((str(line["reward_queries"]) for line in curve if "parted" in line), "never")
        last = [line for line in curve if "reward_mean" in line][-1]
        rows.append(
            f"| {guard} | {last['reward_queries']} | {last['reward_mean']:.3f} | {judged[-1][names[1]]:.3f} | "
            f"{best[names[1]]:.3f} | {best['reward_queries']} | {alarm} |"
        )
    if len(rows) == 2:
        return []
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(root / "overoptimisation.png", dpi=130)
    return rows


def grids(given: argparse.Namespace, root: Path) -> None:
    """The last sample pictures of the first seed's runs, before and after from the same noise, one run below the other."""
    runs = [f"{reward}-{method}-{given.seeds[0]}" for reward in given.rewards for method in given.methods]
    runs += [f"overoptimisation-{guard}" for guard in GUARDS]
    shown = {run: sorted((root / run / "samples").glob("step-*.png")) for run in runs}
    pictures = {run: Image.open(paths[-1]).convert("RGB") for run, paths in shown.items() if paths}
    if not pictures:
        return
    width, height = max(p.width for p in pictures.values()), max(p.height for p in pictures.values()) + 24
    grid = Image.new("RGB", (2 * width, height * -(-len(pictures) // 2)), "white")
    for i, (run, picture) in enumerate(pictures.items()):
        x, y = i % 2 * width, i // 2 * height
        ImageDraw.Draw(grid).text((x + 30, y + 1), run, fill="black", font_size=18)
        grid.paste(picture, (x, y + 24))
    grid.resize((grid.width // 2, grid.height // 2), Image.Resampling.LANCZOS).save(root / "grid.jpg", quality=88)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "plot"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS))
    parser.add_argument("--queries", type=int, default=768, help=f"reward queries of a run, a multiple of {PER_ROUND}")
    given = parser.parse_args()
    if given.queries % PER_ROUND:
        parser.error(f"--queries is {given.queries}; expected a multiple of {PER_ROUND}")
    for part in given.parts:
        if part == "plot":
            plot(given)
            continue
        work(PARTS[part](given), given.output_dir, given.processes, given.measured)


if __name__ == "__main__":
    main()
