"""The whole job from the command line on a tiny Stable Diffusion 3: a transformer on a rectified flow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from palate.evaluation.manifest import read_manifest, read_settings
from palate.runs import recipe
from palate.training.log import read_log

FEATURES = "{name: perceptual, layers: half, steps_back: 20}"
ONLINE = {
    "train_data": None,
    "train_prompts": "animals",
    "rewards": "jpeg_compressibility",
    "samples_per_round": 4,
    "sample_batch_size": 4,
    "sample_num_steps": 3,
    "train_batch_size": 2,
    "updates_per_round": 1,
    "kl_samples": 1,
}


@pytest.fixture
def train(palate, sd3_dir):
    return lambda **options: palate("train", **{"pretrained_model_name_or_path": sd3_dir, "max_train_steps": 2, **options})


def weights(folder):
    return load_file(Path(folder, "pytorch_lora_weights.safetensors"))


def moved(folder):
    return any(bool(x.any()) for name, x in weights(folder).items() if "lora_B" in name)


def pictures(folder):
    return np.stack([np.asarray(Image.open(Path(folder, p.file))) for p in read_manifest(folder)]).astype(int)


WAYS = {
    "dpo": {"objective.name": "dpo", "objective.beta": "auto", "objective": None},
    "ncp-dpo": {"objective": "dpo", "space": FEATURES, "gradient_checkpointing": "true"},
    "ncp-dpo of three layers at any time": {
        "objective": "dpo",
        "space": "{name: perceptual, layers: all, target_time: uniform}",
    },
    "kto": {"objective": "kto"},
    "sft of a sum of spaces": {"objective": "sft", "space": f"[{{name: latent}}, {FEATURES}]".replace("half", "quarter")},
    "min-snr and all layers": {"objective": "dpo", "snr_gamma": 5, "lora_layers": "all", "caption_dropout": 0.5},
    "ddpo_is": {"objective": "ddpo_is", **ONLINE},
    "ddpo_is of two late steps": {"objective": "ddpo_is", **ONLINE, "window_size": 2, "window_start": 1},
    "rwr in perceptual space": {"objective": "sft", "space": FEATURES, **ONLINE, "guidance_in_training": "false"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_learning(train, way):
    options = {name: value for name, value in WAYS[way].items() if value is not None or name == "train_data"}
    code, _, errors = train(**options)
    assert code == 0, errors
    assert "Traceback" not in errors
    lines = read_log("out/log.jsonl")
    assert [line["step"] for line in lines if "loss" in line][-1] == 2
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert moved("out")
    assert all(name.startswith("transformer.transformer_blocks.") for name in weights("out"))


@pytest.mark.parametrize("way", ["dpo", "ncp-dpo", "ddpo_is"])
def test_resumed_equals_uninterrupted(train, way):
    options = {name: value for name, value in WAYS[way].items() if value is not None or name == "train_data"}
    options |= {"max_train_steps": 4, "checkpointing_steps": 1, "validation_prompts": "[]"}
    assert train(**options, output_dir="whole")[0] == 0
    assert train(**{**options, "max_train_steps": 2}, output_dir="parts")[0] == 0
    code, _, errors = train(**options, output_dir="parts", resume_from_checkpoint="latest")
    assert code == 0, errors
    for name, tensor in weights("whole").items():
        assert torch.equal(weights("parts")[name], tensor), name


def test_a_lora_is_trained_compared_continued_and_exported(palate, train, sd3_dir, prompts_file):
    compared = {"evaluation_prompts": prompts_file, "judges": "[jpeg_compressibility]", "num_inference_steps": 2}
    code, said, errors = train(**compared, sample_steps=1, validation_prompts="[a red house]", learning_rate=0.1)
    assert code == 0, errors
    assert "judge prefers" in said
    assert read_settings("out/evaluation/tuned")["sampler"] == "FlowMatchEulerDiscreteScheduler"
    assert [path.name for path in Path("out").glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]  # no kohya twin
    card = Path("out/README.md").read_text()
    assert "from diffusers import StableDiffusion3Pipeline" in card
    assert "stable-diffusion-3" in card
    assert train(output_dir="more", pretrained_lora="out")[0] == 0
    assert palate("evaluate", "out")[0] == 0
    drawing = {"prompts": prompts_file, "num_inference_steps": 2}
    assert palate("generate", "out", **drawing, output_dir="drawn")[0] == 0
    assert palate("generate", sd3_dir, **drawing, output_dir="base")[0] == 0
    assert np.abs(pictures("drawn") - pictures("base")).max() > 1
    assert palate("compare", "base", "drawn", judges="[jpeg_compressibility]", output_dir="compared")[0] == 0
    assert palate("export", "out", format="diffusers", output="lora")[0] == 0
    assert palate("export", "out", format="pipeline", output="merged")[0] == 0
    assert palate("generate", "merged", **drawing, output_dir="again")[0] == 0
    assert np.abs(pictures("again") - pictures("drawn")).max() <= 1
    code, _, errors = palate("export", "out", format="kohya", output="twin.safetensors")
    assert (code, errors.count("\n")) == (2, 1)
    assert "no layout for LoRAs of StableDiffusion3Pipeline" in errors


def test_pictures_of_a_run_are_those_of_diffusers(palate, train, sd3_dir):
    from diffusers import StableDiffusion3Pipeline

    assert train(learning_rate=0.1)[0] == 0
    Path("prompts.txt").write_text("a red house\n")
    assert palate("generate", "out", prompts="prompts.txt", num_inference_steps=3, guidance_scale=4, output_dir="drawn")[0] == 0
    plain = StableDiffusion3Pipeline.from_pretrained(sd3_dir)
    plain.load_lora_weights("out")
    seed = read_manifest("drawn")[0].seed
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 64}
    expected = plain("a red house", generator=torch.Generator().manual_seed(seed), **options).images[0]
    assert np.abs(pictures("drawn")[0] - np.asarray(expected).astype(int)).max() <= 1


def test_without_t5_it_is_trained_and_saved_whole(palate, train, sd3_without_t5, prompts_file):
    assert train(pretrained_model_name_or_path=sd3_without_t5)[0] == 0
    assert palate("export", "out", format="pipeline", output="whole")[0] == 0
    index = json.loads(Path("whole/model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    code, _, errors = palate("generate", "whole", prompts=prompts_file, num_inference_steps=2, output_dir="drawn")
    assert code == 0, errors
    assert len(read_manifest("drawn")) == 4


def test_all_weights_are_trained_and_a_lora_made_of_them(palate, train):
    model = {"train_method": "full", "objective.name": "sft"}
    assert train(**model)[0] == 0
    assert Path("out/transformer/config.json").is_file()
    assert not Path("out/unet").exists()
    card = Path("out/README.md").read_text()
    assert "all weights of the transformer" in card
    assert 'transformer = SD3Transformer2DModel.from_pretrained("path/to/this/folder", subfolder="transformer"' in card
    code, _, errors = palate("export", "out", format="merged-unet", output="merged")
    assert code == 0, errors
    assert Path("merged/diffusion_pytorch_model.safetensors").is_file()
    assert palate("export", "out", format="lora-from-full", output="lora", rank=2)[0] == 0
    assert [path.name for path in Path("lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    code, _, errors = train(**model)
    assert (code, "already holds a run" in errors) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "{name: perceptual, layers: mid}"}, "layers mid of the perceptual space do not exist in the transformer of"),
        ({"space": "[{name: latent}, {name: perceptual}]"}, "choose quarter, half, all"),
        ({"refiner": "{refiner}"}, "a refiner finishes pictures of an SDXL model"),
        ({"resolution": 36}, "multiple of 8"),
        ({"resolution": 72, "objective": "ddpo_is", **ONLINE, "timestep_spacing": "trailing"}, "spaces them by its own shift"),
    ],
)
def test_what_it_has_not_is_told(train, refiner_dir, monkeypatch, options, message):
    def never(*_, **__):
        raise AssertionError("encoded")

    monkeypatch.setattr("palate.data.encode.encode", never)
    given = {n: str(v).replace("{refiner}", str(refiner_dir)) if v is not None else None for n, v in options.items()}
    code, _, errors = train(**given)
    assert (code, message in errors) == (2, True), errors
    assert "Traceback" not in errors
    assert not Path("out").exists()


def test_a_unet_has_no_layers_of_a_transformer(palate, model_dir):
    code, _, errors = palate("train", space=FEATURES)
    assert (code, errors.count("\n")) == (2, 1)
    assert "layers half of the perceptual space do not exist in the U-Net of" in errors
    assert "choose last_down, mid, all" in errors


def test_a_word_of_caution_comes_before_training(train, monkeypatch):
    monkeypatch.setattr("palate.models.sd3.StableDiffusion3.caution", "this one is distilled: train its base")
    code, _, errors = train(max_train_steps=1)
    assert code == 0
    assert errors.index("this one is distilled") < errors.index("wrote")
    assert recipe.load("out/recipe.yaml").model.pretrained_model_name_or_path
