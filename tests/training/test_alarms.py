"""A run that cannot learn says so, once, in its first updates; one that can says nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palate.training.alarms import FIRST, Alarms, alike
from palate.training.options import TrainOptions

WEIGHTS = [torch.linspace(-1, 1, 1001), torch.zeros(10)]


def alarms(total: int = 100, **options: object) -> Alarms:
    return Alarms(TrainOptions(**options), total)


def test_nothing_is_said_of_a_plain_run() -> None:
    of = alarms(learning_rate=1e-5, lr_warmup_steps=50)
    assert of.before(WEIGHTS) == []
    assert [of.after(done, 0.3, 2.0) for done in range(1, 10)] == [[]] * 9
    assert of.logits(20, 0.5) == of.rewards(0.3) == of.rewards(None) == []
    assert of.said == []


@pytest.mark.parametrize(("warmup", "total", "share"), [(500, 2, "0.2 %"), (10, 10, "90 %"), (5, 1, "0 %")])
def test_a_warm_up_longer_than_the_run(warmup: int, total: int, share: str) -> None:
    of = alarms(total, lr_warmup_steps=warmup)
    (line,) = of.before(WEIGHTS)
    assert line.startswith(f"warning: the warm-up of {warmup} steps is not over when the run ends after {total}: ")
    assert f"gets to {share} of 1e-05; lower lr_warmup_steps" in line
    assert of.before(WEIGHTS) == []
    assert alarms(warmup + 1, lr_warmup_steps=warmup).before(WEIGHTS) == []


@pytest.mark.parametrize(
    ("rate", "total", "said"), [(1e-12, 100, True), (1e-9, 10, True), (1e-5, 1, False), (1e-8, 100, False)]
)
def test_a_rate_that_moves_no_weight_of_a_lora(rate: float, total: int, said: bool) -> None:
    fresh = [torch.randn(16, 64) / 16, torch.zeros(64, 16)]  # the second matrix begins at 0, to which anything can be added
    lines = alarms(total, learning_rate=rate).before(fresh)
    assert len(lines) == said
    assert all(line.startswith(f"warning: learning_rate {rate:g} moves no weight by more than ") for line in lines)


def test_a_rate_that_float32_cannot_add_to_most_weights() -> None:
    weights = [torch.full((1000,), 0.05)]
    (line,) = alarms(1000, learning_rate=1e-9).before(weights)
    assert line.startswith("warning: learning_rate 1e-09 is less than float32 can add to 100 % of the weights")
    assert alarms(1000, learning_rate=1e-8).before(weights) == []


@pytest.mark.parametrize("total", [1, 2, 3, 50])
def test_no_gradient(total: int) -> None:
    of = alarms(total)
    said = [line for done in range(1, total + 1) for line in of.after(done, 0.0, None)]
    assert len(said) == 1
    assert said[0].startswith(f"warning: the gradient was 0 in all {min(total, FIRST)} updates, so nothing is learned")


def test_a_gradient_that_comes_later_is_one() -> None:
    of = alarms()
    assert [of.after(done, norm, None) for done, norm in enumerate((0.0, 0.0, 1e-3, 0.0), start=1)] == [[]] * 4


def test_a_run_resumed_within_the_first_updates_says_nothing_it_has_not_seen() -> None:
    assert alarms().after(FIRST, 0.0, None) == []


def test_a_beta_that_does_nothing() -> None:
    of = alarms()
    said = [line for done in range(1, 5) for line in of.after(done, 0.3, 1e-4)]
    assert len(said) == 1
    assert "beta does nothing" in said[0]
    assert "raise beta about 1e+04 times" in said[0]
    assert of.logits(20, 1e-5) == []  # it was said


@pytest.mark.parametrize(("size", "said"), [(1e7, True), (1e3, False)])
def test_a_beta_that_decides_at_once(size: float, said: bool) -> None:
    of = alarms()
    lines = [line for done in range(1, 5) for line in of.after(done, 0.3, size)]
    assert len(lines) == said
    assert all("beta is so large" in line and "lower beta" in line for line in lines)


def test_a_rate_that_moves_nothing_is_said_once() -> None:
    of, weights = alarms(learning_rate=1e-12), [torch.zeros(4)]
    assert len(of.before(weights)) == 1
    for done in range(1, 4):
        of.after(done, 0.5, None)
        assert of.moved(done, weights, 1e-12) == []


@pytest.mark.parametrize(("size", "hint"), [(1e-4, "all but zero"), (30.0, "saturated"), (1.0, None)])
def test_logits_once_they_had_time_to_grow(size: float, hint: str | None) -> None:
    of = alarms()
    assert of.logits(19, size) == []
    lines = of.logits(20, size)
    assert [hint in line for line in lines] == ([True] if hint else [])
    assert of.logits(30, size) == []


@pytest.mark.parametrize(("share", "said"), [(1.0, False), (0.02, False), (1e-3, True), (0.0, True)])
@pytest.mark.parametrize("warmup", [0, 2])
def test_weights_that_the_optimizer_does_not_move(share: float, said: bool, warmup: int) -> None:
    of, weights, rate = alarms(learning_rate=1e-3, lr_warmup_steps=warmup), [torch.zeros(4), torch.zeros(3)], 0.0
    of.before(weights)
    lines = list[str]()
    for done in range(1, 6):
        of.after(done, 0.5, None)
        rate = 1e-3 * min(1.0, (done - 1) / warmup if warmup else 1.0)
        weights[1][2] += share * rate
        lines += of.moved(done, weights, rate)
    assert len(lines) == said
    assert all("no weight moves by more than" in line for line in lines)


def test_an_optimizer_of_steps_as_small_as_its_gradients_is_not_alarmed_of() -> None:
    of, weights = alarms(total=100, learning_rate=1e-3, optimizer="torch.optim:SGD"), [torch.zeros(4)]
    of.before(weights)
    for done in range(1, 4):
        of.after(done, 0.5, None)
        weights[0] += 1e-5 * 1e-3
        assert of.moved(done, weights, 1e-3) == []


def test_what_any_process_holds_counts() -> None:
    """Each looks at its own part, and says what all say together: of the other one four weights of four can be added to."""

    def beside(other: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda rows: torch.cat([rows, other.to(rows)])

    options, part = TrainOptions(learning_rate=1e-9), [torch.full((396,), 0.05), torch.zeros(0)]
    assert len(Alarms(options, 1000).before(part)) == 1
    assert len(Alarms(options, 1000, (), beside(torch.tensor([[3, 4]]))).before(part)) == 1  # 3 of 400
    assert Alarms(options, 1000, (), beside(torch.tensor([[4, 4]]))).before(part) == []  # 4 of 400
    for moved, said in ((1e-3, 0), (1e-6, 1)):
        for held in (part, part[1:]):  # of a weight with fewer rows than processes the last have none
            of = Alarms(TrainOptions(learning_rate=1e-3), 100, (), beside(torch.tensor([[9, 9]])))
            of.before(held)
            of.gather = beside(torch.tensor([moved]))
            lines = [line for done in range(1, 4) for line in of.after(done, 0.5, None) + of.moved(done, held, 1e-3)]
            assert len(lines) == said


def test_rewards_that_are_all_alike() -> None:
    of = alarms()
    assert "all pictures of a round have the same reward" in of.rewards(0.0)[0]
    assert of.rewards(0.0) == []


def test_pictures_that_are_alike() -> None:
    one = torch.randn(4, 8, 8)
    assert alike(one, one + 1e-6)
    assert not alike(one, one + 1e-2)
    assert not alike(one, one[:, :4])


def test_no_recipe_that_comes_with_palate_raises_an_alarm_before_it_begins() -> None:
    from palate.runs import library, recipe

    for name in library.built_in():
        options = recipe.load(name).training
        total = options.max_train_steps or 100
        assert Alarms(options, total).before([torch.randn(10_000) / 30]) == [], name
        few = Alarms(options, 3).before([torch.randn(10_000) / 30])
        assert all("the warm-up of" in line for line in few), name
        assert len(few) == (options.lr_warmup_steps >= 3), name
    assert Path(library.BUILT_IN).is_dir()
