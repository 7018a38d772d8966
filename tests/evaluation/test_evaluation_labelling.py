"""Scores to pairs: laws, and small cases by hand."""

from __future__ import annotations

import math

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.base.errors import UserError
from palate.data import pickapic
from palate.data.pairs import read_pairs
from palate.data.selection import absolute_winners, mark
from palate.evaluation.labelling import (
    LabelCounts,
    Labelled,
    common,
    finish,
    kind_of,
    label_of,
    pairs_of,
    sole_winners,
)

MARGINS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5)
NONE = LabelCounts(0, 0, 0, 0, 0, 0, 0)


@given(MARGINS, st.none() | st.floats(1e-3, 1e3), st.floats(0, 10))
def test_swapping_the_pictures_mirrors_the_label(margins, temperature, threshold):
    here = label_of(margins, temperature=temperature, threshold=threshold)
    there = label_of([-m for m in margins], temperature=temperature, threshold=threshold)
    assert 0 <= here <= 1
    assert here + there == pytest.approx(1, abs=1e-12)


def test_labels_by_hand():
    assert label_of([2.0, 1.0, -5.0]) == 1.0  # two of three, however strong the third
    assert label_of([2.0, -5.0]) == 0.5
    assert label_of([0.3, 0.1, -1.0], threshold=0.2) == 0.5  # one for, one undecided, one against
    assert label_of([0.3, 20.0, -1.0], threshold=[0.2, 30.0, 2.0]) == 1.0  # each by its own threshold: the first alone decides
    assert label_of([0.4], temperature=0.2) == pytest.approx(1 / (1 + math.exp(-2)))
    assert label_of([0.1], temperature=0.2, threshold=0.1) == 0.5
    assert label_of([-1e9], temperature=1e-3) == 0.0


def test_pairs_of_candidates():
    candidates = {"a": {"x": [3.0], "y": [1.0], "z": [2.0]}, "b": {"only": [0.0]}}
    found, disagreements = pairs_of(candidates, label_of)
    assert [(p.first, p.second, p.label) for p in found] == [("x", "y", 1.0), ("x", "z", 1.0), ("y", "z", 0.0)]
    assert disagreements == 0
    found, _ = pairs_of(candidates, label_of, which="extremes")
    assert [(p.first, p.second) for p in found] == [("x", "y")]
    # Two judges of opposite taste agree on nothing.
    assert pairs_of({"a": {"x": [1.0, 0.0], "y": [0.0, 1.0]}}, label_of) == ([Labelled("a", "x", "y", 0.5)], 1)


def test_sole_winners():
    def pair(first, second, label, prompt="p"):
        return Labelled(prompt, first, second, label)

    beats_all = [pair("x", "y", 1.0), pair("z", "x", 0.0), pair("y", "z", 1.0)]
    assert sole_winners(beats_all) == beats_all[:2]
    assert sole_winners([pair("x", "y", 1.0), pair("y", "z", 1.0), pair("z", "x", 1.0)]) == []  # a circle
    assert sole_winners([pair("x", "y", 1.0), pair("x", "z", 0.5)]) == []  # a tie
    assert sole_winners([pair("x", "y", 1.0), pair("u", "v", 1.0)]) == []  # two that never met
    apart = [pair("x", "y", 1.0), pair("x", "y", 0.0, "q")]
    assert sole_winners(apart) == apart


def test_a_sole_winner_is_an_absolute_winner_without_another():
    votes = [("p", (b"A", b"B"), 1.0), ("p", (b"C", b"D"), 0.0)]  # two comparisons that never met
    pairs = [Labelled(prompt, *pictures, label) for prompt, pictures, label in votes]
    assert absolute_winners(votes) == {mark("p", b"A"), mark("p", b"D")}
    assert sole_winners(pairs) == []
    decided = ("p", (b"A", b"D"), 1.0)
    assert absolute_winners([*votes, decided]) == {mark("p", b"A")}
    assert sole_winners([*pairs, Labelled("p", b"A", b"D", 1.0)])[0].winner == b"A"


def test_ties_are_dropped_or_kept_and_counted():
    pairs = [Labelled("p", 1, 2, 1.0), Labelled("q", 3, 4, 0.5)]
    kept, counts = finish(pairs, NONE, absolute_winner=False, keep_ties=False)
    assert (kept, counts.pairs, counts.ties, counts.written) == (pairs[:1], 2, 1, 1)
    assert finish(pairs, NONE, absolute_winner=False, keep_ties=True)[0] == pairs
    with pytest.raises(UserError, match="no pairs are left"):
        finish(pairs[1:], NONE, absolute_winner=False, keep_ties=False)


def test_written_pairs_are_read(tmp_path, pairs_dir):
    images = [(pairs_dir / f"0-{side}.png").read_bytes() for side in ("chosen", "rejected")]
    rows = [pickapic.row("a boat", *images, 0.25, model_0="m", unasked=1)] * 70
    pickapic.write(tmp_path / "sub/p.parquet", rows, {**pickapic.COLUMNS, "model_0": str})
    found = list(read_pairs(tmp_path / "sub/p.parquet"))
    assert len(found) == 70
    assert (found[0].prompt, found[0].image_0, found[0].image_1, found[0].label) == ("a boat", *images, 0.25)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["p.parquet"]


def test_types_of_columns(tmp_path, pairs_dir):
    values = {
        "whole": (1, 2),
        "real": (1, 0.5),
        "truth": (True, False),
        "text": ("a", "b\ud800"),
        "mixed": (1, "x"),
        "big": (1, 1 << 64),
    }
    columns = {name: common({kind_of(v) for v in column}) for name, column in values.items()}
    assert columns == {"whole": int, "real": float, "truth": bool, "text": str, "mixed": str, "big": str}
    image = (pairs_dir / "0-chosen.png").read_bytes()
    rows = [pickapic.row("a", image, image, 1.0, **{name: column[i] for name, column in values.items()}) for i in range(2)]
    rows.append(pickapic.row("a", image, image, 1.0))
    pickapic.write(tmp_path / "p.parquet", rows, {**pickapic.COLUMNS, **columns})
    found = pq.read_table(tmp_path / "p.parquet", columns=list(values)).to_pylist()
    assert found[1] == {"whole": 2, "real": 0.5, "truth": False, "text": "b?", "mixed": "x", "big": str(1 << 64)}
    assert set(found[2].values()) == {None}
