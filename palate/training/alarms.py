"""What tells in a run's first updates that it will not learn: each alarm is said once, with what to do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from palate.training.options import TrainOptions

FIRST = 3
"""Updates after which gradients and logits tell: the very first may be made at a rate of 0."""
NO_GRADIENT = 1e-12
NO_MOVE = 1e-7
"""What all updates together must be able to move a weight by: a hundredth of what the shortest trial runs do."""
SMALL, LARGE = 0.01, 10.0
"""Of logits: below the sigmoid is a straight line, above it is flat."""
BEYOND = 1e6
"""Of the logit of an ordinary difference: from there on the first update alone decides each pair. Recipes stay below 1000."""
STUCK = 0.01
"""Of what the rate allows: AdamW's first updates move the weight that moves most by nearly all of it."""
SAMPLED = 2**20
"""Weights that are looked at."""


class Alarms:
    """Of one run; ``said``, which checkpoints keep, names those that were raised.

    Each method returns lines to say.

    Args:
        gather: where each process has other weights, puts the rows of all together; all call the same methods.
    """

    def __init__(
        self, options: TrainOptions, total: int, said: Collection[str] = (), gather: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        self.options, self.total, self.said, self.gather = options, total, list(said), gather
        self.norms: list[float] = []
        self.reaches: list[float] = []
        self.rates: list[float] = []
        self.begun: Tensor | None = None

    def before(self, weights: Sequence[Tensor]) -> list[str]:
        """What options tell of themselves: a warm-up that does not end, a rate that moves no weight."""
        self.begun = _some(weights)
        options, rate = self.options, self.options.learning_rate
        found = list[str]()
        if options.lr_warmup_steps >= self.total and options.lr_scheduler != "constant":
            reached = (self.total - 1) / options.lr_warmup_steps
            found += self._once(
                "warm-up",
                f"the warm-up of {options.lr_warmup_steps} steps is not over when the run ends after {self.total}: the "
                f"learning rate gets to {100 * reached:.2g} % of {rate:g}; lower lr_warmup_steps, or raise max_train_steps",
            )
        if rate * self.total < NO_MOVE:
            found += self._once(
                "rate",
                f"learning_rate {rate:g} moves no weight by more than {rate * self.total:.1g} in {self.total} steps, which "
                "changes no picture; 1e-5 to 3e-4 are usual for a LoRA, 1e-6 to 1e-5 for all weights",
            )
        elif (share := self._movable(weights, rate)) < 0.01:
            found += self._once(
                "rate",
                f"learning_rate {rate:g} is less than float32 can add to {100 * (1 - share):.0f} % of the weights; 1e-6 to "
                "1e-5 are usual for all weights",
            )
        return found

    def after(self, done: int, norm: float, reach: float | None) -> list[str]:
        """Of update number ``done`` (from 1): the gradient's norm, and the logit of an ordinary difference within a pair."""
        if done > FIRST:
            return []
        self.norms.append(norm)
        self.reaches += [] if reach is None else [reach]
        if done < min(FIRST, self.total) or len(self.norms) < done:  # or resumed within the first
            return []
        if max(self.norms) < NO_GRADIENT:
            return self._once(
                "gradient",
                f"the gradient was 0 in all {done} updates, so nothing is learned: pictures, labels or rewards that are all "
                "alike, or a LoRA of strength 0, have none",
            )
        # Of pictures that are all alike it is 0 whatever beta is.
        if self.reaches and 0 < (size := sum(self.reaches) / len(self.reaches)) < SMALL:
            return self._once(
                "logits",
                f"the logits stay all but zero, so beta does nothing: a margin as large as the difference of a "
                f"pair's own errors would have the logit {size:.1g}; raise beta about {1 / size:.0g} times, or use "
                "--objective.beta auto",
            )
        if self.reaches and (size := sum(self.reaches) / len(self.reaches)) > BEYOND:
            return self._once(
                "logits",
                f"beta is so large that each pair is learned or lost at once: a margin as large as the difference of a "
                f"pair's own errors would have the logit {size:.1g}; lower beta, or use --objective.beta auto",
            )
        return []

    def moved(self, done: int, weights: Sequence[Tensor], rate: float) -> list[str]:
        """After update number ``done`` (from 1), made at ``rate``: whether the optimizer moves the weights as it should."""
        if self.begun is None or done > FIRST:  # or resumed within the first
            return []
        self.rates.append(rate)
        if done < min(FIRST, self.total) or not sum(self.rates) or max(self.norms, default=0.0) < NO_GRADIENT:
            return []
        moved = (_some(weights) - self.begun).abs()
        most = moved.amax(0, keepdim=True) if len(moved) else torch.zeros(1)  # of a process without a part
        share = float(self.gather(most).max()) / sum(self.rates)
        least = STUCK if self.options.optimizer.startswith("adamw") else NO_MOVE / (self.options.learning_rate * self.total)
        self.begun = None
        if share >= least or "rate" in self.said:
            return []
        return self._once(
            "moved",
            f"no weight moves by more than {share:.1g} of the learning rate: the gradients (of norm {max(self.norms):.1g}, or "
            "max_grad_norm) drown in adam_epsilon or in float32; raise the one, or lower the other",
        )

    def rewards(self, std: object) -> list[str]:
        """Of a round's rewards."""
        if std != 0.0:
            return []
        return self._once(
            "rewards",
            "all pictures of a round have the same reward, so it tells none from another: look at the reward function",
        )

    def logits(self, done: int, size: float | None) -> list[str]:
        """Of the mean of \\|u\\|, once it had time to grow."""
        if size is None or done < 20 or SMALL <= size <= LARGE:
            return []
        if size < SMALL:
            hint = f"the logits are all but zero (mean |u| = {size:.2g}), so beta does nothing: raise beta or learning_rate"
        else:
            hint = f"the logits are saturated (mean |u| = {size:.3g}), so most pairs push no more: lower beta or learning_rate"
        return self._once("logits", f"step {done}: {hint}")

    def _movable(self, weights: Sequence[Tensor], rate: float) -> float:
        """The share of the weights to which float32 can add ``rate``, about what every optimizer here adds at the most."""
        sizes = _some(weights).abs()
        counts = self.gather(torch.tensor([[int((sizes + rate != sizes).sum()), len(sizes)]])).sum(0)
        return int(counts[0]) / max(int(counts[1]), 1)

    def _once(self, name: str, line: str) -> list[str]:
        if name in self.said:
            return []
        self.said.append(name)
        return [f"warning: {line}"]


def _some(weights: Sequence[Tensor]) -> Tensor:
    """A copy of the first weights, as many as are looked at."""
    found = list[Tensor]()
    for weight in weights:
        found.append(weight.detach().flatten()[: SAMPLED - sum(map(len, found))].float().cpu())
    return torch.cat(found)


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two pictures' latents are the same but for what the size of a batch does to the last digits."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=1e-4)
