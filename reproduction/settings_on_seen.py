"""Compare settings of a miniature recipe without touching the unseen prompts.

    python reproduction/settings_on_seen.py --recipe miniature-ncp-dpo --variants plain guidance-4 --output_dir out/settings

Every variant is trained as its recipe says, with a few options changed, and compared with the base model on prompts *of the
voted pairs*, by the judge that labels (``mini-pickscore``) and by prompt following (``mini-clip``). The held-out judge and the
unseen prompts take no part, so what they say of the setting chosen here stays honest. Finished runs are not repeated; the
table is written to ``<output_dir>/table.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from palate.data.pairs import read_pairs
from palate.miniature import world
from palate.runs import recipe
from palate.runs.train import train
from palate.training.log import read_log

VARIANTS = {
    "plain": {},
    "guidance-4": {"guidance_scale": 4.0},
    "t_min-300": {"t_min": 300},
    "t_min-700": {"t_min": 700},
    "beta-2e5": {"objective.beta": 2e5},
    "beta-1e6": {"objective.beta": 1e6},
    "lr-6e-4": {"learning_rate": 6e-4},
    "steps-120": {"max_train_steps": 120},
    "batch-64": {"train_batch_size": 64, "max_train_steps": 60},
    "rank-64": {"rank": 64},
    "mid": {"space.layers": "mid"},
    "steps_back-20": {"space.steps_back": 20},
    "full": {"train_method": "full", "learning_rate": 3e-5},
}


def prompts(path: Path, count: int) -> Path:
    """The first ``count`` different prompts of the voted pairs, as a text file."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        seen = dict.fromkeys(pair.prompt for pair in read_pairs(world.pairs()))
        path.write_text("\n".join(list(seen)[:count]) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="miniature-ncp-dpo")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("out/settings"))
    given = parser.parse_args()
    lines = ["| setting | mini-pickscore | mini-clip | diversity | training, s |", "| --- | --- | --- | --- | --- |"]
    for name in given.variants:
        folder = given.output_dir / f"{given.recipe}-{name}-seed{given.seed}"
        if not (folder / "metrics.json").is_file():
            options = {
                "output_dir": str(folder),
                "seed": given.seed,
                "evaluation_prompts": str(prompts(given.output_dir / f"seen-{given.prompts}.txt", given.prompts)),
                "num_evaluation_prompts": None,
                "judges": ["mini-pickscore", "mini-clip"],
                "validation_prompts": [],
                "checkpointing_steps": None,
            }
            train(recipe.load(given.recipe, {**options, **VARIANTS[name]}), command=f"settings_on_seen: {VARIANTS[name]}")
        found = json.loads((folder / "metrics.json").read_text())
        wins = [c["win_rate"] for c in found["comparisons"]]
        rates = [f"{w['rate']:.0%} ({w['low']:.0%}-{w['high']:.0%})" for w in wins]
        ratio = found["diversity"]["tuned"] / found["diversity"]["base"]
        lines.append(f"| {name} | {' | '.join(rates)} | {ratio:.2f} | {read_log(folder / 'log.jsonl')[-1]['seconds']:.0f} |")
        print(lines[-1], flush=True)
    (given.output_dir / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
