"""Runs whose frozen weights are in 8 or 4 bits: trained, continued, compared, drawn from, exported into whole weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palate.runs import recipe
from palate.training.log import read_log

SIDE = 64
WAYS = {
    "klein nf4": ("klein", {"quantize": "nf4", "lora_layers": "all"}),
    "flux nf4 in half precision": ("flux", {"quantize": "nf4", "mixed_precision": "bf16", "gradient_checkpointing": "true"}),
    "zimage int8": ("zimage", {"quantize": "int8", "caption_dropout": 0.5}),
    "sd int8 by ncp-dpo": ("sd", {"quantize": "int8", "space": "perceptual", "mixed_precision": "bf16"}),
}


@pytest.fixture
def folder(model_dir, flow_dir):
    return lambda kind: model_dir if kind == "sd" else flow_dir(kind)


def weights(run: str) -> dict:
    return load_file(Path(run, "pytorch_lora_weights.safetensors"))


def losses(run: str) -> list[float]:
    return [line["loss"] for line in read_log(Path(run) / "log.jsonl") if "loss" in line]


@pytest.mark.parametrize("way", WAYS)
def test_a_lora_is_trained_and_drawn_with(palate, folder, prompts_file, way):
    kind, more = WAYS[way]
    model = {"pretrained_model_name_or_path": folder(kind), "resolution": SIDE, "max_train_steps": 1}
    code, _, errors = palate("train", **model, **more, sample_steps=1)
    assert code == 0, errors
    found = weights("out")
    assert any(bool(x.any()) for name, x in found.items() if "lora_B" in name)
    assert all(bool(torch.isfinite(x).all()) for x in found.values())
    assert recipe.load("out/recipe.yaml").model.quantize == more["quantize"]
    drawn = {"prompts": prompts_file, "num_inference_steps": 2, "resolution": SIDE, "quantize": more["quantize"]}
    code, _, errors = palate("generate", "out", output_dir="drawn", mixed_precision=more.get("mixed_precision", "no"), **drawn)
    assert code == 0, errors


def test_it_is_continued_drawn_from_and_merged_into_whole_weights(palate, flow_dir, prompts_file):
    options = {"pretrained_model_name_or_path": flow_dir("klein"), "resolution": SIDE, "quantize": "nf4"}
    options["validation_prompts"] = "[]"
    assert palate("train", **options, max_train_steps=2)[0] == 0
    assert palate("train", **options, max_train_steps=3, resume_from_checkpoint="latest")[0] == 0
    assert palate("train", **options, max_train_steps=3, output_dir="straight")[0] == 0
    found, straight = weights("out"), weights("straight")
    assert losses("out") == losses("straight")
    assert all(bool((found[name] == straight[name]).all()) for name in found)
    drawn = {"prompts": prompts_file, "num_inference_steps": 2, "resolution": SIDE}
    assert palate("generate", "out", output_dir="drawn", quantize="nf4", **drawn)[0] == 0
    assert json.loads(Path("drawn/settings.json").read_text())["quantize"] == "nf4"
    code, _, errors = palate("generate", "out", output_dir="drawn", **drawn)
    assert (code, "begun with quantize" in errors) == (2, True)
    assert palate("export", "out", format="pipeline", output="merged")[0] == 0
    assert palate("generate", "merged", output_dir="again", **drawn)[0] == 0


def test_the_reference_is_the_rounded_model(palate, model_dir):
    """A new LoRA changes nothing: the first margin, of policy and reference on the same weights, is 0."""
    code, _, errors = palate("train", quantize="int8", max_train_steps=1, validation_prompts="[]")
    assert code == 0, errors
    first = next(line for line in read_log(Path("out/log.jsonl")) if "loss" in line)
    assert first["winner_advantage"] == first["loser_advantage"] == 0
    assert palate("train", max_train_steps=1, validation_prompts="[]", output_dir="plain")[0] == 0
    assert losses("plain") == losses("out")  # log 2
    plain = next(line for line in read_log(Path("plain/log.jsonl")) if "loss" in line)
    assert plain["winner_error"] != first["winner_error"]


def test_its_own_pictures_are_learned_from(palate, flow_dir):
    own = {"train_prompts": "animals", "train_data": None, "rewards": "jpeg_compressibility", "objective": "nft"}
    own |= {"samples_per_round": 4, "group_size": 2, "advantage": "group", "weighting": "advantage", "adv_clip": 1}
    own |= {"sample_batch_size": 4, "train_batch_size": 4, "sample_num_steps": 2, "sample_eta": 0, "updates_per_round": 1}
    options = {"pretrained_model_name_or_path": flow_dir("flux"), "resolution": SIDE, "max_train_steps": 2, "quantize": "int8"}
    compared = {"evaluation_prompts": "animals", "num_evaluation_prompts": 2}
    code, _, errors = palate("train", **options, **own, judges="[jpeg_compressibility]", **compared)
    assert code == 0, errors
    assert any(bool(x.any()) for name, x in weights("out").items() if "lora_B" in name)
    assert Path("out/report.html").exists()


def test_what_is_refused(palate):
    for options, told in {
        ("quantize", "int4"): "quantize is 'int4'",
        ("quantize", "nf4", "train_method", "full"): "quantize nf4 freezes the weights: use train_method lora",
    }.items():
        code, _, errors = palate("train", **dict(zip(options[::2], options[1::2], strict=True)))
        (line,) = errors.splitlines()
        assert code == 2
        assert told in line
        assert not Path("out").exists()
