"""Prompts of the miniature world, by name; among them a split that tells what training on some prompts does to others.

The split is by object and place (the ground): online training sees *six* combinations of three objects and three places.
Unseen are two objects, one place, and the other three combinations of the nine. The base model knows them all.
"""

from __future__ import annotations

import dataclasses
import hashlib
from itertools import product

from palate.base.shapes import Shape
from palate.data.prompts import Prompt, read_prompts
from palate.miniature import world
from palate.miniature.captions import ATTRIBUTES, Scene, caption, scene_of

OBJECTS, NEW_OBJECTS = ("house", "tree", "cactus"), ("tower", "sailboat")
PLACES, NEW_PLACES = ("meadow", "sand", "snow"), ("water",)
NEW_COMBINATIONS = frozenset(zip(OBJECTS, PLACES, strict=True))
"""A house on a meadow, a tree on sand, a cactus in snow: every object and every place is trained with two others."""

EACH = 16
"""Prompts a combination of object and place."""

SPLIT = {
    "miniature-gen-train": [(o, p) for o in OBJECTS for p in PLACES if (o, p) not in NEW_COMBINATIONS],
    "miniature-gen-objects": [(o, p) for o in NEW_OBJECTS for p in PLACES],
    "miniature-gen-places": [(o, p) for o in OBJECTS for p in NEW_PLACES],
    "miniature-gen-combinations": sorted(NEW_COMBINATIONS),
}
"""Name of a list -> its combinations of object and place: 96, 96, 48 and 48 prompts."""

UNSEEN = ("miniature-unseen", "miniature-unseen-mixed")
"""Lists of prompts that no voted pair shows; of the second the pictures are tall and wide in turn."""
TALL, WIDE = Shape(height=96, width=64), Shape(height=64, width=96)

NAMES = ("miniature-seen", *UNSEEN, *SPLIT)


def find(name: str) -> list[Prompt]:
    """One of :data:`NAMES`; the metadata of every prompt are the attributes of its scene."""
    if name in SPLIT:
        return [_prompt(caption(scene)) for o, p in SPLIT[name] for scene in _some(o, p)]
    path = world.unseen_prompts() if name in UNSEEN else world.seen_prompts()
    found = [_prompt(prompt.text) for prompt in read_prompts(path)]
    if name == "miniature-unseen-mixed":
        found = [dataclasses.replace(prompt, shape=WIDE if i % 2 else TALL) for i, prompt in enumerate(found)]
    return found


def _prompt(text: str) -> Prompt:
    return Prompt(text, None, dataclasses.asdict(scene_of(text)))


def _some(thing: str, place: str) -> list[Scene]:
    """:data:`EACH` scenes of an object at a place, spread over all other attributes by a digest of the scene."""
    values = product(*{**ATTRIBUTES, "object": (thing,), "ground": (place,)}.values())
    return [Scene(*v) for v in sorted(values, key=lambda v: hashlib.sha256("|".join(v).encode()).digest())[:EACH]]
