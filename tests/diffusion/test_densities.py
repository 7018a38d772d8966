from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.base.errors import UserError
from palate.base.seeds import mix
from palate.diffusion import densities
from palate.diffusion.denoising import TIME, Conditioning, draw
from palate.diffusion.schedule import RectifiedFlow, from_config

vp = from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1})
flow = RectifiedFlow(shift=3.0)
DENSITIES = {
    "uniform": densities.uniform,
    "logit_normal": densities.logit_normal(0.5, 0.8),
    "shifted": densities.shifted(3.0),
    "grid": densities.grid(vp.path(25)),
}


def times(density, schedule, seeds, low=0, high=999):
    return density(schedule, torch.as_tensor(seeds), low, high, TIME, "cpu")


@pytest.fixture
def at(monkeypatch):
    """The time that a density gives where the item's uniform number is u."""

    def drawn(density, schedule, u, low=0, high=999):
        monkeypatch.setattr(densities, "uniform_numbers", lambda *_: torch.tensor([u], dtype=torch.float64))
        return times(density, schedule, [0], low, high).item()

    return drawn


def test_golden(at):
    # Shift 3: 3 * 0.5 / (1 + 2 * 0.5) = 0.75. F(0.5) = 0.5 / (3 - 2 * 0.5) = 0.25, so up to 500 the median is that of
    # p = 0.125: 3 * 0.125 / (1 + 2 * 0.125) = 0.3. The last time of a flow is 999: F(0.999) = 0.997006.
    assert at(densities.shifted(3.0), flow, 0.5, 0, 500) == pytest.approx(300)
    assert at(densities.shifted(3.0), vp, 0.5) == 750
    assert at(densities.shifted(3.0), flow, 0.5) == pytest.approx(1000 * 3 * 0.498503 / 1.997006, abs=1e-3)
    # The logit of the share is m + s z; z = 1 at 0.8413447, sigmoid(1) = 0.7310586, sigmoid(-1 + 2 * 1) is the same.
    assert at(densities.logit_normal(), vp, 0.8413447461) == 731
    assert at(densities.logit_normal(-1.0, 2.0), vp, 0.8413447461) == 731
    assert at(densities.logit_normal(), vp, 0.5) == 500
    # From 500 on the median of a standard normal is at 0.75: z = 0.6744898, sigmoid = 0.6624876.
    assert at(densities.logit_normal(), vp, 0.5, 500, 999) == 662


def test_a_static_shift_moves_the_mean_of_logit_normal(at):
    for u in (0.1, 0.5, 0.83):
        plain = at(densities.logit_normal(0.0, 0.9), flow, u, 1, 998) / 1000
        # Bounds move with the axis; here they are so wide that they cut off nothing worth the name.
        moved = at(densities.logit_normal(math.log(3), 0.9), flow, u, 1, 998) / 1000
        assert moved == pytest.approx(3 * plain / (1 + 2 * plain), abs=2e-3)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("schedule", [vp, flow])
@settings(max_examples=15)
@given(low=st.integers(0, 900), width=st.integers(60, 999), seed=st.integers(0, 2**62))
def test_bounds_hold_and_an_item_does_not_depend_on_its_batch(name, schedule, low, width, seed):
    high, seeds = min(999, low + width), [mix(seed, i) for i in range(12)]
    found = times(DENSITIES[name], schedule, seeds, low, high)
    assert found.dtype == (torch.int64 if schedule is vp or name == "grid" else torch.float64)
    assert low <= float(found.min()) <= float(found.max()) <= high
    assert torch.equal(times(DENSITIES[name], schedule, seeds[3:4], low, high), found[3:4])


@pytest.mark.parametrize("schedule", [vp, flow])
@pytest.mark.parametrize("name", ["logit_normal", "shifted"])
def test_one_time_alone(schedule, name):
    assert times(DENSITIES[name], schedule, [1, 2], 400, 400).tolist() == [400, 400]


def test_the_default_is_the_schedules_own_uniform():
    seeds, cond = torch.arange(20), Conditioning({"a": torch.zeros(20, 1)})
    for schedule in (vp, flow):
        plain = schedule.uniform(seeds, 3, 900, TIME, "cpu")
        assert torch.equal(draw(schedule, torch.zeros(20, 1), cond, seeds, t_min=3, t_max=900).t, plain)


@pytest.mark.parametrize("schedule", [vp, flow])
@pytest.mark.parametrize(
    ("density", "cumulative"),
    [
        (densities.shifted(1.0), lambda x: x),
        (densities.shifted(3.0), lambda x: x / (3 - 2 * x)),
        (densities.logit_normal(0.5, 0.8), lambda x: 0.5 * math.erfc((0.5 - math.log(x / (1 - x))) / (0.8 * math.sqrt(2)))),
    ],
)
def test_draws_have_the_distribution(schedule, density, cumulative):
    n = 4000
    found = (times(density, schedule, range(n)).double() / 1000).sort().values
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        below = int((found < share).sum()) / n
        assert below == pytest.approx(cumulative(share), abs=4 * math.sqrt(0.25 / n))  # four standard errors at most


def test_integers_within_bounds_are_alike_where_the_shift_is_1():
    counts = torch.bincount(times(densities.shifted(1.0), vp, range(4000), 10, 19) - 10, minlength=10)
    assert len(counts) == 10
    assert ((counts - 400) ** 2 / 400).sum().item() < 27.9  # the 0.999 quantile of chi-square with 9 degrees of freedom


def test_a_grid_is_the_times_of_sampling():
    for schedule, n in ((vp, 8), (flow, 10)):
        path = schedule.path(n)
        found = times(densities.grid(path), schedule, range(400), 0, 999)
        inside = [t for t in path.t.tolist() if t <= 999]  # a flow begins at 1000, where nothing is left of the picture
        assert set(found.tolist()) == set(inside)
        assert len(inside) == (n if schedule is vp else n - 1)
    with pytest.raises(UserError, match=r"none of the 8 times of sampling lies in 2 \.\. 5"):
        times(densities.grid(vp.path(8)), vp, [0], 2, 5)
