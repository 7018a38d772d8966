"""Pairs and single pictures to what training reads: latents and text encodings, computed once and kept in the cache."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from palate.base.errors import UserError
from palate.base.machine import tell
from palate.base.processes import Processes
from palate.base.shapes import Shape
from palate.data.buckets import Fitted, shared
from palate.data.cache import TensorCache
from palate.data.encoded import EncodedPairs, EncodedPictures
from palate.data.images import converted, crop_position, decode_usable, framed, size_of
from palate.data.items import Columns, EncodedPair, EncodedPicture, Items
from palate.data.pairs import LikedPicture, PreferencePair, Reader
from palate.data.remembered import recall, remember, signature

PIXELS_AT_ONCE = 2**19
"""Two pictures of 512 pixels a side, one of 768 or 1024: half a kilobyte for each in every tensor of those layers."""


@runtime_checkable
class PictureConditions(Protocol):
    """What a model is told of a picture beside its prompt."""

    def __call__(self, size: tuple[int, int], shape: Shape, position: tuple[float, float], *, flip: bool) -> dict[str, Tensor]:
        """By name, of a picture of ``size`` (width, height) that :func:`palate.data.images.framed` cuts with the rest."""
        ...


@dataclass(frozen=True)
class Encoders:
    """What encoding needs of a model."""

    encode_images: Callable[[Tensor], Tensor]
    """Pictures ``(b, 3, h, w)``, float32 in [-1, 1], to latents ``(b, c, h, w)``."""
    encode_text: Callable[[list[str]], dict[str, Tensor]]
    """Prompts to tensors of as many rows, by name."""
    image_fingerprint: str
    """Stands for the weights of ``encode_images``. Models that share it share cache entries, and so need the same picture
    conditions."""
    text_fingerprint: str
    """Stands for the weights of ``encode_text``."""
    picture_conditions: PictureConditions


def encode(
    items: Iterable[PreferencePair] | Iterable[LikedPicture],
    encoders: Encoders,
    *,
    cache: TensorCache,
    shapes: Sequence[Shape],
    random_flip: bool = False,
    center_crop: bool = True,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
    processes: Processes | None = None,
    part: tuple[int, int] = (0, 1),
) -> EncodedPairs | EncodedPictures:
    """Stream pairs, or single pictures, into the cache and return their keys.

    A source whose files are as they were is not read again (:mod:`palate.data.remembered`).

    Of pairs winners come first; labels below 1/2 are turned round. Both pictures of a pair get one of the ``shapes``, that of
    :func:`palate.data.buckets.shared`; what that cost is told in ``Encoded.fitted``.

    The encoders see only what the cache lacks, each picture and each prompt once, ``batch_size`` at a time (of large pictures
    fewer), without gradients; so a run that was stopped continues where it was. Latents and encodings of prompts are kept as
    ``dtype``.

    With ``center_crop`` an entry belongs to a picture. Without, the position of what is kept is drawn once per item from
    ``seed`` and the contents of its pictures, for both of a pair the same, and in every epoch (a new position in every epoch
    could not be cached), and an entry belongs to a picture in a pair. With ``random_flip`` both variants are encoded, and
    ``batch`` chooses.

    Args:
        processes: those that call this with the same arguments. Each reads all, and encodes the pictures and prompts whose
            digests fall to it: nothing is encoded twice. All return when all are done; where machines do not share the
            cache's folder, those of each machine then encode what it lacks.
        part: index and count, where the work is shared by calls that do not wait for each other: the rest is left out.

    Raises:
        UserError: a wrong shape, a picture that does not decode (of a ``Reader`` where it bears no more of them), NaN or
            infinity from an encoder, no items.
    """
    for shape in shapes:
        Shape.of(shape.told)  # which refuses what no VAE takes
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but it must be 1 or more")
    processes = processes or Processes()
    work = _Work(encoders, cache, shapes, random_flip, center_crop, dtype, batch_size, seed)
    name = work.name_of(items) if isinstance(items, Reader) else None
    if name is not None:
        known = recall(cache, name, items)
        if not processes.any(known is None or not cache.holds(known[0].keys)) and known is not None:
            return _encoded(*known, cache)
    everywhere = (part[0] * processes.count + processes.index, part[1] * processes.count)
    for share in (everywhere, processes.local):
        work.share = share
        found = _rounds(items, work, processes, progress)
        if part[1] > 1 or not processes.any(not cache.holds(found.keys)):
            if name is not None and part[1] == 1 and 0 in (processes.index, processes.local[0]):
                remember(cache, name, found, work.fitted, cast("Reader", items))
            return _encoded(found, work.fitted, cache)
    raise UserError(f"entries have gone from the cache folder {cache.folder} while it was filled: run again")


def _encoded(items: Items[Any], fitted: Fitted, cache: TensorCache) -> EncodedPairs | EncodedPictures:
    return (EncodedPairs if items.pairs else EncodedPictures)(items, cache, fitted)


def _rounds(
    items: Iterable[PreferencePair] | Iterable[LikedPicture], work: _Work, processes: Processes, progress: bool
) -> Items[Any]:
    """All items, once every process knows which pictures cannot be used: one sees that of its own pictures alone."""
    known: set[str] = set()
    while True:
        columns = Columns()
        work.fitted, work.met = Fitted(), set()
        stream, about = (items.checked(work.check), items.rows_about()) if isinstance(items, Reader) else (items, None)
        stream = stream if progress else _pace(stream, about)
        bar = tqdm(stream, total=about, desc="encoding", unit=" items", disable=not progress)
        try:
            for item in bar:
                columns.add(work.add(item))
                bar.set_postfix(encoded=work.encoded, reused=work.reused, refresh=False)
            work.flush()
        finally:  # what was encoded is kept whatever comes
            work.cache.flush()
        unusable = processes.union(work.unusable)
        work.cache.refresh()
        if processes.count == 1 or unusable == known:
            break
        known, work.unusable = unusable, set(unusable)
    if not columns:
        raise UserError("there are no preference pairs or pictures to encode: check their source")
    return Items(columns.tensors())


def encode_pairs(pairs: Iterable[PreferencePair], encoders: Encoders, **options: Any) -> EncodedPairs:
    """:func:`encode`, of pairs alone. Raises ``UserError`` for single pictures."""
    encoded = encode(pairs, encoders, **options)
    if not isinstance(encoded, EncodedPairs):
        raise UserError("these are single pictures, not pairs: expected two pictures an item, and which is the better one")
    return encoded


def _pace(stream: Iterable[Any], about: int | None) -> Iterator[Any]:
    """The same, told of in lines where there is no bar: after a minute, and every ten."""
    began = time.monotonic()
    due = began + 60
    for done, item in enumerate(stream):
        if (now := time.monotonic()) > due and done:
            due = now + 600
            left = (
                ""
                if about is None
                else f" of about {about}, {max(0, about - done) * (now - began) / done / 60:.0f} minutes left"
            )
            tell(f"encoding: {done} items{left} at {done / (now - began):.3g} a second")
        yield item


class _Work:
    """Items to keys, and what the cache lacks of them to entries."""

    share = (0, 1)
    """Index and count: which part of what is lacking is encoded here."""

    def __init__(
        self,
        encoders: Encoders,
        cache: TensorCache,
        shapes: Sequence[Shape],
        random_flip: bool,
        center_crop: bool,
        dtype: torch.dtype,
        batch_size: int,
        seed: int,
    ) -> None:
        self.encoders, self.cache, self.shapes, self.seed = encoders, cache, shapes, seed
        self.flips, self.center_crop = (False, True) if random_flip else (False,), center_crop
        self.common = {"dtype": str(dtype).removeprefix("torch."), "version": 2}
        # Of large pictures fewer: a VAE's first layers hold 128 float32 channels of every pixel, several times over.
        at_once = {shape: max(1, min(batch_size, PIXELS_AT_ONCE // shape.pixels)) for shape in shapes}
        encode_pictures = functools.partial(_encode_pictures, encoders, dtype=dtype)
        self.pictures = {shape: _Queue(cache, n, encode_pictures) for shape, n in at_once.items()}
        self.texts = _Queue(cache, batch_size, lambda prompts: _kept(encoders.encode_text(prompts), dtype))
        self.unusable: set[str] = set()
        """Digests of pictures that cannot be used, as far as they are known."""
        self.decoded = functools.lru_cache(maxsize=2)(decode_usable)
        self.fitted, self.met = Fitted(), set[int]()

    @property
    def encoded(self) -> int:
        return sum(queue.encoded for queue in self.pictures.values())

    @property
    def reused(self) -> int:
        return sum(queue.reused for queue in self.pictures.values())

    def name_of(self, reader: Reader) -> str | None:
        """The key under which the items of a reader are remembered: of all that decides theirs. None if that cannot be told."""
        if (source := signature(reader)) is None:
            return None
        models = {"image_model": self.encoders.image_fingerprint, "text_model": self.encoders.text_fingerprint}
        told = [shape.told for shape in self.shapes]
        how = {"resolution": told if len(told) > 1 else told[0], "flips": self.flips}
        how["crop"] = "centre" if self.center_crop else self.seed
        return self.cache.key(kind="set", source=source, **models, **how, **self.common)

    def check(self, image: bytes) -> str:
        """Why a picture cannot be used, or nothing; one that has entries, or that another process looks at, can be."""
        digest = _digest(image)
        if digest not in self.unusable and not (self._mine(digest) and self._lacking(image)):
            return ""
        try:
            self.decoded(image)
        except ValueError as error:
            self.unusable.add(digest)
            return str(error)
        return ""

    def add(self, item: PreferencePair | LikedPicture) -> EncodedPair | EncodedPicture:
        """The keys of an item; what is lacking of it is encoded, by and by."""
        digests = [_digest(image) for image in item.pictures]
        position = (0.5, 0.5) if self.center_crop else crop_position(_item_seed(self.seed, digests))
        sizes = [self._size(image) for image in item.pictures]
        shape = shared(self.shapes, sizes)
        for digest, size in zip(digests, sizes, strict=True):
            if (met := hash((digest, shape))) not in self.met:  # in however many pairs it is
                self.met.add(met)
                self.fitted.add(size, shape)
        keys = [self._picture(item, image, shape, position) for image in item.pictures]
        text = self.cache.key(kind="text", model=self.encoders.text_fingerprint, prompt=item.prompt, **self.common)
        if self._mine(text) and self.texts.lacks(text):
            self.texts.add(text, item.prompt, item.source)
        if isinstance(item, LikedPicture):
            return EncodedPicture(item.prompt, text, keys[0], item.label, item.weight, item.source, shape)
        if item.label < 0.5:
            keys.reverse()
        label = max(item.label, 1 - item.label)
        return EncodedPair(item.prompt, text, keys[0], keys[1], label, item.weight, item.source, shape)

    def flush(self) -> None:
        for queue in (*self.pictures.values(), self.texts):
            queue.flush()

    def _mine(self, digest: str) -> bool:
        return int(digest[:8], 16) % self.share[1] == self.share[0]

    def _lacking(self, image: bytes) -> bool:
        """Whether there may be something to encode; which crop and which of several shapes, only the pair tells."""
        return not self.center_crop or not any(
            all(map(queue.there, self._keys(image, shape, (0.5, 0.5)))) for shape, queue in self.pictures.items()
        )

    def _size(self, image: bytes) -> tuple[int, int]:
        """Width and height; of a picture that cannot be used, which is left out once all processes know of it, any."""
        try:
            return size_of(image)
        except ValueError:
            try:
                return self.decoded(image).size
            except ValueError:
                return 1, 1

    def _keys(self, image: bytes, shape: Shape, position: tuple[float, float]) -> tuple[str, ...]:
        """One, and that of the mirrored picture if it is wanted."""
        parts = {"kind": "latents", "model": self.encoders.image_fingerprint, "image": _digest(image)}
        parts |= {"colours": "srgb"} if converted(image) else {}  # entries of old did without the profile
        how = {"resolution": shape.told, "crop": position, **self.common}
        return tuple(self.cache.key(**parts, **how, flip=flip) for flip in self.flips)

    def _picture(
        self, item: PreferencePair | LikedPicture, image: bytes, shape: Shape, position: tuple[float, float]
    ) -> tuple[str, ...]:
        keys, queue = self._keys(image, shape, position), self.pictures[shape]
        if self._mine(_digest(image)):
            for key, flip in zip(keys, self.flips, strict=True):
                if queue.lacks(key):
                    queue.add(key, self._prepared(item, image, shape, position, flip), item.source)
        return keys

    def _prepared(
        self, item: PreferencePair | LikedPicture, image: bytes, shape: Shape, position: tuple[float, float], flip: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            picture = self.decoded(image)
        except ValueError as error:
            raise UserError(f"{item.source or 'an item'}: a picture {error}; remove it or repair the picture") from None
        conditions = self.encoders.picture_conditions(picture.size, shape, position, flip=flip)
        return framed(picture, shape, position, flip=flip), conditions


class _Queue:
    """What the cache lacks, encoded a batch at a time."""

    def __init__(self, cache: TensorCache, batch_size: int, encode: Callable[[list[Any]], Mapping[str, Tensor]]) -> None:
        self.cache, self.batch_size, self.encode = cache, batch_size, encode
        self.waiting: dict[str, tuple[object, str]] = {}
        self.encoded = self.reused = 0

    def there(self, key: str) -> bool:
        """Whether an entry is in the cache, or soon will be."""
        return key in self.waiting or self.cache.has(key)

    def lacks(self, key: str) -> bool:
        """Whether an entry is still to be added."""
        there = self.there(key)
        self.reused += there
        return not there

    def add(self, key: str, item: object, source: str) -> None:
        self.waiting[key] = item, source
        if len(self.waiting) == self.batch_size:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        if not self.waiting:
            return
        tensors = {name: rows.cpu() for name, rows in self.encode([item for item, _ in self.waiting.values()]).items()}
        for name, rows in tensors.items():
            if len(rows) != len(self.waiting):
                raise ValueError(f"the encoder gave {len(rows)} rows of {name} for {len(self.waiting)} items")
            for row, (_, source) in zip(rows, self.waiting.values(), strict=True):
                if not row.isfinite().all():
                    raise UserError(
                        f"encoding {source or 'an item'} gave NaN or infinity in {name} as {rows.dtype}: "
                        "use float32 (SDXL's own VAE overflows in float16)"
                    )
        for i, key in enumerate(self.waiting):
            self.cache.put(key, {name: rows[i] for name, rows in tensors.items()})
        self.encoded += len(self.waiting)
        self.waiting = {}


def _encode_pictures(
    encoders: Encoders, items: list[tuple[Tensor, dict[str, Tensor]]], dtype: torch.dtype
) -> dict[str, Tensor]:
    pixels, conditions = zip(*items, strict=True)
    latents = _kept({"latents": encoders.encode_images(torch.stack(pixels))}, dtype)
    # Sizes and places are not rounded.
    return latents | {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}


def _kept(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """With the precision of the cache; token ids and masks are not converted."""
    return {name: rows.to(dtype) if rows.is_floating_point() else rows for name, rows in tensors.items()}


@functools.lru_cache(maxsize=16)
def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


def _item_seed(seed: int, digests: list[str]) -> int:
    return int.from_bytes(hashlib.sha256(" ".join([str(seed), *digests]).encode()).digest()[:8], "big")
