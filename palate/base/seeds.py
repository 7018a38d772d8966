"""Seeds: what is random about one item depends on its own numbers alone."""

from __future__ import annotations

import torch


def mix(*numbers: int) -> int:
    """63 well-mixed bits of some integers: the seed of one item."""
    return _splitmix(*numbers) >> 1


def generator(seed: int, stream: int) -> torch.Generator:
    """Random numbers of one item; every stream is independent of the others."""
    # Neighbouring seeds and streams must not give related numbers, and torch's CPU generator keeps only 32 bits of what it is
    # given: so every bit of both is mixed into the low ones.
    return torch.Generator().manual_seed(_splitmix(seed, stream))


def _splitmix(*numbers: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), chained: every bit depends on every bit of the numbers."""
    full = 2**64 - 1
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & full
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & full
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & full
        state ^= state >> 31
    return state
