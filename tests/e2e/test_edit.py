"""``palate generate`` from pictures, scored, compared and labelled; mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palate.data.pairs import read_pairs
from palate.evaluation.manifest import read_manifest

QUICK = {"num_inference_steps": 4, "guidance_scale": 3}


@pytest.fixture
def edit(palate, model_dir, tmp_path):
    """The same wish for three photos, and a fourth prompt; the photos lie beside the prompts."""
    rng = np.random.default_rng(0)
    (tmp_path / "set" / "photos").mkdir(parents=True)
    rows = []
    for number in range(4):
        pixels = rng.integers(0, 255, (40 + 8 * number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 60)).save(tmp_path / f"set/photos/{number}.png")
        rows.append({"prompt": "in winter" if number < 3 else "a red house", "init_image": f"photos/{number}.png"})
    (tmp_path / "set/prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(output_dir, model=model_dir, **options):
        return palate("generate", model, output_dir=output_dir, **{"prompts": "set/prompts.jsonl", **QUICK, **options})

    return run


def drawn(folder):
    return np.stack([np.asarray(Image.open(Path(folder, p.file))) for p in read_manifest(folder)]).astype(int)


def test_from_pictures_to_a_report(edit, palate):
    code, said, errors = edit("base", strength=0.5)
    assert (code, said) == (0, "drew 4 of 4 pictures of tiny-sd, 0 were there; see base\n"), errors
    pictures = read_manifest("base")
    assert len({p.init_image for p in pictures}) == 4
    assert [Image.open(Path("base", str(p.init_image))).size for p in pictures] == [(64, 64)] * 4
    assert json.loads(Path("base/settings.json").read_text())["strength"] == 0.5
    # Another batch, another process: the same; without --init_image the prompt's own picture, with it still.
    assert edit("again", strength=0.5, batch_size=1, init_image="set/photos/0.png")[0] == 0
    assert np.abs(drawn("again") - drawn("base")).max() <= 1
    assert edit("base", strength=0.5)[1] == "drew 0 of 4 pictures of tiny-sd, 4 were there; see base\n"
    code, _, errors = edit("base", strength=0.75)
    assert (code, "base was begun with strength 0.5, now 0.75" in errors) == (2, True)
    # A tuned model edits the same pictures from the same noise.
    palate("train", learning_rate=0.05, lora_alpha=8, output_dir="run", max_train_steps=1)
    assert edit("tuned", "run", strength=0.5)[0] == 0
    assert np.abs(drawn("tuned") - drawn("base")).mean() > 0.5
    for side in ("base", "tuned"):
        assert palate("score", side, judges="jpeg_compressibility")[0] == 0
    code, _, errors = palate("compare", "base", "tuned")
    assert code == 0, errors
    told = json.loads(Path("comparison/comparison.json").read_text())
    # The same words about three photos are three tasks.
    assert (told["prompts"], told["comparisons"][0]["win_rate"]["prompts"]) == (4, 4)
    assert {shown["init_image"] for shown in told["shown"]} == {p.init_image for p in pictures}
    assert Path("comparison/report.html").read_text().count("what was edited") == 4
    # Candidates for a pair are edits of one picture.
    code, said, errors = palate("label", "base", "tuned", judges="jpeg_compressibility", output="p.parquet", ties="keep")
    assert said.startswith("4 prompts, 4 pairs"), errors
    assert sorted(p.prompt for p in read_pairs("p.parquet", ties="keep")) == ["a red house", *["in winter"] * 3]


def test_one_picture_for_all_and_sdxl(edit, palate, sdxl_dir, prompts_file):
    options = {"prompts": prompts_file, "num_prompts": 2}
    code, _, errors = edit("one", sdxl_dir, **options, init_image="set/photos/0.png")
    assert code == 0, errors
    assert len({p.init_image for p in read_manifest("one")}) == 1
    assert json.loads(Path("one/settings.json").read_text())["strength"] == 0.8
    assert edit("plain", sdxl_dir, **options)[0] == 0
    assert "strength" not in json.loads(Path("plain/settings.json").read_text())
    assert np.abs(drawn("one") - drawn("plain")).max() > 1
    assert edit("other", sdxl_dir, **options, init_image="set/photos/1.png")[0] == 0
    for side in ("one", "other"):
        assert palate("score", side, judges="jpeg_compressibility")[0] == 0
    code, _, errors = palate("compare", "one", "other")
    assert (code, "was edited from different pictures in one and other" in errors) == (2, True)


def test_another_folder_is_refused_before_weights_are_read(edit, monkeypatch):
    from palate.runs.models import NamedModel

    assert edit("out", strength=0.5, resolution=64, num_prompts=1)[0] == 0
    monkeypatch.setattr(NamedModel, "load", None)  # not to be called
    for options, said in (
        ({"strength": 0.75}, "begun with strength 0.5, now 0.75"),
        ({"seed": 1}, "begun with seed 0, now 1"),
        ({"num_inference_steps": 8}, "begun with num_inference_steps 4, now 8"),
        ({"resolution": 32}, "begun with resolution 64, now 32"),
        ({"model_name": "other"}, "begun with name 'tiny-sd', now 'other'"),
        ({"prompts": "set/plain.txt", "strength": None}, "begun with strength 0.5, now None"),
        ({"prompts": "set/plain.txt", "init_image": "set/photos/1.png"}, "out/00000-00.png was edited from"),
    ):
        Path("set/plain.txt").write_text("in winter\n")
        code, _, errors = edit("out", **{"strength": 0.5, "num_prompts": 1, **options})
        assert (code, said in errors, len(errors.splitlines())) == (2, True, 1), errors


def test_training_and_its_comparison_say_that_they_do_not_edit(edit, palate):
    told = "4 prompt(s) name an init_image, and all pictures are drawn from noise: only 'palate generate' edits"
    code, _, errors = palate("train", max_train_steps=1, evaluation_prompts="set/prompts.jsonl", validation_prompts="[a tree]")
    assert code == 0, errors
    assert told in errors.splitlines()
    code, _, errors = palate("evaluate", "out")
    assert code == 0, errors
    assert told in errors.splitlines()
    code, _, errors = palate("evaluate", "out", num_evaluation_prompts=1, refiner_start=0.5)
    assert code == 0, errors
    assert told.replace("4", "1") in errors.splitlines()
    assert "without effect here: refiner_start (for a refiner)" in errors.splitlines()


def write(**row):
    Path("set/own.jsonl").write_text(json.dumps({"prompt": "in winter", **row}) + "\n")


def test_mistakes(edit, prompts_file, refiner_dir, sdxl_dir):
    Path("outside.png").write_bytes(Path("set/photos/0.png").read_bytes())
    Path("set/cut.png").write_bytes(Path("set/photos/0.png").read_bytes()[:900])
    Path("set/link.png").symlink_to(Path("outside.png").resolve())
    for path, said in (
        ("gone.png", "set/gone.png of prompt 'in winter' does not exist"),
        ("cut.png", "set/cut.png of prompt 'in winter' cannot be decoded"),
        ("../outside.png", "'../outside.png' of prompt 'in winter' leads outside"),
        ("link.png", "'link.png' of prompt 'in winter' leads outside"),
        ("photos", "cannot be read (Is a directory)"),
        (3, "is 3; expected a path"),
    ):
        write(init_image=path)
        code, _, errors = edit("out", prompts="set/own.jsonl")
        assert (code, said in errors, len(errors.splitlines())) == (2, True, 1), errors
    with Path("set/prompts.jsonl").open("a") as stream:
        stream.write('{"prompt": "a tower"}\n')
    for options, said in (
        ({}, "prompt 'a tower' names no init_image, others do"),
        ({"prompts": prompts_file, "strength": 0.5}, "there is nothing to edit"),
        ({"init_image": "gone.png", "prompts": prompts_file}, "gone.png of prompt"),
        ({"init_image": "outside.png", "strength": 0.1}, "strength is 0.1 of 4 steps"),
        ({"init_image": "outside.png", "model": sdxl_dir, "refiner": refiner_dir}, "an edited picture is not refined"),
    ):
        code, _, errors = edit("out", **options)
        assert (code, said in errors, len(errors.splitlines())) == (2, True, 1), errors
    assert not Path("out").exists()
