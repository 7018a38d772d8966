"""Pairs and single pictures to what training reads: latents and text encodings, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from palate.base.errors import UserError
from palate.data.cache import TensorCache
from palate.data.encoded import EncodedPair, EncodedPairs, EncodedPicture, EncodedPictures
from palate.data.images import check_resolution, converted, crop_position, decode, square
from palate.data.pairs import LikedPicture, PreferencePair

PIXELS_AT_ONCE = 2**19
"""Two pictures of 512 pixels a side, one of 768 or 1024: half a kilobyte for each in every tensor of those layers."""


@runtime_checkable
class PictureConditions(Protocol):
    """What a model is told of a picture beside its prompt."""

    def __call__(
        self, size: tuple[int, int], resolution: int, position: tuple[float, float], *, flip: bool
    ) -> dict[str, Tensor]:
        """By name, of a picture of ``size`` (width, height) that :func:`palate.data.images.square` cuts with the rest."""
        ...


@dataclass(frozen=True)
class Encoders:
    """What encoding needs of a model."""

    encode_images: Callable[[Tensor], Tensor]
    """Pictures ``(b, 3, r, r)``, float32 in [-1, 1], to latents ``(b, c, h, w)``."""
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

    The encoders see only what the cache lacks, each picture and each prompt once, ``batch_size`` at a time (of large pictures
    fewer), without gradients; so a run that was stopped continues where it was. Floating-point results are kept as ``dtype``.

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

    def encode_pictures(items: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Tensor]:
        pixels, conditions = zip(*items, strict=True)
        latents = encoders.encode_images(torch.stack(pixels))
        return {"latents": latents, **{name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}}

    # Of large pictures fewer: a VAE's first layers hold 128 float32 channels of every pixel, several times over.
    pictures = _Queue(cache, max(1, min(batch_size, PIXELS_AT_ONCE // resolution**2)), dtype, encode_pictures)
    texts = _Queue(cache, batch_size, dtype, encoders.encode_text)
    pairs: list[EncodedPair] = []
    singles: list[EncodedPicture] = []
    bar = tqdm(items, desc="encoding", unit=" items", disable=not progress)
    try:
        for item in bar:
            digests = [hashlib.sha256(image).hexdigest() for image in item.pictures]
            position = (0.5, 0.5) if center_crop else crop_position(_item_seed(seed, digests))
            keys = []
            for image, digest in zip(item.pictures, digests, strict=True):
                variants = []
                for flip in (False, True) if random_flip else (False,):
                    parts = {"kind": "latents", "model": encoders.image_fingerprint, "image": digest, "resolution": resolution}
                    parts |= {"colours": "srgb"} if converted(image) else {}  # entries of old did without the profile
                    key = cache.key(**parts, crop=position, flip=flip, **common)
                    variants.append(key)
                    if pictures.lacks(key):
                        picture = _decoded(item, image)
                        pixels = square(picture, resolution, position, flip=flip)
                        conditions = encoders.picture_conditions(picture.size, resolution, position, flip=flip)
                        pictures.add(key, (pixels, conditions), item.source)
                keys.append(tuple(variants))
            text = cache.key(kind="text", model=encoders.text_fingerprint, prompt=item.prompt, **common)
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
    finally:  # what was encoded is kept whatever comes
        cache.flush()
    if pairs and singles:
        raise ValueError("pairs and single pictures in one stream")
    if not pairs and not singles:
        raise UserError("there are no preference pairs or pictures to encode: check their source")
    return EncodedPairs(pairs, cache) if pairs else EncodedPictures(singles, cache)


def encode_pairs(pairs: Iterable[PreferencePair], encoders: Encoders, **options: Any) -> EncodedPairs:
    """:func:`encode`, of pairs alone. Raises ``UserError`` for single pictures."""
    encoded = encode(pairs, encoders, **options)
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
        present = self.cache.has(key)
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
