"""The main job from the command line, on a tiny real Stable Diffusion."""

from __future__ import annotations

import functools
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from palate.base.shapes import Shape
from palate.data import encode
from palate.runs import recipe
from palate.runs import train as run
from palate.training.log import read_log

OBJECTIVES = ("dpo", "cpo", "sft")


def one_line(text: str, *parts: str) -> None:
    """An error told in one line that holds all parts."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    assert all(part in lines[0] for part in parts), lines[0]


@pytest.mark.parametrize("space", ["latent", "perceptual"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_in_every_space(palate, objective, space):
    keywords = {"objective.beta": 1000, "objective.bc_weight": 1} if objective == "cpo" else {}
    code, said, errors = palate("train", objective=objective, space=space, **keywords)
    assert (code, said) == (0, "")
    assert "Traceback" not in errors
    lines = read_log("out/log.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines[1:])
    made = recipe.load("out/recipe.yaml")
    assert (made.objective["name"], made.space["name"]) == (objective, space)
    assert any(t.abs().max() > 0 for n, t in load_file("out/pytorch_lora_weights.safetensors").items() if "lora_B" in n)


@pytest.mark.parametrize("space", ["latent", "perceptual"])
def test_an_objective_of_ones_own_trains(palate, monkeypatch, space):
    Path(f"own_{space}.py").write_text(
        "from palate.diffusion.denoising import Fit, Pair\n"
        "def squared_hinge(policy: Pair[Fit], reference: Pair[Fit], *, slope: float = 1.0):\n"
        "    gap = (policy.l.error - reference.l.error) - (policy.w.error - reference.w.error)\n"
        "    return (1 - slope * gap).clamp(min=0).square()\n"
    )
    code, _, errors = palate("train", objective=f"own_{space}:squared_hinge", space=space, **{"objective.slope": 500})
    assert code == 0, errors
    assert recipe.load("out/recipe.yaml").objective == {"name": f"own_{space}:squared_hinge", "slope": 500.0}
    assert any(t.abs().max() > 0 for n, t in load_file("out/pytorch_lora_weights.safetensors").items() if "lora_B" in n)


def test_paths_may_begin_at_home(palate, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, errors = palate("train", output_dir="~/there", max_train_steps=1)
    assert code == 0, errors
    assert recipe.load("there/recipe.yaml").training.output_dir == str(tmp_path / "there")


def test_a_sum_of_spaces_and_full_weights(palate):
    space = "[{name: latent, weight: 0.5}, {name: perceptual, layers: mid}]"
    code, _, errors = palate("train", space=space, train_method="full", max_train_steps=2)
    assert code == 0, errors
    assert Path("out/unet/config.json").is_file()
    assert recipe.load("out/recipe.yaml").space[1]["layers"] == "mid"


def test_everything_a_run_leaves(palate, judge_dir, prompts_file):
    extra = {"judges": f"[pickscore:{judge_dir}]", "evaluation_prompts": prompts_file, "lora_alpha": 8}
    code, said, errors = palate("train", **extra)
    assert code == 0, errors
    assert "judge prefers" in said
    found = {str(p.relative_to("out")) for p in Path("out").rglob("*")}
    assert found >= {
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors",
        "recipe.yaml",
        "run.json",
        "log.jsonl",
        "train.log",
        "samples/step-000000.png",
        "samples/step-000003.png",
        "before_after.png",
        "metrics.json",
        "report.html",
        "checkpoint-3",
        "evaluation/tuned/00003-00.png",
    }
    assert not [name for name in found if name.endswith((".tmp", ".saving")) or "/." in name]
    with safe_open("out/pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 8
    about = json.loads(Path("out/run.json").read_text())
    assert about["command"].startswith("palate train quick.yaml --pretrained_model_name_or_path ")
    assert about["versions"]["torch"] == torch.__version__
    assert (about["rows"], about["pairs"]) == (16, 14)
    made = recipe.load("out/recipe.yaml")
    assert recipe.load("out/recipe.yaml").as_dict() == made.as_dict()
    assert made.training.learning_rate == 1e-3
    assert made.policy.lora_alpha == 8.0
    assert made.objective == {"name": "dpo", "beta": 5000.0}
    report = Path("out/report.html").read_text()
    assert str(judge_dir) in report
    assert "palate train quick.yaml" in report
    # Again, from the saved weights: the same pictures and numbers.
    metrics, tuned = Path("out/metrics.json").read_bytes(), pictures("out/evaluation/tuned")
    for name in ("metrics.json", "report.html", "before_after.png"):
        Path("out", name).unlink()
    code, again, errors = palate("evaluate", "out")
    assert (code, again) == (0, said), errors
    assert Path("out/metrics.json").read_bytes() == metrics
    assert (pictures("out/evaluation/tuned") == tuned).all()
    # Other judges can be asked later.
    code, said, errors = palate("evaluate", "out", judges="[jpeg_compressibility]", num_evaluation_prompts=2)
    assert code == 0, errors
    assert [c["judge"] for c in json.loads(Path("out/metrics.json").read_text())["comparisons"]] == ["jpeg_compressibility"]


def pictures(folder: str | Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(Path(folder).glob("*.png"))]).astype(int)


def test_diffusers_draws_the_pictures_that_training_showed(palate, model_dir, judge_dir, prompts_file):
    from diffusers import StableDiffusionPipeline

    # A strong, visible change, at a strength (alpha / rank) that a reader must not lose.
    palate("train", learning_rate=0.05, lora_alpha=8, judges="[jpeg_compressibility]", evaluation_prompts=prompts_file)
    pipeline = StableDiffusionPipeline.from_pretrained(model_dir)
    pipeline.set_progress_bar_config(disable=True)
    options = recipe.load("out/recipe.yaml").evaluation
    prompts = prompts_file.read_text().splitlines()

    def draw() -> np.ndarray:
        images = pipeline(
            prompts,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[torch.Generator().manual_seed(options.evaluation_seed + i) for i in range(len(prompts))],
        ).images
        return np.stack([np.asarray(image) for image in images]).astype(int)

    # One grey level: convolutions may sum in another order, depending on where in memory their inputs lie.
    base, tuned = pictures("out/evaluation/base"), pictures("out/evaluation/tuned")
    assert np.abs(draw() - base).max() <= 1
    pipeline.load_lora_weights("out")
    assert np.abs(draw() - tuned).max() <= 1
    assert np.abs(tuned - base).max() > 10


def test_a_lora_trained_here_is_continued_here_and_loaded_by_plain_diffusers(palate, model_dir, prompts_file):
    from diffusers import StableDiffusionPipeline

    palate("train", learning_rate=0.05, lora_alpha=8, output_dir="first")
    options = {"judges": "[jpeg_compressibility]", "evaluation_prompts": prompts_file, "pretrained_lora": "first"}
    code, _, errors = palate("train", learning_rate=0.05, **options)
    assert code == 0, errors
    assert read_log("out/log.jsonl")[0]["held_out_accuracy"] == 0.5  # it begins as its own reference
    evaluation = recipe.load("out/recipe.yaml").evaluation
    prompts = prompts_file.read_text().splitlines()

    def draw(lora: str) -> np.ndarray:
        pipeline = StableDiffusionPipeline.from_pretrained(model_dir)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(lora)
        images = pipeline(
            prompts,
            num_inference_steps=evaluation.num_inference_steps,
            guidance_scale=evaluation.guidance_scale,
            generator=[torch.Generator().manual_seed(evaluation.evaluation_seed + i) for i in range(len(prompts))],
        ).images
        return np.stack([np.asarray(image) for image in images]).astype(int)

    before, after = pictures("out/evaluation/base"), pictures("out/evaluation/tuned")
    assert np.abs(draw("first") - before).max() <= 1
    assert np.abs(draw("out") - after).max() <= 1
    assert np.abs(after - before).max() > 10
    # Comparing again draws nothing, or with other steps all of it; resuming what is finished changes nothing.
    assert "generating" in palate("evaluate", "out", num_inference_steps=evaluation.num_inference_steps + 1)[2]
    assert np.abs(pictures("out/evaluation/base") - before).max() > 1
    code, _, errors = palate("evaluate", "out")
    assert code == 0, errors
    assert errors.count("generating") == 2
    code, _, errors = palate("evaluate", "out")
    assert code == 0, errors
    assert "generating" not in errors
    assert np.abs(pictures("out/evaluation/base") - before).max() <= 1
    assert np.abs(pictures("out/evaluation/tuned") - after).max() <= 1
    weights = load_file("out/pytorch_lora_weights.safetensors")
    code, _, errors = palate("train", learning_rate=0.05, **options, resume_from_checkpoint="latest")
    assert code == 0, errors
    assert all(torch.equal(t, weights[n]) for n, t in load_file("out/pytorch_lora_weights.safetensors").items())


def test_an_average_of_weights_is_what_is_saved(palate):
    palate("train", learning_rate=0.05, output_dir="plain")
    code, _, errors = palate("train", learning_rate=0.05, ema_decay=0.9, optimizer="adamw", max_train_steps=3)
    assert code == 0, errors
    plain, averaged = (load_file(f"{folder}/pytorch_lora_weights.safetensors") for folder in ("plain", "out"))
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)
    last = load_file("out/checkpoint-3/weights.safetensors")
    assert sorted(t.sum().item() for t in last.values()) == sorted(t.sum().item() for t in plain.values())


def test_a_second_run_encodes_nothing(palate, tmp_path, monkeypatch):
    encoded = []
    flush = encode._Queue.flush

    def counting(self):
        encoded.append(len(self.waiting))
        return flush(self)

    monkeypatch.setattr(encode._Queue, "flush", counting)
    options = {"cache_dir": tmp_path / "cache", "max_train_steps": 1}
    palate("train", **options)
    assert sum(encoded) == 32 + 8  # pictures and prompts, each once
    encoded.clear()
    assert palate("train", **options, output_dir="again")[0] == 0
    assert sum(encoded) == 0


def test_encoders_are_out_of_memory_while_training(palate, monkeypatch):
    from palate.training import loop

    seen = []
    update = loop._Run.update

    def watching(self, *args):
        seen.append((self.policy.denoiser.vae.loaded, self.policy.denoiser.texts[0].loaded))
        return update(self, *args)

    monkeypatch.setattr(loop._Run, "update", watching)
    palate("train", sample_steps=1)
    assert seen == [(False, False)] * 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resumed_is_uninterrupted_bit_for_bit(palate, method):
    options = {"train_method": method, "lr_warmup_steps": 3, "eval_steps": 2}
    palate("train", **options, max_train_steps=4, output_dir="straight")
    palate("train", **options, max_train_steps=2)
    recipe_before, about = Path("out/recipe.yaml").read_text(), Path("out/run.json").read_text()
    code, _, errors = palate("train", **options, max_train_steps=4, resume_from_checkpoint="latest", learning_rate=2e-3)
    assert code == 2
    one_line(errors, "learning_rate was 0.001, is 0.002")
    assert Path("out/recipe.yaml").read_text() == recipe_before
    code, _, errors = palate("train", **options, max_train_steps=4, resume_from_checkpoint="latest")
    assert code == 0, errors
    name = "pytorch_lora_weights.safetensors" if method == "lora" else "unet/diffusion_pytorch_model.safetensors"
    expected, found = (load_file(Path(folder, name)) for folder in ("straight", "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    without = [{k: v for k, v in line.items() if k != "seconds"} for line in read_log("straight/log.jsonl")]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in read_log("out/log.jsonl")] == without
    assert Path("out/run.json").read_text() == about
    assert recipe.load("out/recipe.yaml").training.resume_from_checkpoint is None
    code, _, errors = palate("train", **options, max_train_steps=4)
    assert code == 2
    one_line(errors, "out already holds a run", "--resume_from_checkpoint latest")


def test_ctrl_c_says_how_to_go_on(palate, monkeypatch):
    from palate.training import loop

    update = loop._Run.update

    def interrupting(self, done, signals):
        if done == 2:
            signal.raise_signal(signal.SIGINT)
        return update(self, done, signals)

    monkeypatch.setattr(loop._Run, "update", interrupting)
    code, said, errors = palate("train", checkpointing_steps=None, max_train_steps=4)
    assert (code, said) == (130, "")
    last = errors.strip().splitlines()[-1]
    assert last.startswith("stopped: after step 2;")
    assert "--resume_from_checkpoint latest" in last
    assert Path("out/checkpoint-2").is_dir()
    monkeypatch.undo()


@pytest.mark.parametrize(("when", "kept"), [(2, False), (3, True)])
def test_a_second_ctrl_c_goes_back_to_the_last_checkpoint(palate, monkeypatch, when, kept):
    from palate.training import loop

    update = loop._Run.update

    def interrupting(self, done, signals):
        if done == when:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return update(self, done, signals)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "update", interrupting)
        code, _, errors = palate("train", max_train_steps=4)
    assert code == 130
    assert ("goes on from checkpoint-2" if kept else "begins again") in errors.splitlines()[-1]
    # And so it does.
    assert palate("train", max_train_steps=4, resume_from_checkpoint="latest" if kept else None)[0] == 0


def test_ctrl_c_while_comparing_keeps_the_weights(palate, monkeypatch, prompts_file):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "compare_models", interrupted)
    code, _, errors = palate("train", judges="[jpeg_compressibility]", evaluation_prompts=prompts_file)
    assert code == 130
    assert "palate evaluate out" in errors.splitlines()[-1]
    assert Path("out/pytorch_lora_weights.safetensors").is_file()


@pytest.fixture
def v_model(model_dir, tmp_path):
    """The tiny model with a scheduler of v prediction."""
    import shutil

    folder = tmp_path / "v-model"
    shutil.copytree(model_dir, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    return folder


@pytest.mark.parametrize("space", ["latent", "perceptual"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_v_prediction_checkpointing_and_bf16(palate, v_model, space, method):
    options = {"gradient_checkpointing": "true", "mixed_precision": "bf16", "train_method": method, "space": space}
    code, _, errors = palate("train", pretrained_model_name_or_path=v_model, max_train_steps=2, **options)
    assert code == 0, errors
    lines = read_log("out/log.jsonl")
    assert lines[0]["held_out_accuracy"] == 0.5  # before training, policy and reference agree bit for bit
    assert lines[-1]["held_out_accuracy_low"] <= lines[-1]["held_out_accuracy"] <= lines[-1]["held_out_accuracy_high"]
    assert lines[1]["implicit_accuracy"] == 0.5
    assert lines[-1]["grad_norm"] > 0


def test_automatic_beta_dropped_captions_and_weighted_times(palate, v_model):
    options = {"objective.beta": "auto", "caption_dropout": 0.5, "snr_gamma": 5, "pretrained_model_name_or_path": v_model}
    code, _, errors = palate("train", **options, max_train_steps=2)
    assert code == 0, errors
    beta = json.loads(Path("out/run.json").read_text())["chosen"]["beta"]
    assert f"beta {beta:g}, chosen from the spread of errors" in errors
    assert [line["beta"] for line in read_log("out/log.jsonl") if "loss" in line] == [beta, beta]
    assert recipe.load("out/recipe.yaml").objective["beta"] == "auto"
    code, _, errors = palate("train", **options, max_train_steps=4, resume_from_checkpoint="latest")
    assert code == 0, errors
    assert read_log("out/log.jsonl")[-1]["beta"] == beta


def test_long_prompts_are_counted_and_bad_rows_told(palate, pairs_dir, tmp_path):
    import shutil

    folder = tmp_path / "pairs"
    shutil.copytree(pairs_dir, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[3]["prompt"] = rows[3]["prompt"] * 20
    rows[5]["chosen"] = "gone.png"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, errors = palate("train", train_data=folder, max_bad_rows=1)
    assert code == 0, errors
    assert "\n1 prompt is longer than the 40 tokens that the text encoder reads: its end is not seen\n" in errors
    assert "skipped metadata.jsonl, row 6" in errors
    assert "15 pairs, 1 bad rows skipped" in errors


def test_only_our_own_lines_are_printed(palate, tmp_path, model_dir, pairs_dir, judge_dir, prompts_file, cache_dir):
    import os
    import subprocess

    words = ["train", "quick.yaml", "--max_train_steps", "1", "--output_dir", "out", "--judges", f"[pickscore:{judge_dir}]"]
    words += ["--pretrained_model_name_or_path", str(model_dir), "--train_data", str(pairs_dir)]
    words += ["--cache_dir", str(cache_dir), "--evaluation_prompts", str(prompts_file)]
    done = subprocess.run(
        [sys.executable, "-m", "palate", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    wrote = ("wrote out", "wrote out")  # the LoRA and its twin in kohya's layout
    ours = ("16 rows: 16 pairs", "step 0", "step 1", *wrote, "generating 4", "generating 4", "compared in")
    lines = done.stderr.strip().splitlines()
    assert len(lines) == len(ours), done.stderr
    assert all(line.startswith(start) for line, start in zip(lines, ours, strict=True)), done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_a_dozen_lines_of_python_do_the_same(palate, model_dir, pairs_dir, cache_dir):
    palate("train", max_train_steps=2, validation_fraction=0, space="perceptual", output_dir="recipe")

    from palate.data.cache import TensorCache
    from palate.data.encode import encode_pairs
    from palate.data.pairs import read_pairs
    from palate.models.families import load_denoiser
    from palate.models.policy import Policy
    from palate.objectives.pairs import dpo
    from palate.spaces import perceptual
    from palate.training.loop import train
    from palate.training.options import TrainOptions
    from palate.training.steps import pair_step

    denoiser = load_denoiser(str(model_dir))
    pairs = encode_pairs(read_pairs(pairs_dir), denoiser.encoders(), cache=TensorCache(cache_dir), shapes=[Shape.square(64)])
    denoiser.release()
    policy = Policy(denoiser, rank=4)
    space = perceptual(policy.features, policy.schedule)
    step = pair_step(policy, space, functools.partial(dpo, beta=5000.0))
    train(step, policy, pairs, options=TrainOptions(learning_rate=1e-3, max_train_steps=2, output_dir="python"))
    policy.save("python")

    expected, found = (load_file(Path(folder, "pytorch_lora_weights.safetensors")) for folder in ("recipe", "python"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
