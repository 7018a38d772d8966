"""``palate export``: a run, a LoRA and full weights to every format; nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

KOHYA = "pytorch_lora_weights_kohya.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def run(palate, tmp_path) -> Path:
    options = {"rank": 2, "lora_alpha": 3, "lora_layers": "all", "resolution": 32, "validation_prompts": "[]"}
    assert palate("train", max_train_steps=1, **options)[0] == 0
    return tmp_path / "out"


def test_a_run_in_every_format(palate, run, tmp_path, model_dir):
    with safe_open(run / KOHYA, "pt") as opened:
        told = opened.metadata()
    assert (told["ss_output_name"], told["ss_learning_rate"], told["ss_seed"]) == ("out", "0.001", "0")
    assert told["ss_training_comment"] == "Palate: dpo (beta 5000.0)"
    assert told["modelspec.resolution"] == "32x32"  # that of the training, not the model's own 64

    code, said, err = palate("export", "out", format="kohya", output="k/my.safetensors", dtype="fp16")
    assert (code, said) == (0, "wrote k/my.safetensors\n"), err
    twin, half = load_file(run / KOHYA), load_file(tmp_path / "k" / "my.safetensors")
    assert all(torch.equal(half[n], twin[n].half()) for n in twin)
    # From the file alone, as somebody else's LoRA, and back.
    base = {"pretrained_model_name_or_path": model_dir}
    assert palate("export", f"out/{KOHYA}", format="diffusers", output="back", **base)[:2] == (0, f"wrote back/{DIFFUSERS}\n")
    ours, back = load_file(run / DIFFUSERS), load_file(tmp_path / "back" / DIFFUSERS)
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[n], back[n]) for n in ours)
    assert palate("export", "out", format="merged-unet", output="unet")[0] == 0
    assert palate("export", "back", format="pipeline", output="pipe", **base)[0] == 0
    merged, whole = (load_file(tmp_path / d / "diffusion_pytorch_model.safetensors") for d in ("unet", "pipe/unet"))
    assert all(torch.equal(merged[n], whole[n]) for n in merged)
    # What was merged is that LoRA.
    code, said, _ = palate("export", "unet", format="lora-from-full", output="again", rank=2, **base)
    assert code == 0
    assert "a LoRA of rank 2 in" in said
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [DIFFUSERS, KOHYA]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_run_of_all_weights(palate, tmp_path):
    assert palate("train", max_train_steps=1, train_method="full", validation_prompts="[]")[0] == 0
    assert not (tmp_path / "out" / KOHYA).exists()
    code, said, err = palate("export", "out", format="lora-from-full", output="lora", energy=0.9, lora_layers="attention")
    assert code == 0, err
    assert "of the change of all weights" in said
    assert palate("export", "out", format="merged-unet", output="unet", dtype="fp16")[0] == 0
    code, _, err = palate("export", "out", format="kohya", output="k.safetensors")
    assert code == 2
    assert "holds a whole U-Net, no LoRA: use --format lora-from-full" in err


MISTAKES = [
    ("out", {"format": "kohja"}, "format is 'kohja' (did you mean 'kohya'?"),
    ("out", {"output": "k"}, "expected a name that ends in .safetensors"),
    ("out", {"output": "quick.safetensors"}, "quick.safetensors is there already"),
    ("out", {"rank": 4}, "rank and energy are of lora-from-full"),
    ("out", {"format": "lora-from-full", "output": "l"}, "out is a LoRA already"),
    ("out", {"format": "lora-from-full", "energy": 2}, "energy is 2.0; expected a share"),
    ("out", {"dtype": "fp8"}, "dtype is 'fp8'"),
    ("gone", {}, "no LoRA at gone"),
    ("owner/model", {}, "hf download owner/model"),
    ("text.safetensors", {}, "is no readable safetensors file"),
    (f"out/{DIFFUSERS}", {}, "name the model it was trained on with --pretrained_model_name_or_path"),
    ("other.safetensors", {"pretrained_model_name_or_path": "MODEL"}, "other.safetensors"),
]


def test_mistakes_are_told_and_leave_nothing(palate, run, tmp_path, model_dir):
    (tmp_path / "quick.safetensors").write_text("")
    (tmp_path / "text.safetensors").write_text("no weights")
    tensors = load_file(run / KOHYA)
    save_file({n.replace("attn1", "attn9"): x for n, x in tensors.items()}, tmp_path / "other.safetensors")
    before = sorted(tmp_path.rglob("*"))
    for name, options, message in MISTAKES:
        given = {"format": "kohya", "output": "new.safetensors", **options}
        given = {n: model_dir if v == "MODEL" else v for n, v in given.items()}
        code, said, err = palate("export", name, **given)
        assert (code, said) == (2, "")
        assert message in err
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before


LAYOUTS = [("kohya", "new.safetensors"), ("diffusers", "new"), ("merged-unet", "new"), ("pipeline", "new")]


@pytest.mark.parametrize(("layout", "output"), LAYOUTS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1e6, "hold numbers above 65504, where fp16 ends: use --dtype bf16 or fp32"),
        (1e-12, "is left in fp16"),
        (0.0, "nothing to export"),
    ],
)
def test_a_file_that_would_be_useless_is_not_written(palate, run, tmp_path, layout, output, value, message):
    tensors = {n: torch.full_like(t, value) for n, t in load_file(run / DIFFUSERS).items()}
    with safe_open(run / DIFFUSERS, "pt") as opened:
        save_file(tensors, run / DIFFUSERS, metadata=opened.metadata())
    code, said, err = palate("export", "out", format=layout, output=output, dtype="fp16")
    assert (code, said) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / output).exists()


@pytest.mark.parametrize(("layout", "output"), LAYOUTS[:2])
def test_layers_that_a_file_loses_are_told(palate, run, tmp_path, layout, output):
    tensors = load_file(run / DIFFUSERS)
    first = next(n for n in tensors if n.endswith("lora_B.weight"))
    tensors = {n: t + 1e-2 if "lora_B" in n else t for n, t in tensors.items()} | {first: torch.full_like(tensors[first], 1e-9)}
    with safe_open(run / DIFFUSERS, "pt") as opened:
        save_file(tensors, run / DIFFUSERS, metadata=opened.metadata())
    code, said, err = palate("export", "out", format=layout, output=output, dtype="fp16")
    assert code == 0, err
    assert said.startswith("1 of ")
    assert "lose their change in fp16: use --dtype fp32 to keep it" in said
    assert palate("export", "out", format=layout, output=f"fine-{output}")[:2][1].startswith("wrote ")
