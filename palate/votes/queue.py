"""Who is shown which pair next: plain state without clock, files or chance, so that its laws can be tested.

A *pair* is the number of a row of ``pairs``: two pictures, or up to four that are shown together. A rater *takes* a pair,
then *answers* or *skips* it; a pair that is held by as many raters as asked is dealt to no other. The order is that of
uncertainty sampling (Lewis and Gale 1994): pairs with fewer raters first, among those the ones whose pictures are nearest in
strength, then a shuffle of the rater's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import factorial

import numpy as np

GAP = 8  # so many other pairs lie at least between a pair and its repeat, lest the first answer be remembered


@dataclass(frozen=True)
class Dealt:
    """A pair as one rater sees it; ``arrangement`` is the number of the order in which its pictures stand."""

    pair: int
    arrangement: int
    repeat: bool = False


@dataclass
class _Rater:
    taken: list[int] = field(default_factory=list)  # pairs in the order in which they were dealt, repeats among them
    open: set[int] = field(default_factory=set)  # dealt and not answered, counted as held
    let_go: set[int] = field(default_factory=set)  # dealt, not answered, and no longer counted
    answered: set[int] = field(default_factory=set)
    repeated: set[int] = field(default_factory=set)
    noise: np.ndarray | None = None


class Queue:
    """The state of all raters' queues.

    ``pairs[i]`` are the numbers of its pictures, ``raters_per_pair`` how many people judge a pair, ``repeats`` the share of
    a rater's pairs that come again with sides changed (0 for none), ``seed`` decides shuffles and sides.
    """

    def __init__(self, pairs: Sequence[tuple[int, ...]], *, raters_per_pair: int, repeats: float = 0.0, seed: str = "") -> None:
        self.pairs = list(pairs)
        self.raters_per_pair, self.repeats, self.seed = raters_per_pair, repeats, seed
        pictures = sorted({picture for pair in self.pairs for picture in pair})
        self._number = {picture: i for i, picture in enumerate(pictures)}
        longest = max(map(len, self.pairs), default=2)
        rows = [[self._number[p] for p in pair] for pair in self.pairs]
        self._ends = np.array([row + row[:1] * (longest - len(row)) for row in rows], dtype=np.int64).reshape(-1, longest)
        """The pictures of each pair; a shorter one has its first again, which changes no extent."""
        self.held = np.zeros(len(self.pairs), dtype=np.int64)
        """How many raters a pair has gone to, ``(pairs,)``."""
        self._points, self._seen = np.zeros(len(pictures)), np.zeros(len(pictures))
        self._gone = np.zeros(len(self.pairs), dtype=bool)
        self._raters: dict[str, _Rater] = {}

    # Dealing --------------------------------------------------------------------------------------------------------------

    def choose(self, rater: str, champion: int | None = None) -> Dealt | None:
        """The rater's next pair, or None when nothing is left for them; nothing changes until ``take``.

        With ``champion`` (a picture) pairs that show it come before all others: the better picture is challenged again.
        """
        state = self._rater(rater)
        if (again := self._due_repeat(state)) is not None:
            last = factorial(len(self.pairs[again])) - 1
            return Dealt(again, last - self._arrangement(rater, again), repeat=True)
        free = (self.held < self.raters_per_pair) & ~self._gone
        free[list({*state.taken, *state.open})] = False
        if not free.any():
            return None
        if champion is not None:
            challenged = free & (self._ends == self._number.get(champion, -1)).any(axis=1)
            free = challenged if challenged.any() else free
        rates = ((self._points + 1) / (self._seen + 2))[self._ends]
        distance = np.round(rates.max(axis=1) - rates.min(axis=1), 1)
        if state.noise is None:
            state.noise = np.random.default_rng(_number(self.seed, "order", rater)).random(len(self.pairs))
        rank = 2 * self.held + distance + 0.1 * state.noise  # fewest raters, then nearest in strength, then by chance
        pair = int(np.argmin(np.where(free, rank, np.inf)))
        return Dealt(pair, self._arrangement(rater, pair))

    def take(self, rater: str, dealt: Dealt) -> None:
        """The rater now has this pair before them."""
        state = self._rater(rater)
        state.taken.append(dealt.pair)
        if dealt.repeat:
            state.repeated.add(dealt.pair)
        else:
            state.open.add(dealt.pair)
            self.held[dealt.pair] += 1

    # Answers; none of them concern repeats, which measure consistency and nothing else --------------------------------------

    def answer(self, rater: str, pair: int, best: int | None) -> None:
        """``best`` is the place of the preferred picture in the pair, None for a tie."""
        state = self._rater(rater)
        state.open.remove(pair)
        state.answered.add(pair)
        self._score(pair, best, 1)

    def skip(self, rater: str, pair: int) -> None:
        """The rater sees the pair no more; another may take it instead."""
        self._rater(rater).open.remove(pair)
        self.held[pair] -= 1

    def undo_answer(self, rater: str, pair: int, best: int | None) -> None:
        state = self._rater(rater)
        state.answered.remove(pair)
        state.open.add(pair)
        self._score(pair, best, -1)

    def undo_skip(self, rater: str, pair: int) -> None:
        """Only where there is ``room``: others may have taken the place meanwhile."""
        self._rater(rater).open.add(pair)
        self.held[pair] += 1

    def room(self, pair: int) -> bool:
        """Whether fewer raters than asked hold the pair."""
        return bool(self.held[pair] < self.raters_per_pair)

    # Raters who leave, pictures that vanish -----------------------------------------------------------------------------------

    def let_go(self, rater: str, pair: int) -> None:
        """A rater who left holds no place any more."""
        state = self._rater(rater)
        state.open.remove(pair)
        state.let_go.add(pair)
        self.held[pair] -= 1

    def resume(self, rater: str, pair: int) -> bool:
        """The rater is back: whether there still is a place for them."""
        state = self._rater(rater)
        if pair in state.open:
            return True
        if pair not in state.let_go or not self.room(pair):
            return False
        state.let_go.remove(pair)
        state.open.add(pair)
        self.held[pair] += 1
        return True

    def lose(self, pair: int) -> None:
        """A picture of the pair is gone: it is dealt no more."""
        self._gone[pair] = True

    def left(self, rater: str) -> int:
        """How many pairs this rater may yet be dealt; without repeats."""
        state = self._rater(rater)
        free = (self.held < self.raters_per_pair) & ~self._gone
        free[list({*state.taken, *state.open})] = False
        return int(free.sum())

    # Parts -------------------------------------------------------------------------------------------------------------------

    def _rater(self, rater: str) -> _Rater:
        return self._raters.setdefault(rater, _Rater())

    def _due_repeat(self, state: _Rater) -> int | None:
        dealt = len(state.taken)
        if int((dealt + 1) * self.repeats) <= int(dealt * self.repeats):
            return None
        # The longest ago first; by when it was shown, so that a restart, which knows no more, decides alike.
        old = state.taken[: max(0, dealt - GAP)]
        return next((p for p in old if p in state.answered and p not in state.repeated and not self._gone[p]), None)

    def _arrangement(self, rater: str, pair: int) -> int:
        pictures = self.pairs[pair]
        return _number(self.seed, "side", rater, *map(str, pictures)) % factorial(len(pictures))

    def _score(self, pair: int, best: int | None, sign: int) -> None:
        ends = [self._number[p] for p in self.pairs[pair]]
        self._points[ends] += 0.5 * sign if best is None else [float(sign * (place == best)) for place in range(len(ends))]
        self._seen[ends] += sign


def _number(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")
