"""Several data sets in one: how often an epoch goes through each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from palate.base.shapes import Shape
from palate.data.encoded import EncodedPairs, EncodedPictures


class Mixture:
    """A source of training that goes through each of several sets so many times an epoch; a fraction is a part of it.

    Parts follow on one another from epoch to epoch, so that after ``1 / share`` epochs of a share below 1 all have been seen.
    An item that comes twice in an epoch comes with another index, and so with other times and noise.

    Args:
        encoded: the items of all sets.
        sets: which set each item is of, from 0 on: ``(n,)``.
        shares: of each set, how many times an epoch goes through it; above 0.
    """

    rounds = None

    def __init__(self, encoded: EncodedPairs | EncodedPictures, sets: np.ndarray, shares: Sequence[float]) -> None:
        self.encoded = encoded
        members = [np.flatnonzero(sets == number).tolist() for number in range(len(shares))]
        self.parts = [
            (of_set, max(1, round(share * len(of_set)))) for of_set, share in zip(members, shares, strict=True) if of_set
        ]

    def __len__(self) -> int:
        return sum(taken for _, taken in self.parts)

    def order(self, seed: int, epoch: int) -> list[int]:
        """The indices of an epoch, each once; index ``i`` shows item ``i % n``. The same for the same ``(seed, epoch)``."""
        found: list[int] = []
        for number, (of_set, taken) in enumerate(self.parts):
            seen: dict[int, int] = {}
            for position in range(epoch * taken, (epoch + 1) * taken):
                cycle, place = divmod(position, len(of_set))
                item = self._cycle(seed, number, cycle)[place]
                found.append(item + seen.get(item, 0) * len(self.encoded))
                seen[item] = seen.get(item, 0) + 1
        random.Random(f"{seed} {epoch}").shuffle(found)
        return found

    def _cycle(self, seed: int, number: int, cycle: int) -> list[int]:
        """A set in a new order."""
        if self._known[:1] != (key := (seed, number, cycle),):
            of_set = self.parts[number][0]
            self._known = (key, random.Random(f"{seed} {number} {cycle}").sample(of_set, len(of_set)))
        return self._known[1]

    _known: tuple[Any, ...] = (None,)

    def shape_of(self, index: int) -> Shape | None:
        """As :meth:`palate.data.encoded.Encoded.shape_of`."""
        return self.encoded.shape_of(index % len(self.encoded))

    def batch(self, indices: Sequence[int], seeds: Tensor) -> Any:
        """As :meth:`palate.data.encoded.EncodedPairs.batch`, of indices as :meth:`order` gives them."""
        return self.encoded.batch([index % len(self.encoded) for index in indices], seeds)
