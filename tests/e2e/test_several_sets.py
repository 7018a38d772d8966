"""Several data sets in one recipe, words before every prompt, and going on where data and model lie elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from palate.training.log import read_log

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def sets(pairs_dir, tmp_path):
    """The sixteen votes as two sets of four and twelve."""
    rows = (pairs_dir / "metadata.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("few", rows[:4]), ("many", rows[4:])):
        shutil.copytree(pairs_dir, tmp_path / name)
        (tmp_path / name / "metadata.jsonl").write_text("".join(some))
    return "few", "many"


def test_several_sets_are_gone_through_as_often_as_the_recipe_says(palate, sets):
    options = {"train_data": "few", "more_train_data": "{many: 0.5}", "validation_fraction": 0, "validation_prompts": "[]"}
    code, _, errors = palate("train", **options, num_train_epochs=2, max_train_steps=None)
    assert code == 0, errors
    assert "an epoch has 10: 4 of few, 1 times; 12 of many, 0.5 times" in errors
    run = json.loads(Path("out/run.json").read_text())
    assert (run["pairs"], run["rows"], run["more"]["many"]["rows"]) == (10, 4, 12)
    assert read_log(Path("out/log.jsonl"))[-1]["step"] == 5  # 20 items in batches of 4
    code, _, errors = palate("train", **{**options, "more_train_data": "{few: 2}"}, output_dir="twice")
    assert (code, "name each set once" in errors) == (2, True), errors


def test_a_run_goes_on_where_data_and_model_lie_elsewhere_and_refuses_others(palate, pairs_dir, model_dir, sets, tmp_path):
    options = {"validation_prompts": "[]", "lora_dropout": 0.1}
    assert palate("train", **options, max_train_steps=2)[0] == 0
    assert palate("train", **options, max_train_steps=4, output_dir="straight")[0] == 0
    shutil.copytree(pairs_dir, "other_place")
    shutil.copytree(model_dir, "other_model")
    shutil.move("out", "moved")
    there = {"train_data": "other_place", "pretrained_model_name_or_path": "other_model", "output_dir": "moved"}
    there |= {"cache_dir": "new_cache", "resume_from_checkpoint": "latest", "max_train_steps": 4}
    code, _, errors = palate("train", **options, **{**there, "train_data": "few"})
    assert (code, "was trained on other data than are there now" in errors) == (2, True), errors
    code, _, errors = palate("train", **options, **there)
    assert code == 0, errors
    one, other = (load_file(f"{run}/{FILE}") for run in ("moved", "straight"))
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_words_before_every_prompt(palate, pairs_dir):
    options = {"validation_prompts": "[]", "max_train_steps": 1}
    assert palate("train", **options, caption_prefix="ohwx style,")[0] == 0
    assert palate("train", **options, output_dir="plain")[0] == 0
    one, other = (load_file(f"{run}/{FILE}") for run in ("out", "plain"))
    assert any(bool((one[name] != other[name]).any()) for name in one)
    shown = json.loads(Path("out/evaluation/base/manifest.jsonl").read_text().splitlines()[0])
    assert shown["prompt"].startswith("ohwx style, a ")
