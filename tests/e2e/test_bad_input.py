"""Every mistake of a user: exit code 2, one line that names it, and no output folder."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def refused(palate):
    """Runs ``palate train`` with a mistake in it and returns the line that says so."""

    def run(*words: object, **options: object) -> str:
        existed = Path("out").exists()
        code, said, errors = palate("train", *words, **options)
        lines = errors.strip().splitlines()
        assert code == 2, errors
        assert said == ""
        # A run that came as far as training has shown its log before; nothing follows the error.
        assert [line.startswith("error: ") for line in lines].index(True) == len(lines) - 1, errors
        assert Path("out").exists() == existed
        return lines[-1]

    return run


@pytest.fixture
def pairs(pairs_dir, tmp_path):
    """A copy of the pairs with every row changed by a function of the row and its number."""

    def make(change) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(pairs_dir, folder)
        path = folder / "metadata.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        changed = [change(row, number) for number, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed if row))
        return folder

    return make


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are loaded: the mistake could have been seen before."""
    from palate.models.parts import Source

    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Source, "read", loaded)


EARLY = [
    ({"learning_rat": 1e-3}, "unknown option --learning_rat (did you mean --learning_rate?"),
    ({"trainin.seed": 1}, "no section 'trainin' (did you mean 'training'?"),
    ({"training.rank": 1}, "unknown option --training.rank"),
    ({"objective": "dop"}, "no objective named 'dop' (did you mean 'dpo'? choose from "),
    ({"objective": "cdpo", "objective.label_smoothing": 0.5}, "label_smoothing is 0.5; expected the share of wrong votes"),
    ({"objective.beta": -5000}, "objective dpo: beta is -5000.0; expected a positive number"),
    ({"objective": "kto", "objective.disliked_weight": -1}, "objective kto: disliked_weight is -1.0; expected 0 or more"),
    ({"objective": "orpo", "objective.beta": "auto"}, "objective orpo has no option 'beta'"),
    ({"pretrained_lora": "nowhere"}, "no LoRA at nowhere: expected a .safetensors file, or a folder"),
    ({"pretrained_lora": "out", "train_method": "full"}, "pretrained_lora continues a LoRA, but train_method is full"),
    ({"optimizer": "adam"}, "optimizer is 'adam' (did you mean 'adamw'?"),
    ({"caption_dropout": 2}, "caption_dropout is 2.0; expected a share from 0 to 1"),
    ({"snr_gamma": -1}, "snr_gamma is -1.0; expected a positive number"),
    ({"ema_decay": 1}, "ema_decay is 1.0; expected between 0 and 1"),
    ({"objective": "cpo"}, "objective cpo needs beta, bc_weight"),
    ({"objective.bta": 1}, "objective dpo has no option 'bta' (did you mean 'beta'?"),
    ({"objective.beta": "much"}, "beta is 'much'; expected a number"),
    ({"objective": "json:dumps"}, "json:dumps raises on pairs"),
    ({"objective": "nowhere.to_be:found"}, "No module named 'nowhere'"),
    ({"objective": "json:found"}, "has no attribute 'found'"),
    ({"space": "latnt"}, "no space named 'latnt' (did you mean 'latent'?"),
    ({"space": "perceptual", "space.layers": "middle"}, "layers 'middle'"),
    ({"space": "perceptual", "space.steps_back": 0}, "steps_back is 0"),
    ({"space": "perceptual", "space.normalise": "maybe"}, "normalise is 'maybe'; expected true or false"),
    ({"space": "[{name: latent, weight: -1}]"}, "weights of spaces must be positive"),
    ({"learning_rate": "abc"}, "learning_rate is 'abc'; expected a number"),
    ({"learning_rate": "nan"}, "learning_rate is 'nan'; expected a number"),
    ({"learning_rate": -1}, "learning_rate is -1.0; expected a positive number"),
    ({"max_train_steps": 1.5}, "max_train_steps is '1.5'; expected a whole number or null"),
    ({"max_train_steps": 0}, "max_train_steps is 0; expected at least 1"),
    ({"gradient_checkpointing": "on"}, "gradient_checkpointing is 'on'; expected true or false"),
    ({"train_method": "foo"}, "train_method is 'foo' (choose from full, lora)"),
    ({"rank": 0}, "rank is 0; expected 1 to 4096"),
    ({"rank": 10**6}, "rank is 1000000; expected 1 to 4096"),
    ({"train_batch_size": 10**9}, "train_batch_size is 1000000000; expected 1 to 65536"),
    ({"adam_weight_decay": 1e6}, "which at learning_rate 0.001 takes 1000 of every weight in every step: 0.01 is usual"),
    ({"adam_epsilon": 0}, "adam_epsilon is 0.0; expected a positive number"),
    ({"adam_beta1": 1}, "adam_beta1 is 1.0; expected 0 or more and below 1"),
    ({"resolution": 10**9}, "resolution is 1000000000; expected a multiple of 8 up to 8192"),
    ({"lora_alpha": 0}, "lora_alpha is 0.0; expected a positive number"),
    ({"resolution": 60}, "resolution is 60, but it must be a positive multiple of 8: try 56 or 64"),
    ({"validation_fraction": 1}, "validation_fraction is 1.0"),
    ({"ties": "kep"}, "ties is 'kep' (did you mean 'keep'?"),
    ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
    ({"lr_scheduler": "cosin"}, "did you mean 'cosine'?"),
    ({"columns": "{prompt: text}"}, "columns maps 'prompt' to 'text', which is missing"),
    ({"columns": "[a"}, "--columns is not readable YAML"),
    ({"columns": "prompt"}, "columns is 'prompt'; expected a mapping"),
    ({"train_data": "gone.parquet"}, "gone.parquet does not exist"),
    ({"pretrained_model_name_or_path": "./gone"}, "no model at ./gone"),
    ({"pretrained_model_name_or_path": "empty"}, "model_index.json is missing"),
    ({"pretrained_model_name_or_path": "one.safetensors"}, "from_single_file"),
    ({"resume_from_checkpoint": "latest"}, "out holds no checkpoint to resume from"),
    ({"resume_from_checkpoint": "checkpoint-9"}, "there is no checkpoint at checkpoint-9"),
    ({"output_dir": "quick.yaml"}, "output_dir quick.yaml is a file"),
    ({"output_dir": "quick.yaml/out"}, "output_dir quick.yaml/out cannot be written to (Not a directory)"),
    ({"judges": "[pickscor:folder]"}, "no judge 'pickscor:folder'"),
    ({"judges": "[pickscore]"}, "hf download yuvalkirstain/PickScore_v1"),
    ({"judges": "[pickscore:gone]"}, "no folder gone"),
    ({"judges": "[pickscore:empty]"}, "empty has no config.json"),
    ({"judges": "[aesthetic:JUDGE]"}, "no aesthetic head"),
    ({"evaluation_prompts": "gone.txt", "judges": "[jpeg_compressibility]"}, "gone.txt does not exist"),
    ({"evaluation_prompts": "blank.txt", "judges": "[jpeg_compressibility]"}, "blank.txt has no prompts"),
    ({"num_inference_steps": 0}, "num_inference_steps is 0"),
]


