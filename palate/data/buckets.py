"""Aspect buckets: shapes of about as many pixels each, so that a picture is trained on near its own proportions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from palate.base.jsonl import JsonObject
from palate.base.shapes import MAX_SIDE, Shape
from palate.data.images import kept

MUCH = 0.9
"""A picture of which less is kept is told of."""


def buckets(resolution: Shape, step: int, aspect: float, most: int = MAX_SIDE) -> list[Shape]:
    """The shapes of at most as many pixels as ``resolution`` that would have more, were either side a step longer; and the
    greatest square.

    step: sides are multiples of it. aspect: the longer side is at most so many times the shorter one. most: pixels of the
    longest side. Of 1024, 64 and 2.5 they are 640x1600, 704x1472, 768x1344, 832x1216, 896x1152, 960x1088, 1024 and the same
    turned: what SDXL was trained on (arXiv 2307.01952, appendix I), without its extremes.
    """
    budget = resolution.pixels
    side = min(math.isqrt(budget), most) // step * step
    found = {Shape.square(side)} if side else set[Shape]()
    for width in range(step, min(most, budget // step) + 1, step):
        height = min(budget // width, most) // step * step
        grows = (width + step) * height <= budget and width + step <= most
        if height and not grows and max(width, height) <= aspect * min(width, height):
            found.add(Shape(height, width))
    return sorted(found)


def shared(shapes: Sequence[Shape], sizes: Sequence[tuple[int, int]]) -> Shape:
    """The one of ``shapes`` in which pictures of these sizes (width, height) are trained on together.

    Its aspect is the nearest, by the logarithm, to the geometric mean of theirs: so each of two pictures is cropped by the same
    factor, or neither is; and a pair turned by a quarter has its shape turned.
    """
    wanted = sum(math.log(width / height) for width, height in sizes) / len(sizes)
    return min(shapes, key=lambda shape: (round(abs(math.log(shape.width / shape.height) - wanted), 9), shape))


@dataclass
class Fitted:
    """What became of pictures that were cropped and resized to their shapes: each once, however many pairs it is in."""

    shapes: Counter[Shape] = field(default_factory=Counter[Shape])
    lost: float = 0.0
    """Sum of the shares of pictures that were cut off."""
    cropped: int = 0
    """Pictures of which less than ``MUCH`` was kept."""
    worst: float = 0.0
    enlarged: int = 0

    def add(self, size: tuple[int, int], shape: Shape) -> None:
        """A picture of ``size`` (width, height)."""
        share = kept(size, shape)
        self.shapes[shape] += 1
        self.lost += 1 - share
        self.cropped += share < MUCH
        self.worst = max(self.worst, 1 - share)
        self.enlarged += share * size[0] * size[1] < (1 - 1e-9) * shape.pixels

    def told(self) -> JsonObject:
        """As :meth:`of` reads it."""
        return {**vars(self), "shapes": {str(shape): n for shape, n in self.shapes.items()}}

    @classmethod
    def of(cls, told: JsonObject) -> Fitted:
        return cls(**{**told, "shapes": Counter({Shape.of(shape): n for shape, n in told.get("shapes", {}).items()})})

    def words(self) -> list[str]:
        """What is to be told; nothing of pictures that fit."""
        pictures = sum(self.shapes.values())
        told = []
        if len(self.shapes) > 1:
            told.append("pictures by shape: " + ", ".join(f"{n} of {shape}" for shape, n in sorted(self.shapes.items())))
        if self.cropped:
            told.append(
                f"{self.cropped} of {pictures} pictures lose more than a tenth to the crop, up to {self.worst:.0%}; of all "
                f"{self.lost / pictures:.1%} is cut off"
            )
        if self.enlarged:
            told.append(f"{self.enlarged} of {pictures} pictures are smaller than they are trained on, and are enlarged")
        return told
