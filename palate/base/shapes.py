"""Sizes of pictures: one type for height and width, how people write it, and the multiples that a model takes."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from palate.base.errors import UserError, short

STEP = 8
"""Sides are multiples of this whatever the model: a VAE shrinks each by 8."""
MAX_SIDE = 8192


@dataclass(frozen=True, order=True)
class Shape:
    """Height and width of a picture in pixels, in the order of tensors.

    Written as people do, ``832x1216`` is width x height, and a square its side, ``1024``.
    """

    height: int
    width: int

    @classmethod
    def square(cls, side: int) -> Shape:
        return cls(side, side)

    @classmethod
    def of(cls, told: int | str, name: str = "resolution") -> Shape:
        """A shape as it is told, ``1024`` or ``832x1216``.

        Raises:
            UserError: it is neither, or a side is no multiple of 8 up to ``MAX_SIDE``; names the nearest shapes that are.
        """
        sides = re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", told) if isinstance(told, str) else None
        try:
            shape = cls.square(int(told)) if sides is None else cls(int(sides[2]), int(sides[1]))
        except ValueError:
            raise UserError(
                f"{name} is {short(told)}; expected a whole number, the side of a square such as 1024, or WIDTHxHEIGHT such as "
                "832x1216"
            ) from None
        if max(shape.height, shape.width) > MAX_SIDE:
            raise UserError(f"{name} is {short(told, quoted=False)}; expected a multiple of {STEP} up to {MAX_SIDE}")
        if not shape.fits(STEP):
            must = "it must be a" if shape.is_square else "width and height must each be a"
            raise UserError(f"{name} is {shape}, but {must} positive multiple of {STEP}: try {shape.near(STEP)}")
        return shape

    def __str__(self) -> str:
        return str(self.told)

    @property
    def told(self) -> int | str:
        """As :meth:`of` reads it."""
        return self.width if self.is_square else f"{self.width}x{self.height}"

    @property
    def is_square(self) -> bool:
        return self.height == self.width

    @property
    def _sides(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def fits(self, step: int) -> bool:
        """Whether both sides are positive multiples of ``step``."""
        return all(side >= step and side % step == 0 for side in self._sides)

    def near(self, step: int, most: int = MAX_SIDE) -> str:
        """In words, the next smaller and larger shape whose sides are positive multiples of ``step`` up to ``most``."""
        most -= most % step
        low = [min(max(step, side // step * step), most) for side in self._sides]
        high = [min(side if side == below else below + step, most) for side, below in zip(self._sides, low, strict=True)]
        return " or ".join(dict.fromkeys((str(Shape(*low)), str(Shape(*high)))))


def one_shape_each(shapes: Sequence[Hashable], most: int) -> list[list[int]]:
    """Places of ``shapes`` cut into batches of one shape each and of at most ``most``.

    Shapes come in the order in which they are first met, and places in theirs; where all are alike that is a plain cut.
    """
    places: dict[Hashable, list[int]] = {}
    for place, shape in enumerate(shapes):
        places.setdefault(shape, []).append(place)
    return [alike[start : start + most] for alike in places.values() for start in range(0, len(alike), most)]


def in_as_many(batches: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """The same batches cut into ``count``, if they are fewer: in each turn the longest in two.

    Raises ValueError: they hold fewer places than ``count``.
    """
    found = [*batches]
    while len(found) < count:
        longest = max(found, key=len)
        half, place = len(longest) // 2, found.index(longest)
        if not half:
            raise ValueError(f"{len(found)} places cannot be cut into {count} batches")
        found[place : place + 1] = [longest[:half], longest[half:]]
    return found
