"""Options that have no effect are told, and have none."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from palate.runs import library, recipe
from palate.runs.idle import idle, idle_line
from palate.training.log import read_log

ONLINE = {
    "rewards": "jpeg_compressibility",
    "samples_per_round": 4,
    "sample_batch_size": 4,
    "sample_num_steps": 2,
    "updates_per_round": 1,
    "group_size": 2,
    "rounds": 2,
    "max_train_steps": None,
    "train_data": None,
}
TRACKER = {"tracker_buffer_size": 20, "tracker_min_count": 1}
ADVANTAGES = {"advantage": "group", "adv_clip": 0.1, "global_std": "true"}
SOFTMAX = {"temperature": 0.1, "standardise_rewards": "true"}
PATH = {"window_start": 1, "window_size": 1, "timestep_fraction": 0.3}
TIMES = {"t_min": 300, "t_max": 700, "snr_gamma": 5}
PAIRS = {"random_flip": "true", "center_crop": "false", "validation_fraction": 0.4, "buckets": "true", "num_train_epochs": 5}
WATCHED = {"held_out_pictures": 3, "eval_steps": 1}
LORA = {"rank": 8, "lora_alpha": 2, "lora_layers": "all"}
ADAM = {"adam_beta1": 0.1, "adam_beta2": 0.2, "adam_epsilon": 1e-3}
WAYS = {
    "offline": (
        {
            "optimizer_options": "{betas: [0.8, 0.9], eps: 1e-6, weight_decay: 0.1}",
            "validation_fraction": 0,
            "checkpointing_steps": "null",
        },
        {
            **ADAM,
            "adam_weight_decay": 0.5,
            "eval_steps": 1,
            "checkpoints_total_limit": 1,
            "refiner_start": 0.4,
            "num_train_epochs": 7,
            "bucket_step": 16,
            "bucket_aspect": 2,
        },
    ),
    "full": ({"train_method": "full", "rank": 16, "optimizer": "adafactor"}, {**LORA, **ADAM}),
    "a LoRA goes on": (
        {"pretrained_lora": "before", "rank": 16, "optimizer": "torch.optim:SGD"},
        {**LORA, **ADAM, "adam_weight_decay": 0.5},
    ),
    "ddpo_is": (
        {**ONLINE, "objective": "ddpo_is", "advantage": "round"},
        {**TRACKER, **SOFTMAX, **TIMES, **PAIRS, **WATCHED, "weighting": "percentile", "percentile": 50, "global_std": "true"},
    ),
    "rwr": ({**ONLINE, "objective": "sft"}, {**TRACKER, **ADVANTAGES, **PATH, **PAIRS, "percentile": 50}),
    "sparse rwr": ({**ONLINE, "objective": "sft", "weighting": "percentile"}, {**TRACKER, **ADVANTAGES, **PATH, **SOFTMAX}),
    "nft": (
        {**ONLINE, "objective": "nft", "weighting": "advantage", "sample_eta": 0, "advantage": "group"},
        {**TRACKER, **PATH, **SOFTMAX, **WATCHED, "percentile": 50, "kl_samples": 2},
    ),
    "online dpo": (
        {**ONLINE, "objective": "dpo", "sample_guidance_scale": 1, "train_batch_size": 2},
        {
            **ADVANTAGES,
            **TRACKER,
            **PATH,
            **SOFTMAX,
            "weighting": "threshold",
            "threshold": 0.5,
            "guidance_in_training": "false",
        },
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_options_without_effect_are_told_and_change_no_number(palate, prompts_file, tmp_path, way):
    used, unused = WAYS[way]
    undrawn = {"evaluation_prompts": "null", "validation_prompts": "[]"} if way != "offline" else {}
    used = {**undrawn, **used, **({"train_prompts": prompts_file} if "rewards" in used else {})}
    if "pretrained_lora" in used:
        assert palate("train", output_dir=used["pretrained_lora"])[0] == 0
    found = {}
    for folder, options in (("without", used), ("with", {**used, **unused})):
        code, _, errors = palate("train", output_dir=folder, **options)
        assert code == 0, errors
        (file,) = [*(tmp_path / folder).glob("*lora_weights.safetensors"), *(tmp_path / folder).glob("unet/*.safetensors")]
        log = [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(tmp_path / folder / "log.jsonl")]
        found[folder] = load_file(file), log
        told = next((line for line in errors.splitlines() if line.startswith("without effect here: ")), "")
        made = recipe.load(str(tmp_path / folder / "recipe.yaml"))
        assert set(idle(made)) == (set(unused) if folder == "with" else set())
        assert told == (idle_line(made) or "")
    (weights, log), (others, other_log) = found["without"], found["with"]
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    assert log == other_log


@pytest.mark.parametrize("name", library.built_in())
def test_published_recipes_name_nothing_without_effect(name):
    made = recipe.load(name)
    # Those for real models leave it to the user to name a judge to be watched by.
    assert set(idle(made)) == ({"eval_steps"} if made.online.train_prompts and not made.online.held_out_rewards else set())


def test_a_plan_tells_them_too(palate):
    code, told, errors = palate("plan", optimizer="adafactor", adam_beta1=0.5, adam_beta2=0.5, bucket_step=64)
    assert code == 0, errors
    assert "without effect here: adam_beta1, adam_beta2 (for optimizer adamw and adamw_8bit, without the same in" in told
    assert "; bucket_step (for buckets)" in told


def test_layers_of_text_encoders_that_a_lora_lacks_count(palate):
    assert palate("train", output_dir="before")[0] == 0
    options = {"pretrained_lora": "before", "train_text_encoder": True, "lora_layers": "all", "rank": 16}
    assert idle(recipe.load("quick.yaml", options)) == {}
