"""What training does to a rectified flow: SFT, DPO, CPO and KTO from votes; NFT, Flow-GRPO and DDPO-IS from a reward.

    python reproduction/flow.py tune offline faster online overoptimisation table --processes 2

All on ``mini-sd3``, with the settings of the recipes ``miniature-flow-*`` and every seed of ``--seeds``:

- tune: one run of each of ``RATES`` for each online method with the first seed.
  Those that learn from votes at each of ``OFFLINE_RATES``, compared on prompts of the voted pairs.
- offline: from the votes on its own pictures, then compared with the base model on unseen prompts.
- faster: the same at the highest rate where a lower one was chosen, for by points the higher is better with all of them.
- online: mean reward of each round against reward queries, for small files alone, watched by a judge of prompt following;
  DDPO-IS is the recipe of Flow-GRPO with noise in the first five of eight steps instead of a moving window of two. Then the
  base and the tuned model draw the same unseen prompts, which no round's luck with its eight prompts disturbs.
- overoptimisation: Flow-GRPO for the aesthetic judge far beyond what is good for it, watched by judges that it never sees. What
  a KL budget or the held-out best would have saved is read off: until they end it, a run with a budget is the run without.
- table: tables and curves of all that is finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import (
    JUDGES,
    PER_ROUND,
    QUIET,
    SPLIT_JUDGES,
    Run,
    base_name,
    guards,
    mean_change,
    most_points,
    options,
    pyplot,
    read_curve,
    read_scores,
    rewards_of,
    row,
    table,
    versus,
    work,
)

from palate.evaluation.statistics import mean_difference

OFFLINE: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("miniature-flow-dpo", {}),
    "NCP-DPO": ("miniature-flow-ncp-dpo", {}),
    "KTO": ("miniature-flow-kto", {}),
    "SFT": ("miniature-flow-dpo", {"objective": "sft"}),
    "NCP-SFT": ("miniature-flow-ncp-dpo", {"objective": "sft"}),
    "CPO": ("miniature-flow-dpo", {"objective": "{name: cpo, beta: 25, bc_weight: 2.5}"}),
    "NCP-CPO": ("miniature-flow-ncp-dpo", {"objective": "{name: cpo, beta: 4, bc_weight: 0.4}"}),
}
"""CPO's beta is what ``beta: auto`` chooses in each space; the winner's weight is a tenth of it, as in mini-sd's recipes."""
WHOLE_PATH = {"window_size": 5, "window_end": "null"}
ONLINE: dict[str, tuple[str, dict[str, Any]]] = {
    "NFT": ("miniature-flow-nft", {}),
    "Flow-GRPO": ("miniature-flow-grpo", {}),
    "DDPO-IS": ("miniature-flow-grpo", WHOLE_PATH),
}
RATES, RATE = (1e-3, 3e-3), 3e-3
"""Tried, and chosen: at 1e-3 no method moves the reward in 384 queries by more than rounds differ by their prompts."""
OFFLINE_RATES = (3e-4, 1e-3)
SEEN, SEEN_PROMPTS = "miniature-seen", 48
SEEN_BASE = base_name("mini-sd3", SEEN, SEEN_PROMPTS)
UNSEEN, OFFLINE_PROMPTS, ONLINE_PROMPTS = "miniature-unseen", 96, 48


def voted_run(name: str, method: str, rate: float, seed: int) -> Run:
    recipe, changes = OFFLINE[method]
    options = {"seed": seed, **QUIET, **changes, "learning_rate": rate}
    return Run(name, recipe, options, (UNSEEN,), OFFLINE_PROMPTS, 15, cost=300)


def offline(given: argparse.Namespace) -> list[Run]:
    rates = chosen_rates(given.measured)
    return [voted_run(f"offline-{method}-{seed}", method, rate, seed) for method, rate in rates.items() for seed in given.seeds]


def faster(given: argparse.Namespace) -> list[Run]:
    """At the highest rate those whose chosen one is lower."""
    rates = chosen_rates(given.measured)
    return [
        voted_run(f"faster-{method}-{seed}", method, OFFLINE_RATES[-1], seed)
        for seed in given.seeds
        for method, rate in rates.items()
        if rate != OFFLINE_RATES[-1]
    ]


def chosen_rates(measured: Path) -> dict[str, float]:
    """Of the methods whose rates are all tried."""
    found = {method: best_rate(measured, method) for method in OFFLINE}
    return {method: rate for method, rate in found.items() if rate is not None}


