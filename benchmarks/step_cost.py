"""What a training step costs, by method, and what the cache of latents saves.

    python benchmarks/step_cost.py --pairs 16 --repeats 5

One process, one model, one machine: the ratios are what matters. "floor" is the policy's forward and backward pass alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from palate.diffusion.batches import PairBatch
from palate.miniature import world
from palate.models.families import load_denoiser
from palate.models.policy import Policy
from palate.objectives import pairs, samples
from palate.spaces import latent, perceptual
from palate.training.steps import pair_step, sample_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(world.checkpoint("mini-sd")))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    denoiser = load_denoiser(given.model)
    side, p = denoiser.default_resolution, given.pairs
    pictures = torch.rand(2 * p, 3, side, side) * 2 - 1
    latents = denoiser.encode_images(pictures)
    cond = denoiser.encode_prompts(["a red house on the left"] * 2 * p).tensors
    batch = PairBatch(latents, cond, torch.ones(p), torch.ones(p), torch.arange(p))
    policy = Policy(denoiser, rank=16)
    ncp = perceptual(policy.features, policy.schedule)
    dpo, cpo = partial(pairs.dpo, beta=5000.0), partial(pairs.cpo, beta=500.0, bc_weight=1.0)

    def trained(step: Callable) -> Callable[[], None]:
        def run() -> None:
            step(batch)[0].mean().backward()

        return run

    def floor() -> None:
        t = torch.full((2 * p,), 500)
        from palate.diffusion.denoising import Conditioning

        policy(latents, t, Conditioning(cond)).square().mean().backward()

    cases = {
        "floor: policy forward and backward": floor,
        "SFT, latent (winners only)": trained(sample_step(policy, latent(), samples.sft)),
        "CPO, latent": trained(pair_step(policy, latent(), cpo)),
        "DPO, latent": trained(pair_step(policy, latent(), dpo)),
        "DPO, perceptual": trained(pair_step(policy, ncp, dpo)),
        "encoding the pictures of one step (what the cache saves)": lambda: denoiser.encode_images(pictures),
        "encoding its prompts (what the cache saves)": lambda: denoiser.encode_prompts(["a red house on the left"] * 2 * p),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(given.repeats + 1):  # interleaved, so that a slow moment of the machine hits all cases
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    reference = statistics.median(seconds["DPO, latent"])
    print(f"{p} pairs a step, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {given.repeats}")
    for name, taken in seconds.items():
        print(f"{statistics.median(taken):8.3f} s  {statistics.median(taken) / reference:5.2f} x DPO latent   {name}")


if __name__ == "__main__":
    main()
