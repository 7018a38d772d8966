"""Editing (SDEdit): its laws, and parity with diffusers' own image-to-image pipelines."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.models.drawing import Drawing
from palate.models.families import load_denoiser

PROMPTS, SEEDS = ["a red house", "a blue tower on the left"], [3, 4]
QUICK = Drawing(num_inference_steps=4, guidance_scale=3.0, shape=Shape.square(64))


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request, model_dir, sdxl_dir):
    return model_dir if request.param == "sd" else sdxl_dir


@pytest.fixture(scope="module")
def denoiser(folder):
    return load_denoiser(str(folder))


@pytest.fixture(scope="module")
def init():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def levels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_parity_with_diffusers(denoiser, init):
    from diffusers import AutoPipelineForImage2Image

    found = levels(denoiser.generate(PROMPTS, SEEDS, QUICK, init=list(init), strength=0.5))
    pipeline = AutoPipelineForImage2Image.from_pipe(denoiser.pipeline(), add_watermarker=False)
    wanted = pipeline(
        PROMPTS,
        # As latents: from pixels diffusers draws them at random around the mean that is taken here.
        image=denoiser.encode_images(init),
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
    ).images
    assert np.abs(found - levels(wanted)).max() <= 1


def test_strength_from_all_to_nothing(folder, init, tmp_path):
    # Nearly no noise at the first time: a random VAE's latents are so small that the usual noise would drown them.
    config = shutil.copytree(folder, tmp_path / "model") / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_start": 1e-6}))
    denoiser = load_denoiser(str(tmp_path / "model"))

    def edited(strength, steps=4):
        drawing = dataclasses.replace(QUICK, num_inference_steps=steps)
        return levels(denoiser.generate(PROMPTS, SEEDS, drawing, init=list(init), strength=strength))

    kept = (denoiser.decode(denoiser.encode_images(init)) * 255).permute(0, 2, 3, 1).numpy()
    apart = [np.abs(x - kept).mean() for x in (edited(0.002, 500), edited(0.5), edited(1.0))]
    assert apart[0] < 5 < min(apart[1:])
    assert (edited(1.0) == levels(denoiser.generate(PROMPTS, SEEDS, QUICK))).all()


def test_a_picture_depends_on_its_own_row_alone(denoiser, init):
    both = levels(denoiser.generate(PROMPTS, SEEDS, QUICK, init=list(init), strength=0.75))
    second = levels(denoiser.generate(PROMPTS[1:], SEEDS[1:], QUICK, init=list(init[1:]), strength=0.75))
    assert np.abs(both[1:] - second).max() <= 1
    one_by_one = dataclasses.replace(QUICK, batch_size=1)
    single = levels(denoiser.generate(PROMPTS, SEEDS, one_by_one, init=list(init), strength=0.75))
    assert np.abs(both - single).max() <= 1


@pytest.mark.parametrize("strength", [0.0, 0.2, 1.1, float("nan")])
def test_no_step_left(denoiser, init, strength):
    with pytest.raises(UserError, match=r"leaves a step: at least 0\.25"):
        denoiser.generate(PROMPTS, SEEDS, QUICK, init=list(init), strength=strength)