def best_rate(measured: Path, method: str) -> float | None:
    """The rate whose pictures ``mini-pickscore`` prefers most often; None where a training is missing."""
    tried: list[tuple[float, float | None]] = []
    for rate in OFFLINE_RATES:
        found = versus(measured, [(SEEN_BASE, f"rate-{method}-{rate:g}")], SEEN, ["mini-pickscore"])
        tried.append((rate, found[0].rate if found else None))
    return most_points(tried)


def rewarded(reward: str, watched_by: str, seed: int, queries: int) -> dict[str, Any]:
    watch = {"held_out_rewards": f"[{watched_by}]", "held_out_pictures": 16}
    return {"rewards": f"[{reward}]", **watch, **QUIET, "seed": seed, "rounds": queries // PER_ROUND, "lr_warmup_steps": 0}


def small_files(seed: int, given: argparse.Namespace) -> dict[str, Any]:
    return rewarded("jpeg_compressibility", "mini-clip", seed, given.queries)


def rewarded_run(method: str, rate: float, seed: int, given: argparse.Namespace) -> Run:
    recipe, changes = ONLINE[method]
    changes = {**small_files(seed, given), **changes, "learning_rate": rate}
    name = f"online-{method}-{rate:g}-{seed}"
    return Run(name, recipe, changes, (UNSEEN,), ONLINE_PROMPTS, judges=SPLIT_JUDGES, cost=250)


def tune(given: argparse.Namespace) -> list[Run]:
    found = [rewarded_run(method, rate, given.seeds[0], given) for method in ONLINE for rate in RATES]
    for method, (recipe, changes) in OFFLINE.items():
        for rate in OFFLINE_RATES:
            options = {**QUIET, "seed": given.seeds[0], **changes, "learning_rate": rate}
            found.append(Run(f"rate-{method}-{rate:g}", recipe, options, (SEEN,), SEEN_PROMPTS, 15, cost=300))
    return found


def online(given: argparse.Namespace) -> list[Run]:
    return [rewarded_run(method, RATE, seed, given) for seed in given.seeds for method in ONLINE]


def overoptimisation(given: argparse.Namespace) -> list[Run]:
    watched = "mini-heldout, mini-clip"
    return [
        Run(
            f"too-far-{seed}",
            "miniature-flow-grpo",
            {**rewarded("mini-aesthetic", watched, seed, 2 * given.queries), "eval_steps": 4},
            cost=450,
        )
        for seed in given.seeds
    ]


PARTS = {
    "tune": tune,
    "offline": offline,
    "faster": faster,
    "online": online,
    "overoptimisation": overoptimisation,
}


# Tables ------------------------------------------------------------------------------------------------------------------


def offline_table(given: argparse.Namespace) -> list[str]:
    base = base_name("mini-sd3", UNSEEN, OFFLINE_PROMPTS)
    at_most, rates = f"{OFFLINE_RATES[-1]:g}", chosen_rates(given.measured)

    def row_of(label: str, one: str, other: str | None = None) -> list[Any]:
        pairs = [(base if other is None else f"{other}-{seed}", f"{one}-{seed}") for seed in given.seeds]
        return [label, *versus(given.measured, pairs, UNSEEN)]

    rows = [row_of(f"{method}, {rate:g}", f"offline-{method}") for method, rate in rates.items()]
    rows += [row_of(f"{method}, {at_most}", f"faster-{method}") for method in OFFLINE]
    against = [(f"NCP-{method}", method) for method in ("DPO", "SFT", "CPO")]
    rows += [row_of(f"{a} against {b}", f"offline-{a}", f"offline-{b}") for a, b in (*against, ("KTO", "DPO"))]
    for one, other in (("faster-NCP-DPO", "faster-DPO"), ("faster-NCP-CPO", "offline-CPO"), ("offline-KTO", "faster-DPO")):
        label = " against ".join(name.partition("-")[2] for name in (one, other))
        rows.append(row_of(f"{label}, {at_most}", one, other))
    return table(["method", *JUDGES], [cells for cells in rows if len(cells) > 1])


def rates_table(given: argparse.Namespace) -> list[str]:
    rows = []
    for method in OFFLINE:
        for rate in OFFLINE_RATES:
            if found := versus(given.measured, [(SEEN_BASE, f"rate-{method}-{rate:g}")], SEEN):
                rows.append([f"{method}, {rate:g}", *found])
    return table(["rate, seen prompts", *JUDGES], rows)


def curves(given: argparse.Namespace, names: Sequence[str]) -> list[list[dict[str, Any]]]:
    return [curve for name in names if (curve := read_curve(given.measured, name))]


def online_table(given: argparse.Namespace) -> list[str]:
    head = ["reward", "method", "queries", "first round", "last two: mean (each seed)", "change", "held out, before", "after"]
    names = {(m, rate): [f"online-{m}-{rate:g}-{seed}" for seed in given.seeds] for m in ONLINE for rate in RATES}
    lines = [row("compress", f"{m}, {rate:g}", found) for (m, rate), same in names.items() if (found := curves(given, same))]
    return [*table(head, []), *lines]


def unseen_table(given: argparse.Namespace) -> list[str]:
    """What each seed's training changed on prompts that it was not trained on."""
    rows, base = [], read_scores(given.measured, base_name("mini-sd3", UNSEEN, ONLINE_PROMPTS), UNSEEN, SPLIT_JUDGES)
    for method in ONLINE:
        for rate in RATES:
            names = [f"online-{method}-{rate:g}-{seed}" for seed in given.seeds]
            found = [read_scores(given.measured, name, UNSEEN, SPLIT_JUDGES) for name in names]
            if base is not None and (found := [one for one in found if one is not None]):
                changes = [mean_change(base[:, k], found, k) for k in range(len(SPLIT_JUDGES))]
                rows.append([f"{method}, {rate:g}", *changes])
    means = (
        [] if base is None else [f"{judge}, from {mean:.2f}" for judge, mean in zip(SPLIT_JUDGES, base.mean(0), strict=True)]
    )
    return table(["method, rate", *means], rows)


def overoptimisation_table(given: argparse.Namespace) -> list[str]:
    found = {seed: read_curve(given.measured, f"too-far-{seed}") for seed in given.seeds}
    rows = [[seed, *r] for seed, curve in found.items() if curve for r in guards(curve, "mini-heldout", ["mini-clip"])]
    return table(["seed", "guard", "queries", "reward", "mini-heldout", "mini-clip"], rows)


def plot(given: argparse.Namespace) -> None:
    plt = pyplot()
    given.output_dir.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    base = read_scores(given.measured, base_name("mini-sd3", UNSEEN, ONLINE_PROMPTS), UNSEEN, SPLIT_JUDGES)
    for color, method in enumerate(ONLINE):
        names = [f"online-{method}-{RATE:g}-{seed}" for seed in given.seeds]
        for number, name in enumerate(names):
            if base is None or (found := read_scores(given.measured, name, UNSEEN, SPLIT_JUDGES)) is None:
                continue
            size, clip = (mean_difference(base[:, k], found[:, k], range(len(base))) for k in (0, 1))
            bars = {f"{side}err": [[d.difference - d.low], [d.high - d.difference]] for side, d in (("x", size), ("y", clip))}
            label = None if number else method
            axis.errorbar(size.difference, clip.difference, **bars, fmt="o", color=f"C{color}", label=label, capsize=2)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="kB saved on unseen prompts (95 %)", ylabel="change of mini-clip (95 %)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(given.output_dir / "flow-online.png", dpi=110)
    if not (pushed := curves(given, [f"too-far-{seed}" for seed in given.seeds])):
        return
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for number, curve in enumerate(pushed):
        watched = [(line["reward_queries"], line["held_out/mini-heldout"]) for line in curve if "held_out/mini-heldout" in line]
        axis.plot(*rewards_of(curve), color="C0", label=None if number else "mini-aesthetic, rewarded")
        axis.plot(*zip(*watched, strict=True), color="C1", label=None if number else "mini-heldout")
    axis.set(xlabel="reward queries", ylabel="points")
    axis.legend()
    figure.tight_layout()
    figure.savefig(given.output_dir / "flow-too-far.png", dpi=110)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "table"])
    parser.add_argument("--queries", type=int, default=384, help=f"reward queries of a run, a multiple of {PER_ROUND}")
    given = parser.parse_args()
    if given.queries % PER_ROUND:
        parser.error(f"--queries is {given.queries}; expected a multiple of {PER_ROUND}")
    for part in given.parts:
        if part != "table":
            work(PARTS[part](given), given.output_dir, given.processes, given.measured)
            continue
        for lines in (
            rates_table(given),
            offline_table(given),
            online_table(given),
            unseen_table(given),
            overoptimisation_table(given),
        ):
            print("\n".join(lines), end="\n\n")
        plot(given)


if __name__ == "__main__":
    main()
