"""Claim: a tuned model's implicit reward is a judge. Its accuracy in both spaces, beside judges, on pairs of another model.

The runs are those of ``flow.py offline``; the pairs are votes on pictures of another model (``miniature-pairs``). With
``PALATE_HUMAN_PAIRS`` naming a folder of real rankings, those too: there beside judges that need no weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import JUDGES, StoppedError, palate, table, write_json

PAIRS, TIMES = 100, 5
WEIGHTLESS = ("jpeg_compressibility", "jpeg_incompressibility")
SPACES = "[latent, perceptual]"
METHODS = ("DPO", "NCP-DPO", "KTO")


@dataclass(frozen=True)
class Measurement:
    """What ``palate accuracy`` says of one model, or of judges, on one set of pairs."""

    name: str
    source: str
    words: tuple[str, ...]
    trained: str | None = None
    cost: int = 100

    def finished(self, measured: Path) -> bool:
        return (measured / f"{self.name}.json").is_file()

    def carry_out(self, root: Path, measured: Path) -> str:
        if self.trained is not None and not (root / self.trained / "pytorch_lora_weights.safetensors").is_file():
            raise StoppedError(f"the weights of {self.trained} are not in {root}: remove its result, so that it is trained")
        found = root / f"{self.name}.found"
        size = ["--max_pairs", str(PAIRS), "--timesteps", str(TIMES), "--output", str(found)]
        palate(["accuracy", self.source, *self.words, *size], root / f"{self.name}.txt")
        kept = {"pairs": json.loads(found.read_text())["pairs"], "accuracy": json.loads(found.read_text())["accuracy"]}
        write_json(measured / f"{self.name}.json", kept)
        return ", ".join(f"{one['name']} {one['accuracy']['rate']:.0%}" for one in kept["accuracy"])


def sources() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> where the pairs are, and judges of them."""
    found = {"votes": ("miniature-pairs", JUDGES)}
    if human := os.environ.get("PALATE_HUMAN_PAIRS"):
        found["human"] = (human, WEIGHTLESS)
    return found


def runs(measured: Path, seeds: Sequence[int]) -> list[Measurement]:
    found = []
    for label, (source, judges) in sources().items():
        found.append(Measurement(f"accuracy-{label}-judges", source, ("--judges", f"[{', '.join(judges)}]"), cost=20))
        for method in METHODS:
            for seed in seeds if label == "votes" else seeds[:1]:
                run = f"offline-{method}-{seed}"
                words = ("--model", run, "--space", SPACES)
                found.append(Measurement(f"accuracy-{label}-{run}", source, words, run))
    return found


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    """Of each set: judges with intervals over prompts, tuned models with each seed's own."""
    rows = []
    for label in ("votes", "human"):
        for one in of(measured, f"accuracy-{label}-judges"):
            rows.append([label, one["name"], "{rate:.0%} ({low:.0%}-{high:.0%})".format(**one["accuracy"])])
        for method in METHODS:
            found = [of(measured, f"accuracy-{label}-offline-{method}-{seed}") for seed in seeds]
            for space in zip(*filter(None, found), strict=True):
                rates = [one["accuracy"]["rate"] for one in space]
                each = ", ".join(f"{rate:.0%}" for rate in rates)
                rows.append([label, f"{method} ({space[0]['name'].split('(')[1]}", f"{sum(rates) / len(rates):.0%}; {each}"])
    return table(["pairs", "judge, or implicit reward and its space", "accuracy"], rows)


def of(measured: Path, name: str) -> list[dict[str, Any]]:
    path = measured / f"{name}.json"
    return json.loads(path.read_text())["accuracy"] if path.is_file() else []
