"""``palate generate`` on the tiny model: LoRAs, runs, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from palate.evaluation.manifest import read_manifest


def drawn(folder):
    return np.stack([np.asarray(Image.open(Path(folder, p.file))) for p in read_manifest(folder)]).astype(int)


QUICK = {"num_inference_steps": 2, "guidance_scale": 3}


@pytest.fixture
def generate(palate, model_dir, prompts_file):
    def run(output_dir, model=model_dir, **options):
        return palate("generate", model, output_dir=output_dir, **{"prompts": prompts_file, **QUICK, **options})

    return run


def test_the_same_noise_in_any_batch_and_for_every_lora(generate, palate):
    assert generate("one", batch_size=1)[0] == 0
    assert "drew 4 of 4 pictures of tiny-sd" in generate("four", batch_size=4)[1]
    # One grey level: convolutions may sum in another order, depending on the size of the batch.
    assert np.abs(drawn("one") - drawn("four")).max() <= 1
    assert np.abs(drawn("one")[0] - drawn("one")[1]).max() > 10
    palate("train", learning_rate=0.05, lora_alpha=8, output_dir="run")
    for name, words in (("off", "[run:0]"), ("half", "run/pytorch_lora_weights.safetensors:0.5"), ("on", "[run]")):
        code, _, errors = generate(name, lora=words)
        assert code == 0, errors
    assert np.abs(drawn("off") - drawn("four")).max() <= 1
    apart = {name: np.abs(drawn(name) - drawn("four")).mean() for name in ("half", "on")}
    assert apart["on"] > apart["half"] > 1
    # A finished run is its base model with what it trained; and further LoRAs may follow.
    assert generate("of-run", "run")[0] == 0
    assert np.abs(drawn("of-run") - drawn("on")).max() <= 1
    assert generate("twice", "run", lora="run:-1")[0] == 0
    assert np.abs(drawn("twice") - drawn("four")).max() <= 1
    assert {p.model for p in read_manifest("half")} == {"tiny-sd + run at 0.5"}
    assert json.loads(Path("twice/model.json").read_text())["loras"][0]["scale"] == -1
    # The same options with other weights do not go on.
    palate("train", learning_rate=0.01, output_dir="again")
    Path("again/pytorch_lora_weights.safetensors").replace("run/pytorch_lora_weights.safetensors")
    code, _, errors = generate("on", lora="[run]")
    assert (code, "begun with loras" in errors) == (2, True)


def test_an_embedded_model_is_known_by_its_name():
    """Not by where this installation keeps it: a folder of its pictures goes on after a move."""
    from palate.runs.models import find_model

    assert find_model("mini-sd").about()["base"] == "mini-sd"


def test_long_prompts_and_negative_prompts_are_told(generate):
    code, _, errors = generate("out", negative_prompt="blur, " * 60, images_per_prompt=2)
    assert code == 0, errors
    assert errors == "1 prompt is longer than the 40 tokens that the text encoder reads: its end is not seen\n"


def test_a_run_that_trained_all_weights(generate, palate):
    palate("train", train_method="full", learning_rate=0.05, output_dir="full", max_train_steps=1)
    assert generate("tuned", "full")[0] == generate("base")[0] == 0
    assert np.abs(drawn("tuned") - drawn("base")).mean() > 1


def test_a_model_whose_weights_are_others_by_now_does_not_go_on(palate, model_dir, prompts_file):
    shutil.copytree(model_dir, "model")
    options = {"prompts": prompts_file, "num_prompts": 1, "num_inference_steps": 1, "output_dir": "drawn"}
    assert palate("generate", "model", **options)[0] == 0
    assert "drew 0 of 1" in palate("generate", "model", **options)[1]
    (file,) = Path("model/unet").glob("*.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file)
    code, _, errors = palate("generate", "model", **options)
    assert (code, "drawn was begun with weights" in errors) == (2, True), errors


def test_shards_and_several_pictures(generate):
    assert generate("out", images_per_prompt=2, shard="1/2")[0] == 0
    code, said, _ = generate("out", images_per_prompt=2)
    assert (code, said) == (0, "drew 4 of 8 pictures of tiny-sd, 4 were there; see out\n")
    assert len({p.seed for p in read_manifest("out")}) == 8


def test_metadata_and_sets_reach_the_manifest(generate, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red house", "category": "houses"}\n')
    assert generate("own", prompts="p.jsonl")[0] == 0
    assert read_manifest("own")[0].metadata == {"category": "houses"}
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\tChallenge\tNote\na blue tower\tOutdoor Scenes\tBasic\t\n")
    assert generate("parti", prompts="partiprompts:parti.tsv")[0] == 0
    assert read_manifest("parti")[0].metadata == {"category": "Outdoor Scenes", "challenge": "Basic"}


def test_negatives_and_a_refiner(generate, sdxl_dir, refiner_dir):
    for name, options in (
        ("plain", {}),
        ("negative", {"negative_prompt": "a blue tower"}),
        ("refined", {"refiner": refiner_dir, "refiner_start": 0.5}),
    ):
        code, _, errors = generate(name, sdxl_dir, **options, num_prompts=2)
        assert code == 0, errors
    assert np.abs(drawn("negative") - drawn("plain")).max() > 1
    assert np.abs(drawn("refined") - drawn("plain")).max() > 1
    assert {p.negative for p in read_manifest("negative")} == {"a blue tower"}
    assert json.loads(Path("refined/settings.json").read_text()) == json.loads(Path("plain/settings.json").read_text())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "nowhere/at/all"}, "no model at nowhere/at/all"),
        ({"lora": "gone.safetensors"}, "there is no gone.safetensors"),
        ({"lora": "[quick.yaml:strong]"}, "the scale is 'strong'"),
        ({"lora": "[quick.yaml:1e40]"}, "the scale is '1e40'; expected a number such as 0.8, of a size up to 1000"),
        ({"lora": "[quick.yaml:-1e-40]"}, "the scale is '-1e-40'"),
        ({"lora": "quick.yaml"}, "quick.yaml cannot be put into"),
        ({"refiner": "nowhere/at/all"}, "no model at nowhere/at/all"),
        ({"refiner_start": 0.5}, "refiner_start does nothing without a refiner: name one with --refiner"),
        ({"prompts": "gone.txt"}, "gone.txt does not exist"),
        ({"images_per_prompt": 0}, "images_per_prompt is 0"),
        ({"resolution": 65}, "multiple of 8"),
        ({"shard": "3/2"}, "shard is '3/2'; expected its number, counted from 1"),
        ({"guidance": 3}, "unknown option --guidance (did you mean 'guidance_scale'?"),
    ],
)
def test_mistakes(generate, options, said):
    code, _, errors = generate("out", **options)
    assert code == 2
    assert said in errors
    assert len(errors.splitlines()) == 1
    assert not Path("out").exists()


def test_words_that_are_missing(palate):
    assert "needs --output_dir" in palate("generate", "mini-sd", prompts="miniature-unseen")[2]
    assert "expects a model first" in palate("generate", prompts="miniature-unseen")[2]
    assert "--lora" in palate("generate", "--help")[1]