@pytest.mark.parametrize(("options", "message"), EARLY, ids=[message[:40] for _, message in EARLY])
def test_refused_before_weights_are_loaded(refused, no_weights, tmp_path, judge_dir, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "one.safetensors").write_bytes(b"")
    options = {name: str(value).replace("JUDGE", str(judge_dir)) for name, value in options.items()}
    assert message in refused(**options)


def other_lora(file: Path) -> None:
    save_file({"unet.nowhere.to_q.lora_A.weight": torch.ones(2, 8), "unet.nowhere.to_q.lora_B.weight": torch.ones(8, 2)}, file)


BEFORE_ENCODING = [
    ({"t_min": 1000}, "times 1000 to 999 are outside the schedule; choose 0 <= t_min <= t_max <= 999"),
    ({"t_max": 5000}, "times 0 to 5000 are outside the schedule"),
    ({"space": "perceptual", "space.steps_back": 800, "t_max": 700}, "apart from time 800 on, and t_max is 700: raise t_max"),
    ({"pretrained_lora": "other.safetensors"}, "unet.nowhere.to_q"),
]


@pytest.mark.parametrize(("options", "message"), BEFORE_ENCODING, ids=[message[:30] for _, message in BEFORE_ENCODING])
def test_refused_before_anything_is_encoded(refused, monkeypatch, options, message):
    other_lora(Path("other.safetensors"))
    monkeypatch.setattr("palate.runs.train.encoded_of", lambda *_: pytest.fail("pictures were encoded"))
    assert message in refused(**options)


