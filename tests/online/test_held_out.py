from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from palate.base.errors import UserError
from palate.data.prompts import Prompt
from palate.judges.reward import RewardError
from palate.online.bundle import RewardBundle
from palate.online.held_out import HeldOut, parted

EVALUATIONS, IMAGES = 20, 64


def noisy(rng, drift, *, image=0.5, wobble=0.1):
    """Held-out scores: what each image scores by itself, a drift, noise of each image, and a wobble of all together."""
    m = len(drift)
    own, shared = rng.normal(0, 1, IMAGES), rng.normal(0, wobble, (m, 1))
    return torch.tensor(own + np.asarray(drift)[:, None] + shared + rng.normal(0, image, (m, IMAGES)))


def first_alarm(trained, held_out):
    return next((m for m in range(1, len(trained) + 1) if parted(list(trained)[:m], held_out[:m])), None)


@pytest.mark.parametrize("wobble", [0.0, 0.1, 0.3])
def test_false_alarms_are_rare(wobble):
    rng = np.random.default_rng(1)
    runs = [noisy(rng, np.zeros(EVALUATIONS), wobble=wobble) for _ in range(100)]
    # 0, 1.5 and 4 % of 400 runs at another seed; 10 of 100 is more than three standard deviations above 4 %.
    assert sum(first_alarm(range(EVALUATIONS), run) is not None for run in runs) <= 10


def test_a_decline_is_found_soon():
    rng = np.random.default_rng(2)
    drift = [*np.linspace(0, 0.5, 10), *(0.5 - 0.1 * np.arange(1, 11))]
    found = [first_alarm(range(EVALUATIONS), noisy(rng, drift)) for _ in range(50)]
    assert all(at is not None and at > 10 for at in found)
    assert np.mean(found) < 18


def test_no_alarm_while_both_rise_or_both_fall():
    rng = np.random.default_rng(3)
    rise, fall = np.linspace(0, 2, EVALUATIONS), np.linspace(0, -2, EVALUATIONS)
    assert first_alarm(rise, noisy(rng, rise)) is None
    assert first_alarm(fall, noisy(rng, fall)) is None  # a run that falls apart is another matter
    assert first_alarm(rise, noisy(rng, fall)) is not None


def test_by_hand():
    # Means 4, 4, 4, 0, 0, 0: the wobble is sqrt(mean(0, 0, 16, 0, 0) / 3) = sqrt(3.2 / 3) = 1.03, the fall 4 = 3.87 of it.
    held_out = torch.tensor([4.0, 4, 4, 0, 0, 0])[:, None].expand(6, 8)
    assert parted(range(6), held_out, threshold=3.8)
    assert not parted(range(6), held_out, threshold=3.9)
    assert not parted([0.0] * 6, held_out, threshold=3.8)  # the trained reward did not rise
    assert not parted(range(5), held_out[1:], threshold=3.8)  # five evaluations are too few
    # Now the images fall by 4 + 4 z, z = -1, 1, ...: the paired error is 4 sqrt(8 / 7) / sqrt(8) = 1.51, the fall 2.65 of it.
    spread = held_out.clone()
    spread[:3] += 4 * torch.tensor([-1.0, 1] * 4)
    assert parted(range(6), spread, threshold=2.6)
    assert not parted(range(6), spread, threshold=2.7)


def test_units_do_not_matter():
    rng = np.random.default_rng(4)
    held_out = noisy(rng, np.linspace(0, -1, 8))
    assert parted(range(8), held_out) == parted(range(8), 1000 * held_out + 5) is True
    with pytest.raises(ValueError, match="7 trained rewards came with 8"):
        parted(range(7), held_out)


PROMPTS = [Prompt(text) for text in ("a", "b", "c")]


def grey(level):
    def generate(prompts, seeds):
        assert seeds == [7, 8, 9]
        return [Image.new("RGB", (8, 8), (level, level, level)) for _ in prompts]

    return generate


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def test_evaluates_the_same_list_and_knows_the_best():
    rewards = RewardBundle({"bright": brightness, "dark": lambda i, p: -brightness(i, p)})
    held_out = HeldOut(PROMPTS, 7, rewards, batch_size=2)
    assert held_out.evaluate(grey(51), 1.0) == pytest.approx({"held_out/bright": 0.2, "held_out/dark": -0.2})
    assert held_out.best
    held_out.evaluate(grey(102), 2.0)
    assert held_out.best
    held_out.evaluate(grey(51), 3.0)
    assert not held_out.best
    assert held_out.alarm() is None


def test_alarm_and_resuming():
    held_out, again = (HeldOut(PROMPTS, 7, RewardBundle({"bright": brightness})) for _ in range(2))
    for step in range(24):
        if step == 11:
            again.load_state_dict(held_out.state_dict())
        for watched in [held_out, again][: 1 if step < 11 else 2]:
            watched.evaluate(grey(200 - 8 * step), float(step))
    assert torch.equal(held_out.scores["bright"], again.scores["bright"])
    assert held_out.alarm() == again.alarm()
    assert "the trained reward rises while bright, held out, falls" in str(held_out.alarm())
    for prompts in (PROMPTS[:2], [*PROMPTS[:2], Prompt("d")]):
        with pytest.raises(UserError, match="other held-out rewards or on other prompts"):
            HeldOut(prompts, 7, RewardBundle({"bright": brightness})).load_state_dict(held_out.state_dict())


def test_the_reward_of_the_first_round_is_told_later_and_once():
    held_out = HeldOut(PROMPTS, 7, RewardBundle({"bright": brightness}))
    held_out.first_round(0.0)  # nothing was judged yet
    held_out.evaluate(grey(51), float("nan"))
    held_out.first_round(1.5)
    held_out.evaluate(grey(51), 2.0)
    held_out.first_round(3.0)
    assert held_out.trained == [1.5, 2.0]


def test_a_reward_that_fails_records_nothing():
    held_out = HeldOut(PROMPTS, 7, RewardBundle({"bright": lambda i, p: None}))
    with pytest.raises(RewardError, match="reward bright returned nothing"):
        held_out.evaluate(grey(51), 1.0)
    assert held_out.trained == []
    with pytest.raises(UserError, match="need prompts"):
        HeldOut([], 7, RewardBundle({"bright": brightness}))
