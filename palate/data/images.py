"""Pictures: bytes to RGB, to tensors and back, and the crop, flip and resize that both pictures of a pair share."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError, features
from torch import Tensor

from palate.base.errors import said
from palate.base.shapes import MAX_SIDE, Shape

# Only formats that PIL reads by itself: some others (EPS) start external programs on data from outside.
OPTIONAL = {"AVIF": features.check_module("avif"), "JPEG2000": features.check_codec("jpg_2000")}
"""Those that some builds of PIL lack."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(name for name, present in OPTIONAL.items() if present))
MAX_PIXELS = MAX_SIDE**2
LEAST_SIDE, LONGEST = 4, 10
"""Of the pictures that data may hold: the shorter side in pixels, and how many times as long the other one may be."""
ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)
"""EXIF's tag for how a picture was held, and those of its values that turn it by a quarter."""
SAME = 3
"""Levels of 256 by which a profile may differ from sRGB and still be taken for it."""
SRGB_GAMMA, SRGB_PRIMARIES = 1 / 2.2, (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
"""What a PNG without a profile tells of sRGB in its chunks gAMA and cHRM: red, green and blue as x and y."""
WIDE = "has colours of high dynamic range or a wide gamut without a profile: save it as sRGB with 8 bits"
warnings.filterwarnings("ignore", module=r"PIL\.")  # of what is damaged beside the pixels, and of sizes refused below
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 24  # now bounds colour profiles alone: texts are left out before PIL sees the file
OTHERS = (
    (b"%PDF", "a PDF document", "pdftoppm -png IN OUT"),
    (b"8BPS", "a Photoshop file", "magick IN OUT.png"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture, which this Pillow does not read", "opj_decompress -i IN -o OUT.png"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture, which this Pillow does not read", "opj_decompress -i IN -o OUT.png"),
    (b"\xff\x0a", "a JPEG XL picture", "djxl IN OUT.png"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture", "djxl IN OUT.png"),
    (b"v/1\x01", "an OpenEXR picture", "magick IN OUT.png"),
    (b"#?RADIANCE", "a Radiance picture", "magick IN OUT.png"),
)
"""How files begin that are often taken for pictures we read, what they are, and what converts them."""


HEADS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8")
"""How pictures that we read begin, and nothing else does."""


def decode(data: bytes) -> Image.Image:
    """Decode a picture completely: upright sRGB, 8 bits a sample, transparency on white, the first frame of an animation.

    Colours of another profile are converted. What a file holds besides its picture is not read and refuses nothing.
    Raises ``ValueError`` with the reason: empty, not a picture, truncated or damaged, more than ``MAX_PIXELS``, samples
    without a fixed white.
    """
    if not data:
        raise ValueError("is empty (0 bytes)")
    data, formats = _pixels_only(data), (*FORMATS, "TGA") if _is_tga(data) else FORMATS
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            size = image.size
            image.verify()  # checksums of PNG, which load() does not compare
    except UnidentifiedImageError:
        raise ValueError(_what(data)) from None
    # PIL's plugins raise nearly anything on damaged data: OSError, SyntaxError, struct.error, DecompressionBombError.
    except Exception as error:
        raise ValueError(f"cannot be decoded ({said(error)})") from None
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"is too large ({size[0]} x {size[1]} pixels, at most {MAX_PIXELS} are read)")
    _refuse_wide(data)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            image.load()
            _refuse_without_white(image)
            _refuse_wide_by_name(image)
            return _rgb(_upright(image))
    except _UnknownColourError:
        raise
    except Exception as error:
        raise ValueError(f"cannot be decoded ({said(error)})") from None


def decode_usable(data: bytes) -> Image.Image:
    """As :func:`decode`, of a picture that shows something: placeholders of dead links are often a single pixel.

    Raises ``ValueError`` also for one with a side below ``LEAST_SIDE``, or more than ``LONGEST`` times as long as wide.
    """
    image = decode(data)
    shorter, longer = sorted(image.size)
    if shorter < LEAST_SIDE:
        raise ValueError(f"is {image.width} x {image.height} pixels, a placeholder (a side must have {LEAST_SIDE} or more)")
    if longer > LONGEST * shorter:
        raise ValueError(f"is {image.width} x {image.height} pixels (one side may be {LONGEST} times as long as the other)")
    return image


def converted(data: bytes) -> bool:
    """Whether decoding a file may convert its colours: what was computed before that was done is then out of date."""
    if data.startswith(b"\x89PNG") and any(kind == b"gAMA" and _bends(_gamma(chunk)) for kind, chunk in _chunks(data)):
        return True
    return data[:4] in (b"II*\0", b"MM\0*") or any(mark in data for mark in (b"iCCP", b"ICC_PROFILE", b"ICCP"))


def _what(data: bytes) -> str:
    """What a file is that is no picture we read, and what converts it."""
    for head, name, command in OTHERS:
        if data.startswith(head):
            return f"is {name}: convert it ({command})"
    if data[4:8] == b"ftyp":
        kind = "an AVIF picture, which this Pillow does not read" if data[8:11] == b"avi" else "a HEIC picture or a film"
        return f"is {kind}: convert it (heif-convert IN OUT.png)"
    begins = data[:512].lstrip().lower()
    if begins.startswith((b"<!doctype html", b"<html")):
        return "is not a picture but a web page, as dead links give"
    if begins.startswith((b"<svg", b"<?xml")):
        return "is a drawing (SVG): convert it (rsvg-convert IN -o OUT.png)"
    if data.startswith(b"version https://git-lfs"):
        return "is not a picture but a pointer of Git LFS: fetch the files (git lfs pull)"
    if any(data.startswith(head) for head in HEADS):
        return "is a damaged picture: copy or download it again"
    return f"is not a picture (expected one of {', '.join((*FORMATS, 'TGA'))})"


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and whole bytes of the chunks of a PNG; what is cut short comes as it is, and ends them."""
    place = 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4].ljust(4, b"\0"))
        yield data[place + 4 : place + 8], data[place : place + length + 12]
        place += length + 12


def _pixels_only(data: bytes) -> bytes:
    """A PNG without its texts: programs keep whole workflows there, beyond what PIL is willing to read."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    # ImageMagick keeps in a text how a picture was held.
    kept = [c for kind, c in _chunks(data) if kind not in (b"tEXt", b"zTXt", b"iTXt") or c[8:29] == b"Raw profile type exif"]
    return data[:8] + b"".join(kept)


def _is_tga(data: bytes) -> bool:
    """Whether a file is surely TGA, whose header alone is so short that nearly any bytes could be one."""
    if data[-18:-1] == b"TRUEVISION-XFILE.":
        return True
    if len(data) < 18 or data[1] != 0 or data[2] not in (2, 3) or data[16] not in (8, 16, 24, 32):
        return False
    width, height = struct.unpack("<HH", data[12:16])
    return width * height > 0 and len(data) == 18 + data[0] + width * height * data[16] // 8


def _refuse_wide(data: bytes) -> None:
    """Refuse colours that are told by number (H.273) and are not sRGB's: PIL would read them as if they were."""
    place = data.find(b"colrnclx", 0, 1 << 14) if data[4:8] == b"ftyp" else -1
    code = data[place + 8 : place + 12] if place >= 0 else b""
    if data.startswith(b"\x89PNG"):
        chunk = next((c for kind, c in _chunks(data) if kind == b"cICP"), b"")
        code = bytes((0, chunk[8], 0, chunk[9])) if len(chunk) >= 12 else b""
    if len(code) == 4 and (code[1] in (9, 11, 12) or code[3] in (8, 16, 18)):
        raise ValueError(WIDE)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; damaged ones say nothing."""
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


class _UnknownColourError(ValueError):
    """Samples of which nobody knows which colour they are."""


def _refuse_without_white(image: Image.Image) -> None:
    bits = getattr(image, "tag_v2", {}).get(258, (16,))  # of TIFF; the other formats have 16 at most
    wide = max(bits if isinstance(bits, tuple) else (bits,)) > 16
    if image.mode == "F":
        raise _UnknownColourError("has floating-point samples, which have no fixed white: save it with 8 bits a sample")
    if image.mode.startswith("I") and (wide or _outside(image)):
        raise _UnknownColourError("has samples of 32 bits or with a sign, which have no fixed white: save it with 8 or 16 bits")


def _refuse_wide_by_name(image: Image.Image) -> None:
    """Refuse a gamut wider than sRGB's that a PNG tells by its primaries, or a camera by the name of Adobe RGB alone."""
    info = image.info
    if info.get("icc_profile") or "srgb" in info:
        return
    primaries = info.get("chromaticity", (0, 0, *SRGB_PRIMARIES))[2:]
    if max(abs(ours - theirs) for ours, theirs in zip(SRGB_PRIMARIES, primaries, strict=True)) > 0.02:
        raise _UnknownColourError(WIDE)
    name = ""
    with contextlib.suppress(Exception):  # damaged EXIF data say nothing
        name = str(image.getexif().get_ifd(ExifTags.IFD.Interop).get(1, ""))
    if name.startswith("R03"):
        raise _UnknownColourError(WIDE)


def _outside(image: Image.Image) -> bool:
    samples = np.asarray(image)
    return bool(samples.min() < 0 or samples.max() > 65535)


def _rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile and "srgb" not in image.info and _bends(image.info.get("gamma", SRGB_GAMMA)):
        return _bent(_plain(image), image.info["gamma"])
    return _plain(image, profile)


def _gamma(chunk: bytes) -> float:
    """Of a whole gAMA chunk."""
    return int.from_bytes(chunk[8:12]) / 100_000


def _bends(gamma: float) -> bool:
    """Whether values of that gamma are others than sRGB's; an old PNG may tell 0, which is none."""
    return 0 < gamma < 10 and abs(gamma / SRGB_GAMMA - 1) > 0.05


def _bent(image: Image.Image, gamma: float) -> Image.Image:
    """From samples that are light to the power of ``gamma`` to sRGB's (IEC 61966-2-1)."""
    light = np.linspace(0, 1, 256) ** (1 / gamma)
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return image.point(list((255 * values).round().astype(int)) * 3)


def _plain(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """In RGB on white, its values changed by the profile alone."""
    if image.mode.startswith("I"):  # 16 bits a sample; PIL's own conversion would clip at 255
        grey = (np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8)
        return _srgb(Image.fromarray(grey), profile).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = _srgb(image.convert("RGB"), profile)
        opaque.putalpha(image.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque).convert("RGB")
    return _srgb(image if image.mode in ("RGB", "CMYK", "L") else image.convert("RGB"), profile).convert("RGB")


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """In the colours of sRGB; the values of a picture without a profile, or with one that is damaged, are sRGB's."""
    if not profile or (change := _change(profile, image.mode)) is None:
        return image
    return ImageCms.applyTransform(image, change) or image


@functools.lru_cache(maxsize=16)
def _change(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it is sRGB by another name: its values are left as they are."""
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        change = ImageCms.buildTransform(theirs, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None  # damaged, or of another kind of picture
    if mode not in ("RGB", "L"):
        return change
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3) if mode == "RGB" else steps[None]
    probe = Image.fromarray(grid)
    moved = np.asarray(ImageCms.applyTransform(probe, change)).astype(int) - np.asarray(probe.convert("RGB"))
    return change if abs(moved).max() > SAME else None


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


def size_of(data: bytes | Path) -> tuple[int, int]:
    """Width and height of a picture, or its file, as :func:`decode` gives it, by its header alone.

    Raises ``ValueError``: it has none that can be read.
    """
    formats = (*FORMATS, "TGA") if isinstance(data, bytes) and _is_tga(data) else FORMATS
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=formats) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(ORIENTATION, 1) in LYING else (width, height)
    except Exception as error:  # as in decode
        raise ValueError(f"cannot be decoded ({said(error)})") from None


def crop_position(seed: int) -> tuple[float, float]:
    """Where what is drawn from ``seed`` lies in the rest of a picture: 0 = left or top, 1 = right or bottom; (across, down)."""
    draw = random.Random(seed)
    return draw.random(), draw.random()


def framed(
    image: Image.Image, shape: Shape, position: tuple[float, float] = (0.5, 0.5), *, flip: bool = False
) -> Float32[Tensor, "3 h w"]:
    """The largest part of a picture that has the proportions of ``shape``, at a relative position, resized to it with
    antialiasing; values in [-1, 1]; then mirrored."""
    left, top, width, height = _largest_part(image.size, shape, position)
    # Cropping in source coordinates: one resampling, and no rounding that differs between two sizes of the same picture.
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    image = image.resize((shape.width, shape.height), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1).contiguous() / 127.5 - 1
    return pixels.flip(-1) if flip else pixels


def framing(
    size: tuple[int, int], shape: Shape, position: tuple[float, float] = (0.5, 0.5), *, flip: bool = False
) -> Int64[Tensor, 6]:
    """How :func:`framed` frames a picture of ``size`` (width, height), as SDXL is told (arXiv 2307.01952, section 2.2).

    Original height and width; top and left of the crop, in pixels of the picture resized so that it just covers ``shape`` (of
    the mirrored picture, with ``flip``); target height and width.
    """
    left, top, width, height = _largest_part(size, shape, position)
    left = size[0] - width - left if flip else left
    scale = shape.height / height
    return torch.tensor([size[1], size[0], round(top * scale), round(left * scale), shape.height, shape.width])


def kept(size: tuple[int, int], shape: Shape) -> float:
    """Share of a picture of ``size`` (width, height) that :func:`framed` does not cut off."""
    _, _, width, height = _largest_part(size, shape, (0.0, 0.0))
    return width * height / (size[0] * size[1])


def _largest_part(size: tuple[int, int], shape: Shape, position: tuple[float, float]) -> tuple[float, float, float, float]:
    """Left, top, width and height."""
    width, height = map(float, size)
    if width * shape.height >= height * shape.width:
        width = height * shape.width / shape.height
    else:
        height = width * shape.height / shape.width
    return position[0] * (size[0] - width), position[1] * (size[1] - height), width, height
