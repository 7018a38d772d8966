"""Sizes of pictures: how they are told, what is refused, and batches of one shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.base.errors import UserError
from palate.base.shapes import MAX_SIDE, Shape, in_as_many, one_shape_each

SIDES = st.integers(1, MAX_SIDE // 8).map(lambda n: 8 * n)


def test_a_size_is_told_as_width_by_height():
    assert Shape.of("832x1216") == Shape(height=1216, width=832)
    assert Shape.of(" 832 X 1216 ") == Shape.of("832×1216") == Shape.of("832x1216")
    assert Shape.of(1024) == Shape.of("1024") == Shape.of("1024x1024") == Shape(1024, 1024)
    assert (Shape(1216, 832).told, Shape(64, 64).told) == ("832x1216", 64)
    assert (str(Shape(1216, 832)), str(Shape(64, 64))) == ("832x1216", "64")


@given(SIDES, SIDES)
def test_what_is_told_is_read_back(height, width):
    shape = Shape(height, width)
    assert Shape.of(shape.told) == Shape.of(str(shape)) == shape


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (60, "resolution is 60, but it must be a positive multiple of 8: try 56 or 64"),
        (0, "try 8 or 16"),
        (-8, "try 8 or 16"),
        ("60x96", "resolution is 60x96, but width and height must each be a positive multiple of 8: try 56x96 or 64x96"),
        ("0x96", "try 8x96 or 16x96"),
        ("8193x64", "resolution is 8193x64; expected a multiple of 8 up to 8192"),
        pytest.param(10**5000, "expected a multiple of 8 up to 8192", id="huge"),
        ("wide", "resolution is 'wide'; expected a whole number, the side of a square such as 1024, or WIDTHxHEIGHT such as"),
        ("64x", "expected a whole number"),
        ("-64x64", "expected a whole number"),
        ("64x64x64", "expected a whole number"),
        ("12345678901x64", "expected a whole number"),
    ],
)
def test_what_is_no_size_is_refused_with_the_nearest_ones(told, said):
    with pytest.raises(UserError) as caught:
        Shape.of(told)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([8, 16, 32, 64]), st.sampled_from([256, 1000, MAX_SIDE]))
def test_the_nearest_sizes_are_allowed_and_nearest(height, width, step, most):
    told = [Shape.of(text) for text in Shape(height, width).near(step, most).split(" or ")]
    allowed = range(step, most + 1, step)
    for given_side, sides in ((height, [s.height for s in told]), (width, [s.width for s in told])):
        assert set(sides) <= set(allowed)
        assert min(allowed, key=lambda side: abs(side - given_side)) in sides


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_batches_of_one_shape_hold_everything_once_and_in_order(shapes, most):
    cut = one_shape_each(shapes, most)
    assert sorted(place for places in cut for place in places) == list(range(len(shapes)))
    for places in cut:
        assert 1 <= len(places) <= most
        assert len({shapes[place] for place in places}) == 1
        assert places == sorted(places)
    # No more batches than the shapes force: of each only the last may be short.
    assert len(cut) == sum(-(-shapes.count(shape) // most) for shape in set(shapes))


@given(st.integers(0, 30), st.integers(1, 6))
def test_one_shape_is_cut_as_it_comes(n, most):
    assert one_shape_each(["a"] * n, most) == [list(range(n))[start : start + most] for start in range(0, n, most)]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 6), st.data())
def test_batches_are_cut_into_as_many_as_others_have(shapes, most, data):
    before = [tuple(places) for places in one_shape_each(shapes, most)]
    count = data.draw(st.integers(1, len(shapes)))
    cut = in_as_many(before, count)
    assert len(cut) == max(count, len(before))
    assert all(cut)
    assert [place for places in cut for place in places] == [place for places in before for place in places]
    assert all(len({shapes[place] for place in places}) == 1 for places in cut)
