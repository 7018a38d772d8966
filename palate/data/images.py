"""Pictures: bytes to RGB, to tensors and back, and the crop, flip and resize that both pictures of a pair share."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from palate.base.errors import UserError

# Only formats that PIL reads by itself: some others (EPS) start external programs on data from outside.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 8192 * 8192


def decode(data: bytes) -> Image.Image:
    """Decode a picture completely: upright RGB, 8 bits a sample, transparency on white, the first frame of an animation.

    Raises ``ValueError`` with the reason: empty, not a picture, truncated or damaged, more than ``MAX_PIXELS``.
    """
    if not data:
        raise ValueError("is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
            image.verify()  # checksums of PNG, which load() does not compare
    except UnidentifiedImageError:
        raise ValueError(f"is not a picture (expected one of {', '.join(FORMATS)})") from None
    # PIL's plugins raise nearly anything on damaged data: OSError, SyntaxError, struct.error, DecompressionBombError.
    except Exception as error:
        raise ValueError(f"cannot be decoded ({error})") from None
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"is too large ({size[0]} x {size[1]} pixels, at most {MAX_PIXELS} are read)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise ValueError(f"cannot be decoded ({error})") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point samples have no fixed white; save it with 8 bits a sample")
    if image.mode.startswith("I"):  # 16 bits a sample; PIL's own conversion would clip at 255
        samples = np.asarray(image).clip(0, 65535).astype(np.float32)
        return Image.fromarray((samples / 257).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_tensor(images: Sequence[Image.Image]) -> Float[Tensor, "b 3 h w"]:
    """Pictures of one size as float32 ``(b, 3, h, w)`` in [0, 1]."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def encoded(images: Float[Tensor, "b 3 h w"], form: str, **options: Any) -> list[bytes]:
    """Pictures rounded to 8 bits a sample, as files of PIL's format ``form`` with its ``options``."""
    files = []
    for picture in to_pictures(images):
        buffer = io.BytesIO()
        picture.save(buffer, format=form, **options)
        files.append(buffer.getvalue())
    return files


def to_pictures(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """The inverse of :func:`to_tensor`, rounding to 8 bits a sample."""
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def check_resolution(resolution: int) -> None:
    """Raise ``UserError`` unless the VAE's factor 8 divides ``resolution``."""
    if resolution < 8 or resolution % 8:
        below = max(8, resolution // 8 * 8)
        raise UserError(f"resolution is {resolution}, but it must be a positive multiple of 8: try {below} or {below + 8}")


def crop_position(seed: int) -> tuple[float, float]:
    """Where a square drawn from ``seed`` lies along the longer side: 0 = left or top, 1 = right or bottom; (across, down)."""
    draw = random.Random(seed)
    return draw.random(), draw.random()


def square(
    image: Image.Image, resolution: int, position: tuple[float, float] = (0.5, 0.5), *, flip: bool = False
) -> Float32[Tensor, "3 r r"]:
    """The largest square of a picture at a relative position, resized with antialiasing; values in [-1, 1]; then mirrored."""
    left, top, side = _largest_square(image.size, position)
    # Cropping in source coordinates: one resampling, and no rounding that differs between two sizes of the same picture.
    box = (left, top, left + side, top + side)
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1).contiguous() / 127.5 - 1
    return pixels.flip(-1) if flip else pixels


def framing(
    size: tuple[int, int], resolution: int, position: tuple[float, float] = (0.5, 0.5), *, flip: bool = False
) -> Int64[Tensor, 6]:
    """How :func:`square` frames a picture of ``size`` (width, height), as SDXL is told (arXiv 2307.01952, section 2.2).

    Original height and width; top and left of the crop, in pixels of the picture resized so that its shorter side is
    ``resolution`` (of the mirrored picture, with ``flip``); target height and width.
    """
    left, top, side = _largest_square(size, position)
    left = size[0] - side - left if flip else left
    scale = resolution / side
    return torch.tensor([size[1], size[0], round(top * scale), round(left * scale), resolution, resolution])


def _largest_square(size: tuple[int, int], position: tuple[float, float]) -> tuple[float, float, int]:
    """Left, top and side."""
    side = min(size)
    return position[0] * (size[0] - side), position[1] * (size[1] - side), side
