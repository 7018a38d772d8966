"""Aspect buckets: which shapes there are, which one pictures share, and what is told of the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from palate.base.shapes import Shape
from palate.data.buckets import Fitted, buckets, shared
from palate.data.images import framed, framing, kept

SIDES = st.integers(1, 4000)
SIZES = st.tuples(SIDES, SIDES)


def test_those_of_sdxl():
    wide = ["1088x960", "1152x896", "1216x832", "1344x768", "1472x704", "1600x640"]
    tall = ["x".join(reversed(name.split("x"))) for name in wide]
    assert {str(shape) for shape in buckets(Shape.square(1024), 64, 2.5)} == {"1024", *wide, *tall}


def test_those_of_the_miniature():
    # 64 x 96 and its turn fill the budget of 64 x 96; the greatest square, 64 x 64, does not, and is there all the same.
    assert [str(shape) for shape in buckets(Shape(64, 96), 32, 2.5)] == ["64", "96x64", "64x96"]


@given(st.integers(64, 1600), st.sampled_from([8, 16, 32, 64]), st.floats(1, 4), st.sampled_from([512, 2048, 8192]))
def test_every_bucket_is_as_large_as_it_may_be(side, step, aspect, most):
    found = buckets(Shape.square(side), step, aspect, most)
    assert Shape.square(min(side, most) // step * step) in found
    assert {Shape(shape.width, shape.height) for shape in found} == set(found)  # a turned picture has the turned shape
    for shape in found:
        longer, shorter = max(shape.height, shape.width), min(shape.height, shape.width)
        assert shape.fits(step)
        assert shape.pixels <= side**2
        assert longer <= min(most, aspect * shorter)
        if not shape.is_square and longer + step <= most:
            assert shape.pixels + step * shorter > side**2
            assert shape.pixels + step * longer > side**2


def test_no_bucket_where_the_step_is_longer_than_the_side():
    assert buckets(Shape.square(32), 64, 2.5) == []


@given(SIZES, SIZES)
def test_a_pair_shares_the_bucket_nearest_to_the_mean_of_its_aspects(one, other):
    shapes = buckets(Shape.square(1024), 64, 2.5)
    mean = math.sqrt(one[0] / one[1] * other[0] / other[1])
    found = shared(shapes, [one, other])
    assert found == shared(shapes, [other, one])

    def apart(shape):
        return abs(math.log(shape.width / shape.height / mean))

    assert apart(found) <= min(map(apart, shapes)) + 1e-8
    turned = shared(shapes, [one[::-1], other[::-1]])
    assert apart(Shape(turned.width, turned.height)) == pytest.approx(apart(found), abs=1e-8)


@given(SIZES)
def test_a_picture_of_a_buckets_own_proportions_loses_nothing(size):
    for shape in buckets(Shape.square(1024), 64, 2.5):
        assert shared(buckets(Shape.square(1024), 64, 2.5), [(shape.width, shape.height)] * 2) == shape
        assert kept((shape.width * 3, shape.height * 3), shape) == 1
    assert 0 < kept(size, Shape(64, 96)) <= 1


def test_both_of_a_pair_are_cropped_by_one_factor():
    # 1 : 1 beside 4 : 1 meet at 2 : 1, of which either keeps a half.
    shape = shared([Shape(64, 64), Shape(64, 128), Shape(64, 256)], [(300, 300), (800, 200)])
    assert shape == Shape(64, 128)
    assert (kept((300, 300), shape), kept((800, 200), shape)) == (0.5, 0.5)


def test_what_is_kept_is_the_middle_in_the_shapes_proportions():
    # Red tells the column and green the row. Of 100 x 60 a tall 2 : 3 keeps the whole height and the middle 40 columns.
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(100)[None], np.arange(60)[:, None]
    image = Image.fromarray(pixels)
    found = (framed(image, Shape(60, 40)) + 1) * 127.5
    assert found.shape == (3, 60, 40)
    assert found[0, 30, 0].item() == pytest.approx(30, abs=0.01)
    assert found[0, 30, 39].item() == pytest.approx(69, abs=0.01)
    assert (found[1, 0, 20].item(), found[1, 59, 20].item()) == (pytest.approx(0, abs=0.01), pytest.approx(59, abs=0.01))
    # At the far right, and mirrored.
    right = (framed(image, Shape(60, 40), (1.0, 0.0)) + 1) * 127.5
    assert right[0, 0, 39].item() == pytest.approx(99, abs=0.01)
    assert framed(image, Shape(60, 40), flip=True).flip(-1).equal(framed(image, Shape(60, 40)))


def test_sdxl_is_told_the_true_size_and_crop():
    # 2000 x 1500 into 832 x 1216: 1500 * 832 / 1216 = 1026.3 columns are kept, from (2000 - 1026.3) / 2 = 486.8 on; resized by
    # 1216 / 1500 the crop begins at 394.7. A width and height of SDXL stand behind one another as height, width.
    assert framing((2000, 1500), Shape(1216, 832)).tolist() == [1500, 2000, 0, 395, 1216, 832]
    # 1000 x 2000: 1000 * 1216 / 832 = 1461.5 rows, from 269.2 on, times 0.832.
    assert framing((1000, 2000), Shape(1216, 832)).tolist() == [2000, 1000, 224, 0, 1216, 832]
    assert framing((2000, 1500), Shape(1216, 832), (0.0, 0.5)).tolist()[3] == 0
    assert framing((2000, 1500), Shape(1216, 832), (0.0, 0.5), flip=True).tolist()[3] == round(973.7 * 1216 / 1500)


@given(SIZES, st.tuples(st.integers(1, 20), st.integers(1, 20)), st.floats(0, 1), st.floats(0, 1))
def test_a_crop_lies_within_the_picture(size, sides, across, down):
    shape = Shape(8 * sides[0], 8 * sides[1])
    height, width, top, left, *_ = framing(size, shape, (across, down)).tolist()
    assert (width, height) == size
    scale = max(shape.width / width, shape.height / height)
    assert 0 <= top <= scale * height - shape.height + 1
    assert 0 <= left <= scale * width - shape.width + 1
    share = kept(size, shape)
    assert share == pytest.approx(shape.pixels / (scale**2 * width * height), rel=1e-6)


def test_what_is_cut_off_and_enlarged_is_told():
    fitted = Fitted()
    assert fitted.words() == []
    fitted.add((640, 640), Shape(64, 64))
    assert fitted.words() == []
    fitted.add((200, 100), Shape(64, 64))  # a half is lost
    fitted.add((48, 64), Shape(96, 64))  # 2 : 3 of 48 x 64 are 42.7 x 64: a ninth is lost, and it is enlarged
    assert fitted.words() == [
        "pictures by shape: 2 of 64, 1 of 64x96",
        "2 of 3 pictures lose more than a tenth to the crop, up to 50%; of all 20.4% is cut off",
        "1 of 3 pictures are smaller than they are trained on, and are enlarged",
    ]