RECIPES = [
    ("objective: {name: [}", "not readable YAML"),
    ("- a\n- b", "holds list; expected sections"),
    ("trainng: {seed: 1}", "unknown section 'trainng' (did you mean 'training'?"),
    ("training: {sed: 1}", "unknown option 'sed' (did you mean 'seed'?"),
    ("training: 5", "training holds 5; expected options such as"),
    ("objective: {beta: 5}", "expected a name such as"),
    ("space: 3", "expected a name such as"),
    ("training: {seed: [1]}", "seed is [1]; expected a whole number"),
    ("policy: {gradient_checkpointing: 1}", "expected true or false"),
    ("model: {1: 2}", "unknown option 1"),
]


@pytest.mark.parametrize(("text", "message"), RECIPES, ids=[text[:20] for text, _ in RECIPES])
def test_a_recipe_that_cannot_be(refused, no_weights, text, message):
    Path("bad.yaml").write_text(text)
    assert message in refused("bad.yaml")


def test_no_such_recipe(refused, no_weights):
    assert "no recipe named 'miniatur-dpo' (did you mean 'miniature-dpo'?" in refused("miniatur-dpo")
    assert "no recipe file at gone.yaml" in refused("gone.yaml")
    Path("latin.yaml").write_bytes(b"# \xe9")
    assert "latin.yaml cannot be read" in refused("latin.yaml")


ROWS = [
    (lambda row, n: {k: v for k, v in row.items() if k != "rejected"}, "'rejected'"),
    (lambda row, n: {**row, "prompt": 3}, "row 1, column prompt"),
    (lambda row, n: {**row, "chosen": "gone.png"}, "row 1, column chosen: 'gone.png' does not exist"),
    (lambda row, n: {**row, "chosen": "metadata.jsonl"}, "is not a picture"),
    (lambda row, n: None, "is empty"),
    (lambda row, n: votes(row, 0.5), "has only ties (16 pairs)"),
    (lambda row, n: votes(row, 1.5), "row 1, column label"),
]


def votes(row, label):
    return {"prompt": row["prompt"], "image_0": row["chosen"], "image_1": row["rejected"], "label": label}


@pytest.mark.parametrize(("change", "message"), ROWS, ids=[message for _, message in ROWS])
def test_data_that_cannot_be_used_is_refused_before_weights_are_loaded(refused, no_weights, pairs, change, message):
    assert message in refused(train_data=pairs(change))


def test_more_bad_rows_than_allowed(refused, pairs):
    folder = pairs(lambda row, n: {**row, "chosen": "gone.png"} if n in (8, 11) else row)
    line = refused(train_data=folder, max_bad_rows=1)
    assert "row 9" in line
    assert "row 12" in line


def test_models_that_are_none_of_ours(refused, no_weights, model_dir):
    shutil.copytree(model_dir, "other")
    index = Path("other/model_index.json")
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "PixArtSigmaPipeline"))
    line = refused(pretrained_model_name_or_path="other")
    assert "is a PixArtSigmaPipeline; supported pipelines: StableDiffusionPipeline" in line
    index.write_text("{")
    assert "model_index.json of other is damaged" in refused(pretrained_model_name_or_path="other")


