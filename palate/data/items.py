"""Encoded pairs and pictures by column: a million of them take some 300 MB, and are shuffled and chosen without being read."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from palate.base.shapes import Shape


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The cache's keys of a pair, winner first: ``winner[1]`` and ``loser[1]``, if there, are the mirrored pictures."""

    prompt: str
    text: str
    winner: tuple[str, ...]
    loser: tuple[str, ...]
    label: float  # in [0.5, 1]
    weight: float
    source: str
    shape: Shape | None = None  # None: that of all

    @property
    def pictures(self) -> tuple[tuple[str, ...], ...]:
        return self.winner, self.loser


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """The cache's keys of a single picture; ``picture[1]``, if there, is the mirrored one."""

    prompt: str
    text: str
    picture: tuple[str, ...]
    label: float  # in [0, 1]: probability that it is liked
    weight: float
    source: str
    shape: Shape | None = None  # None: that of all

    @property
    def pictures(self) -> tuple[tuple[str, ...], ...]:
        return (self.picture,)


Item = TypeVar("Item", EncodedPair, EncodedPicture)


class Items(Sequence[Item], Generic[Item]):
    """Items of one kind, each made when it is asked for.

    Args:
        columns: as :meth:`Columns.tensors` gives them.
        rows: which rows of the columns, in order; all unless given.
    """

    def __init__(self, columns: Mapping[str, Tensor], rows: np.ndarray | None = None) -> None:
        if "height" not in columns:  # remembered before there were several shapes
            columns = {**columns, **dict.fromkeys(("height", "width"), torch.zeros(len(columns["label"]), dtype=torch.int16))}
        self._tensors = columns
        self._columns = {name: column.numpy() for name, column in columns.items()}
        self._rows = np.arange(len(self._columns["label"])) if rows is None else rows

    @staticmethod
    def of(items: Iterable[Item]) -> Items[Item]:
        """Of items one by one, all of the same kind and with as many keys."""
        columns = Columns()
        for item in items:
            columns.add(item)
        return Items(columns.tensors())

    @property
    def pairs(self) -> bool:
        """Whether these are pairs, not single pictures."""
        return self._columns["pictures"].shape[1] == 2

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The columns, of all rows."""
        return self._tensors

    @property
    def label(self) -> np.ndarray:
        """``(n,)``"""
        return self._columns["label"][self._rows]

    @property
    def weight(self) -> np.ndarray:
        """``(n,)``"""
        return self._columns["weight"][self._rows]

    @property
    def rows(self) -> np.ndarray:
        """Which rows of the columns these are ``(n,)``."""
        return self._rows

    @staticmethod
    def joined(parts: Sequence[Items[Item]]) -> Items[Item]:
        """The items of several, one after the other. Raises ``ValueError`` for others of kind or number of keys."""
        columns = [part._columns for part in parts]
        if len({(c["pictures"].shape[1:], c["text"].shape[1:]) for c in columns}) > 1:
            raise ValueError("items of different kinds cannot be joined")
        found: dict[str, Tensor] = {}
        for name in columns[0]:
            values = [c[name][: c[f"{name}_end"][-1]] if f"{name}_end" in c else c[name] for c in columns]
            if name.endswith("_end"):  # places in the bytes of the same name
                values = [v + sum(int(c[name][-1]) for c in columns[:i]) for i, v in enumerate(values)]
            found[name] = torch.from_numpy(np.concatenate(values))
        starts = [sum(len(c["label"]) for c in columns[:i]) for i in range(len(parts))]
        rows = np.concatenate([part._rows + start for part, start in zip(parts, starts, strict=True)])
        return Items(found, rows)

    @property
    def pictures(self) -> np.ndarray:
        """The bytes of the pictures' keys ``(n, 1 or 2, variants, 32)``, winners first."""
        return self._columns["pictures"][self._rows]

    @property
    def keys(self) -> np.ndarray:
        """The bytes of all keys ``(k, 32)``; those that several items share come several times."""
        return np.concatenate([self._columns["text"][self._rows], self.pictures.reshape(-1, 32)])

    @property
    def prompts(self) -> Iterator[str]:
        return (self._text("prompts", row) for row in self._rows)

    def shape(self, index: int) -> Shape | None:
        """Of an item's pictures."""
        height, width = (int(self._columns[name][self._rows[index]]) for name in ("height", "width"))
        return Shape(height, width) if height else None

    def where(self, chosen: np.ndarray) -> Items[Item]:
        """Some of them, in order: a mask ``(n,)``."""
        return Items(self._tensors, self._rows[chosen])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Items[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Items[Item]:
        if isinstance(index, slice):
            return Items(self._tensors, self._rows[index])
        row, columns = self._rows[index], self._columns
        keys = tuple(tuple(key.tobytes().hex() for key in variants) for variants in columns["pictures"][row])
        numbers = float(columns["label"][row]), float(columns["weight"][row])
        kind = EncodedPair if self.pairs else EncodedPicture
        text = columns["text"][row].tobytes().hex()
        return cast(
            "Item", kind(self._text("prompts", row), text, *keys, *numbers, self._text("sources", row), self.shape(index))
        )

    def _text(self, name: str, row: np.int64) -> str:
        ends = self._columns[f"{name}_end"]
        return self._columns[name][ends[row - 1] if row else 0 : ends[row]].tobytes().decode()


class Columns:
    """Items as they come, in little memory."""

    def __init__(self) -> None:
        self._bytes = {name: bytearray() for name in ("prompts", "sources", "text", "pictures")}
        self._numbers = {"label": array("d"), "weight": array("d"), "prompts_end": array("q"), "sources_end": array("q")}
        self._numbers |= {"height": array("h"), "width": array("h")}
        self._shape: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._numbers["label"])

    def add(self, item: EncodedPair | EncodedPicture) -> None:
        """Raises ``ValueError`` for an item of another kind, or with another number of keys, than those before."""
        shape = len(item.pictures), len(item.pictures[0])
        if self._shape not in (None, shape):
            raise ValueError("pairs and single pictures, or other numbers of variants, in one stream")
        self._shape = shape
        for name, text in (("prompts", item.prompt), ("sources", item.source)):
            self._bytes[name] += text.encode()
            self._numbers[f"{name}_end"].append(len(self._bytes[name]))
        self._bytes["text"] += bytes.fromhex(item.text)
        self._bytes["pictures"] += bytes.fromhex("".join(key for variants in item.pictures for key in variants))
        self._numbers["label"].append(item.label)
        self._numbers["weight"].append(item.weight)
        self._numbers["height"].append(item.shape.height if item.shape else 0)
        self._numbers["width"].append(item.shape.width if item.shape else 0)

    def tensors(self) -> dict[str, Tensor]:
        """What :class:`Items` takes; at least one item must have been added."""
        assert self._shape is not None
        raw = {name: torch.frombuffer(data or bytearray(1), dtype=torch.uint8) for name, data in self._bytes.items()}
        numbers = {name: torch.from_numpy(np.frombuffer(found, found.typecode)) for name, found in self._numbers.items()}
        keys = {"text": raw["text"].view(-1, 32), "pictures": raw["pictures"].view(-1, *self._shape, 32)}
        return {**raw, **numbers, **keys}
