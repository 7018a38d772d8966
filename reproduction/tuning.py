"""Tuning: every objective gets the same five trainings, judged by ``mini-pickscore`` on prompts of the voted pairs.

The learning rate at three values with the recipe's strength, the strength at a fifth and at five times with the recipe's
rate; the strength is beta, or ORPO's weight. SFT, which has none, has five rates. The seed serves no result, and the unseen
prompts and ``mini-heldout`` take no part. The setting whose pictures gain most is what ``objectives`` and ``spaces`` use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import Run, base_name, gain, most_points, table, versus
from short import PROMPTS, short

SEED, SEEN = 100, "miniature-seen"
BASE, DECIDES = base_name("mini-sd", SEEN, PROMPTS), "mini-pickscore"
AUTOMATIC = 735
"""What ``beta: auto`` chooses in latent space."""
STRENGTHS: dict[str, tuple[str, float]] = {
    "dpo": ("beta", 1000),
    "kto": ("beta", AUTOMATIC),
    "ipo": ("beta", AUTOMATIC),
    "sdpo": ("beta", AUTOMATIC),
    "cdpo": ("beta", AUTOMATIC),
    "hinge": ("beta", AUTOMATIC),
    "dspo": ("beta", AUTOMATIC),
    "mapo": ("beta", AUTOMATIC),
    "orpo": ("weight", 0.05),
    "cpo": ("beta", 1000),
    "ncp-dpo": ("beta", 5e5),
    "ncp-cpo": ("beta", 5e5),
}
OBJECTIVES = ("sft", *list(STRENGTHS)[:-2])
PERCEPTUAL = {"ncp-sft": 32, "ncp-dpo": 32, "ncp-cpo": 32}
"""Updates that have as many operations as :data:`short.UPDATES` of the same objective in latent space."""
METHODS = (*OBJECTIVES, *PERCEPTUAL)


def settings(method: str) -> list[dict[str, Any]]:
    """Changes to the recipe, of which the first are none."""
    rates = (1e-4, 1e-3) if method in STRENGTHS else (1e-4, 2e-4, 6e-4, 1e-3)
    name, strength = STRENGTHS.get(method, ("", 0.0))
    strengths = [{f"objective.{name}": f"{factor * strength:g}"} for factor in (0.2, 5)] if name else []
    return [{}, *({"learning_rate": rate} for rate in rates), *strengths]


def named(method: str, setting: dict[str, Any]) -> str:
    return "-".join(["tune", method, *(f"{name.split('.')[-1]}-{value}" for name, value in setting.items())])


def told(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name.split('.')[-1]} {value}" for name, value in setting.items()) or "the recipe's"


def of_equal_operations(method: str) -> dict[str, Any]:
    return {"max_train_steps": PERCEPTUAL[method]} if method in PERCEPTUAL else {}


def runs(measured: Path, seeds: Sequence[int]) -> list[Run]:
    return [
        run
        for method in METHODS
        for setting in settings(method)
        for run in short(
            named(method, setting), f"miniature-{method}", [SEED], of_equal_operations(method) | setting, prompts=SEEN
        )
    ]


def best(measured: Path, method: str) -> dict[str, Any] | None:
    """The chosen changes to the recipe; None where a training is missing."""
    return most_points([(one, gain(measured, BASE, f"{named(method, one)}-{SEED}", SEEN, DECIDES)) for one in settings(method)])


def tuned(measured: Path, method: str, seeds: Sequence[int]) -> list[Run]:
    """The runs of a method at its chosen setting; none until it is chosen."""
    chosen = best(measured, method)
    if chosen is None:
        return []
    return short(name_of(method, chosen), f"miniature-{method}", seeds, of_equal_operations(method) | chosen)


def name_of(method: str, chosen: dict[str, Any]) -> str:
    """Runs with the recipe's own settings are those that other scripts share."""
    return f"{method}-tuned" if chosen else method


def tables(measured: Path, seeds: Sequence[int]) -> list[str]:
    rows = []
    for method in METHODS:
        chosen = best(measured, method)
        for setting in settings(method):
            if preferences := versus(measured, [(BASE, f"{named(method, setting)}-{SEED}")], SEEN):
                rows.append([method, f"**{told(setting)}**" if setting == chosen else told(setting), *preferences])
    return table(["objective", "setting, seen prompts", "held out", "preference", "prompt", "looks"], rows)
