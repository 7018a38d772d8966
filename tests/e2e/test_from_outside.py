"""What people add without touching Palate: objectives, spaces, rewards, judges and families by ``module:name``, and Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import palate as python
from palate.base.errors import UserError
from palate.models.families import check_model, load_denoiser
from palate.runs import recipe

MINE = '''
from palate.models.sd import StableDiffusion

def soft(policy, reference, *, beta=2000.0):
    """DPO by hand, without annotations."""
    import torch
    gain = (reference.w.error - policy.w.error) - (reference.l.error - policy.l.error)
    return -torch.nn.functional.logsigmoid(beta * gain)

def liked(policy, label):
    return policy.error * label

def confused(policy, reference):
    return policy.wrong

def blurred(*, size=2):
    """Errors of blocks of pixels."""
    import torch

    class Blurred:
        t_min = 0

        def __call__(self, noised):
            return lambda output: torch.nn.functional.avg_pool2d(output.float(), size)

    return Blurred()

def of_features(features, schedule, *, layers="mid"):
    from palate.spaces import perceptual
    return perceptual(features, schedule, layers=layers)

def red(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2))

def judge(images, prompts):
    return images[:, 0].mean(dim=(1, 2))

class Mine(StableDiffusion):
    pass

not_a_class = 3
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "outside_things.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "outside_things"
    sys.modules.pop("outside_things", None)


def losses() -> list[float]:
    rows = map(json.loads, Path("out/log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_an_objective_needs_no_annotation(palate, mine):
    assert recipe.build({"objective": f"{mine}:soft"}).method.evidence == "pairs"
    assert recipe.build({"objective": f"{mine}:liked"}).method.evidence == "samples"
    code, _, errors = palate("train", objective=f"{mine}:soft", **{"objective.beta": 1000})
    assert code == 0, errors
    by_hand = losses()
    palate("train", objective="dpo", output_dir="other", **{"objective.beta": 2000})  # beta / 2 is in the formula
    rows = map(json.loads, Path("other/log.jsonl").read_text().splitlines())
    assert by_hand == pytest.approx([row["loss"] for row in rows if "loss" in row], rel=1e-5)


def test_an_objective_that_fits_nothing_is_refused_with_what_it_raised(mine):
    with pytest.raises(
        UserError, match=r"on pairs AttributeError: .*wrong.*on samples AttributeError: .*wrong.*policy\.w\.error"
    ):
        recipe.build({"objective": f"{mine}:confused"})


@pytest.mark.parametrize("space", ["blurred", "of_features"])
def test_a_space_from_outside_trains_alone_and_in_a_sum(palate, mine, space):
    code, _, errors = palate("train", space=f"{mine}:{space}", max_train_steps=1)
    assert code == 0, errors
    assert recipe.load("out/recipe.yaml").space["name"] == f"{mine}:{space}"
    both = f"[{{name: latent, weight: 0.5}}, {{name: '{mine}:{space}', weight: 0.5}}]"
    code, _, errors = palate("train", space=both, max_train_steps=1, output_dir="sum")
    assert code == 0, errors
    with pytest.raises(UserError, match="has no option 'sise'"):
        recipe.build({"space": {"name": f"{mine}:{space}", "sise": 3}})


def test_a_family_from_outside_trains_and_draws(palate, mine, model_dir, prompts_file):
    model = f"{mine}:Mine@{model_dir}"
    assert check_model(model) == f"{mine}:Mine"
    code, _, errors = palate("train", pretrained_model_name_or_path=model, judges=f"[{mine}:judge]", num_evaluation_prompts=1)
    assert code == 0, errors
    assert Path("out/report.html").is_file()
    code, _, errors = palate("generate", "out", prompts=prompts_file, output_dir="drawn", num_inference_steps=2)
    assert code == 0, errors
    code, _, errors = palate("generate", model, prompts=prompts_file, output_dir="base", num_inference_steps=2)
    assert code == 0, errors
    for wrong, said in ((f"{mine}:Gone@{model_dir}", "Gone"), (f"{mine}:Mine@gone", "no model at gone")):
        code, _, errors = palate("train", pretrained_model_name_or_path=wrong, output_dir="wrong")
        assert (code, said in errors) == (2, True), errors


def test_a_run_from_python_is_that_of_the_command_line(palate, model_dir, pairs_dir, cache_dir, tmp_path):
    options = {
        "pretrained_model_name_or_path": model_dir,
        "train_data": pairs_dir,
        "cache_dir": cache_dir,
        "max_train_steps": 3,
    }
    folder = python.train("quick.yaml", output_dir=tmp_path / "python", objective={"name": "dpo", "beta": 300}, **options)
    assert folder == tmp_path / "python"
    assert palate("train", **{"objective.beta": 300})[0] == 0
    weights = "pytorch_lora_weights.safetensors"
    assert Path("out", weights).read_bytes() == (folder / weights).read_bytes()
    command = json.loads((folder / "run.json").read_text())["command"]
    assert command.startswith("palate.train('quick.yaml', output_dir='")
    with pytest.raises(UserError, match="did you mean --learning_rate"):
        python.train("quick.yaml", lr=3)


def test_the_miniature_is_known_by_name_in_python_too():
    assert load_denoiser("mini-sd").default_resolution == 64
