"""What one training step reads: batches of pairs, of single pictures, of sampled steps."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from palate.diffusion.schedule import Times


@dataclass(frozen=True)
class PairBatch:
    """What one training step reads; p pairs, on the CPU, in the dtype they were encoded with."""

    latents: Float[Tensor, "rows c h w"]  # rows = 2p, winners first
    # Rows as those of latents, by name: the text encoding, and what the model is told of each picture
    cond: dict[str, Tensor]
    label: Float[Tensor, " p"]  # in [0.5, 1]: probability that the winner is the better one
    weight: Float[Tensor, " p"]
    seeds: Int64[Tensor, " p"]


@dataclass(frozen=True)
class SampleBatch:
    """b single pictures that people liked or disliked, on the CPU; rows as in ``PairBatch``."""

    latents: Float[Tensor, "b c h w"]
    cond: dict[str, Tensor]  # b rows, by name
    label: Float[Tensor, " b"]  # in [0, 1]: probability that the picture is liked; 1 or 0 for a plain vote
    weight: Float[Tensor, " b"]
    seeds: Int64[Tensor, " b"]


@dataclass(frozen=True, eq=False)
class TrajectoryBatch:
    """b steps, on the CPU: each from latents `xt` at time t to `after` at time s, as it was sampled for one of `prompts`."""

    xt: Float[Tensor, " b *d"]
    after: Float[Tensor, " b *d"]
    t: Times
    s: Times
    cond: dict[str, Tensor]
    old_log_prob: Float[Tensor, " b"]
    advantage: Float[Tensor, " b"]
    prompts: list[str]
    old_mean: Float[Tensor, " b *d"] | None = None


Batch = PairBatch | SampleBatch | TrajectoryBatch
