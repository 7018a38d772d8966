from __future__ import annotations

import sys

import pytest
import torch
from tiny_training import TinyPolicy, run
from torch import nn

from palate.base.errors import UserError
from palate.training import checkpoints
from palate.training.optimizers import Average, make_optimizer
from palate.training.options import TrainOptions


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A LoRA pair (the second all zeros), a convolution and a bias."""
    g = torch.Generator().manual_seed(0)
    shapes = ((4, 12), (12, 4), (6, 4, 3, 3), (6,))
    made = [nn.Parameter(0.3 * torch.randn(*shape, generator=g).to(dtype)) for shape in shapes]
    made[1].data.zero_()
    return made


def steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], n: int = 30) -> None:
    g = torch.Generator().manual_seed(1)
    for _ in range(n):
        for weight in weights:
            weight.grad = 0.01 * torch.randn(weight.shape, generator=g)
        optimizer.step()


def test_adafactor_is_that_of_the_published_sdxl_runs():
    from transformers.optimization import Adafactor

    ours, theirs = parameters(), parameters()
    steps(make_optimizer(ours, TrainOptions(optimizer="adafactor", learning_rate=1e-3)), ours)
    published = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "weight_decay": 1e-2}
    steps(Adafactor(theirs, lr=1e-3, **published), theirs)
    start = parameters()
    for a, b, c in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert (a - c).abs().max() > 1e-3


def test_eight_bits_without_the_package_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"adamw_8bit needs bitsandbytes.*palate\[8bit\]") as refused:
        make_optimizer(parameters(), TrainOptions(optimizer="adamw_8bit"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_resumed_with_an_average_is_uninterrupted_bit_for_bit(tmp_path, optimizer):
    options = {"optimizer": optimizer, "ema_decay": 0.9, "checkpointing_steps": 3}
    straight = run(tmp_path / "a", **options)
    run(tmp_path / "b", **options, max_train_steps=3)
    resumed = run(tmp_path / "b", **options, resume_from_checkpoint="latest")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_the_average_is_that_of_diffusers():
    from diffusers.training_utils import EMAModel

    weights = parameters()
    ours, theirs = Average(weights, 0.7), EMAModel(weights, decay=0.7)
    g = torch.Generator().manual_seed(2)
    for n in range(1, 40):
        for weight in weights:
            weight.data += 0.1 * torch.randn(weight.shape, generator=g)
        ours.update(n)
        theirs.step(weights)
    for a, b in zip(ours.tensors, theirs.shadow_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_the_average_is_sampled_evaluated_and_the_result(tmp_path):
    policy, seen = TinyPolicy(), []
    options = {"max_train_steps": 3, "checkpointing_steps": 1}
    hooks = {"on_sample": lambda step: seen.append(flat(policy.state_dict())), "sample_steps": 1}
    run(tmp_path / "a", policy=policy, ema_decay=0.5, **hooks, **options)
    live = [flat(checkpoints.load(tmp_path / "a" / f"checkpoint-{n}").weights) for n in (1, 2, 3)]
    # The decays are 0, min(0.5, 2 / 11), min(0.5, 3 / 12).
    first = live[0]
    second = 2 / 11 * first + 9 / 11 * live[1]
    third = 0.25 * second + 0.75 * live[2]
    for found, expected in zip(seen[1:], (first, second, third), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(flat(policy.state_dict()), third)
    # Training itself goes on from the weights, not from their average.
    torch.testing.assert_close(flat(run(tmp_path / "b", **options).state_dict()), live[2])
