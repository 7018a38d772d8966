"""Encoded pairs and pictures: what training reads, from the cache."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.data.buckets import Fitted
from palate.data.cache import TensorCache
from palate.data.items import EncodedPair, EncodedPicture, Item, Items
from palate.data.selection import same_prompt
from palate.diffusion.batches import PairBatch, SampleBatch

Kind = TypeVar("Kind", bound="Encoded")
Tokenize = Callable[[list[str]], dict[str, Tensor]]
"""Prompts -> what text encoders read, a row each, by name."""


class Encoded(Generic[Item]):
    """Items whose tensors lie in a cache; only keys, labels, weights and prompts are held in memory.

    Numbers that were kept with 16 bits are given with 32.
    """

    rounds = None  # unlike the model's own pictures, the items stay the same from epoch to epoch

    def __init__(
        self, items: Items[Item], cache: TensorCache, fitted: Fitted | None = None, words: Tokenize | None = None
    ) -> None:
        self.items, self.cache, self.fitted, self._words = items, cache, fitted or Fitted(), words

    def __len__(self) -> int:
        return len(self.items)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each item, in order."""
        return list(self.items.prompts)

    def digest(self) -> str:
        """Of the contents that are learned from: pictures and prompts as they were encoded, labels, weights."""
        items = self.items
        parts = (items.keys.tobytes(), items.label.tobytes(), items.weight.tobytes())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]

    def where(self: Kind, chosen: np.ndarray | Sequence[bool]) -> Kind:
        """With some of the items alone."""
        return type(self)(self.items.where(np.asarray(chosen, bool)), self.cache, words=self._words)

    def with_words(self: Kind, words: Tokenize) -> Kind:
        """Batches also hold the tokens of their prompts, for text encoders that learn."""
        return type(self)(self.items, self.cache, self.fitted, words)

    def _text(self, item: Item) -> dict[str, Tensor]:
        tokens = {} if self._words is None else self._words([item.prompt])
        return {**self._read(item.text, item), **{name: rows[0] for name, rows in tokens.items()}}

    def without_prompts(self: Kind, prompts: Iterable[str]) -> Kind:
        """What has none of these prompts, as :func:`same_prompt` compares them. Raises ``UserError`` if nothing is left."""
        others = {same_prompt(prompt) for prompt in prompts}
        kept = [same_prompt(prompt) not in others for prompt in self.items.prompts]
        if not any(kept):
            raise UserError("the training data has no prompt that the validation data has not: name other validation data")
        return self.where(kept)

    def split(self: Kind, fraction: float, seed: int) -> tuple[Kind, Kind]:
        """Training and held-out items, about ``fraction`` of them held out, with no prompt on both sides.

        Prompts that differ only in capitals or spaces count as one. The order of the items does not matter to which prompts
        are held out, except through their numbers of items.
        """
        if not 0 < fraction < 1:
            raise UserError(f"the held-out fraction is {fraction}, but it must lie between 0 and 1")
        groups = [same_prompt(prompt) for prompt in self.items.prompts]
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
        held = np.array([group in held_out for group in groups])
        return self.where(~held), self.where(held)

    def order(self, seed: int, epoch: int) -> list[int]:
        """The order of an epoch: a permutation of all indices, the same for the same ``(seed, epoch)``."""
        return random.Random(f"{seed} {epoch}").sample(range(len(self)), len(self))

    def shape_of(self, index: int) -> Shape | None:
        """Items of one shape can be in one batch."""
        return self.items.shape(index)

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
            every = {name.tobytes().hex() for name in self.items.keys}
            others = sum(self.cache.get(other) is None for other in every if other != key)
            raise UserError(
                f"the entry of {item.source or repr(item.prompt)} in the cache folder {self.cache.folder} is missing or damaged"
                f"{f', and {others} more' if others else ''}: run again, and it is encoded anew"
            )
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


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
            cond=self._cond(pictures, [self._text(pair) for pair in pairs] * 2),
            label=torch.tensor([pair.label for pair in pairs], dtype=torch.float32),
            weight=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
            seeds=seeds,
        )

    def without_ties(self) -> EncodedPairs:
        """Only the pairs that have a winner: what methods train on that look at the winner alone."""
        kept = self.items.label > 0.5
        if not kept.any():
            raise UserError(f"all {len(self)} pairs are ties: a method that trains on winners needs pairs with a winner")
        return self.where(kept)


class EncodedPictures(Encoded[EncodedPicture]):
    """Encoded single pictures."""

    def batch(self, indices: Sequence[int], seeds: Int64[Tensor, " b"]) -> SampleBatch:
        """The pictures at ``indices``, read from the cache; as :meth:`EncodedPairs.batch`."""
        items, flips = self._picked(indices, seeds)
        pictures = [self._variant(item.picture, flip, item) for item, flip in zip(items, flips, strict=True)]
        return SampleBatch(
            latents=torch.stack([picture["latents"] for picture in pictures]),
            cond=self._cond(pictures, [self._text(item) for item in items]),
            label=torch.tensor([item.label for item in items], dtype=torch.float32),
            weight=torch.tensor([item.weight for item in items], dtype=torch.float32),
            seeds=seeds,
        )

    def liked(self) -> EncodedPictures:
        """Without the disliked pictures: what methods train on that know no dislike. Raises ``UserError`` if none is liked."""
        kept = self.items.label > 0
        if not kept.any():
            raise UserError(f"all {len(self)} pictures are disliked: a method that imitates pictures needs liked ones")
        return self.where(kept)


def flipped(seed: int) -> bool:
    """A fair coin from an item's seed, by a hash: independent of the noise and time that are drawn from the same seed."""
    return bool(hashlib.sha256(f"flip {seed}".encode()).digest()[0] & 1)
