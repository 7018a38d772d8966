"""From the rewards of a round to what its pictures weigh: advantages, softmax weights, the best few, ranked pairs.

Rewards are (n,) and `prompts` the n texts they were drawn for, in one order. Standard deviations are those of the population.
"""

# torch types tolist and a few others in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class PromptTracker:
    """Running statistics of every prompt's rewards (arXiv 2305.13301, section 4.3 and appendix D).

    Args:
        buffer_size: rewards kept of a prompt, the latest.
        min_count: a prompt with fewer is measured against all pictures of the round.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16):
        self.buffer_size, self.min_count = buffer_size, min_count
        self.rewards: dict[str, deque[float]] = {}

    def advantages(
        self, prompts: Sequence[str], rewards: Float[Tensor, " n"], *, global_std: bool = False
    ) -> Float[Tensor, " n"]:
        """(r - mean) / (std + 1e-6), the new rewards counted in; with `global_std` the std is that of the round."""
        values = rewards.double()
        new: list[float] = values.tolist()
        for prompt, reward in zip(prompts, new, strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        found = torch.empty_like(values)
        for prompt, rows in _groups(prompts).items():
            known = torch.tensor(self.rewards[prompt], dtype=torch.float64)
            around = known if len(known) >= self.min_count else values
            std = values.std(correction=0) if global_std else around.std(correction=0)
            found[rows] = (values[rows] - around.mean()) / (std + 1e-6)
        return found.float()

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(rewards) for prompt, rewards in self.rewards.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self.rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state.items()}


def group_advantages(prompts: Sequence[str], rewards: Float[Tensor, " n"], *, global_std: bool = False) -> Float[Tensor, " n"]:
    """Every picture against the others of its prompt in this round (arXiv 2505.05470, eq. 4), in float32."""
    values, found = rewards.double(), torch.zeros(len(rewards), dtype=torch.float64)
    for rows in _groups(prompts).values():
        std = (values if global_std else values[rows]).std(correction=0)
        found[rows] = (values[rows] - values[rows].mean()) / (std + 1e-6)
    return found.float()


def softmax_weights(
    prompts: Sequence[str],
    rewards: Float[Tensor, " n"],
    *,
    temperature: float,
    per_prompt: bool = False,
    standardise: bool = False,
) -> Float[Tensor, " n"]:
    """Weights of reward-weighted regression: n softmax(reward / temperature), whose mean is 1 (arXiv 2305.13301, eq. RWR).

    per_prompt: the softmax is over the pictures of each prompt, and its weights have mean 1 there.
    standardise: rewards are first brought to mean 0 and standard deviation 1, over the same pictures.
    """
    found = torch.empty(len(rewards), dtype=torch.float64)
    for rows in _groups(prompts).values() if per_prompt else [list(range(len(rewards)))]:
        values = rewards[rows].double()
        if standardise:
            values = (values - values.mean()) / (values.std(correction=0) + 1e-8)
        found[rows] = len(rows) * torch.softmax(values / temperature, 0)
    return found.float()


def best(rewards: Float[Tensor, " n"], threshold: float) -> Bool[Tensor, " n"]:
    """Which rewards reach the threshold: those that sparse RWR keeps; where none does, those as good as the best one."""
    return rewards.double() >= min(threshold, float(rewards.double().max()))


def percentile(rewards: Float[Tensor, " n"], q: float) -> float:
    """The q-th percentile (0 to 100), interpolated linearly between rewards."""
    return float(torch.quantile(rewards.double(), q / 100))


def effective_sample_size(weights: Float[Tensor, " n"]) -> float:
    """(sum w)^2 / sum w^2: as many equal weights would say as much."""
    w = weights.double()
    return float(w.sum() ** 2 / w.square().sum())


def ranked_pairs(prompts: Sequence[str], rewards: Float[Tensor, " n"]) -> list[tuple[int, int]]:
    """(better, worse) rows: of each prompt's pictures the best with the worst, the second with the last but one, and so on."""
    pairs: list[tuple[int, int]] = []
    for rows in _groups(prompts).values():
        order = sorted(rows, key=lambda row: -float(rewards[row]))
        pairs += list(zip(order[: len(order) // 2], reversed(order[-(len(order) // 2) :]), strict=True))
    return pairs


def spread(prompts: Sequence[str], pictures: Float[Tensor, "n 3 h w"]) -> float | None:
    """Diversity: root mean square difference of two pictures of one prompt, the mean over prompts; None without such two."""
    found: list[float] = []
    for rows in _groups(prompts).values():
        if len(rows) > 1:
            found.append(float(torch.pdist(pictures[rows].flatten(1).double()).mean() / pictures[0].numel() ** 0.5))
    return sum(found) / len(found) if found else None


def _groups(prompts: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(row)
    return found
