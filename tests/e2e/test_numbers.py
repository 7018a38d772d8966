"""Numbers at the ends of what options admit: taken, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palate.training.log import read_log

ENDS = [2**64 - 1, 2**63, -1, -(2**63)]
ONLINE = {
    "objective": "ddpo_is",
    "rewards": "jpeg_compressibility",
    "held_out_rewards": "[jpeg_incompressibility]",
    "held_out_pictures": 2,
    "samples_per_round": 4,
    "sample_batch_size": 4,
    "sample_num_steps": 2,
    "updates_per_round": 2,
    "rounds": 1,
    "kl_samples": 0,
    "max_train_steps": None,
    "train_data": None,
    "cache_dir": None,
}


@pytest.mark.parametrize("seed", ENDS)
def test_training_takes_every_seed(palate, seed):
    code, _, errors = palate(
        "train", seed=seed, evaluation_seed=seed, max_train_steps=1, center_crop="false", cache_dir="cache"
    )
    assert code == 0, errors
    assert [line["step"] for line in read_log("out/log.jsonl")] == [0, 1]
    assert f"seed: {seed}\n" in Path("out/recipe.yaml").read_text()


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_online_training_takes_every_seed(palate, prompts_file, seed):
    code, _, errors = palate("train", train_prompts=prompts_file, seed=seed, evaluation_seed=seed, **ONLINE)
    assert code == 0, errors


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_drawing_comparing_and_measuring_take_every_seed(palate, model_dir, pairs_dir, prompts_file, seed):
    for name in ("a", "b"):
        given = {"output_dir": name, "prompts": prompts_file, "seed": seed, "num_inference_steps": 1, "guidance_scale": 1}
        code, _, errors = palate("generate", model_dir, model_name=name, **given)
        assert code == 0, errors
    settings = json.loads(Path("a/settings.json").read_text())["seed"]
    assert settings == seed
    code, _, errors = palate("compare", "a", "b", judges="[jpeg_compressibility]", seed=seed, draws=100)
    assert code == 0, errors
    assert palate("train", max_train_steps=1)[0] == 0
    code, _, errors = palate("accuracy", pairs_dir, model="out", seed=seed, timesteps=1, max_pairs=2)
    assert code == 0, errors


@pytest.mark.parametrize("steps", [1000, 1001, 10**30])
def test_more_steps_than_the_sampler_has_times_are_one_line(palate, model_dir, prompts_file, steps):
    drawn = palate("generate", model_dir, prompts=prompts_file, output_dir="drawn", num_inference_steps=steps)
    trained = palate("train", num_inference_steps=steps)
    for code, said, errors in (drawn, trained):
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert (code, said) == (2, "")
        assert "num_inference_steps is " in line
        assert errors.splitlines()[-1] == line
    assert not list(Path().glob("drawn/*.png"))
    assert not Path("out").exists()
