"""What training never sees: rewards on fixed prompts and seeds, and the alarm when they part from the trained one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from palate.base.errors import UserError
from palate.data.images import to_tensor
from palate.data.prompts import Prompt
from palate.online.bundle import RewardBundle

WINDOW = 3
"""Evaluations that are averaged."""

THRESHOLD = 4.0
"""Standard errors by which a held-out reward must have fallen."""


def parted(
    trained: Sequence[int | float],
    held_out: Float[Tensor, "evaluations n"],
    *,
    window: int = WINDOW,
    threshold: float = THRESHOLD,
) -> bool:
    """Whether the trained reward and a held-out one have parted: over-optimisation, as of the last evaluation.

    Both are averaged over ``window`` evaluations. The last average is compared with the best held-out one among those that
    share no evaluation with it. They have parted if since then the trained reward rose and the held-out one fell by more than
    ``threshold`` standard errors. The standard error is the larger of two: that of the paired differences of the n
    images, and that of the wobble between evaluations, whose variance is half the mean square of successive differences
    (von Neumann 1941), so that a trend does not count as wobble. Never before ``2 * window`` evaluations.

    Four standard errors look strict because the best of many averages is compared, evaluation after evaluation: without any
    decline, 20 evaluations of 64 images raise a false alarm in none to 4 of 100 runs, depending on the wobble; see
    ``reproduction/false_alarms.py``.

    Args:
        trained: the mean trained reward at each evaluation.
        held_out: the held-out reward of the same n (prompt, seed) at each evaluation.
    """
    rose, scores = np.asarray(trained, dtype=np.float64), held_out.double().numpy()
    m, n = scores.shape
    if len(rose) != m:
        raise ValueError(f"{len(rose)} trained rewards came with {m} held-out ones")
    if m < 2 * window:
        return False
    means = scores.mean(axis=1)
    starts = range(m - 2 * window + 1)
    start = max(starts, key=lambda i: means[i : i + window].mean())
    best, last = slice(start, start + window), slice(m - window, m)
    change = scores[last].mean(axis=0) - scores[best].mean(axis=0)
    paired = change.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
    wobble = np.sqrt(np.square(np.diff(means)).mean() / window)  # the difference of two averages: 2 / window variances
    fell = change.mean() < -threshold * max(paired, wobble)
    return bool(fell and rose[last].mean() > rose[best].mean())


class HeldOutState(TypedDict):
    """What was found so far."""

    trained: list[float]
    scores: dict[str, list[list[float]]]
    """By name, of each evaluation those of all pictures."""
    prompts: NotRequired[list[str]]


class HeldOut:
    """A fixed list of (prompt, seed), judged again and again by rewards that are never trained on.

    Args:
        prompts: one picture each.
        seed: of the first picture; the next has the next.
        rewards: the first of them decides which evaluation is the best.
        batch_size: pictures that a reward sees at once.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, rewards: RewardBundle, *, batch_size: int = 32):
        if not prompts:
            raise UserError("held-out rewards need prompts, and there are none")
        self.prompts, self.seeds = list(prompts), [(seed + i) % 2**64 for i in range(len(prompts))]
        self.rewards, self.batch_size = rewards, batch_size
        self.forget()

    def forget(self) -> None:
        """Begin anew, without any evaluation."""
        self.trained: list[float] = []
        self.scores: dict[str, Tensor] = {name: torch.empty(0, len(self.prompts)) for name in self.rewards.rewards}

    def evaluate(
        self, generate: Callable[[list[Prompt], list[int]], Sequence[Image.Image]], trained: float
    ) -> dict[str, float]:
        """Judge the model as it is; ``trained`` is the mean of the trained reward since the last evaluation,
        nan where nothing was drawn yet (see :meth:`first_round`).

        Returns:
            The mean of each held-out reward, as ``held_out/NAME``.

        Raises:
            RewardError: a reward failed; nothing is recorded.
        """
        images = generate(self.prompts, self.seeds)
        parts = [slice(start, start + self.batch_size) for start in range(0, len(self.prompts), self.batch_size)]
        pending = [self.rewards.submit(to_tensor(images[part]), self.prompts[part]) for part in parts]
        raw = self.rewards.collect(pending).raw
        self.rewards.close()
        self.trained.append(float(trained))
        self.scores = {name: torch.cat([self.scores[name], raw[name][None]]) for name in raw}
        return {f"held_out/{name}": float(scores.mean()) for name, scores in raw.items()}

    def first_round(self, trained: float) -> None:
        """Tell the trained reward of the first round, which is drawn before training: it belongs to the evaluation there."""
        if self.trained and math.isnan(self.trained[0]):
            self.trained[0] = float(trained)

    @property
    def best(self) -> bool:
        """Whether the last evaluation is the best so far, by the first held-out reward: its weights are worth keeping."""
        means = next(iter(self.scores.values())).mean(dim=1)
        return bool(means[-1] >= means.max())

    def alarm(self) -> str | None:
        """What to tell the user if :func:`parted` says so of a held-out reward; None otherwise."""
        gone = [name for name, scores in self.scores.items() if parted(self.trained, scores)]
        if not gone:
            return None
        return (
            f"over-optimisation: the trained reward rises while {' and '.join(gone)}, held out, falls by more than "
            f"{THRESHOLD:g} standard errors; stop here and take the best checkpoint, or bound the KL divergence"
        )

    def state_dict(self) -> HeldOutState:
        """What was found so far, so that a resumed run knows its best and its peak."""
        scores = {name: scores.numpy().tolist() for name, scores in self.scores.items()}
        return {"trained": list(self.trained), "scores": scores, "prompts": self._texts()}

    def load_state_dict(self, state: HeldOutState) -> None:
        n = len(self.prompts)
        others = state.get("prompts", self._texts()) != self._texts() or set(state["scores"]) != set(self.scores)
        if others or any(len(row) != n for rows in state["scores"].values() for row in rows):
            raise UserError("the checkpoint was judged by other held-out rewards or on other prompts; resume with the same")
        self.trained = [float(t) for t in state["trained"]]
        self.scores = {name: torch.tensor(state["scores"][name]).reshape(-1, n) for name in self.scores}

    def _texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]
