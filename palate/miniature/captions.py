"""What a picture of the miniature world may show, and the sentence that says so: seven attributes and their phrases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SKIES = ("day", "dawn", "sunset", "night")


GROUNDS = ("meadow", "sand", "snow", "water")


OBJECTS = ("house", "tree", "tower", "sailboat", "cactus")


COLOURS = ("red", "blue", "yellow", "purple", "white")


SIDES = ("left", "right")


BACKDROPS = ("plain", "mountains")


ORBS = ("none", "sun", "moon")


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sky": SKIES,
    "ground": GROUNDS,
    "object": OBJECTS,
    "colour": COLOURS,
    "side": SIDES,
    "backdrop": BACKDROPS,
    "orb": ORBS,
}
"""Every attribute of a scene with its values, in the order in which classifiers number them."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Every field is one of the values listed in :data:`ATTRIBUTES`."""

    sky: str
    ground: str
    object: str
    colour: str
    side: str
    backdrop: str
    orb: str

    def labels(self) -> list[int]:
        """The index of each attribute's value, in the order of :data:`ATTRIBUTES`."""
        return [values.index(getattr(self, name)) for name, values in ATTRIBUTES.items()]


_GROUND_PHRASES = {
    "meadow": ("on a green meadow", "standing in green grass"),
    "sand": ("on golden sand", "in a sandy desert"),
    "snow": ("on white snow", "in deep snow"),
    "water": ("by the blue water", "on a calm lake"),
}


_SKY_PHRASES = {
    "day": ("under a clear blue sky", "on a bright day"),
    "dawn": ("under a pink dawn sky", "at dawn"),
    "sunset": ("under an orange sunset sky", "at sunset"),
    "night": ("under a starry night sky", "at night"),
}


_BACKDROP_PHRASES = {"plain": ("",), "mountains": ("mountains behind", "with mountains in the distance")}


_ORB_PHRASES = {
    "none": ("",),
    "sun": ("the sun above", "with the sun in the sky"),
    "moon": ("the moon above", "with the moon in the sky"),
}


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A sentence that names every attribute; the first phrasing of each without ``rng``, a random one with it."""

    def pick(phrases: tuple[str, ...]) -> str:
        return phrases[0] if rng is None else phrases[int(rng.integers(len(phrases)))]

    head = f"a {scene.colour} {scene.object} on the {scene.side}"
    tail = [
        pick(_GROUND_PHRASES[scene.ground]),
        pick(_BACKDROP_PHRASES[scene.backdrop]),
        pick(_ORB_PHRASES[scene.orb]),
        pick(_SKY_PHRASES[scene.sky]),
    ]
    if rng is not None:
        rng.shuffle(tail)
    return ", ".join([head, *(phrase for phrase in tail if phrase)])


def scene_of(text: str) -> Scene:
    """Read a scene back from its caption.

    Raises:
        ValueError: if an attribute cannot be found, naming the attribute and the values it may take.
    """
    found: dict[str, str] = {}
    tables = {"sky": _SKY_PHRASES, "ground": _GROUND_PHRASES, "backdrop": _BACKDROP_PHRASES, "orb": _ORB_PHRASES}
    head = text.split(",", 1)[0].split()
    for name, values in ATTRIBUTES.items():
        if name in tables:
            hits = [v for v in values if any(phrase and phrase in text for phrase in tables[name][v])]
            default = {"backdrop": "plain", "orb": "none"}.get(name)
        else:
            hits, default = [v for v in values if v in head], None
        if hits:
            found[name] = hits[0]
        elif default is not None:
            found[name] = default
        else:
            raise ValueError(f"no {name} in the caption {text!r}; expected one of {', '.join(values)}")
    return Scene(**found)
