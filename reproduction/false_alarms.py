"""How often the alarm of docs/rewards.md sounds without cause, and how soon with one: python reproduction/false_alarms.py"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from palate.online.held_out import parted

RUNS, EVALUATIONS, IMAGES = 1000, 20, 64


def series(rng: np.random.Generator, drift: np.ndarray, wobble: float) -> Tensor:
    """What each image scores by itself, a drift, a wobble of all images together, and noise of 0.5 of each."""
    own, shared = rng.normal(0, 1, IMAGES), rng.normal(0, wobble, (EVALUATIONS, 1))
    return torch.tensor(own + drift[:, None] + shared + rng.normal(0, 0.5, (EVALUATIONS, IMAGES)))


def first_alarm(held_out: Tensor) -> int | None:
    return next((m for m in range(1, EVALUATIONS + 1) if parted(list(range(m)), held_out[:m])), None)


def main() -> None:
    rng = np.random.default_rng(0)
    for wobble in (0.0, 0.1, 0.3):
        alarms = [first_alarm(series(rng, np.zeros(EVALUATIONS), wobble)) for _ in range(RUNS)]
        print(f"wobble {wobble}: {sum(at is not None for at in alarms)} false alarms in {RUNS} runs")
    peak = np.concatenate([np.linspace(0, 0.5, 10), 0.5 - 0.1 * np.arange(1, 11)])
    alarms = [at for at in (first_alarm(series(rng, peak, 0.1)) for _ in range(RUNS)) if at is not None]
    print(f"peak at 10: {len(alarms)} alarms in {RUNS} runs, at {min(alarms)} or later, on average {np.mean(alarms):.1f}")


if __name__ == "__main__":
    main()
