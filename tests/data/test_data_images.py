from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from palate.base.errors import UserError
from palate.data import images
from palate.data.images import check_resolution, crop_position, decode, square


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def framed(data: bytes, resolution: int, crop: str, flip: bool, seed: int) -> torch.Tensor:
    position = (0.5, 0.5) if crop == "center" else crop_position(seed)
    return square(decode(data), resolution, position, flip=flip)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right and green downwards, so that a pixel tells where it is from."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[..., 0] = np.linspace(0, 255, width)[None]
    array[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(array)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([8, 16]), st.sampled_from(["center", "random"]), st.booleans(),
    st.integers(0, 2**63 - 1),
)  # fmt: skip
def test_a_square_has_its_shape_and_range(width, height, resolution, crop, flip, seed):
    first = framed(encoded(noise(width, height)), resolution, crop, flip, seed)
    assert first.shape == (3, resolution, resolution)
    assert first.dtype == torch.float32
    assert first.min() >= -1
    assert first.max() <= 1


@settings(max_examples=20, deadline=None)
@given(st.booleans(), st.integers(0, 2**63 - 1), st.sampled_from(["center", "random"]))
def test_the_crop_is_the_same_in_relative_terms_for_two_sizes(flip, seed, crop):
    # One scene at two sizes and 3 : 1: the crops show the same part, so the ramps agree up to resampling.
    large, small = encoded(ramp(192, 64)), encoded(ramp(96, 32))
    first, second = (framed(data, 16, crop, flip, seed) for data in (large, small))
    assert (first - second).abs().max() < 0.06


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63 - 1), st.sampled_from(["center", "random"]))
def test_flip_mirrors(seed, crop):
    for data in (encoded(noise(20, 12, 1)), encoded(noise(9, 30, 2))):
        assert torch.equal(framed(data, 8, crop, False, seed), framed(data, 8, crop, True, seed).flip(-1))


def test_center_crop_takes_the_middle():
    # 4 x 2 pixels of one sample each, blown up 8 times: the middle square is columns 1 and 2.
    columns = np.repeat(np.repeat(np.array([[0, 51, 204, 255]] * 2, dtype=np.uint8), 8, axis=0), 8, axis=1)
    pixels = square(Image.fromarray(columns).convert("RGB"), 16)
    # 51 / 127.5 - 1 = -0.6 and 204 / 127.5 - 1 = 0.6
    assert pixels[0, 8, 2].item() == pytest.approx(-0.6, abs=1e-6)
    assert pixels[0, 8, 13].item() == pytest.approx(0.6, abs=1e-6)


def test_resize_is_antialiased():
    # A checkerboard of single pixels shrunk 8 times is grey; picking pixels would give black or white.
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    assert square(Image.fromarray(board).convert("RGB"), 16).abs().max() < 0.05


def test_random_crop_depends_on_the_seed_alone_and_covers_the_range():
    positions = [crop_position(seed) for seed in range(200)]
    assert positions == [crop_position(seed) for seed in range(200)]
    values = np.array(positions)
    assert values.min() < 0.05
    assert values.max() > 0.95
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.25


def test_exif_orientation_is_respected():
    upright = ramp(32, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees to the left
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(np.asarray(decode(encoded(stored, exif=exif))), np.asarray(upright))


def test_transparency_is_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 51))
    assert decode(encoded(half)).getpixel((0, 0)) == (204, 204, 204)  # 255 * (1 - 51 / 255)
    assert decode(encoded(Image.new("LA", (8, 8), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_a_transparent_entry():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    found = decode(encoded(image, transparency=0))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((5, 5)) == (40, 50, 60)


@pytest.mark.parametrize(("sample", "expected"), [(0, 0), (65535, 255), (257 * 128, 128)])
def test_sixteen_bits_are_scaled_not_clipped(sample, expected):
    image = Image.fromarray(np.full((8, 8), sample, dtype=np.uint16))
    assert decode(encoded(image)).getpixel((3, 3)) == (expected,) * 3


def test_cmyk_is_converted():
    found = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert found.mode == "RGB"
    red, green, blue = found.getpixel((4, 4))
    assert red > 200
    assert green < 60
    assert blue < 60


def flipped_bit_png() -> bytes:
    data = bytearray(encoded(noise(32, 32)))
    data[len(data) // 2] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello, I am text", "not a picture"),
        (encoded(noise(64, 64), "JPEG")[:-400], "cannot be decoded"),
        (encoded(noise(64, 64))[:-400], "cannot be decoded"),
        (flipped_bit_png(), "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a picture"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
    ],
)
def test_defects_are_told(data, words):
    with pytest.raises(ValueError, match=words):
        decode(data)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match=r"too large.*11 x 10"):
        decode(encoded(noise(11, 10)))


@pytest.mark.parametrize("resolution", [0, -8, 4, 100])
def test_resolution_must_be_a_multiple_of_eight(resolution):
    with pytest.raises(UserError, match="multiple of 8"):
        check_resolution(resolution)
