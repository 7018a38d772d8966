"""Pairs and single pictures to what training reads: latents and text encodings, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from palate.base.errors import UserError
from palate.data.cache import TensorCache
from palate.data.images import check_resolution, crop_position, decode, framing, square
from palate.data.pairs import LikedPicture, PreferencePair
from palate.data.selection import same_prompt


@dataclass(frozen=True)
class PairBatch:
    """What one training step reads; p pairs, on the CPU, in the dtype they were encoded with."""

    latents: Float[Tensor, "rows c h w"]  # rows = 2p, winners first
    # Rows as those of latents, by name: the text encoding, and "framing" (2p, 6), as palate.data.images.framing gives it
    cond: dict[str, Tensor]
    label: Float[Tensor, " p"]  # in [0.5, 1]: probability that the winner is the better one
    weight: Float[Tensor, " p"]
    seeds: Int64[Tensor, " p"]


@dataclass(frozen=True)
class SampleBatch:
    """b single pictures that people liked or disliked, on the CPU; rows as in ``PairBatch``."""

    latents: Float[Tensor, "b c h w"]
    cond: dict[str, Tensor]  # b rows, by name
    label: Float[Tensor, " b"]  # in [0, 1]: probability that the picture is liked; 1 or 0 for a plain vote
    weight: Float[Tensor, " b"]
    seeds: Int64[Tensor, " b"]


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


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """The cache's keys of a single picture; ``picture[1]``, if there, is the mirrored one."""

    prompt: str
    text: str
    picture: tuple[str, ...]
    label: float  # in [0, 1]: probability that it is liked
    weight: float
    source: str


Item = TypeVar("Item", EncodedPair, EncodedPicture)


