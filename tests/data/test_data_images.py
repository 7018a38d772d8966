from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.data import images
from palate.data.images import FORMATS, converted, crop_position, decode, decode_usable
from palate.data.images import framed as frame


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def framed(data: bytes, resolution: int, crop: str, flip: bool, seed: int) -> torch.Tensor:
    position = (0.5, 0.5) if crop == "center" else crop_position(seed)
    return frame(decode(data), Shape.square(resolution), position, flip=flip)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right and green downwards, so that a pixel tells where it is from."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[..., 0] = np.linspace(0, 255, width)[None]
    array[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(array)


@settings(max_examples=30)
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


@settings(max_examples=20)
@given(st.booleans(), st.integers(0, 2**63 - 1), st.sampled_from(["center", "random"]))
def test_the_crop_is_the_same_in_relative_terms_for_two_sizes(flip, seed, crop):
    # One scene at two sizes and 3 : 1: the crops show the same part, so the ramps agree up to resampling.
    large, small = encoded(ramp(192, 64)), encoded(ramp(96, 32))
    first, second = (framed(data, 16, crop, flip, seed) for data in (large, small))
    assert (first - second).abs().max() < 0.06


@settings(max_examples=20)
@given(st.integers(0, 2**63 - 1), st.sampled_from(["center", "random"]))
def test_flip_mirrors(seed, crop):
    for data in (encoded(noise(20, 12, 1)), encoded(noise(9, 30, 2))):
        assert torch.equal(framed(data, 8, crop, False, seed), framed(data, 8, crop, True, seed).flip(-1))


def test_center_crop_takes_the_middle():
    # 4 x 2 pixels of one sample each, blown up 8 times: the middle square is columns 1 and 2.
    columns = np.repeat(np.repeat(np.array([[0, 51, 204, 255]] * 2, dtype=np.uint8), 8, axis=0), 8, axis=1)
    pixels = frame(Image.fromarray(columns).convert("RGB"), Shape.square(16))
    # 51 / 127.5 - 1 = -0.6 and 204 / 127.5 - 1 = 0.6
    assert pixels[0, 8, 2].item() == pytest.approx(-0.6, abs=1e-6)
    assert pixels[0, 8, 13].item() == pytest.approx(0.6, abs=1e-6)


def test_resize_is_antialiased():
    # A checkerboard of single pixels shrunk 8 times is grey; picking pixels would give black or white.
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    assert frame(Image.fromarray(board).convert("RGB"), Shape.square(16)).abs().max() < 0.05


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
        Shape.of(resolution)


# What stands beside a picture, and what its values mean ----


@pytest.mark.parametrize("kind", ["text", "compressed", "international", "damaged", "profile", "exif"])
def test_what_stands_beside_a_picture_refuses_nothing(kind):
    info, options, image = PngImagePlugin.PngInfo(), {}, noise(20, 12)
    if kind in ("text", "compressed"):
        for i in range(40):  # more than Pillow reads of one, and of all together
            info.add_text(f"workflow {i}", "x" * 2_000_000, zip=kind == "compressed")
    elif kind == "international":
        info.add_itxt("workflow", "x" * 2_000_000, zip=True)
    elif kind == "damaged":
        info.add(b"zTXt", b"workflow\0\0no zlib")
    elif kind == "profile":
        options["icc_profile"] = np.random.default_rng(0).bytes(2_000_000)
    else:
        options["exif"] = b"Exif\0\0nothing of the sort"
    data = encoded(image, pnginfo=info, **options)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(image))


def test_a_wrong_checksum_of_a_text_refuses_nothing_and_one_of_pixels_does():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b")
    data = encoded(noise(20, 12), pnginfo=info)
    place = data.index(b"tEXt")
    decode(data[: place + 5] + b"!" + data[place + 6 :])
    place = data.index(b"IDAT")
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(data[: place + 9] + b"!" + data[place + 10 :])


@pytest.mark.parametrize("file_format", [name for name in FORMATS if name != "GIF"] + ["TGA"])
def test_all_formats_are_read(file_format):
    image = noise(40, 24)
    lossless = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    found = decode(encoded(image, file_format, **lossless.get(file_format, {})))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(image)).max() <= 12
    assert found.size == image.size


