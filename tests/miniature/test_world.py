"""The embedded checkpoints and pairs are what they claim to be, read by plain libraries."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from palate.miniature import world
from palate.miniature.captions import scene_of
from tools.miniature import scenes


def test_stable_diffusion_loads_in_plain_diffusers_and_draws() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(world.checkpoint("mini-sd"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.steps_offset == 1
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert pipe.unet.config.cross_attention_dim == pipe.text_encoder.config.hidden_size
    picture = pipe("a red house on the left, on a green meadow", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)


def test_sdxl_loads_in_plain_diffusers_and_draws() -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(world.checkpoint("mini-sdxl"), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.steps_offset == 1
    assert pipe.tokenizer_2.pad_token == "!"
    widths = pipe.text_encoder.config.hidden_size, pipe.text_encoder_2.config.hidden_size
    assert pipe.unet.config.cross_attention_dim == sum(widths)
    assert pipe.config.force_zeros_for_empty_prompt
    picture = pipe("a red house on the left, on a green meadow", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)


def test_sd3_loads_in_plain_diffusers_and_draws() -> None:
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(world.checkpoint("mini-sd3"), text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder_3 is None
    assert pipe.tokenizer_2.pad_token == "!"
    assert pipe.transformer.config.qk_norm == "rms_norm"
    picture = pipe("a red house on the left, on a green meadow", num_inference_steps=2, height=64, width=96).images[0]
    assert picture.size == (96, 64)


@pytest.mark.parametrize("name", sorted(world.JUDGES))
def test_judges_load_in_plain_transformers(name: str) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    folder = world.checkpoint(name)
    clip, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    size = clip.config.vision_config.image_size
    ids = tokenizer(["a red house"], return_tensors="pt").input_ids
    assert clip(input_ids=ids, pixel_values=torch.zeros(1, 3, size, size)).logits_per_image.shape == (1, 1)


def test_the_held_out_judge_shares_nothing_with_the_labelling_one() -> None:
    first, second = (json.loads((world.checkpoint(n) / "config.json").read_text()) for n in ("mini-pickscore", "mini-heldout"))
    assert first["vision_config"]["hidden_size"] != second["vision_config"]["hidden_size"]


@pytest.mark.parametrize(
    ("name", "model", "least"),
    [
        ("miniature-pairs", "mini-sd", 2000),
        ("miniature-sdxl-pairs", "mini-sdxl", 1000),
        ("miniature-sd3-pairs", "mini-sd3", 1000),
    ],
)
def test_pairs_have_pick_a_pic_columns_and_about_an_eighth_ties(name: str, model: str, least: int) -> None:
    table = pq.read_table(world.pairs(name))
    assert table.num_rows >= least
    assert set(table["model_0"].to_pylist()) == {model}
    for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "best_image_uid", "user_id", "model_0"):
        assert name in table.column_names
    label = table["label_0"].to_pylist()
    assert set(label) <= {0.0, 0.5, 1.0}
    assert 0.09 < label.count(0.5) / len(label) < 0.15
    assert Image.open(io.BytesIO(table["jpg_0"][0].as_py())).size == (64, 64)


@pytest.mark.parametrize("name", sorted(world.PAIRS))
def test_unseen_prompts_are_in_no_pair(name: str) -> None:
    unseen = world.unseen_prompts().read_text().splitlines()
    trained = {scene_of(c) for c in pq.read_table(world.pairs(name), columns=["caption"])["caption"].to_pylist()}
    assert len(unseen) >= 192
    assert not trained & {scene_of(p) for p in unseen}
    assert all(scenes.is_held_out(scene_of(p)) for p in unseen)


def test_every_checkpoint_has_a_card_with_measurements() -> None:
    for name in (*world.MODELS, "mini-rater", *world.JUDGES):
        assert "| measured | value |" in (world.checkpoint(name) / "README.md").read_text()


def test_sizes_stay_small() -> None:
    def megabytes(folder: Path) -> float:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6

    assert megabytes(world.ROOT / "checkpoints") < 60
    assert sum(megabytes(world.ROOT / folder) for folder in world.PAIRS.values()) < 25