def test_a_hub_id_without_a_network_says_what_to_download(refused, no_weights, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = refused(pretrained_model_name_or_path="someone/some-model")
    assert "hf download someone/some-model --local-dir models/some-model" in line
    assert "--pretrained_model_name_or_path models/some-model" in line


def test_an_option_without_value_or_name(refused, no_weights):
    assert "--seed lacks a value; expected a whole number" in refused("quick.yaml", "--seed", "--rank", "4")
    assert "'rank' is not an option" in refused("quick.yaml", "rank")
    assert "expects a recipe first" in refused("--rank")


def test_a_model_that_lacks_a_part(refused, model_dir):
    shutil.copytree(model_dir, "partial")
    shutil.rmtree("partial/vae")
    assert "cannot be loaded" in refused(pretrained_model_name_or_path="partial")


def test_a_folder_that_holds_something(refused, no_weights):
    Path("out").mkdir()
    Path("out/recipe.yaml").write_text("")
    assert "already holds a run, without checkpoints; name another --output_dir" in refused()
    Path("out/checkpoint-5").mkdir()
    assert "continue it with --resume_from_checkpoint latest" in refused()
    assert "checkpoint out/checkpoint-5 is damaged" in refused(resume_from_checkpoint="latest")


WRITERS = ["palate.runs.recipe.write", "palate.evaluation.grid.before_after_grid", "palate.data.cache.os.pwrite"]


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk(refused, monkeypatch, tmp_path, writer, existed):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "the file")

    if existed:
        Path("out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        line = refused(cache_dir=tmp_path / "cache")
    assert "full" in line or "No space left on device" in line
    assert not existed or not list(Path("out").iterdir())


def test_a_full_disk_at_the_end_keeps_the_checkpoint(palate, monkeypatch):
    from palate.models.sd import StableDiffusion

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "save_lora", full)
        code, _, errors = palate("train")
    assert code == 2
    assert "pytorch_lora_weights.safetensors cannot be written" in errors.splitlines()[-1]
    assert Path("out/checkpoint-3").is_dir()
    assert palate("train", resume_from_checkpoint="latest")[0] == 0
    assert Path("out/pytorch_lora_weights.safetensors").is_file()


def test_evaluating_what_is_not_there(palate, prompts_file):
    def one_line(*words, **options):
        code, _, errors = palate("evaluate", *words, **options)
        assert code == 2
        (line,) = errors.strip().splitlines()
        return line

    assert palate("evaluate")[:2] == palate("evaluate", "--help")[:2]
    assert "expects the folder of a finished run" in one_line(judges="x")
    assert "gone holds no recipe.yaml" in one_line("gone")
    palate("train", max_train_steps=1, evaluation_prompts="null")
    assert "add --evaluation_prompts FILE" in one_line("out")
    for option in ("learning_rate", "training.seed", "rank", "output_dir", "objective.beta", "space", "train_prompts"):
        assert f"--{option} is of training, which is over; palate evaluate takes" in one_line("out", **{option: 3})
    assert "unknown option --jdges (did you mean --judges?" in one_line("out", jdges=3)
    run = json.loads(Path("out/run.json").read_text())
    for wrong in (5, "a cat", ["a cat", None], {"a": 1}):
        Path("out/run.json").write_text(json.dumps({**run, "compared": wrong}))
        assert re.search("compared is .*, expected a list of prompts; mend it", one_line("out"))
    Path("out/run.json").write_text(json.dumps(run))
    given = {"evaluation_prompts": prompts_file, "judges": "[jpeg_compressibility]"}
    weights = Path("out/pytorch_lora_weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    assert "no readable safetensors file" in one_line("out", **given)
    weights.unlink()
    assert "is the training finished?" in one_line("out", **given)