@pytest.mark.parametrize("file_format", [*FORMATS, "TGA"])
@pytest.mark.parametrize("part", [0.3, 0.7])
def test_a_cut_picture_of_any_format_is_refused(file_format, part):
    data = encoded(noise(40, 24), file_format)
    with pytest.raises(ValueError, match=r"^(is|cannot be|has)"):
        decode(data[: int(len(data) * part)])


@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=200)
def test_bytes_that_are_no_picture_are_never_taken_for_one(data):
    with pytest.raises(ValueError, match=r"^(is|cannot be|has)"):
        decode(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n <html>", "web page"),
        (b"%PDF-1.7", "pdftoppm"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "heif-convert"),
        (b"<svg xmlns=''/>", "rsvg-convert"),
        (b"8BPS\0\1", "magick"),
        (b"\xff\x0a\0\0", "djxl"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_what_is_taken_for_a_picture_is_told_with_what_converts_it(data, said):
    with pytest.raises(ValueError, match=said):
        decode(data)


def gamma(power: float) -> bytes:
    """A grey profile of that gamma, as ICC.1 lays it out: header, one table of two tags."""
    import struct

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(power * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    table = struct.pack(">I", 2)
    for sign, offset, size in ((b"wtpt", 156, 20), (b"kTRC", 176, 16)):
        table += sign + struct.pack(">II", offset, size)
    body = table + white + curve
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + body


P3 = [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]  # columns: r, g, b in XYZ (D50)
SRGB = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]


def primaries(matrix: list[list[float]], power: float) -> bytes:
    """A profile of an RGB space with those primaries and one gamma."""
    import struct

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))

    tags = [(b"wtpt", xyz(0.9642, 1.0, 0.8249))]
    for i, letter in enumerate((b"r", b"g", b"b")):
        tags.append((letter + b"XYZ", xyz(*(row[i] for row in matrix))))
        tags.append((letter + b"TRC", b"curv" + bytes(4) + struct.pack(">IH", 1, round(power * 256)) + bytes(2)))
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for sign, content in tags:
        table += sign + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


@pytest.mark.parametrize("colour", [(200, 100, 100), (90, 160, 80), (60, 90, 180), (128, 128, 128)])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_wide_colours_are_converted_as_the_matrices_say(colour, file_format):
    light = np.linalg.solve(SRGB, np.array(P3) @ (np.array(colour) / 255) ** 2.2)
    expected = np.where(light > 0.0031308, 1.055 * light.clip(0) ** (1 / 2.4) - 0.055, 12.92 * light) * 255
    image = Image.new("RGB", (16, 16), colour)
    options = {} if file_format in ("PNG", "TIFF") else {"quality": 100}
    data = encoded(image, file_format, icc_profile=primaries(P3, 2.2), **options)
    assert np.abs(np.array(decode(data).getpixel((8, 8))) - expected.clip(0, 255)).max() <= 4
    assert converted(data) or file_format == "AVIF"  # read only since colours are converted


def test_values_with_srgb_by_any_name_are_left_as_they_are():
    image = noise(20, 12)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(np.asarray(decode(encoded(image, icc_profile=profile))), np.asarray(image))


def test_values_of_another_profile_are_converted():
    # Of gamma 1 the value 55 is the light 0.2157, which sRGB writes as 1.055 * 0.2157 ** (1 / 2.4) - 0.055 = 0.502: 128.
    grey = Image.new("L", (8, 8), 55)
    for mode in ("L", "I;16"):
        image = grey if mode == "L" else Image.fromarray(np.full((8, 8), 55 * 257, dtype=np.uint16))
        data = encoded(image, icc_profile=gamma(1.0))
        assert converted(data)
        assert decode(data).getpixel((0, 0)) == pytest.approx((128,) * 3, abs=1)
    assert not converted(encoded(grey))


def test_transparency_is_kept_where_colours_are_converted():
    image = Image.new("LA", (8, 8), (55, 0))
    assert decode(encoded(image, icc_profile=gamma(1.0))).getpixel((0, 0)) == (255, 255, 255)


def told(kind: bytes, *numbers: int) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add(kind, b"".join(n.to_bytes(4) for n in numbers))
    return info


