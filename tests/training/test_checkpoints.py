from __future__ import annotations

import errno

import pytest
import torch

from palate.base.errors import UserError
from palate.training import checkpoints
from palate.training.log import RunLog, read_log

RECIPE = {"seed": 0, "training": {"max_train_steps": 4, "learning_rate": 0.1}, "objective": {"name": "dpo"}}


def save(folder, step=4, **options):
    state = {"step": step, "optimizer": {"state": {0: {"exp_avg": torch.arange(3.0)}}}}
    return checkpoints.save(folder, step, weights={"a": torch.ones(2) * step}, state=state, recipe=RECIPE, **options)


def test_round_trip(tmp_path):
    path = save(tmp_path)
    assert path == checkpoints.latest(tmp_path) == tmp_path / "checkpoint-4"
    loaded = checkpoints.load(path)
    assert loaded.weights["a"].tolist() == [4, 4]
    assert loaded.state["optimizer"]["state"][0]["exp_avg"].tolist() == [0, 1, 2]
    assert loaded.recipe == RECIPE


def test_latest_goes_by_number_and_the_limit_keeps_the_last(tmp_path):
    assert checkpoints.latest(tmp_path / "nowhere") is None
    (tmp_path / ".checkpoint-99.tmp").mkdir()
    for step in (2, 10, 9, 10):
        save(tmp_path, step, total_limit=2)
    assert checkpoints.latest(tmp_path).name == "checkpoint-10"
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]


def test_another_recipe_is_refused_by_name(tmp_path):
    loaded = checkpoints.load(save(tmp_path))
    checkpoints.check_recipe(loaded, {**RECIPE, "training": {"max_train_steps": 9, "learning_rate": 0.1}})
    with pytest.raises(UserError, match=r"training.learning_rate was 0.1, is 0.2"):
        checkpoints.check_recipe(loaded, {**RECIPE, "training": {"max_train_steps": 4, "learning_rate": 0.2}})
    with pytest.raises(UserError, match=r"objective.beta was None, is 5"):
        checkpoints.check_recipe(loaded, {**RECIPE, "objective": {"name": "dpo", "beta": 5}})
    checkpoints.check_recipe(loaded, {**RECIPE, "objective": {"name": "cpo"}}, may_differ={"objective"})


def test_an_option_that_a_checkpoint_does_not_know_stood_at_its_default(tmp_path):
    loaded = checkpoints.load(save(tmp_path))
    newer = {**RECIPE, "training": {**RECIPE["training"], "optimizer": "adamw"}}
    with pytest.raises(UserError, match=r"training.optimizer was None, is 'adamw'"):
        checkpoints.check_recipe(loaded, newer)
    checkpoints.check_recipe(loaded, newer, defaults={"training": {"optimizer": "adamw", "learning_rate": 0.3}})
    with pytest.raises(UserError, match=r"training.optimizer was 'sgd', is 'adamw'"):
        checkpoints.check_recipe(loaded, newer, defaults={"training": {"optimizer": "sgd"}})
    # What it does know counts, not the default; and what this recipe does not have is no difference.
    checkpoints.check_recipe(loaded, RECIPE, defaults={"training": {"learning_rate": 0.3, "optimizer": "adamw"}})


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "recipe.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_damage_is_named(tmp_path, name, damage):
    path = save(tmp_path)
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage != "missing":
        (path / name).write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": b"\xff\xfe" * 40}[damage])
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load(path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint at"):
        checkpoints.load(tmp_path / "checkpoint-1")


def test_state_cannot_run_code(tmp_path):
    path = save(tmp_path)
    torch.save({"step": print}, path / "state.pt")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load(path)


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match=r"No space left.*resume from checkpoint-1"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_log_is_cut_to_the_step_resumed_from(tmp_path):
    with RunLog(tmp_path) as log:
        for step in (0, 2, 4, 6):
            log.record({"step": step, "loss": 0.5})
    (tmp_path / "log.jsonl").open("a").write('{"step": 8, "lo')  # a crash in mid-line
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [0, 2, 4, 6]
    with RunLog(tmp_path, step=4) as log:
        log.record({"step": 6, "loss": 0.4})
    assert read_log(tmp_path / "log.jsonl")[-2:] == [{"step": 4, "loss": 0.5}, {"step": 6, "loss": 0.4}]
    assert "loss 0.4" in (tmp_path / "train.log").read_text()
    with pytest.raises(UserError, match="there is no log"):
        read_log(tmp_path / "other.jsonl")
