"""Which of the pairs that were read are kept: absolute winners, no repeats, so many a prompt."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import TypeVar

Picture = TypeVar("Picture", bound=Hashable)


def same_prompt(prompt: str) -> str:
    """What prompts have in common that differ only in capitals, spaces or the encoding of accents: they count as one."""
    return " ".join(unicodedata.normalize("NFC", prompt).split()).casefold()


def unbeaten(results: Iterable[tuple[Picture, Picture, float]]) -> set[Picture]:
    """Those that won every comparison they took part in; a tie is no win.

    results: two pictures, and the probability that the first is the better one.
    """
    found: dict[Picture, bool] = {}
    for first, second, label in results:
        for picture, won in ((first, label > 0.5), (second, label < 0.5)):
            found[picture] = found.get(picture, True) and won
    return {picture for picture, kept in found.items() if kept}


def absolute_winners(votes: Iterable[tuple[str, Sequence[bytes], float]]) -> set[bytes]:
    """The :func:`unbeaten` pictures of every prompt, as :func:`mark` names them under it.

    A prompt may have several, of comparisons that never met; its only one is the sole winner that ``palate label`` asks for
    (:func:`palate.evaluation.labelling.sole_winners`). ``votes`` are prompt, two pictures, and the probability that the first
    is the better one. Noise-Conditioned Perception (arXiv 2406.17636, section 6) trains on pairs whose winner is such a
    picture: in a chain x1 < x2 < x3 the pushes on x2 partly cancel. About 150 bytes a picture are held in memory.
    """
    return unbeaten((mark(prompt, first), mark(prompt, second), label) for prompt, (first, second), label in votes)


def mark(prompt: str, *pictures: bytes) -> bytes:
    """A short name for pictures under a prompt, in whatever order they come."""
    digests = sorted(hashlib.sha256(picture).digest() for picture in pictures)
    return hashlib.sha256(b"".join([same_prompt(prompt).encode(), b"\0", *digests])).digest()[:16]


class Selection:
    """Says of each pair in turn whether it is kept, and counts by reason those that are not, in ``left_out``.

    Args:
        winners: only pairs whose better picture is one of these (see :func:`absolute_winners`).
        deduplicate: of several pairs of the same two pictures under a prompt the first alone.
        max_pairs_per_prompt: the first so many pairs of a prompt.
    """

    def __init__(
        self, winners: Container[bytes] | None = None, deduplicate: bool = False, max_pairs_per_prompt: int | None = None
    ) -> None:
        self.winners, self.deduplicate, self.most = winners, deduplicate, max_pairs_per_prompt
        self.left_out: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        self._of_prompt: Counter[bytes] = Counter()

    def keeps(self, prompt: str, pictures: Sequence[bytes], label: float) -> bool:
        """Whether this one is kept; single pictures come alone, and have no winner."""
        reason = self._reason(prompt, pictures, label)
        if reason:
            self.left_out[reason] += 1
        return not reason

    def _reason(self, prompt: str, pictures: Sequence[bytes], label: float) -> str:
        if self.winners is not None and mark(prompt, pictures[label < 0.5]) not in self.winners:
            return "without an absolute winner"
        if self.deduplicate:
            key = mark(prompt, *pictures)
            if key in self._seen:
                return "repeated"
            self._seen.add(key)
        if self.most is not None:
            key = mark(prompt)
            if self._of_prompt[key] == self.most:
                return "beyond max_pairs_per_prompt"
            self._of_prompt[key] += 1
        return ""
