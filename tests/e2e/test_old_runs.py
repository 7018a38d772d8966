"""Runs of an earlier Palate go on: their checkpoints load, their recipes mean the same, every verb takes their folders.

``tests/old_runs`` was written at 867067d by the commands in each ``run.json``, which stop after step 3 of 6: the online one in
the middle of a round. ``NAME-finished.safetensors`` are the weights of the same command with ``--max_train_steps 6``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palate.runs import recipe
from palate.runs.models import find_model
from palate.training.log import read_log

OLD = Path(__file__).parents[1] / "old_runs"
RUNS = ("offline", "online")
LORA = "pytorch_lora_weights.safetensors"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""An update moves a weight by 3e-4 to 1e-3. Another instruction set rounded otherwise by 1e-6, which Adam enlarges."""


@pytest.fixture(params=RUNS)
def run(request, tmp_path) -> Path:
    return Path(shutil.copytree(OLD / request.param, tmp_path / request.param))


def test_goes_on_to_the_weights_of_a_run_without_a_stop(palate, run, tmp_path):
    mine = {"pretrained_model_name_or_path": None, "train_data": None, "cache_dir": tmp_path / "encoded", "max_train_steps": 6}
    before = load_file(run / LORA)
    code, _, errors = palate("train", run / "recipe.yaml", output_dir=run, resume_from_checkpoint="latest", **mine)
    assert code == 0, errors
    assert "resumed after step 3 of 6" in errors
    expected, found = load_file(OLD / f"{run.name}-finished.safetensors"), load_file(run / LORA)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert max(float((found[name] - before[name]).abs().max()) for name in found) > 10 * CLOSE["atol"]
    assert [line["step"] for line in read_log(run / "log.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", RUNS)
def test_recipe_means_the_same(name):
    """Options of today that it does not name are at their default."""
    saved = json.loads((OLD / name / "checkpoint-3" / "recipe.json").read_text())
    now = json.loads(json.dumps(recipe.load(str(OLD / name / "recipe.yaml")).as_dict()))
    for section, values in recipe.defaults().items():
        saved[section] = json.loads(json.dumps(values)) | saved[section]
    assert now == saved


def test_is_a_model_to_generate_with(palate, run, prompts_file, tmp_path):
    assert find_model(str(run)).tuned == run / LORA
    options = {"prompts": prompts_file, "num_prompts": 1, "num_inference_steps": 2}
    for model, out in ((run, "tuned"), ("mini-sd", "base")):
        code, _, errors = palate("generate", model, output_dir=tmp_path / out, **options)
        assert code == 0, errors
    tuned, base = (sorted((tmp_path / out).rglob("*.png")) for out in ("tuned", "base"))
    assert len(tuned) == len(base) == 1
    assert tuned[0].read_bytes() != base[0].read_bytes()  # three steps are seen
