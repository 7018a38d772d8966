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


class ScheduleFree(torch.optim.SGD):
    """Plain SGD whose result is the mean of its iterates, as optimizers without a schedule have one: ``train`` and ``eval``."""

    def __init__(self, params, lr, times=1.0):
        super().__init__(params, lr=times * lr)

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["n"] = state.get("n", 0) + 1
            state["mean"] = state.get("mean", 0) + (p.detach() - state.get("mean", 0)) / state["n"]

    def _swap(self):
        for p in self.param_groups[0]["params"]:
            if "mean" in self.state[p]:
                p.data, self.state[p]["mean"] = self.state[p]["mean"], p.data

    def train(self):
        if self.param_groups[0].get("result"):
            self._swap()
        self.param_groups[0]["result"] = False

    def eval(self):
        if not self.param_groups[0].get("result"):
            self._swap()
        self.param_groups[0]["result"] = True


def test_an_optimizer_of_ones_own_trains_as_the_same_by_name(tmp_path):
    keywords = {"betas": [0.9, 0.999], "weight_decay": 1e-2, "eps": 1e-8}
    ours = run(tmp_path / "a")
    theirs = run(tmp_path / "b", optimizer="torch.optim:AdamW", optimizer_options=keywords)
    assert torch.equal(flat(ours.state_dict()), flat(theirs.state_dict()))
    other = run(tmp_path / "c", optimizer_options={"eps": 1e-2})
    assert not torch.equal(flat(ours.state_dict()), flat(other.state_dict()))


def test_what_averages_itself_is_sampled_and_ends_as_its_average(tmp_path):
    name = f"{ScheduleFree.__module__}:ScheduleFree"
    policy, seen = TinyPolicy(), []
    options = {"optimizer": name, "learning_rate": 0.1, "checkpointing_steps": 1, "max_train_steps": 3}
    run(tmp_path / "a", policy=policy, on_sample=lambda _: seen.append(flat(policy.state_dict())), sample_steps=1, **options)
    trained = [flat(checkpoints.load(tmp_path / "a" / f"checkpoint-{n}").weights) for n in (1, 2, 3)]
    for n, found in enumerate(seen[1:], 1):
        torch.testing.assert_close(found, torch.stack(trained[:n]).mean(0))
    torch.testing.assert_close(flat(policy.state_dict()), torch.stack(trained).mean(0))
    run(tmp_path / "b", **{**options, "max_train_steps": 2})
    resumed = run(tmp_path / "b", **options, resume_from_checkpoint="latest")
    assert torch.equal(flat(resumed.state_dict()), flat(policy.state_dict()))
    with pytest.raises(UserError, match="averages the weights itself: leave ema_decay out"):
        run(tmp_path / "c", ema_decay=0.9, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adamx"}, r"optimizer is 'adamx' \(did you mean 'adamw'.*\); or package.module:Class"),
        ({"optimizer": "torch.optim:AdamX"}, "torch.optim:AdamX: .*has no attribute 'AdamX'"),
        ({"optimizer": "torch.nn:Linear"}, "torch.nn:Linear is not a class of torch optimizers"),
        ({"optimizer_options": {"bets": 1}}, "optimizer adamw with lr .*unexpected keyword argument 'bets'"),
        ({"optimizer": "torch.optim:Muon"}, "optimizer torch.optim:Muon with lr .*2D"),
    ],
)
def test_optimizers_that_cannot_be_made_are_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as refused:
        make_optimizer(parameters(), TrainOptions(**given))
    assert "\n" not in str(refused.value)
