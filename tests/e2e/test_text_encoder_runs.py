"""Text encoders trained along, from the command line: resumed bit for bit, drawn with, measured, exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finished_runs import drawn, equal_files
from safetensors.torch import load_file

from palate.runs import recipe


def test_it_goes_all_the_way(palate, prompts_file, pairs_dir):
    options = {"train_text_encoder": "true", "caption_dropout": 0.2, "space": "perceptual", "validation_prompts": "[]"}
    options |= {"gradient_checkpointing": "true", "learning_rate": 0.01, "lr_warmup_steps": 0}
    code, _, errors = palate("train", **options, max_train_steps=2)
    assert code == 0, errors
    code, _, errors = palate("train", **options, max_train_steps=3, resume_from_checkpoint="latest")
    assert code == 0, errors
    assert palate("train", **options, max_train_steps=3, output_dir="straight")[0] == 0
    found = equal_files("out", "straight")
    assert any(name.startswith("text_encoder.text_model.") and found[name].any() for name in found if "lora_B" in name)
    kohya = next(Path("out").glob("*_kohya.safetensors"))
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_") for name in load_file(kohya))
    shown = {"prompts": prompts_file, "num_inference_steps": 2, "num_prompts": 2}
    assert palate("generate", "out", output_dir="drawn", **shown)[0] == 0
    base = recipe.load("out/recipe.yaml").model.pretrained_model_name_or_path
    assert palate("generate", base, lora=str(kohya), output_dir="again", **shown)[0] == 0
    assert np.abs(drawn("drawn") - drawn("again")).max() <= 1
    assert palate("export", "out", format="pipeline", output="merged")[0] == 0
    assert palate("generate", "merged", output_dir="of_merged", **shown)[0] == 0
    assert np.abs(drawn("drawn") - drawn("of_merged")).max() <= 1
    code, _, errors = palate("export", "out", format="merged-unet", output="unet")
    assert (code, "use --format pipeline" in errors) == (2, True), errors
    code, _, errors = palate("accuracy", pairs_dir, model="out", timesteps=1)
    assert code == 0, errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_method": "full"}, "train_text_encoder is a LoRA of the text encoders, but train_method is full"),
        ({"lora_kind": "dora"}, "train_text_encoder is for lora_kind lora, not dora"),
    ],
)
def test_where_it_makes_no_sense(palate, options, said):
    code, _, errors = palate("train", train_text_encoder="true", **options)
    assert (code, said in errors, len(errors.strip().splitlines())) == (2, True, 1), errors
    assert not Path("out").exists()


def test_not_in_online_training(palate, prompts_file):
    options = {"objective": "ddpo_is", "train_prompts": prompts_file, "rewards": "jpeg_compressibility"}
    code, _, errors = palate("train", **options, train_data=None, train_text_encoder="true")
    assert (code, "for pictures that are there before training" in errors) == (2, True), errors


def test_not_in_a_family_whose_text_encoders_stay(palate, flow_dir):
    folder = str(flow_dir("zimage"))
    code, _, errors = palate("train", pretrained_model_name_or_path=folder, train_text_encoder="true", resolution=64)
    assert (code, "is for Stable Diffusion 1, 2 and XL" in errors) == (2, True), errors
    assert not Path("out").exists()
