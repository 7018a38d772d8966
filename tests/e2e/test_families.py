"""The whole job with the families beside Stable Diffusion 1.x, each the real architecture at a tiny random size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import BETAS

from palate.base.shapes import Shape
from palate.models.drawing import Drawing
from palate.models.families import load_denoiser


def with_scheduler(model_dir: Path, folder: Path, kind: str, **config) -> Path:
    """The pipeline with another sampler, trained-in betas unchanged."""
    import diffusers

    shutil.copytree(model_dir, folder)
    scheduler = getattr(diffusers, kind)(**BETAS, **config)
    scheduler.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", kind]}))
    return folder


@pytest.fixture
def sd2_dir(model_dir, tmp_path) -> Path:
    """As Stable Diffusion 2.1: v prediction, linear projections, heads of one size, an encoder with exact GELU."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = with_scheduler(
        model_dir, tmp_path / "tiny-sd2", "DDIMScheduler", prediction_type="v_prediction", steps_offset=1, clip_sample=False
    )
    config = {**UNet2DConditionModel.load_config(folder / "unet"), "use_linear_projection": True, "attention_head_dim": [2, 4]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    encoder.config.hidden_act = "gelu"
    encoder.save_pretrained(folder / "text_encoder")
    return folder


def turbo(model_dir: Path, folder: Path) -> Path:
    """As the Turbo kinds: one to four steps from the very last time, new noise at every step, no guidance."""
    return with_scheduler(model_dir, folder, "EulerAncestralDiscreteScheduler", timestep_spacing="trailing", steps_offset=1)


@pytest.fixture
def mixed_sizes(pairs_dir, tmp_path) -> Path:
    """The votes with pictures of three shapes, so that winner and loser of a pair differ."""
    folder = shutil.copytree(pairs_dir, tmp_path / "mixed")
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        Image.open(path).resize([(64, 64), (96, 70), (50, 80)][i % 3]).save(path)
    return folder


def test_sdxl_learns_from_pictures_of_mixed_sizes(palate, sdxl_dir, mixed_sizes, prompts_file):
    from diffusers import StableDiffusionXLPipeline

    code, _, error = palate(
        "train",
        pretrained_model_name_or_path=sdxl_dir,
        train_data=mixed_sizes,
        space="perceptual",
        evaluation_prompts=prompts_file,
        judges="[jpeg_compressibility]",
        max_train_steps=2,
    )
    assert code == 0, error
    assert [c["judge"] for c in json.loads(Path("out/metrics.json").read_text())["comparisons"]] == ["jpeg_compressibility"]
    log = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if "loss" in record]
    assert losses
    assert np.isfinite(losses).all()
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_dir, add_watermarker=False)
    pipeline.load_lora_weights("out")
    manifest = [json.loads(line) for line in Path("out/evaluation/tuned/manifest.jsonl").read_text().splitlines()]
    picture = pipeline(
        manifest[0]["prompt"],
        generator=torch.Generator().manual_seed(manifest[0]["seed"]),
        num_inference_steps=3,
        guidance_scale=5.0,
    ).images[0]
    shown = Image.open(Path("out/evaluation/tuned") / manifest[0]["file"])
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(shown, dtype=int)).max() <= 1


def test_a_refiner_finishes_the_compared_pictures(palate, sdxl_dir, refiner_dir, prompts_file):
    options = {"evaluation_prompts": prompts_file, "judges": "[jpeg_compressibility]", "max_train_steps": 1}
    for name, refiner in (("plain", None), ("refined", refiner_dir)):
        code, _, error = palate(
            "train", pretrained_model_name_or_path=sdxl_dir, refiner=refiner, refiner_start=0.5, output_dir=name, **options
        )
        assert code == 0, error
    plain, refined = (np.asarray(Image.open(f"{n}/evaluation/base/00000-00.png"), dtype=int) for n in ("plain", "refined"))
    assert np.abs(plain - refined).max() > 1


def test_a_refiner_that_cannot_be_used_is_refused_before_training(palate, model_dir, sdxl_dir, refiner_dir):
    for model, refiner, message in (
        (model_dir, refiner_dir, "a refiner finishes pictures of an SDXL model"),
        (sdxl_dir, model_dir, "not a refiner"),
        (sdxl_dir, "nowhere", "no model at nowhere"),
        (refiner_dir, None, "is a refiner"),
    ):
        code, _, error = palate("train", pretrained_model_name_or_path=model, refiner=refiner)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
        assert not Path("out").exists()


