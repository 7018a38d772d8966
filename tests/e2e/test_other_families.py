"""``palate generate`` with a pipeline of no family that is trained: a tiny SD3, where the table does not know it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from palate.evaluation.manifest import read_manifest, read_settings
from palate.models.families import FAMILIES


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    monkeypatch.delitem(FAMILIES, "StableDiffusion3Pipeline")


def drawn(folder):
    return np.stack([np.asarray(Image.open(Path(folder, p.file))) for p in read_manifest(folder)]).astype(int)


def test_sd3_draws(palate, sd3_dir, prompts_file):
    quick = {"prompts": prompts_file, "num_inference_steps": 2, "guidance_scale": 3, "num_prompts": 2}
    code, said, errors = palate("generate", sd3_dir, **quick, output_dir="out")
    assert (code, said) == (0, "drew 2 of 2 pictures of tiny-sd3, 0 were there; see out\n"), errors
    assert drawn("out").shape == (2, 64, 64, 3)
    assert read_settings("out")["sampler"] == "FlowMatchEulerDiscreteScheduler"
    assert palate("generate", sd3_dir, **quick, output_dir="single", batch_size=1)[0] == 0
    assert np.abs(drawn("single") - drawn("out")).max() <= 1
    assert palate("generate", sd3_dir, **quick, output_dir="negative", negative_prompt="a house")[0] == 0
    assert np.abs(drawn("negative") - drawn("out")).max() > 1
    # Parity with the pipeline by itself.
    from diffusers import StableDiffusion3Pipeline

    pictures = read_manifest("out")
    wanted = StableDiffusion3Pipeline.from_pretrained(sd3_dir)(
        [p.prompt for p in pictures],
        num_inference_steps=2,
        guidance_scale=3.0,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(p.seed) for p in pictures],
    ).images
    assert np.abs(np.stack([np.asarray(image) for image in wanted]).astype(int) - drawn("out")).max() <= 1


def test_sd3_is_not_trained_nor_edited(palate, sd3_dir, prompts_file):
    code, _, errors = palate("train", pretrained_model_name_or_path=sd3_dir)
    assert (code, "is a StableDiffusion3Pipeline; supported pipelines" in errors, len(errors.splitlines())) == (2, True, 1)
    Image.new("RGB", (32, 32), "red").save("red.png")
    code, _, errors = palate("generate", sd3_dir, prompts=prompts_file, init_image="red.png", output_dir="out")
    assert (code, "others can only draw" in errors) == (2, True)
    code, _, errors = palate("generate", sd3_dir, prompts=prompts_file, lora="quick.yaml", output_dir="out")
    assert (code, "quick.yaml cannot be put into" in errors, len(errors.splitlines())) == (2, True, 1), errors
    assert not Path("out").exists()


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "pipeline"])
def test_a_lora_of_sd3_is_not_exported(palate, sd3_dir, layout):
    save_file({"transformer.proj_out.lora_A.weight": torch.zeros(1, 2)}, "lora.safetensors")
    code, _, errors = palate(
        "export", "lora.safetensors", format=layout, output="out.safetensors", pretrained_model_name_or_path=sd3_dir
    )
    assert (code, "is a StableDiffusion3Pipeline; supported pipelines" in errors) == (2, True), errors
