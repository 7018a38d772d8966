"""A LoRA file at every door of the command line: drawing, continuing, exporting, measuring, and families that only draw."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from palate.models.families import load_denoiser
from palate.models.files import KOHYA_FILE, LORA_FILE


@pytest.fixture
def lora(model_dir, tmp_path):
    """Writes a LoRA of all queries under names that a function makes of each layer's and of A or B."""

    def write(named, **more) -> Path:
        noise = torch.Generator().manual_seed(0)
        tensors = {}
        for name, module in load_denoiser(str(model_dir)).network.named_modules():
            if name.endswith("to_q"):
                out, into = module.weight.shape
                tensors[named(name, "A")] = torch.randn(2, into, generator=noise)
                tensors[named(name, "B")] = torch.randn(out, 2, generator=noise)
        save_file({**tensors, **more}, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors"

    return write


@pytest.fixture
def doors(palate, model_dir, pairs_dir, prompts_file):
    """Every command that takes a LoRA file; returns what each said."""

    def through(file) -> dict[str, tuple[int, str]]:
        base = {"pretrained_model_name_or_path": model_dir}
        draw = {"prompts": prompts_file, "num_prompts": 1, "num_inference_steps": 2, "output_dir": "drawn"}
        answers = {
            "generate": palate("generate", model_dir, lora=file, **draw),
            "train": palate("train", pretrained_lora=file, max_train_steps=1, validation_prompts="[]"),
            "export": palate("export", file, format="kohya", output="k.safetensors", **base),
            "accuracy": palate("accuracy", pairs_dir, model=f"[{model_dir}]", lora=f"[{file}]", max_pairs=2, timesteps=1),
        }
        return {door: (code, errors) for door, (code, _, errors) in answers.items()}

    return through


NAMES = {
    "peft": lambda name, half: f"base_model.model.{name}.lora_{half}.weight",
    "ddpo": lambda name, half: f"{name.replace('to_q', 'processor.to_q')}_lora.{'down' if half == 'A' else 'up'}.weight",
    "bare": lambda name, half: f"{name}.lora_{half}.weight",
}


@pytest.mark.parametrize("names", NAMES)
def test_good_files_pass_every_door(doors, lora, names):
    answers = doors(lora(NAMES[names]))
    assert {code for code, _ in answers.values()} == {0}, answers


REFUSED = {
    "it does not fit, 1 of its": {
        "unet.down_blocks.9.attentions.0.to_q.lora_A.weight": torch.ones(2, 8),
        "unet.down_blocks.9.attentions.0.to_q.lora_B.weight": torch.ones(8, 2),
    },
    "an OFT": {"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": torch.ones(2, 4, 4)},
    "a DoRA in kohya's layout": {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(8, 1)},
    "with whole differences of weights": {"diffusion_model.conv_in.diff_b": torch.ones(8)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_understood_passes_no_door(doors, lora, message):
    for door, (code, errors) in doors(lora(NAMES["bare"], **REFUSED[message])).items():
        assert code == 2, door
        lines = errors.strip().splitlines()
        assert message in lines[-1], door
        assert "family" not in lines[-1]
    assert not Path("drawn").exists()
    assert not Path("k.safetensors").exists()
    assert not Path("out").exists()


def test_finite_matrices_of_which_the_product_is_not_pass_no_door(doors, lora):
    tensors = load_file(file := lora(NAMES["bare"]))
    for name in list(tensors)[:2]:
        tensors[name] = torch.full_like(tensors[name], 3e20)
    save_file(tensors, file)
    for door, (code, errors) in doors(file).items():
        assert (code, "holds numbers that float32 does not hold" in errors.splitlines()[-1]) == (2, True), door
    assert not Path("drawn/manifest.jsonl").exists()
    assert not Path("k.safetensors").exists()


def test_a_lora_that_is_on_a_hub(doors):
    for door, (code, errors) in doors("owner/lora").items():
        assert (code, "hf download owner/lora --local-dir DIR" in errors) == (2, True), door


def test_a_strength_of_nothing(palate, lora, model_dir, prompts_file):
    alphas = {
        f"{n}.alpha": torch.tensor(0.0) for n, _ in load_denoiser(str(model_dir)).network.named_modules() if n.endswith("to_q")
    }
    file = lora(NAMES["bare"], **alphas)
    draw = {"prompts": prompts_file, "num_prompts": 1, "num_inference_steps": 2, "output_dir": "drawn"}
    code, _, errors = palate("generate", model_dir, lora=file, **draw)
    assert (code, "changes nothing: every alpha is 0" in errors) == (0, True)
    code, _, errors = palate("train", pretrained_lora=file)
    assert (code, "changes nothing and cannot learn to (every alpha is 0)" in errors) == (2, True)
    assert not Path("out").exists()
    base = {"pretrained_model_name_or_path": model_dir}
    code, _, errors = palate("export", file, format="diffusers", output="d", **base)
    assert (code, "there is nothing to export" in errors) == (2, True)


def test_equal_runs_write_equal_files_in_every_process(palate, tmp_path):
    """The order of sets differs between processes, by PYTHONHASHSEED; that of a LoRA's layers must not."""
    options = {"max_train_steps": 1, "lora_layers": "all", "validation_prompts": "[]", "output_dir": "recipe"}
    assert palate("train", **options)[0] == 0
    code, found = "import sys; from palate.cli import main; sys.exit(main(sys.argv[1:]))", []
    for seed in ("1", "2"):
        words = [sys.executable, "-c", code, "train", tmp_path / "recipe/recipe.yaml", "--output_dir", tmp_path / seed / "out"]
        own = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, words)), env={**os.environ, **own}, check=True, capture_output=True, timeout=300)
        found.append([(tmp_path / seed / "out" / name).read_bytes() for name in (LORA_FILE, KOHYA_FILE)])
    assert found[0] == found[1]


# What the last act needs is tried in the first ------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "MySamplerScheduler"},
            "is a MySamplerScheduler, a class that diffusers",
        ),
        ("unet/config.json", {"in_channels": 9}, "is of a model for inpainting"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "is an AutoencoderTiny; it is for previews"),
    ],
)
def test_a_model_that_cannot_be_compared_is_not_trained(
    palate, model_dir, tmp_path, prompts_file, monkeypatch, part, changes, message
):
    from palate.models.parts import Source

    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Source, "read", loaded)
    shutil.copytree(model_dir, tmp_path / "changed")
    path = tmp_path / "changed" / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    code, _, errors = palate("train", pretrained_model_name_or_path="changed")
    assert (code, message in errors.strip().splitlines()[-1]) == (2, True), errors
    code, _, errors = palate("generate", "changed", prompts=prompts_file, output_dir="drawn")
    assert (code, message in errors, errors.count("\n")) == (2, True, 1), errors
    assert not Path("out").exists()
    assert not Path("drawn").exists()


def test_half_a_model_in_half_precision(palate, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "changed")
    unet = tmp_path / "changed" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: t.half() for n, t in load_file(unet).items()}, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    unet.unlink()
    model = {"pretrained_model_name_or_path": "changed", "max_train_steps": 1, "validation_prompts": "[]"}
    code, _, errors = palate("train", **model)
    assert (code, errors.strip().splitlines()[-1].endswith("add --variant fp16")) == (2, True), errors
    code, _, errors = palate("train", **model, variant="fp16")
    assert code == 0, errors
