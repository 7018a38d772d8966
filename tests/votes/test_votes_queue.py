"""Laws of the queue: whatever raters do, in any order."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import factorial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.votes.queue import GAP, Dealt, Queue

MOVES = ("take", "answer", "skip", "undo", "leave", "return", "lose")


class _Party:
    """Raters who act at random, and what an independent book-keeper writes down."""

    def __init__(self, pictures: int, raters_per_pair: int, repeats: float) -> None:
        self.pairs = list(combinations(range(pictures), 2))
        self.queue = Queue(self.pairs, raters_per_pair=raters_per_pair, repeats=repeats, seed="s")
        self.shown: dict[str, list[Dealt]] = {}
        self.holds: dict[str, set[int]] = {}
        self.away: dict[str, set[int]] = {}
        self.done: dict[str, list[tuple[str, int, int | None]]] = {}
        self.gone: set[int] = set()

    def move(self, rater: str, kind: str, choice: int) -> None:
        queue = self.queue
        holds, away = self.holds.setdefault(rater, set()), self.away.setdefault(rater, set())
        done = self.done.setdefault(rater, [])
        if kind == "take":
            dealt = queue.choose(rater)
            if dealt is None:
                return
            assert dealt.pair not in self.gone
            queue.take(rater, dealt)
            self.shown.setdefault(rater, []).append(dealt)
            if not dealt.repeat:
                holds.add(dealt.pair)
        elif kind in ("answer", "skip") and holds:
            pair = sorted(holds)[choice % len(holds)]
            holds.remove(pair)
            label = (0, 1, None)[choice % 3]
            queue.answer(rater, pair, label) if kind == "answer" else queue.skip(rater, pair)
            done.append((kind, pair, label))
        elif kind == "undo" and done:
            what, pair, label = done[-1]
            if what == "answer":
                queue.undo_answer(rater, pair, label)
            elif queue.room(pair):
                queue.undo_skip(rater, pair)
            else:
                return
            done.pop()
            holds.add(pair)
        elif kind == "leave":
            for pair in sorted(holds):
                queue.let_go(rater, pair)
            away |= holds
            holds.clear()
        elif kind == "return":
            for pair in sorted(away):
                if queue.resume(rater, pair):
                    away.remove(pair)
                    holds.add(pair)
        elif kind == "lose":
            self.gone.add(choice % len(self.pairs))
            queue.lose(choice % len(self.pairs))


@settings(max_examples=120)
@given(
    pictures=st.integers(2, 6),
    raters_per_pair=st.integers(1, 4),
    repeats=st.sampled_from([0.0, 0.1, 0.5]),
    moves=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(MOVES), st.integers(0, 50)), max_size=120),
)
def test_laws(pictures, raters_per_pair, repeats, moves):
    party = _Party(pictures, raters_per_pair, repeats)
    for move in moves:
        party.move(*move)
        answered = Counter(pair for done in party.done.values() for kind, pair, _ in done if kind == "answer")
        held = answered + Counter(pair for holds in party.holds.values() for pair in holds)
        assert all(count <= raters_per_pair for count in held.values())
        assert {i: int(n) for i, n in enumerate(party.queue.held) if n} == dict(held)
    for shown in party.shown.values():
        fresh = [dealt.pair for dealt in shown if not dealt.repeat]
        again = [dealt.pair for dealt in shown if dealt.repeat]
        assert len(set(fresh)) == len(fresh)
        assert len(set(again)) == len(again)
        assert len(again) <= repeats * len(shown)
        for i, dealt in enumerate(shown):
            if dealt.repeat:
                first = next(j for j, other in enumerate(shown) if other.pair == dealt.pair)
                assert i - first > GAP
                assert (
                    dealt.arrangement + shown[first].arrangement == factorial(len(party.pairs[dealt.pair])) - 1
                )  # the reverse


@settings(max_examples=30)
@given(pictures=st.integers(2, 7), raters_per_pair=st.integers(1, 3), raters=st.integers(1, 4))
def test_everyone_diligent_completes_everything(pictures, raters_per_pair, raters):
    pairs = list(combinations(range(pictures), 2))
    queue = Queue(pairs, raters_per_pair=raters_per_pair, seed="x")
    names = [str(i) for i in range(raters)]
    seen = {name: set() for name in names}
    turns = 0
    while any(queue.choose(name) for name in names):
        for name in names:
            if dealt := queue.choose(name):
                assert queue.held[dealt.pair] == min(n for pair, n in enumerate(queue.held) if pair not in seen[name])
                seen[name].add(dealt.pair)
                queue.take(name, dealt)
                queue.answer(name, dealt.pair, 0)
        turns += 1
    assert set(queue.held) == {min(raters, raters_per_pair)}
    assert all(queue.left(name) == 0 for name in names)
    assert turns <= len(pairs)


def test_uncertain_pairs_come_first():
    # After one vote each, pictures 0 and 1 have won all, 2 and 3 lost all: of the untouched pairs (0, 1) and (2, 3) are even.
    pairs = [(0, 2), (1, 3), (0, 1), (0, 3), (2, 3), (1, 2)]
    queue = Queue(pairs, raters_per_pair=1)
    for pair in (0, 1):
        queue.take("a", Dealt(pair, 0))
        queue.answer("a", pair, 0)
    first = []
    for _ in range(2):
        dealt = queue.choose("b")
        queue.take("b", dealt)
        first.append(dealt.pair)
    assert sorted(first) == [2, 4]


def test_sides_are_a_fair_coin_of_rater_and_pair():
    pairs = list(combinations(range(30), 2))
    queue, again = (Queue(pairs, raters_per_pair=1, seed="s") for _ in range(2))
    swapped = [queue._arrangement("a", i) for i in range(len(pairs))]
    assert swapped == [again._arrangement("a", i) for i in range(len(pairs))]
    assert swapped != [queue._arrangement("b", i) for i in range(len(pairs))]
    assert 0.4 < sum(swapped) / len(swapped) < 0.6  # 435 tosses: 4 standard deviations are 0.096


def test_the_champion_is_challenged_again():
    queue = Queue(list(combinations(range(5), 2)), raters_per_pair=1)
    faced = []
    for _ in range(4):
        dealt = queue.choose("a", champion=3)
        queue.take("a", dealt)
        queue.answer("a", dealt.pair, 0)
        faced.append(queue.pairs[dealt.pair])
    assert all(3 in pair for pair in faced)
    assert 3 not in queue.pairs[queue.choose("a", champion=3).pair]


@pytest.mark.parametrize(("repeats", "expected"), [(0.0, 0), (0.1, 4), (0.25, 8)])
def test_planned_repeats(repeats, expected):
    queue = Queue(list(combinations(range(20), 2)), raters_per_pair=1, repeats=repeats)
    again = 0
    for _ in range(40):
        dealt = queue.choose("a")
        queue.take("a", dealt)
        again += dealt.repeat
        if not dealt.repeat:
            queue.answer("a", dealt.pair, 0)
    # A quarter of 40 are 10, of which the 4th and 8th come before any pair is old enough.
    assert again == expected