def test_a_family_without_features_has_no_perceptual_space(palate, monkeypatch):
    def never(*_, **__):
        raise AssertionError("encoded")

    monkeypatch.setattr("palate.models.sd.StableDiffusion.features", None)
    monkeypatch.setattr("palate.data.encode.encode", never)
    code, _, error = palate("train", space="{name: perceptual}")
    assert (code, error.count("\n")) == (2, 1)
    assert "is of a family without a perceptual space" in error


def test_a_family_without_a_layout_of_kohya_has_no_twin(palate, monkeypatch):
    monkeypatch.setattr("palate.models.sd.StableDiffusion.kohya", None)
    assert palate("train", max_train_steps=1)[0] == 0
    assert [path.name for path in Path("out").glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]
    assert "ComfyUI" not in Path("out/README.md").read_text()
    code, _, error = palate("export", "out", format="kohya", output="twin.safetensors")
    assert (code, error.count("\n")) == (2, 1)
    assert "no layout for LoRAs of StableDiffusionPipeline" in error


def test_stable_diffusion_2_predicts_v_and_draws_as_by_diffusers(palate, sd2_dir):
    from diffusers import StableDiffusionPipeline

    denoiser = load_denoiser(str(sd2_dir))
    assert denoiser.schedule.prediction_type == "v_prediction"
    options = {"num_inference_steps": 4, "guidance_scale": 4.0}
    plain = StableDiffusionPipeline.from_pretrained(sd2_dir, safety_checker=None)
    expected = plain("a tree", generator=torch.Generator().manual_seed(3), **options).images[0]
    found = denoiser.generate(["a tree"], [3], Drawing(shape=Shape.square(64), **options))[0]
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    for space in ("latent", "perceptual"):
        code, _, error = palate(
            "train", pretrained_model_name_or_path=sd2_dir, space=space, max_train_steps=2, output_dir=space
        )
        assert code == 0, error


@pytest.mark.parametrize("objective", ["ddpo_is", "sft"])
def test_stable_diffusion_2_learns_from_its_own_pictures(palate, sd2_dir, prompts_file, objective):
    tiny = {"samples_per_round": 4, "sample_batch_size": 4, "sample_num_steps": 2, "updates_per_round": 2, "rounds": 2}
    tiny |= {"max_train_steps": None, "train_data": None, "cache_dir": None, "train_batch_size": 2, "kl_samples": 1}
    tiny |= {"train_prompts": prompts_file, "rewards": "jpeg_compressibility", "objective": objective}
    code, _, error = palate("train", pretrained_model_name_or_path=sd2_dir, **tiny)
    assert code == 0, error
    log = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    away = [line["kl_path"] for line in log if "kl_path" in line]
    assert away[0] < 1e-8 < away[1] < 1  # it has moved, and not far
    if objective == "ddpo_is":
        assert log[0]["approx_kl"] < 1e-9  # training finds a step of v as likely as sampling did
    loaded = load_denoiser(str(sd2_dir)).pipeline()
    loaded.load_lora_weights("out", weight_name="pytorch_lora_weights.safetensors")
    assert any(bool(p.any()) for name, p in loaded.unet.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_turbo_kinds_draw_without_guidance_in_few_steps_and_train(palate, model_dir, sdxl_dir, tmp_path, family):
    folder = turbo(sdxl_dir if family == "sdxl" else model_dir, tmp_path / "turbo")
    denoiser = load_denoiser(str(folder))
    steps = []
    for count in (1, 4):
        options = {"num_inference_steps": count, "guidance_scale": 0.0}
        plain = denoiser.pipeline()
        expected = plain("a tree", generator=torch.Generator().manual_seed(3), **options).images[0]
        steps.append(plain.scheduler.timesteps.tolist())
        found = denoiser.generate(["a red house", "a tree"], [4, 3], Drawing(shape=Shape.square(64), **options))[1]
        assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    assert steps == [[999.0], [999.0, 749.0, 499.0, 249.0]]
    code, _, error = palate(
        "train", pretrained_model_name_or_path=folder, guidance_scale=0, num_inference_steps=1, max_train_steps=2
    )
    assert code == 0, error
    assert list(Path("out/samples").glob("*.png"))
