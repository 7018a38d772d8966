"""Runs that cannot learn say so once, on standard error and in train.log; those that can say nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def warnings(palate):
    """Trains, and returns what was warned of: the same on standard error and in train.log."""

    def run(**options: object) -> list[str]:
        code, _, errors = palate("train", **options)
        assert code == 0, errors
        told = [line for line in errors.splitlines() if line.startswith("warning: ")]
        assert told == [line for line in Path("out/train.log").read_text().splitlines() if line.startswith("warning: ")]
        return told

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_train_steps": 1},
        {"objective": "kto"},
        {"objective": "sft"},
        {"objective": "ipo"},
        {"space": "perceptual"},
        {"train_method": "full", "learning_rate": 1e-5},
        {"lr_warmup_steps": 2},
    ],
    ids=str,
)
def test_no_false_alarm(warnings, options):
    assert warnings(**options) == []


CASES = [
    ({"lr_warmup_steps": 500, "max_train_steps": 2}, "the warm-up of 500 steps is not over when the run ends after 2"),
    ({"learning_rate": 1e-12}, "learning_rate 1e-12 moves no weight by more than"),
    ({"objective.beta": 1e-4}, "so beta does nothing"),
    ({"adam_epsilon": 1e6}, "no weight moves by more than"),
    ({"max_train_samples": 1, "validation_fraction": 0}, "there is only one to learn from"),
]


@pytest.mark.parametrize(("options", "message"), CASES, ids=[message[:30] for _, message in CASES])
def test_options_with_which_nothing_is_learned(warnings, options, message):
    (line,) = warnings(**options)
    assert message in line


@pytest.fixture
def changed(pairs_dir, tmp_path):
    """A copy of the pairs whose files and rows a function may change."""

    def make(change) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(pairs_dir, folder)
        path = folder / "metadata.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(change(folder, row, number)) + "\n" for number, row in enumerate(rows)))
        return folder

    return make


def test_pairs_of_one_picture(warnings, changed):
    def twice(folder, row, number):
        shutil.copy(folder / row["chosen"], folder / row["rejected"])
        return row

    told = warnings(train_data=changed(twice), validation_fraction=0)
    assert told[0].startswith("warning: 16 of 16 pairs show one picture twice: they teach nothing")
    assert not any("beta" in line for line in told)


def test_pairs_of_pictures_that_decode_alike(warnings, changed):
    def again(folder, row, number):
        if number < 3:  # the same pixels in another file
            Image.open(folder / row["chosen"]).save(folder / row["rejected"], compress_level=1, dpi=(number + 30, 72))
        return row

    (line,) = warnings(train_data=changed(again), validation_fraction=0)
    assert line.startswith("warning: 3 of 16 pairs show two pictures that are alike to the model")


def test_pairs_that_are_all_ties(warnings, changed):
    def tie(folder, row, number):
        return {"prompt": row["prompt"], "image_0": row["chosen"], "image_1": row["rejected"], "label": 0.5}

    told = warnings(train_data=changed(tie), ties="keep", validation_fraction=0)
    assert told[0].startswith("warning: all pairs are ties")


@pytest.mark.parametrize("liked", [True, False])
def test_pictures_that_all_have_the_same_vote(warnings, changed, liked):
    def vote(folder, row, number):
        return {"prompt": row["prompt"], "image": row["chosen"], "liked": liked}

    (line,) = warnings(train_data=changed(vote), objective="kto")
    assert line.startswith("warning: all pictures have the same vote")


def test_rewards_that_are_all_alike(warnings, prompts_file, tmp_path):
    Path("flat_reward.py").write_text("def flat(images, prompts, metadata):\n    return [1.0] * len(prompts)\n")
    given = {"objective": "ddpo_is", "rewards": "flat_reward:flat", "samples_per_round": 4, "sample_batch_size": 4}
    given |= {"sample_num_steps": 2, "updates_per_round": 2, "rounds": 2, "max_train_steps": None, "train_data": None}
    told = warnings(train_prompts=prompts_file, cache_dir=None, **given)
    assert sum("all pictures of a round have the same reward" in line for line in told) == 1


def test_what_was_said_is_not_said_again_by_a_resumed_run(palate):
    assert palate("train", **{"objective.beta": 1e-4}, max_train_steps=4, lr_warmup_steps=500)[0] == 0
    first = Path("out/train.log").read_text().count("warning: ")
    code, _, errors = palate("train", "out/recipe.yaml", max_train_steps=4, resume_from_checkpoint="out/checkpoint-2")
    assert code == 0, errors
    assert "warning: " not in errors
    assert Path("out/train.log").read_text().count("warning: ") == first == 2


def test_a_comparison_of_other_prompts_than_the_data_s_is_told(palate):
    code, _, errors = palate("train", evaluation_prompts="off", judges="[jpeg_compressibility]")
    assert code == 2
    assert "for none write null" in errors
    given = {"evaluation_prompts": "miniature-unseen", "num_evaluation_prompts": 1, "judges": "[jpeg_compressibility]"}
    code, _, errors = palate("train", max_train_steps=1, **given)
    assert code == 0, errors
    assert "the comparison draws 1 prompts of the miniature world (miniature-unseen), not of your data" in errors
    assert json.loads(Path("out/metrics.json").read_text())