def test_a_gamma_without_a_profile_is_converted():
    """As a profile of that gamma would be: the value 55 of gamma 1 is sRGB's 128."""
    for image in (
        Image.new("RGB", (8, 8), (55, 55, 55)),
        Image.new("L", (8, 8), 55),
        Image.new("RGBA", (8, 8), (55, 55, 55, 255)),
    ):
        data = encoded(image, pnginfo=told(b"gAMA", 100_000))
        assert converted(data)
        assert decode(data).getpixel((0, 0)) == pytest.approx((128,) * 3, abs=1)
    # 55 / 255 is the light 0.0631 of a Macintosh of old, of gamma 1.8: sRGB's 71.
    data = encoded(Image.new("RGB", (8, 8), (55, 55, 55)), pnginfo=told(b"gAMA", 55_556))
    assert decode(data).getpixel((0, 0)) == pytest.approx((71,) * 3, abs=1)


@pytest.mark.parametrize("value", [45455, 45454, 0])
def test_the_gamma_of_srgb_changes_nothing(value):
    image = noise(20, 12)
    data = encoded(image, pnginfo=told(b"gAMA", value))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(image))
    assert not converted(data)


@pytest.mark.parametrize(
    ("numbers", "fine"),
    [
        ((31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000), True),
        ((31270, 32900, 63000, 34000, 31000, 59500, 15500, 7000), True),
        ((31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000), False),
        ((31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000), False),
    ],
)
def test_primaries_without_a_profile(numbers, fine):
    image = noise(8, 8)
    data = encoded(image, pnginfo=told(b"cHRM", *numbers))
    if fine:
        assert np.array_equal(np.asarray(decode(data)), np.asarray(image))
        return
    with pytest.raises(ValueError, match="a wide gamut without a profile"):
        decode(data)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    decode(encoded(image, pnginfo=told(b"cHRM", *numbers), icc_profile=profile))


@pytest.mark.parametrize(("name", "fine"), [("R98", True), ("R03", False)])
def test_adobe_rgb_by_its_name_alone(name, fine):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: name, 2: b"0100"}
    data = encoded(noise(8, 8), "JPEG", exif=exif)
    if fine:
        decode(data)
    else:
        with pytest.raises(ValueError, match="a wide gamut without a profile"):
            decode(data)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF"])
def test_a_damaged_picture_is_not_called_something_else(file_format):
    data = encoded(noise(8, 8), file_format)
    with pytest.raises(ValueError, match=r"damaged|cannot be decoded"):
        decode(data[:6] + b"\0\xff" * 30)


@pytest.mark.parametrize(("primaries", "transfer", "fine"), [(1, 13, True), (9, 16, False), (12, 13, False), (1, 18, False)])
def test_colours_told_by_number(primaries, transfer, fine):
    info = PngImagePlugin.PngInfo()
    info.add(b"cICP", bytes((primaries, transfer, 0, 1)))
    data = encoded(noise(8, 8), pnginfo=info)
    if fine:
        decode(data)
    else:
        with pytest.raises(ValueError, match="high dynamic range or a wide gamut"):
            decode(data)


@pytest.mark.parametrize(("dtype", "value", "grey"), [("uint16", 32896, 128), ("uint16", 65535, 255), ("uint8", 128, 128)])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_samples_of_sixteen_bits(dtype, value, grey, file_format):
    image = Image.fromarray(np.full((8, 8), value, dtype=dtype))
    assert decode(encoded(image, file_format)).getpixel((0, 0)) == (grey,) * 3


@pytest.mark.parametrize("value", [0, 200, 70000, -3])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_samples_without_a_fixed_white_are_refused(dtype, value):
    with pytest.raises(ValueError, match=r"^has .*no fixed white"):
        decode(encoded(Image.fromarray(np.full((8, 8), value, dtype=dtype)), "TIFF"))


@pytest.mark.parametrize(
    ("size", "fine"), [((1, 1), False), ((2000, 1), False), ((3, 8), False), ((4, 4), True), ((8, 81), False), ((8, 80), True)]
)
def test_placeholders(size, fine):
    data = encoded(noise(*size))
    assert decode(data).size == size
    if fine:
        assert decode_usable(data).size == size
    else:
        with pytest.raises(ValueError, match=f"is {size[0]} x {size[1]} pixels"):
            decode_usable(data)
