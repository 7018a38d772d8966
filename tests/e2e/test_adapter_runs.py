"""LoRA's variants from the command line: trained, resumed bit for bit, drawn with, exported, told in the card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finished_runs import drawn, equal_files

from palate.runs import recipe

FILE, TWIN = "pytorch_lora_weights.safetensors", "{}_kohya.safetensors"
WAYS = {
    "dora": {"lora_kind": "dora", "lora_dropout": 0.2},
    "lokr": {"lora_kind": "lokr", "rank": 1, "lora_layers": "all"},
    "loha": {"lora_kind": "loha", "rank_pattern": "{to_v: 3}", "mixed_precision": "bf16"},
    "rslora": {"use_rslora": "true", "lora_alpha": 2, "alpha_pattern": "{to_k: 1}", "ema_decay": 0.9},
    "dora of int8": {"lora_kind": "dora", "quantize": "int8"},
    "lokr of int8": {"lora_kind": "lokr", "quantize": "int8"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_variant_goes_all_the_way(palate, prompts_file, way):
    options = {**WAYS[way], "validation_prompts": "[]", "validation_fraction": 0}
    assert palate("train", **options, max_train_steps=2)[0] == 0
    code, _, errors = palate("train", **options, max_train_steps=3, resume_from_checkpoint="latest")
    assert code == 0, errors
    assert palate("train", **options, max_train_steps=3, output_dir="straight")[0] == 0
    equal_files("out", "straight")
    shown = {"prompts": prompts_file, "num_inference_steps": 2, "num_prompts": 2, "quantize": options.get("quantize")}
    assert palate("generate", "out", output_dir="drawn", **shown)[0] == 0
    kohya = {"format": "kohya", "output": "for_comfyui.safetensors"}
    code, _, errors = palate("export", "out", **kohya)
    if "dora" in way:
        assert (code, "scale a DoRA in ways of their own" in errors) == (2, True)
        assert not list(Path("out").glob("*kohya*"))
        return
    assert code == 0, errors
    base = recipe.load("out/recipe.yaml").model.pretrained_model_name_or_path
    assert palate("generate", base, lora="for_comfyui.safetensors", output_dir="again", **shown)[0] == 0
    assert np.abs(drawn("drawn") - drawn("again")).max() <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_kind": "lora2"}, "lora_kind is 'lora2'"),
        ({"lora_kind": "lokr", "use_rslora": "true"}, "use_rslora is of lora and dora, not of lokr"),
        ({"lora_kind": "loha", "lora_dropout": 0.1}, "lora_dropout is of lora and dora, not of loha"),
        ({"train_method": "full", "lora_kind": "dora"}, "lora_kind is of a LoRA, but train_method is full"),
        ({"pretrained_lora": "x", "rank_pattern": "{to_q: 2}"}, "pretrained_lora goes on as it is: leave rank_pattern out"),
        ({"rank_pattern": "{to_q: 0}"}, "rank_pattern gives 'to_q' 0; expected a number above 0"),
        ({"rank_pattern": "{to_quu: 2}"}, "rank_pattern names 'to_quu', with which no trained layer ends"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_encoded(palate, options, said):
    code, _, errors = palate("train", **options)
    assert (code, said in errors, len(errors.strip().splitlines())) == (2, True, 1), errors
    assert not Path("out").exists()


def test_dropout_is_refused_where_the_model_draws_what_it_learns_from(palate, prompts_file):
    options = {"objective": "ddpo_is", "train_prompts": prompts_file, "rewards": "jpeg_compressibility"}
    code, _, errors = palate("train", **options, train_data=None, lora_dropout=0.1)
    assert (code, "lora_dropout would make the updates see another model" in errors) == (2, True), errors
