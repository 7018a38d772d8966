"""The whole job with the families of rectified flow, each the real architecture at a tiny random size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from palate.diffusion.denoising import draw
from palate.evaluation.manifest import read_manifest
from palate.online import rollouts
from palate.runs import online
from palate.training import fits
from palate.training.log import read_log

SIDE = 64


@pytest.fixture(params=["zimage", "klein", "flux"])
def folder(request, flow_dir):
    return flow_dir(request.param)


def losses(folder: str) -> list[float]:
    return [line["loss"] for line in read_log(Path(folder) / "log.jsonl") if "loss" in line]


def trained(folder: str) -> dict:
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def test_pairs_are_learned_from_continued_and_drawn(palate, folder, prompts_file):
    options = {"pretrained_model_name_or_path": folder, "resolution": SIDE, "checkpointing_steps": 2}
    options |= {"objective": "dpo", "validation_prompts": "[a red house]", "sample_steps": 2, "caption_dropout": 0.2}
    code, _, errors = palate("train", **options, max_train_steps=2)
    assert code == 0, errors
    code, _, errors = palate("train", **options, max_train_steps=3, resume_from_checkpoint="latest")
    assert code == 0, errors
    code, _, errors = palate("train", **options, max_train_steps=3, output_dir="whole")
    assert code == 0, errors
    found, whole = trained("out"), trained("whole")
    assert all(name.startswith("transformer.") for name in found)
    assert any(bool(x.any()) for name, x in found.items() if "lora_B" in name)
    assert found.keys() == whole.keys()
    assert all(bool((found[name] == whole[name]).all()) for name in found)  # resumed as if it had never stopped
    assert losses("out") == losses("whole")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] in Path("out/README.md").read_text()
    drawn = {"prompts": prompts_file, "num_inference_steps": 2, "resolution": SIDE}
    code, _, errors = palate("generate", "out", output_dir="drawn", **drawn)
    assert code == 0, errors
    assert len(read_manifest("drawn")) == 4
    assert palate("export", "out", format="pipeline", output="merged")[0] == 0
    assert palate("generate", "merged", output_dir="again", **drawn)[0] == 0


OWN = {"train_prompts": "animals", "train_data": None, "rewards": "jpeg_compressibility", "samples_per_round": 4}
OWN |= {
    "sample_batch_size": 4,
    "train_batch_size": 2,
    "sample_num_steps": 3,
    "updates_per_round": 1,
    "validation_prompts": "[]",
}
GROUPS = {"group_size": 2, "advantage": "group", "global_std": "true", "sample_guidance_scale": 1}
WAYS = {
    "ddpo_is": {"objective": "ddpo_is", "sample_num_steps": 2},
    "ddpo_tr in a window that moves": {"objective": "ddpo_tr", **GROUPS, "sample_rule": "flow_sde", "window_size": 1}
    | {"window_end": 2},
    "awm": {"objective": "awm", **GROUPS, "weighting": "advantage", "sample_eta": 0},
    "online dpo": {"objective": "dpo", **GROUPS},
}


@pytest.mark.parametrize("way", WAYS)
def test_its_own_pictures_are_learned_from(palate, folder, way):
    options = {"pretrained_model_name_or_path": folder, "resolution": SIDE, "max_train_steps": 2}
    code, _, errors = palate("train", **options, **{**OWN, **WAYS[way]})
    assert code == 0, errors
    assert len(losses("out")) == 2
    assert all(map(math.isfinite, losses("out")))
    assert any(bool(x.any()) for name, x in trained("out").items() if "lora_B" in name)


def test_a_trust_region_holds_the_policy_of_a_flow(palate, flow_dir):
    """Flow-DPPO: `ddpo_tr` without a limit is `ddpo_is` without a clip; with one, steps that have left it are left out."""
    options = {"pretrained_model_name_or_path": flow_dir("flux"), "resolution": SIDE, **OWN, **GROUPS, "sample_rule": "cps"}
    options |= {"rounds": 1, "max_train_steps": None, "inner_epochs": 2, "train_batch_size": 4, "learning_rate": 3e-2}
    runs = {
        "unclipped": {"objective.name": "ddpo_is", "objective.clip_range": 1e9},
        "unbounded": {"objective.name": "ddpo_tr", "objective.trust_region": 1e9},
        "bounded": {"objective.name": "ddpo_tr", "objective.trust_region": 1e-9},
    }
    for name, objective in runs.items():
        code, _, errors = palate("train", **options, **objective, objective=None, output_dir=name)
        assert code == 0, errors
    assert losses("unbounded") == losses("unclipped")
    moved = {name: [line["moved"] for line in read_log(Path(name) / "log.jsonl") if "loss" in line] for name in list(runs)[1:]}
    assert moved["bounded"][0] == moved["unbounded"][0] == 0  # the policy that sampled
    assert moved["bounded"][1] == moved["unbounded"][1] > 1e-9
    assert losses("bounded")[0] == losses("unbounded")[0]
    assert losses("bounded")[1] != losses("unbounded")[1]  # of the steps that have gone too far


SPACES = {
    "half": "{name: perceptual, layers: half, steps_back: 20}",
    "sum": "[{name: latent}, {name: perceptual, layers: all, target_time: uniform}]",
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_pairs_are_learned_from_in_the_perceptual_space(palate, folder, space):
    options = {"objective.name": "dpo", "objective.beta": "auto", "objective": None, "space": space, "mixed_precision": "bf16"}
    options |= {"pretrained_model_name_or_path": folder, "resolution": SIDE, "gradient_checkpointing": "true"}
    code, _, errors = palate("train", **options, max_train_steps=2, validation_prompts="[]")
    assert code == 0, errors
    assert "chosen from the spread of errors" in errors
    assert all(map(math.isfinite, losses("out")))
    assert any(bool(x.any()) for name, x in trained("out").items() if "lora_B" in name)


def test_half_precision_and_checkpointing(palate, folder):
    options = {"mixed_precision": "bf16", "gradient_checkpointing": "true", "lora_layers": "all", "max_train_steps": 1}
    code, _, errors = palate("train", pretrained_model_name_or_path=folder, resolution=SIDE, **options)
    assert code == 0, errors
    assert all(bool(x.isfinite().all()) for x in trained("out").values())
    assert any(bool(x.any()) for name, x in trained("out").items() if "lora_B" in name)


@pytest.mark.parametrize("name", ["klein", "flux"])
def test_a_grid_is_the_times_of_sampling_at_the_size_of_the_pictures(palate, flow_dir, name, monkeypatch):
    """Their shift depends on the size, so the grid does."""
    trained_at, sampled_at = set(), set()

    def spied(*args, **kwargs):
        noised = draw(*args, **kwargs)
        trained_at.update(noised.t.tolist())
        return noised

    class Spied(rollouts.Rollouts):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            sampled_at.update(t for path in self.paths.values() for t in path.t.tolist())

    monkeypatch.setattr(fits, "draw", spied)
    monkeypatch.setattr(online, "Rollouts", Spied)
    own = {"train_prompts": "animals", "train_data": None, "rewards": "jpeg_compressibility", "objective": "nft"}
    own |= {"samples_per_round": 4, "group_size": 2, "advantage": "group", "weighting": "advantage", "adv_clip": 1}
    own |= {"sample_batch_size": 4, "train_batch_size": 4, "sample_num_steps": 3, "sample_eta": 0, "updates_per_round": 1}
    options = {"pretrained_model_name_or_path": flow_dir(name), "resolution": SIDE, "max_train_steps": 3}
    code, _, errors = palate("train", **options, time_density="grid", **own)
    assert code == 0, errors
    assert trained_at == sampled_at - {1000.0}  # where nothing is left of the picture
    assert any(bool(x.any()) for key, x in trained("out").items() if "lora_B" in key)
