"""Every run ends with pictures of before and after and a page, whatever its recipe names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palate.base.shapes import Shape
from palate.data.selection import same_prompt
from palate.evaluation.manifest import read_manifest
from palate.models.sd import StableDiffusion


def drawn(side: str) -> list[str]:
    return [picture.prompt for picture in read_manifest(f"out/evaluation/{side}")]


def prompts_of(folder: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in (folder / "metadata.jsonl").read_text().splitlines()}


def test_held_out_prompts_are_shown_before_and_after(palate, pairs_dir):
    code, _, errors = palate("train", validation_fraction=0.3)
    assert code == 0, errors
    about = json.loads(Path("out/run.json").read_text())
    assert drawn("base") == drawn("tuned") == about["compared"]
    assert 1 <= len(set(drawn("base"))) == len(drawn("base")) < 8
    assert set(drawn("base")) < prompts_of(pairs_dir)
    assert about["pairs"] < 16
    page = Path("out/report.html").read_text()
    assert "Before and after training. No judge has compared them." in page
    assert page.count('<figure class="pair">') == len(drawn("base"))
    assert Image.open("out/before_after.png").width > 0
    assert not Path("out/metrics.json").exists()
    (line,) = [line for line in errors.splitlines() if "drew before and after" in line]
    assert "palate evaluate out --evaluation_prompts partiprompts --judges '[pickscore]'" in line


def test_what_is_held_out_is_not_trained_on_also_with_a_set_of_its_own(palate, pairs_dir):
    code, _, errors = palate("train", validation_data=pairs_dir / "metadata.jsonl", max_train_samples=2)
    assert code == 2  # all its prompts are held out
    code, _, errors = palate("train", validation_fraction=0, max_train_steps=1)
    assert code == 0, errors
    assert "nothing is held out: the pictures before and after show prompts of the training data" in errors
    assert len(drawn("tuned")) == 8 == len({same_prompt(p) for p in drawn("tuned")})


def test_judges_that_are_named_judge_them(palate):
    code, said, errors = palate("train", validation_fraction=0.3, judges="[jpeg_compressibility]", num_evaluation_prompts=1)
    assert code == 0, errors
    assert len(drawn("base")) == 1
    assert "judge prefers" in said or "No clear difference" in said
    assert [c["judge"] for c in json.loads(Path("out/metrics.json").read_text())["comparisons"]] == ["jpeg_compressibility"]


def test_a_finished_run_is_compared_again_on_the_same_prompts_without_its_data(palate, pairs_dir):
    palate("train", validation_fraction=0.3)
    shown = drawn("tuned")
    code, _, errors = palate("evaluate", "out", judges="[jpeg_compressibility]", train_data="gone/", evaluation_seed=5)
    assert code == 0, errors
    card = Path("out/README.md").read_text()  # of how the weights were made
    assert [text in card for text in ("gone", pairs_dir.name, "training 0, evaluation 5")] == [False, True, True]
    assert drawn("tuned") == shown
    assert Path("out/metrics.json").is_file()
    assert palate("evaluate", "out")[0] == 0
    assert not Path("out/metrics.json").exists()  # it told of judges that this comparison has not asked


def test_a_comparison_that_is_stopped_leaves_two_sides_that_belong_together(palate, monkeypatch):
    """And the numbers of these: a page made of them shows what it tells of."""
    palate("train", validation_fraction=0.3, judges="[jpeg_compressibility]", num_evaluation_prompts=2)
    Path("others.txt").write_text("a lighthouse\na mill\n")
    before = [drawn(side) for side in ("base", "tuned")], Path("out/metrics.json").read_bytes()
    asked, generate = [], StableDiffusion.generate

    def stopped(self, *args, **options):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "generate", stopped)
        assert palate("evaluate", "out", evaluation_prompts="others.txt")[0] == 130
    assert ([drawn(side) for side in ("base", "tuned")], Path("out/metrics.json").read_bytes()) == before
    assert palate("evaluate", "out", evaluation_prompts="others.txt")[0] == 0
    shown = [one["prompt"] for one in json.loads(Path("out/metrics.json").read_text())["shown"]]
    assert drawn("base") == drawn("tuned") == shown == ["a lighthouse", "a mill"]


def test_null_is_no_comparison(palate):
    code, _, errors = palate("train", evaluation_prompts="null", max_train_steps=1)
    assert code == 0, errors
    assert not Path("out/evaluation").exists()
    assert "compared" not in json.loads(Path("out/run.json").read_text())


@pytest.mark.parametrize("judges", [None, "[jpeg_compressibility]"])
def test_online_training_shows_the_last_of_its_prompts(palate, prompts_file, judges):
    given = {"rounds": 1, "samples_per_round": 4, "updates_per_round": 1, "sample_num_steps": 2, "objective": "ddpo_is"}
    given |= {"train_data": None, "cache_dir": None, "max_train_steps": None, "num_evaluation_prompts": 2}
    code, _, errors = palate("train", train_prompts=prompts_file, judges=judges, **given)
    assert code == 0, errors
    lines = prompts_file.read_text().splitlines()
    assert drawn("tuned") == lines[:-3:-1]
    assert Path("out/report.html").is_file()


LINES = '{"prompt": "a red house", "seed": 7, "width": 96, "height": 64}\n{"prompt": "a blue tower", "seed": 7}\n'


def test_sample_prompts_and_comparison_have_their_own_seeds_and_sizes(palate, tmp_path):
    (tmp_path / "mine.jsonl").write_text(LINES)
    options = {"validation_prompts": "mine.jsonl", "evaluation_prompts": "mine.jsonl", "sample_steps": 1}
    code, _, errors = palate("train", **options, max_train_steps=1)
    assert code == 0, errors
    assert palate("generate", "out", prompts="mine.jsonl", output_dir="drawn", num_inference_steps=3)[0] == 0
    mine, compared = (read_manifest(Path(folder)) for folder in ("drawn", "out/evaluation/tuned"))
    assert [(p.seed, p.shape) for p in mine] == [(p.seed, p.shape) for p in compared] == [(7, Shape(64, 96)), (7, None)]
    for a, b in zip(mine, compared, strict=True):
        one, other = (
            np.asarray(Image.open(path).convert("RGB")).astype(int)
            for path in (f"drawn/{a.file}", f"out/evaluation/tuned/{b.file}")
        )
        assert np.abs(one - other).max() <= 1
    assert Image.open("out/samples/step-000001.png").width > 224


def test_a_size_that_cannot_be_drawn_is_refused_before_anything_is_encoded(palate, tmp_path):
    (tmp_path / "mine.jsonl").write_text(LINES.replace("96", "100"))
    for name in ("validation_prompts", "evaluation_prompts"):
        code, _, errors = palate("train", **{name: "mine.jsonl"}, cache_dir="new")
        assert (code, "sides must be" in errors or "multiple" in errors, len(errors.strip().splitlines())) == (2, True, 1), (
            errors
        )
        assert not any(Path("new").rglob("*.safetensors"))
        assert not Path("out").exists()
