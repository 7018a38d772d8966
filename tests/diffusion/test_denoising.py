from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.base.errors import UserError
from palate.base.seeds import integers, normal
from palate.diffusion.denoising import Conditioning, Fit, draw, fit
from palate.diffusion.schedule import VariancePreserving, from_config

schedule = from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


def cond(rows: int) -> Conditioning:
    return Conditioning({"text": torch.arange(rows * 6.0).view(rows, 2, 3), "ids": torch.arange(rows)})


def latents(b: int) -> torch.Tensor:
    return torch.randn(b, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@settings(max_examples=20)
@given(seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), cut=st.integers(0, 3), v=st.booleans())
def test_an_item_does_not_depend_on_its_batch(seeds: list[int], cut: int, v: bool):
    this = VariancePreserving(schedule.alphas_cumprod, "v_prediction" if v else "epsilon")
    b, i = len(seeds), cut % len(seeds)
    x0, seeds_ = latents(b), torch.tensor(seeds)
    whole = draw(this, x0, cond(b), seeds_)
    alone = draw(this, x0[i : i + 1], cond(b).rows([i]), seeds_[i : i + 1])
    for name in ("x0", "noise", "xt", "t", "target", "seeds"):
        assert torch.equal(getattr(whole, name)[i : i + 1], getattr(alone, name)), name


def test_winner_and_loser_share_time_noise_and_seed():
    x0 = latents(6)
    noised = draw(schedule, x0, cond(6), torch.tensor([5, 6, 7]), shared=2)
    for value in (noised.t, noised.noise, noised.seeds):
        assert torch.equal(value[:3], value[3:])
    assert noised.seeds.tolist() == [5, 6, 7, 5, 6, 7]
    assert noised.t.dtype == torch.int64
    assert not torch.equal(noised.xt[:3], noised.xt[3:])
    # And a pair is noised as its winner alone would be.
    assert torch.equal(draw(schedule, x0[:3], cond(3), torch.tensor([5, 6, 7])).xt, noised.xt[:3])


def test_times_are_uniform_between_their_limits():
    seeds = torch.arange(4000)
    t = draw(schedule, torch.zeros(4000, 1), cond(4000), seeds, t_min=10, t_max=19).t
    counts = torch.bincount(t - 10, minlength=10)
    assert len(counts) == 10
    # Chi-square with 9 degrees of freedom: 27.9 is its 0.999 quantile.
    assert ((counts - 400) ** 2 / 400).sum().item() < 27.9
    assert draw(schedule, latents(1), cond(1), seeds[:1], t_min=999).t.item() == 999


@pytest.mark.parametrize(("t_min", "t_max"), [(-1, None), (0, 1000), (5, 4)])
def test_times_outside_the_schedule(t_min: int, t_max: int | None):
    with pytest.raises(UserError, match="t_max <= 999"):
        draw(schedule, latents(1), cond(1), torch.tensor([1]), t_min=t_min, t_max=t_max)


def test_rows_must_fit():
    with pytest.raises(ValueError, match="4 items need 4 rows"):
        draw(schedule, latents(4), cond(2), torch.tensor([1, 2]), shared=2)


def test_numbers_of_neighbouring_seeds_and_streams_are_unrelated():
    # Rows of 64 seeds in 4 streams. Off the diagonal a correlation of n pairs has standard deviation 1 / sqrt(n) = 0.022; the
    # largest of 32640 stays below 5 of them, and a row meets itself nowhere.
    n = 2048
    rows = torch.cat([normal(torch.arange(64), (n,), stream, "cpu", torch.float64) for stream in range(4)])
    correlation = (rows @ rows.T / n).triu(diagonal=1)
    assert correlation.abs().max().item() < 5 / math.sqrt(n)
    # First numbers, which a weakly mixed seed would order: mean 0 +- 1/16, variance 1 +- sqrt(2)/16, neighbours unrelated.
    first = rows[:, 0]
    assert abs(first.mean().item()) < 4 / 16
    assert abs(first.var().item() - 1) < 4 * math.sqrt(2) / 16
    assert abs((first[1:] * first[:-1]).mean().item()) < 4 / 16


def test_stream_and_seed_are_not_interchangeable():
    a = normal(torch.tensor([1]), (8,), 0, "cpu", torch.float32)
    assert not torch.equal(a, normal(torch.tensor([0]), (8,), 1, "cpu", torch.float32))
    assert not torch.equal(a, normal(torch.tensor([1 + 2**32]), (8,), 0, "cpu", torch.float32))
    assert torch.equal(a, normal(torch.tensor([1]), (8,), 0, "cpu", torch.float32))
    assert normal(torch.tensor([1]), (2, 3), 0, "cpu", torch.float16).dtype == torch.float16


def test_integers_include_both_ends():
    assert set(integers(torch.arange(100), 3, 5, 0, "cpu").tolist()) == {3, 4, 5}


def test_conditioning():
    two = cond(2)
    assert len(two) == 2
    assert two.repeat(2).tensors["ids"].tolist() == [0, 1, 0, 1]
    assert two.rows([1]).tensors["ids"].tolist() == [1]
    assert two.rows(torch.tensor([1, 0])).tensors["ids"].tolist() == [1, 0]
    assert two.rows(slice(1, 2)).tensors["ids"].tolist() == [1]
    joined = Conditioning.cat([two, cond(1)])
    assert joined.tensors["ids"].tolist() == [0, 1, 0]
    half = two.to("cpu", torch.float16)
    assert half.tensors["text"].dtype == torch.float16
    assert half.tensors["ids"].dtype == torch.int64
    with pytest.raises(ValueError, match="same number of rows"):
        Conditioning({"a": torch.zeros(1, 2), "b": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="same names"):
        Conditioning.cat([two, Conditioning({"text": torch.zeros(1, 2, 3)})])


def test_error_is_a_mean_square_in_float32():
    # (1 + 4 + 9 + 16) / 4 = 7.5 and 0.
    residual = torch.tensor([[[1.0, -2.0], [3.0, -4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert Fit(residual).error.tolist() == [7.5, 0]
    # 300^2 = 90000 is beyond float16.
    large = Fit(torch.full((1, 4), 300.0, dtype=torch.float16)).error
    assert large.dtype == torch.float32
    assert large.item() == 90000
    output = torch.tensor([[3.0, 5.0]])
    assert fit(lambda x: 2 * x, output, torch.tensor([[6.0, 8.0]])).residual.tolist() == [[0, 2]]
