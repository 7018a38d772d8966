"""Seeds and random numbers: what is random about one item depends on its own numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor


def mix(*numbers: int) -> int:
    """63 well-mixed bits of some integers: the seed of one item."""
    return _splitmix(*numbers) >> 1


def generator(seed: int, stream: int) -> torch.Generator:
    """Random numbers of one item; every stream is independent of the others."""
    # Neighbouring seeds and streams must not give related numbers, and torch's CPU generator keeps only 32 bits of what it is
    # given: so every bit of both is mixed into the low ones.
    return torch.Generator().manual_seed(_splitmix(seed, stream))


def normal(
    seeds: Int[Tensor, " b"], shape: Sequence[int], stream: int, device: torch.device | str, dtype: torch.dtype
) -> Float[Tensor, " b *d"]:
    """Standard normal numbers (b, *shape); row i depends on (seeds[i], stream) alone, not on the device."""
    wanted = [int(seed) for seed in seeds.cpu()]
    rows = {seed: torch.randn(*shape, generator=generator(seed, stream)) for seed in set(wanted)}
    return torch.stack([rows[seed] for seed in wanted]).to(device, dtype)


def integers(seeds: Int[Tensor, " b"], low: int, high: int, stream: int, device: torch.device | str) -> Int[Tensor, " b"]:
    """Uniform integers of low .. high (inclusive), (b,) int64; row i depends on (seeds[i], stream) alone."""
    rows = [torch.randint(low, high + 1, (), generator=generator(int(seed), stream)) for seed in seeds.cpu()]
    return torch.stack(rows).to(device)


def uniform(seeds: Int[Tensor, " b"], stream: int, device: torch.device | str) -> Float64[Tensor, " b"]:
    """Uniform numbers of 0 (inclusive) to 1, (b,); row i depends on (seeds[i], stream) alone."""
    rows = [torch.rand((), dtype=torch.float64, generator=generator(int(seed), stream)) for seed in seeds.cpu()]
    return torch.stack(rows).to(device)


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
