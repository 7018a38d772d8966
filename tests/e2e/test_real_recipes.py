"""The recipes for published models, carried out for two steps with tiny models of the same architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palate.runs import library, recipe

FLOWS = ("zimage", "klein", "flux")
PUBLISHED = [name for name in library.built_in() if not name.startswith("miniature-")]
ONLINE = [name for name in PUBLISHED if recipe.load(name).online.train_prompts is not None]
REAL = [name for name in PUBLISHED if name not in ONLINE]


SMALL = {"resolution": 64, "mixed_precision": "no", "validation_prompts": "[]", "logging_steps": 1}
SMALL |= {"num_evaluation_prompts": 2, "num_inference_steps": 2}  # of what is drawn nothing is asked here


@pytest.fixture
def tiny_of(model_dir, sdxl_dir, sd3_dir, flow_dir):
    """The tiny model of a recipe's family."""

    def folder(name: str) -> Path:
        family = next((word for word in name.split("-") if word in (*FLOWS, "sd35", "sdxl")), "sd")
        plain = {"sd": model_dir, "sdxl": sdxl_dir, "sd35": sd3_dir}
        return plain[family] if family in plain else flow_dir(family)

    return folder


def test_there_are_those_of_the_papers_and_for_one_gpu():
    assert {"sd15-dpo", "sdxl-dpo", "sd15-ncp-dpo", "sdxl-ncp-dpo", "sdxl-ncp-cpo", "sdxl-ncp-sft", "sdxl-sft"} <= set(REAL)
    assert {"sd15-cpo", "sd15-ncp-cpo"} <= set(REAL)
    sizes = {"sd35": 24, "zimage": 24, "klein": 16, "flux": 24}
    assert {f"{name}-dpo-{size}gb" for name, size in sizes.items()} <= set(REAL)
    perceptual = {"sd35": 24, "zimage": 32, "klein": 24, "flux": 32}  # computes in float32
    assert {f"{name}-ncp-dpo-{size}gb" for name, size in perceptual.items()} <= set(REAL)
    assert {f"{name}-{way}-24gb" for name in sizes for way in ("nft", "grpo")} <= set(ONLINE)
    assert {f"sdxl-dpo-{size}gb" for size in (12, 16, 24)} <= set(REAL)
    assert {"ddpo-sd14", "ddpo-sd14-full", "ddpo-sd15-24gb", "ddpo-sdxl-lora", "ddpo-sdxl-24gb"} <= set(ONLINE)


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_trains_at_small_size(palate, name, tiny_of):
    made = recipe.load(name)
    assert "Not run with these weights by us" in library.find(name).read_text()
    tiny = {**SMALL, "max_train_steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 2, "validation_fraction": 0}
    if made.training.optimizer == "adamw_8bit":  # needs a GPU
        tiny["optimizer"] = "adamw"
    code, _, err = palate("train", name, pretrained_model_name_or_path=tiny_of(name), lr_warmup_steps=0, **tiny)
    assert code == 0, err
    lines = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert Path("out", "unet" if made.policy.train_method == "full" else "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_recipe_trains_at_small_size(palate, name, tiny_of, prompts_file):
    made = recipe.load(name)
    assert "Not run with these weights by us" in library.find(name).read_text()
    tiny = {**SMALL, "rounds": 1, "samples_per_round": 4, "sample_num_steps": 2, "max_train_steps": None}
    tiny |= {"train_data": None, "cache_dir": None}
    tiny |= {"train_prompts": prompts_file}  # the recipe's own are found in test_online
    if made.online.rewards == ("pickscore",):  # whose weights are not here
        tiny["rewards"] = "jpeg_compressibility"
    if made.online.group_size > 1:
        tiny["group_size"] = 2
    if made.online.window_size is not None:
        tiny["window_size"] = 1
    if made.online.window_end is not None:
        tiny["window_end"] = 2
    code, _, err = palate("train", name, pretrained_model_name_or_path=tiny_of(name), train_batch_size=1, **tiny)
    assert code == 0, err
    lines = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(
        range(1, 1 + made.online.updates_per_round * made.online.inner_epochs)
    )


def test_a_recipe_for_less_memory_is_the_same_training():
    """Cut into other batches, and else as the recipe it is named after."""
    large, small = (recipe.load(name).as_dict() for name in ("ddpo-sdxl-lora", "ddpo-sdxl-24gb"))
    for made in (large, small):
        made["evaluation"].pop("evaluation_batch_size")
        made["online"].pop("sample_batch_size")
        made["training"].pop("train_batch_size")
    assert large == small
    for dpo, cpo in (("sd15-ncp-dpo", "sd15-ncp-cpo"), ("sdxl-ncp-dpo", "sdxl-ncp-cpo")):
        assert recipe.load(dpo).training == recipe.load(cpo).training


def test_what_the_papers_say():
    """Diffusion-DPO: batch 2048, 1e-8 a pair, a quarter of warm-up, 20 % of captions dropped. NCP: rank 64, 512 pairs."""
    for name in ("sd15-dpo", "sdxl-dpo"):
        made = recipe.load(name)
        training = made.training
        pairs = 16 * training.train_batch_size * training.gradient_accumulation_steps
        assert (pairs, training.caption_dropout) == (2048, 0.2)
        assert training.learning_rate == pytest.approx(1e-8 * pairs)
        assert training.lr_warmup_steps == training.max_train_steps / 4
        assert made.policy.train_method == "full"
    assert recipe.load("sdxl-dpo").training.optimizer == "adafactor"
    for name in ("sd15-ncp-dpo", "sdxl-ncp-dpo"):
        made = recipe.load(name)
        pairs = made.training.train_batch_size * made.training.gradient_accumulation_steps
        assert pairs == 512
        assert made.training.learning_rate == pytest.approx(1e-8 * pairs)
        assert (made.policy.rank, made.training.optimizer, made.data.absolute_winners) == (64, "adamw_8bit", True)
        assert made.objective == {"name": "dpo", "beta": 2 * 2500}
