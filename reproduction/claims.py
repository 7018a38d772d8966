"""Run what is missing of all claims, and print what there is and what remains.

    python reproduction/claims.py                                tables and figures of what there is, what remains, and its cost
    python reproduction/claims.py votes labels --processes 2     runs what these lack
    python reproduction/claims.py all --processes 2

Each claim is a script beside this one, whose first lines say what is claimed. It can be stopped at any moment; the same command
goes on. Results are in ``measured/``: remove a file there to have it measured anew.
"""

from __future__ import annotations

import accuracy
import draws
import editing
import guards
import labels
import layers
import objectives
import offpolicy
import raters
import shapes
import short
import smaller_files
import spaces
import together
import tuning
import votes
import weaker
import winners
from runs import SEEDS, options, work

CLAIMS = {
    "tuning": tuning,
    "spaces": spaces,
    "objectives": objectives,
    "layers": layers,
    "labels": labels,
    "votes": votes,
    "raters": raters,
    "winners": winners,
    "draws": draws,
    "accuracy": accuracy,
    "editing": editing,
    "offpolicy": offpolicy,
    "weaker": weaker,
    "together": together,
    "guards": guards,
    "files": smaller_files,
    "shapes": shapes,
}
LONG = ("accuracy", "together", "guards", "files")
"""Their runs are of mini-sd3, or from rewards: three seeds, where the others have five."""


def seeds_of(name: str) -> tuple[int, ...]:
    return SEEDS if name in LONG else short.SEEDS


def main() -> None:
    parser = options(__doc__, seeds=None)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, "all", []], help="whose missing runs are carried out")
    given = parser.parse_args()
    asked = list(CLAIMS) if "all" in given.claims else given.claims
    seeds = {name: given.seeds or seeds_of(name) for name in CLAIMS}
    if "tuning" in asked:  # it decides what others run
        work(tuning.runs(given.measured, seeds["tuning"]), given.output_dir, given.processes, given.measured)
    tasks = [task for name in asked for task in CLAIMS[name].runs(given.measured, seeds[name])]
    work({task.name: task for task in tasks}.values(), given.output_dir, given.processes, given.measured)
    for name, claim in CLAIMS.items():
        print(f"{name}: {claim.__doc__.splitlines()[0]}", *claim.tables(given.measured, seeds[name]), sep="\n", end="\n\n")
    given.output_dir.mkdir(parents=True, exist_ok=True)
    votes.plot(given.measured, seeds["votes"], given.output_dir / "votes.png")
    smaller_files.plot(given.measured, seeds["files"], given.output_dir / "files.png")
    smaller_files.grid(given.output_dir, given.output_dir / "files.jpg")
    weaker.grid(given.output_dir, given.output_dir / "weaker.jpg")
    for name, claim in CLAIMS.items():
        tasks = claim.runs(given.measured, seeds[name])
        missing = [task for task in tasks if not task.finished(given.measured)]
        minutes = sum(task.cost for task in missing) / 60
        told = "complete" if tasks else "waits for tuning"
        print(f"{name}: {len(missing)} missing, about {minutes:.0f} processor minutes" if missing else f"{name}: {told}")


if __name__ == "__main__":
    main()
