"""Pictures of any width and height: drawn, edited, trained on, compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from palate.base.shapes import Shape
from palate.evaluation.manifest import read_manifest
from palate.models.drawing import Drawing
from palate.models.families import load_denoiser
from palate.training.log import read_log

QUICK = {"num_inference_steps": 3, "guidance_scale": 3.0}
WORDS = ["a red house", "a blue tower", "a tree", "a yellow sailboat"]
SIZES = [(64, 96), (96, 64), (64, 64), None]


def sizes(folder):
    return [Image.open(Path(folder, p.file)).size for p in read_manifest(folder)]


def pixels(picture) -> np.ndarray:
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture), dtype=int)


@pytest.fixture
def listed(tmp_path):
    """Four prompts: a tall, a wide and a square one, and one that asks for nothing."""
    rows = [
        {"prompt": text, **({} if size is None else dict(zip(("width", "height"), size, strict=True)))}
        for text, size in zip(WORDS, SIZES, strict=True)
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("family", ["model_dir", "sdxl_dir", "sd3_dir"])
def test_pictures_of_any_shape_are_those_of_diffusers(request, family):
    """SDXL is told the size, and a flow has other tokens; here beside a picture of another shape."""
    from diffusers import DiffusionPipeline

    folder = request.getfixturevalue(family)
    plain = DiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    expected = plain("a red house", height=96, width=64, generator=torch.Generator().manual_seed(3), **QUICK).images[0]
    drawing = Drawing(shape=Shape(96, 64), **QUICK)
    found = load_denoiser(str(folder)).generate(["a tree", "a red house"], [1, 3], drawing, shapes=[Shape(64, 80), None])
    assert [image.size for image in found] == [(80, 64), (64, 96)]
    assert np.abs(pixels(found[1]) - pixels(expected)).max() <= 1


def test_generate_draws_each_prompt_in_its_shape(palate, model_dir, listed):
    draw = {"prompts": listed, "resolution": "96x64", **QUICK}
    code, said, errors = palate("generate", model_dir, output_dir="all", **draw)
    assert (code, said) == (0, "drew 4 of 4 pictures of tiny-sd, 0 were there; see all\n"), errors
    assert sizes("all") == [(64, 96), (96, 64), (64, 64), (96, 64)]
    assert json.loads(Path("all/settings.json").read_text())["resolution"] == "96x64"
    assert [p.shape for p in read_manifest("all")] == [Shape(96, 64), Shape(64, 96), Shape(64, 64), None]
    # In other batches and a shard the same; a folder goes on as it was begun.
    assert palate("generate", model_dir, output_dir="one", batch_size=1, shard="1/2", **draw)[0] == 0
    for file in (p.file for p in read_manifest("one")):
        assert np.abs(pixels(Path("one", file)) - pixels(Path("all", file))).max() <= 1
    assert palate("generate", model_dir, output_dir="all", **draw)[1].startswith("drew 0 of 4")
    listed.write_text(listed.read_text().replace('"width": 96', '"width": 72'))
    code, _, errors = palate("generate", model_dir, output_dir="all", **draw)
    assert (code, "00001-00.png was drawn at 96x64, not 72x64" in errors) == (2, True)
    code, _, errors = palate("generate", model_dir, output_dir="all", **{**draw, "resolution": 64})
    assert (code, "begun with resolution '96x64', now 64" in errors) == (2, True)


def test_each_is_edited_in_its_shape(palate, model_dir, listed, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    options = {"prompts": listed, "resolution": 64, "init_image": "photo.png", "strength": 0.5, **QUICK}
    code, _, errors = palate("generate", model_dir, output_dir="out", **options)
    assert code == 0, errors
    assert sizes("out") == [(64, 96), (96, 64), (64, 64), (64, 64)]
    pictures = read_manifest("out")
    assert [Image.open(Path("out", str(p.init_image))).size for p in pictures] == sizes("out")
    assert len({p.init_image for p in pictures}) == 4  # also the square that was asked for and the one that was not


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"width": 64}, "p.jsonl, line 1: height is missing: give both, or neither"),
        ({"height": 64}, "p.jsonl, line 1: width is missing"),
        (
            {"width": 60, "height": 96},
            "line 1: the size is 60x96, but width and height must each be a positive multiple of 8: try",
        ),
        ({"width": "wide", "height": 96}, "line 1: the size is 'widex96'; expected a whole number"),
        ({"width": 64, "height": 99992}, "line 1: the size is 64x99992; expected a multiple of 8 up to 8192"),
    ],
)
def test_a_wrong_size_of_a_prompt(palate, listed, model_dir, row, said):
    listed.write_text(json.dumps({"prompt": "a tree", **row}))
    code, _, errors = palate("generate", model_dir, prompts=listed, output_dir="out", **QUICK)
    assert (code, said in errors, len(errors.splitlines())) == (2, True, 1), errors
    assert not Path("out").exists()


def test_a_shape_that_the_family_cannot_draw_names_the_nearest(palate, sd3_dir, listed):
    listed.write_text('{"prompt": "a tree", "width": 64, "height": 512}\n')
    code, _, errors = palate("generate", sd3_dir, prompts=listed, output_dir="out", **QUICK)
    assert (code, "sides must be multiples of 8 up to 256 for" in errors, "try 64x256" in errors) == (2, True, True), errors
    assert not Path("out").exists()


# Training ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Twelve pairs: tall, wide, square, and of two shapes at once; some much larger than they are trained on."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "mixed"
    folder.mkdir()
    shapes = [((64, 96), (64, 96)), ((192, 128), (96, 64)), ((64, 64), (100, 100)), ((300, 300), (80, 320))]
    rows = []
    for i in range(12):
        names = []
        for k, size in enumerate(shapes[i % 4]):
            names.append(f"{i}-{k}.png")
            Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / names[-1])
        rows.append({"prompt": WORDS[i % 3], "image_0": names[0], "image_1": names[1], "label_0": 1, "label_1": 0})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


BUCKETS = {"resolution": "64x96", "buckets": "true", "bucket_step": 32, "validation_fraction": 0.3}


@pytest.mark.parametrize("family", ["model_dir", "sdxl_dir", "sd3_dir"])
def test_training_on_buckets_tells_what_is_cropped_and_resumes_exactly(palate, mixed, request, family, tmp_path):
    base = {
        "train_data": mixed,
        "pretrained_model_name_or_path": request.getfixturevalue(family),
        "cache_dir": tmp_path / "cache",
        "max_train_steps": 4,
        **BUCKETS,
    }
    code, _, errors = palate("train", **base)
    assert code == 0, errors
    assert "pictures by shape: 6 of 64, 6 of 96x64, 12 of 64x96" in errors
    # 300 x 300 beside 80 x 320 meet at 1 : 2, and so at 2 : 3: a third of the first and 5 / 8 of the other are lost.
    assert "6 of 24 pictures lose more than a tenth to the crop, up to 62%" in errors
    assert all(np.isfinite(line["loss"]) for line in read_log(Path("out/log.jsonl")) if "loss" in line)
    assert Image.open("out/samples/step-000004.png").size[0] > 0
    whole = load_file("out/pytorch_lora_weights.safetensors")
    assert palate("train", output_dir="again", **base)[0] == 0
    code, _, errors = palate("train", **{**base, "output_dir": "again", "resume_from_checkpoint": "again/checkpoint-2"})
    assert code == 0, errors
    for name, tensor in load_file("again/pytorch_lora_weights.safetensors").items():
        assert torch.equal(tensor, whole[name])


def test_one_shape_for_all(palate, mixed, tmp_path):
    options = {"train_data": mixed, "cache_dir": tmp_path / "cache", "resolution": "64x32", "max_train_steps": 1}
    code, _, errors = palate("train", **options)
    assert code == 0, errors
    assert "pictures by shape" not in errors
    assert "pictures lose more than a tenth to the crop" in errors
    assert (Path("out/recipe.yaml").read_text().count("resolution: 64x32")) == 1
    Path("p.txt").write_text("a tree")
    code, _, errors = palate("generate", "out", prompts="p.txt", output_dir="drawn", **QUICK)
    assert code == 0, errors
    assert sizes("drawn") == [(64, 32)]
    code, _, errors = palate("train", **{**options, "resolution": 64, "output_dir": "one", "buckets": "true"})
    assert code == 0, errors
    assert "resolution 64 leaves no choice of shapes in steps of 64, so all pictures are 64; a lower bucket_step" in errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"resolution": "64x60"},
            "resolution is 64x60, but width and height must each be a positive multiple of 8: try 64x56 or 64",
        ),
        ({"resolution": "64*96"}, "resolution is '64*96'; expected a whole number"),
        ({"buckets": "true", "bucket_step": 12}, "bucket_step is 12; expected a multiple of 8"),
        ({"buckets": "true", "bucket_step": 4}, "bucket_step is 4; expected 8 to 1024"),
        ({"buckets": "true", "bucket_aspect": 0.5}, "bucket_aspect is 0.5; expected 1 to 10"),
        ({"width": 64}, "both in one: --resolution WIDTHxHEIGHT"),
        ({"enable_bucket": "true"}, "did you mean --buckets?"),
    ],
)
def test_mistakes(palate, options, said):
    code, _, errors = palate("train", **options)
    assert (code, said in errors) == (2, True), errors
    assert not Path("out").exists()


# Comparing -----------------------------------------------------------------------------------------------------------------


def test_compare_refuses_pictures_of_different_size(palate, model_dir, prompts_file):
    """Told by the settings, and of folders by hand, which have none, by the pictures themselves."""
    for name, resolution in (("one", 64), ("other", "64x96")):
        drawn = {"prompts": prompts_file, "num_prompts": 2, "output_dir": name, "resolution": resolution, **QUICK}
        assert palate("generate", model_dir, **drawn)[0] == 0
        assert palate("score", name, judges="jpeg_compressibility")[0] == 0
        Path(name, "settings.json").unlink()
    code, _, errors = palate("compare", "one", "other")
    assert (code, "2 of 2 pictures differ in size, such as" in errors, ": 64 in one and 64x96 in other" in errors) == (
        2,
        True,
        True,
    )
    code, _, errors = palate("compare", "one", "other", allow_different_settings="true")
    assert code == 0, errors
    assert "differ in size" in Path("comparison/report.html").read_text()
