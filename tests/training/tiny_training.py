"""A two-channel model and eleven pairs: enough to train in milliseconds. Run as a script, it trains on them (see test_loop)."""

from __future__ import annotations

import copy
import functools
import sys

import torch
from torch import Tensor, nn

from palate.data.cache import TensorCache
from palate.diffusion.batches import PairBatch
from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import VariancePreserving
from palate.objectives.pairs import dpo
from palate.spaces import latent
from palate.training import place
from palate.training.loop import train
from palate.training.options import TrainOptions
from palate.training.references import References
from palate.training.steps import pair_step

PAIRS = 11


class TinyPolicy:
    """A 3 x 3 convolution plus the text; the reference is its frozen copy."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.trainable_module = nn.Conv2d(2, 2, 3, padding=1)
        self.frozen = copy.deepcopy(self.trainable_module).requires_grad_(False)
        betas = torch.linspace(1e-4, 2e-2, 100, dtype=torch.float64)
        self.schedule = VariancePreserving((1 - betas).cumprod(0), "epsilon", steps_offset=1)
        self.reference_calls = 0

    def __call__(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.trainable_module(xt) + cond.tensors["text"][:, :, None, None]

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.reference_calls += 1
        with torch.no_grad():
            return self.frozen(xt) + cond.tensors["text"][:, :, None, None]

    def parameters(self):
        return self.trainable_module.parameters()

    def state_dict(self):
        return {name: p.detach() for name, p in self.trainable_module.named_parameters()}

    def load_state_dict(self, state):
        self.trainable_module.load_state_dict(state)


class TinyPairs:
    """Pairs whose contents depend on their index alone."""

    rounds = None

    def __init__(self, n: int = PAIRS, labels: list[float] | None = None):
        generator = torch.Generator().manual_seed(7)
        self.latents = torch.randn(n, 2, 2, 4, 4, generator=generator)
        self.text = torch.randn(n, 2, generator=generator)
        self.label = torch.tensor(labels or [1.0] * n)
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.label)

    def shape_of(self, index: int) -> None:
        return None

    def order(self, seed: int, epoch: int) -> list[int]:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist()

    def batch(self, indices, seeds) -> PairBatch:
        indices = list(indices)
        self.seen += indices
        latents = torch.cat([self.latents[indices, 0], self.latents[indices, 1]])
        weight = 0.5 + 0.1 * torch.tensor(indices, dtype=torch.float32)
        return PairBatch(latents, {"text": self.text[indices].repeat(2, 1)}, self.label[indices], weight, seeds)


class MixedPairs(TinyPairs):
    """Of three shapes."""

    def __init__(self, n: int = PAIRS):
        super().__init__(n)
        generator = torch.Generator().manual_seed(8)
        self.mixed = [torch.randn(2, 2, 4, 4 + 2 * self.shape_of(i), generator=generator) for i in range(n)]

    def shape_of(self, index: int) -> int:
        return index % 3

    def batch(self, indices, seeds) -> PairBatch:
        plain = super().batch(indices, seeds)
        latents = torch.stack([self.mixed[i] for i in indices], 1).flatten(0, 1)  # fails unless all are of one shape
        return PairBatch(latents, plain.cond, plain.label, plain.weight, plain.seeds)


def run(
    output_dir,
    *,
    policy=None,
    data=None,
    make=None,
    on_sample=None,
    on_evaluate=None,
    states=None,
    beta: float = 50.0,
    recipe=None,
    **options,
):
    """Train eight steps of eight pairs by DPO unless told otherwise; ``make`` makes the step; returns the policy."""
    policy, data = policy or TinyPolicy(), data or TinyPairs()
    given = {"max_train_steps": 8, "train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 3} | options
    step = make(policy) if make else pair_step(policy, latent(), functools.partial(dpo, beta=beta))
    options = TrainOptions(output_dir=str(output_dir), **given)
    train(step, policy, data, options=options, states=states, recipe=recipe, on_sample=on_sample, on_evaluate=on_evaluate)
    return policy


if __name__ == "__main__":
    folder, size, bucket, *cache = [word for word in sys.argv[1:] if word != "mixed"]
    place.BUCKET = int(bucket)
    if cache:  # the same draws three times: without what is kept, keeping it, and with it
        for name in ("plain", "filling", "full"):
            kept = None if name == "plain" else References(TensorCache(cache[0]), {}, together=True)
            make = functools.partial(pair_step, space=latent(), objective=functools.partial(dpo, beta=50.0), references=kept)
            run(f"{folder}/{name}", make=make, train_batch_size=int(size), max_train_steps=6, draws_per_pair=2)
            if kept is not None:
                kept.close()
                print(name, kept.computed, kept.found, file=sys.stderr)
    else:
        data = MixedPairs() if "mixed" in sys.argv else None
        run(folder, data=data, train_batch_size=int(size), max_train_steps=3)
    torch.distributed.destroy_process_group()