class Encoded(Generic[Item]):
    """Items whose tensors lie in a cache; only keys, labels, weights and prompts are held in memory."""

    def __init__(self, items: Sequence[Item], cache: TensorCache) -> None:
        self.items, self.cache = list(items), cache

    def __len__(self) -> int:
        return len(self.items)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each item, in order."""
        return [item.prompt for item in self.items]

    def of(self, items: Sequence[Item]) -> Encoded:
        """The same with other items."""
        return type(self)(items, self.cache)

    def without_prompts(self, prompts: Iterable[str]) -> Encoded:
        """What has none of these prompts, as :func:`same_prompt` compares them. Raises ``UserError`` if nothing is left."""
        others = {same_prompt(prompt) for prompt in prompts}
        kept = [item for item in self.items if same_prompt(item.prompt) not in others]
        if not kept:
            raise UserError("the training data has no prompt that the validation data has not: name other validation data")
        return self.of(kept)

    def split(self, fraction: float, seed: int) -> tuple[Encoded, Encoded]:
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
        """The conditioning of as many rows."""
        return {
            **{name: torch.stack([text[name] for text in texts]) for name in texts[0]},
            "framing": torch.stack([picture["framing"] for picture in pictures]),
        }

    def _picked(self, indices: Sequence[int], seeds: Tensor) -> tuple[list[Item], list[bool]]:
        """The items of a batch, and whether each is mirrored."""
        if len(indices) != len(seeds) or not len(seeds):
            raise ValueError(f"{len(indices)} indices and {len(seeds)} seeds: expected as many, and at least one")
        return [self.items[index] for index in indices], [_flipped(seed) for seed in seeds.tolist()]

    def _variant(self, keys: tuple[str, ...], flip: bool, item: Item) -> dict[str, Tensor]:
        return self._read(keys[flip and len(keys) > 1], item)  # without random_flip there is only one variant

    def _read(self, key: str, item: Item) -> dict[str, Tensor]:
        tensors = self.cache.get(key)
        if tensors is None:
            raise UserError(
                f"the cache entry {self.cache.path(key)} ({item.source or item.prompt!r}) is missing or damaged: "
                "run again, and it is encoded anew"
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


PIXELS_AT_ONCE = 2**19
"""Two pictures of 512 pixels a side, one of 768 or 1024: half a kilobyte for each in every tensor of those layers."""


def encode(
    items: Iterable[PreferencePair] | Iterable[LikedPicture],
    *,
    encode_images: Callable[[Tensor], Tensor],
    encode_text: Callable[[list[str]], dict[str, Tensor]],
    image_fingerprint: str,
    text_fingerprint: str,
    cache: TensorCache,
    resolution: int,
    random_flip: bool = False,
    center_crop: bool = True,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> EncodedPairs | EncodedPictures:
    """Stream pairs, or single pictures, into the cache and return their keys.

    Of pairs winners come first; labels below 1/2 are turned round.

    ``encode_images`` takes ``(b, 3, resolution, resolution)`` float32 in [-1, 1] and returns latents ``(b, c, h, w)``;
    ``encode_text`` takes prompts and returns tensors of as many rows by name. Both see only what the cache lacks, each
    picture and each prompt once, ``batch_size`` at a time (of large pictures fewer); so a run that was stopped continues
    where it was. Floating-point results are kept as ``dtype``. The fingerprints stand for the encoders' weights.

    With ``center_crop`` an entry belongs to a picture. Without, the square's position is drawn once per item from ``seed``
    and the contents of its pictures, for both of a pair the same, and in every epoch (a new position in every epoch could not
    be cached), and an entry belongs to a picture in a pair. With ``random_flip`` both variants are encoded, and ``batch``
    chooses.

    Raises ``UserError`` for a wrong resolution, a picture that does not decode, NaN or infinity from an encoder, no items.
    """
    check_resolution(resolution)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but it must be 1 or more")
    common = {"dtype": str(dtype).removeprefix("torch."), "version": 2}

    def encode_pictures(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        pixels, framings = (torch.stack(parts) for parts in zip(*items, strict=True))
        return {"latents": encode_images(pixels), "framing": framings}

    # Of large pictures fewer: a VAE's first layers hold 128 float32 channels of every pixel, several times over.
    pictures = _Queue(cache, max(1, min(batch_size, PIXELS_AT_ONCE // resolution**2)), dtype, encode_pictures)
    texts = _Queue(cache, batch_size, dtype, encode_text)
    pairs: list[EncodedPair] = []
    singles: list[EncodedPicture] = []
    bar = tqdm(items, desc="encoding", unit=" items", disable=not progress)
    for item in bar:
        digests = [hashlib.sha256(image).hexdigest() for image in item.pictures]
        position = (0.5, 0.5) if center_crop else crop_position("random", _item_seed(seed, digests))
        keys = []
        for image, digest in zip(item.pictures, digests, strict=True):
            variants = []
            for flip in (False, True) if random_flip else (False,):
                parts = {"kind": "latents", "model": image_fingerprint, "image": digest, "resolution": resolution}
                key = cache.key(**parts, crop=position, flip=flip, **common)
                variants.append(key)
                if pictures.lacks(key):
                    picture = _decoded(item, image)
                    pixels = square(picture, resolution, position, flip=flip)
                    pictures.add(key, (pixels, framing(picture.size, resolution, position, flip=flip)), item.source)
            keys.append(tuple(variants))
        text = cache.key(kind="text", model=text_fingerprint, prompt=item.prompt, **common)
        if texts.lacks(text):
            texts.add(text, item.prompt, item.source)
        if isinstance(item, LikedPicture):
            singles.append(EncodedPicture(item.prompt, text, keys[0], item.label, item.weight, item.source))
        else:
            if item.label < 0.5:
                keys.reverse()
            label = max(item.label, 1 - item.label)
            pairs.append(EncodedPair(item.prompt, text, keys[0], keys[1], label, item.weight, item.source))
        bar.set_postfix(encoded=pictures.encoded, reused=pictures.reused, refresh=False)
    pictures.flush()
    texts.flush()
    if pairs and singles:
        raise ValueError("pairs and single pictures in one stream")
    if not pairs and not singles:
        raise UserError("there are no preference pairs or pictures to encode: check their source")
    return EncodedPairs(pairs, cache) if pairs else EncodedPictures(singles, cache)


def encode_pairs(pairs: Iterable[PreferencePair], **options: Any) -> EncodedPairs:
    """:func:`encode`, of pairs alone. Raises ``UserError`` for single pictures."""
    encoded = encode(pairs, **options)
    if not isinstance(encoded, EncodedPairs):
        raise UserError("these are single pictures, not pairs: expected two pictures an item, and which is the better one")
    return encoded


class _Queue:
    """What the cache lacks, encoded a batch at a time."""

    def __init__(
        self, cache: TensorCache, batch_size: int, dtype: torch.dtype, encode: Callable[[list], Mapping[str, Tensor]]
    ) -> None:
        self.cache, self.batch_size, self.dtype, self.encode = cache, batch_size, dtype, encode
        self.seen: set[str] = set()
        self.waiting: list[tuple[str, object, str]] = []
        self.encoded = self.reused = 0

    def lacks(self, key: str) -> bool:
        """True the first time a key is asked for that the cache has not; the caller then adds it."""
        if key in self.seen:
            return False
        self.seen.add(key)
        present = self.cache.get(key) is not None
        self.reused += present
        return not present

    def add(self, key: str, item: object, source: str) -> None:
        self.waiting.append((key, item, source))
        if len(self.waiting) == self.batch_size:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        if not self.waiting:
            return
        keys, items, sources = zip(*self.waiting, strict=True)
        tensors = {
            # Token ids and masks are not converted.
            name: rows.to("cpu", self.dtype if rows.is_floating_point() else rows.dtype)
            for name, rows in self.encode(list(items)).items()
        }
        for name, rows in tensors.items():
            if len(rows) != len(keys):
                raise ValueError(f"the encoder gave {len(rows)} rows of {name} for {len(keys)} items")
            for row, source in zip(rows, sources, strict=True):
                if not row.isfinite().all():
                    raise UserError(
                        f"encoding {source or 'an item'} gave NaN or infinity in {name} as {self.dtype}: "
                        "use float32 (SDXL's own VAE overflows in float16)"
                    )
        for i, key in enumerate(keys):
            self.cache.put(key, {name: rows[i] for name, rows in tensors.items()})
        self.encoded += len(keys)
        self.waiting = []


def _decoded(item: PreferencePair | LikedPicture, image: bytes) -> Image.Image:
    try:
        return decode(image)
    except ValueError as error:
        raise UserError(f"{item.source or 'an item'}: a picture {error}; remove it or repair the picture") from None


def _item_seed(seed: int, digests: list[str]) -> int:
    return int.from_bytes(hashlib.sha256(" ".join([str(seed), *digests]).encode()).digest()[:8], "big")


def _flipped(seed: int) -> bool:
    """A fair coin from an item's seed, by a hash: independent of the noise and time that are drawn from the same seed."""
    return bool(hashlib.sha256(f"flip {seed}".encode()).digest()[0] & 1)
