"""Encoded pairs and pictures: what training reads, from the cache."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from palate.base.errors import UserError
from palate.data.cache import TensorCache
from palate.data.selection import same_prompt
from palate.diffusion.batches import PairBatch, SampleBatch


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

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.text, *self.winner, *self.loser)


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """The cache's keys of a single picture; ``picture[1]``, if there, is the mirrored one."""

    prompt: str
    text: str
    picture: tuple[str, ...]
    label: float  # in [0, 1]: probability that it is liked
    weight: float
    source: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.text, *self.picture)


Item = TypeVar("Item", EncodedPair, EncodedPicture)


Kind = TypeVar("Kind", bound="Encoded")


class Encoded(Generic[Item]):
    """Items whose tensors lie in a cache; only keys, labels, weights and prompts are held in memory."""

    rounds = None  # unlike the model's own pictures, the items stay the same from epoch to epoch

    def __init__(self, items: Sequence[Item], cache: TensorCache) -> None:
        self.items, self.cache = list(items), cache

    def __len__(self) -> int:
        return len(self.items)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each item, in order."""
        return [item.prompt for item in self.items]

    def of(self: Kind, items: Sequence[Item]) -> Kind:
        """The same with other items."""
        return type(self)(items, self.cache)

    def without_prompts(self: Kind, prompts: Iterable[str]) -> Kind:
        """What has none of these prompts, as :func:`same_prompt` compares them. Raises ``UserError`` if nothing is left."""
        others = {same_prompt(prompt) for prompt in prompts}
        kept = [item for item in self.items if same_prompt(item.prompt) not in others]
        if not kept:
            raise UserError("the training data has no prompt that the validation data has not: name other validation data")
        return self.of(kept)

    def split(self: Kind, fraction: float, seed: int) -> tuple[Kind, Kind]:
        """Training and held-out items, about ``fraction`` of them held out, with no prompt on both sides.

        Prompts that differ only in capitals or spaces count as one. The order of the items does not matter to which prompts
        are held out, except through their numbers of items.
        """
        if not 0 < fraction < 1:
            raise UserError(f"the held-out fraction is {fraction}, but it must lie between 0 and 1")
        groups = [same_prompt(item.prompt) for item in self.items]
        sizes = Counter(groups)
        if len(sizes) < 2:
            raise UserError(f"a held-out part needs two different prompts or more, but there is {len(sizes)}: do not split")
        wanted = max(1, round(fraction * len(self)))
        shuffled = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).digest())
        held_out, count = set(), 0
        for group in shuffled:
            if count + sizes[group] <= wanted and len(held_out) < len(sizes) - 1:
                held_out.add(group)
                count += sizes[group]
        held_out = held_out or {min(shuffled, key=sizes.__getitem__)}
        sides = ([], [])
        for item, group in zip(self.items, groups, strict=True):
            sides[group in held_out].append(item)
        return self.of(sides[0]), self.of(sides[1])

    def order(self, seed: int, epoch: int) -> list[int]:
        """The order of an epoch: a permutation of all indices, the same for the same ``(seed, epoch)``."""
        return random.Random(f"{seed} {epoch}").sample(range(len(self)), len(self))

    def _cond(self, pictures: list[dict[str, Tensor]], texts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The conditioning of as many rows: the texts, and what models are told of the pictures."""
        return {
            **{name: torch.stack([text[name] for text in texts]) for name in texts[0]},
            **{name: torch.stack([picture[name] for picture in pictures]) for name in pictures[0] if name != "latents"},
        }

    def _picked(self, indices: Sequence[int], seeds: Tensor) -> tuple[list[Item], list[bool]]:
        """The items of a batch, and whether each is mirrored."""
        if len(indices) != len(seeds) or not len(seeds):
            raise ValueError(f"{len(indices)} indices and {len(seeds)} seeds: expected as many, and at least one")
        return [self.items[index] for index in indices], [flipped(seed) for seed in seeds.tolist()]

    def _variant(self, keys: tuple[str, ...], flip: bool, item: Item) -> dict[str, Tensor]:
        return self._read(keys[flip and len(keys) > 1], item)  # without random_flip there is only one variant

    def _read(self, key: str, item: Item) -> dict[str, Tensor]:
        tensors = self.cache.get(key)
        if tensors is None:
            # What spoilt one entry may have spoilt more. Reading removes those, so that one more run mends them all.
            others = sum(self.cache.get(k) is None for k in {k for one in self.items for k in one.keys} - {key})
            raise UserError(
                f"the entry of {item.source or repr(item.prompt)} in the cache folder {self.cache.folder} is missing or damaged"
                f"{f', and {others} more' if others else ''}: run again, and it is encoded anew"
            )
        return tensors


class EncodedPairs(Encoded[EncodedPair]):
    """Encoded pairs, winners first."""

    def batch(self, indices: Sequence[int], seeds: Int64[Tensor, " p"]) -> PairBatch:
        """The pairs at ``indices``, read from the cache.

        If the pairs were encoded with ``random_flip``, a pair's own seed decides whether both its pictures are mirrored.
        Raises ``UserError`` if an entry of the cache has gone.
        """
        pairs, flips = self._picked(indices, seeds)
        winners = [self._variant(pair.winner, flip, pair) for pair, flip in zip(pairs, flips, strict=True)]
        losers = [self._variant(pair.loser, flip, pair) for pair, flip in zip(pairs, flips, strict=True)]
        pictures = winners + losers
        return PairBatch(
            latents=torch.stack([picture["latents"] for picture in pictures]),
            cond=self._cond(pictures, [self._read(pair.text, pair) for pair in pairs] * 2),
            label=torch.tensor([pair.label for pair in pairs], dtype=torch.float32),
            weight=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
            seeds=seeds,
        )

    def without_ties(self) -> EncodedPairs:
        """Only the pairs that have a winner: what methods train on that look at the winner alone."""
        kept = [pair for pair in self.items if pair.label > 0.5]
        if not kept:
            raise UserError(f"all {len(self)} pairs are ties: a method that trains on winners needs pairs with a winner")
        return self.of(kept)


class EncodedPictures(Encoded[EncodedPicture]):
    """Encoded single pictures."""

    def batch(self, indices: Sequence[int], seeds: Int64[Tensor, " b"]) -> SampleBatch:
        """The pictures at ``indices``, read from the cache; as :meth:`EncodedPairs.batch`."""
        items, flips = self._picked(indices, seeds)
        pictures = [self._variant(item.picture, flip, item) for item, flip in zip(items, flips, strict=True)]
        return SampleBatch(
            latents=torch.stack([picture["latents"] for picture in pictures]),
            cond=self._cond(pictures, [self._read(item.text, item) for item in items]),
            label=torch.tensor([item.label for item in items], dtype=torch.float32),
            weight=torch.tensor([item.weight for item in items], dtype=torch.float32),
            seeds=seeds,
        )

    def liked(self) -> EncodedPictures:
        """Without the disliked pictures: what methods train on that know no dislike. Raises ``UserError`` if none is liked."""
        kept = [item for item in self.items if item.label > 0]
        if not kept:
            raise UserError(f"all {len(self)} pictures are disliked: a method that imitates pictures needs liked ones")
        return self.of(kept)


def flipped(seed: int) -> bool:
    """A fair coin from an item's seed, by a hash: independent of the noise and time that are drawn from the same seed."""
    return bool(hashlib.sha256(f"flip {seed}".encode()).digest()[0] & 1)
