"""Several sets in one: an epoch goes through each as often as it should, and shows nothing twice with the same noise."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palate.data.encoded import EncodedPairs
from palate.data.items import EncodedPair, EncodedPicture, Items
from palate.data.mixture import Mixture

KEY = "ab" * 32


class Encoded(EncodedPairs):
    """Items that tell which were asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices, seeds):
        return SimpleNamespace(indices=indices, seeds=seeds)


def mixture(sizes, shares) -> Mixture:
    return Mixture(Encoded(sum(sizes)), np.repeat(np.arange(len(sizes)), sizes), shares)


SETS = st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.3])), min_size=1, max_size=3)


@given(SETS, st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_shows_each_set_as_often_as_it_should_and_no_index_twice(sets, epoch, seed):
    sizes, shares = zip(*sets, strict=True)
    found = mixture(sizes, shares)
    order = found.order(seed, epoch)
    assert len(order) == len(found) == len(set(order))
    assert order == mixture(sizes, shares).order(seed, epoch)  # of nothing but seed and epoch
    of_set = np.repeat(np.arange(len(sizes)), sizes)
    counted = Counter(int(of_set[i % sum(sizes)]) for i in order)
    assert counted == {k: max(1, round(share * size)) for k, (size, share) in enumerate(sets)}


def test_parts_follow_on_one_another_until_all_was_seen():
    found = mixture((4, 8), (1.0, 0.25))
    seen = [i % 12 for epoch in range(4) for i in found.order(7, epoch)]
    assert Counter(seen) == dict.fromkeys(range(4), 4) | dict.fromkeys(range(4, 12), 1)


def test_copies_are_other_indices_of_the_same_items():
    found = mixture((3,), (2.0,))
    order = sorted(found.order(0, 5))
    assert order == [0, 1, 2, 3, 4, 5]
    batch = found.batch([1, 4], torch.tensor([7, 8]))
    assert (batch.indices, batch.seeds.tolist()) == ([1, 1], [7, 8])
    assert found.order(0, 0) != found.order(0, 1)


def pair(prompt: str, source: str = "s") -> EncodedPair:
    return EncodedPair(prompt, KEY, (KEY,), (KEY,), 1.0, 0.5, source)


def test_items_of_several_sets_are_joined_word_for_word():
    first = Items.of([pair("a", "x, row 1"), pair("bé")])
    second = Items.of([pair(""), pair("ccc", ""), pair("d", "y")])
    joined = Items.joined([first.where(np.array([False, True])), second])
    assert list(joined) == [pair("bé"), pair(""), pair("ccc", ""), pair("d", "y")]
    assert joined.rows.tolist() == [1, 2, 3, 4]
    assert list(Items.joined([Items.of([pair("", "")]), first])) == [pair("", ""), *first]


def test_pairs_and_pictures_are_not_joined():
    picture = Items.of([EncodedPicture("a", KEY, (KEY,), 1.0, 1.0, "s")])
    with pytest.raises(ValueError, match="different kinds"):
        Items.joined([Items.of([pair("a")]), picture])
