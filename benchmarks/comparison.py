"""How long a comparison takes, without pictures: ``python benchmarks/comparison.py [--prompts 3200] [--judges 3]``."""

from __future__ import annotations

import argparse
import time

import numpy as np

from palate.evaluation.compare import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=3200)
    parser.add_argument("--judges", type=int, default=3)
    parser.add_argument("--draws", type=int, default=10_000)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    scores = {
        f"judge {j}": (rng.normal(size=given.prompts), rng.normal(0.1, 1, size=given.prompts)) for j in range(given.judges)
    }
    prompts = [f"prompt {i}" for i in range(given.prompts)]
    began = time.perf_counter()
    compare(scores, prompts, draws=given.draws)
    seconds = time.perf_counter() - began
    print(f"{given.prompts} prompts, {given.judges} judges, {given.draws} draws: {seconds:.2f} s")


if __name__ == "__main__":
    main()
