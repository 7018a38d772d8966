"""The renderer and its captions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.miniature.captions import ATTRIBUTES, Scene, caption, scene_of
from tools.miniature import scenes
from tools.miniature.scenes import Flaw

any_scene = st.builds(Scene, **{name: st.sampled_from(values) for name, values in ATTRIBUTES.items()})


@given(any_scene, st.integers(0, 10_000))
def test_a_caption_tells_the_whole_scene(scene: Scene, seed: int) -> None:
    assert scene_of(caption(scene)) == scene
    assert scene_of(caption(scene, np.random.default_rng(seed))) == scene


def test_a_caption_that_is_no_scene_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no object .* expected one of house"):
        scene_of("a horse on the left, on white snow, at night")


@given(any_scene, st.integers(0, 10_000))
def test_the_same_seed_draws_the_same_picture(scene: Scene, seed: int) -> None:
    first, second = (scenes.shoot(scene, np.random.default_rng(seed)) for _ in range(2))
    assert first.image.size == (64, 64)
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.shown, first.flaws) == (second.shown, second.flaws)


def test_an_unspoilt_shot_shows_what_was_asked() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = scenes.random_scene(rng)
        shot = scenes.shoot(scene, rng, flaw_share=0.0, wrong_share=0.0)
        assert (shot.shown, shot.flaws, shot.appeal) == (scene, (), 1.0)


def test_shares_of_flaws_and_wrong_colours() -> None:
    rng = np.random.default_rng(1)
    scene = scenes.random_scene(rng)
    shots = [scenes.shoot(scene, rng, flaw_share=0.45, wrong_share=0.08) for _ in range(1500)]
    # Three standard deviations of a binomial share over 1500.
    assert np.mean([bool(s.flaws) for s in shots]) == pytest.approx(0.45, abs=0.039)
    assert np.mean([s.shown != scene for s in shots]) == pytest.approx(0.08, abs=0.021)
    assert all(s.shown.colour != scene.colour for s in shots if s.shown != scene)


def test_stronger_flaws_please_less() -> None:
    # 1 - 0.85 * sqrt(0.25) = 0.575 and 1 - 0.85 * sqrt(1) = 0.15
    assert scenes.appeal((Flaw("blur", 0.25),)) == pytest.approx(0.575)
    assert scenes.appeal((Flaw("blur", 1.0),)) == pytest.approx(0.15)
    assert scenes.appeal((Flaw("blur", 0.25), Flaw("dark", 1.0))) == pytest.approx(0.575 * 0.15)


@pytest.mark.parametrize("kind", scenes.FLAWS)
def test_every_flaw_changes_the_picture(kind: str) -> None:
    scene = Scene("day", "meadow", "house", "red", "left", "mountains", "sun")
    good = np.asarray(scenes.render(scene, np.random.default_rng(3)), dtype=float)
    bad = np.asarray(scenes.render(scene, np.random.default_rng(3), (Flaw(kind, 0.7),)), dtype=float)
    assert np.abs(good - bad).mean() > 3


def test_a_tenth_of_the_scenes_is_held_out() -> None:
    everything = [Scene(*values) for values in itertools.product(*ATTRIBUTES.values())]
    assert len(everything) == len(set(everything)) == 4 * 4 * 5 * 5 * 2 * 2 * 3
    # 26 of 256 first bytes are multiples of ten; three standard deviations over 4800.
    assert np.mean([scenes.is_held_out(s) for s in everything]) == pytest.approx(26 / 256, abs=0.0131)
