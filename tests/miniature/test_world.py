"""The embedded checkpoints and pairs are what they claim to be, read by plain libraries."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from palate.miniature import scenes, world


def test_stable_diffusion_loads_in_plain_diffusers_and_draws() -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(world.checkpoint("mini-sd"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.steps_offset == 1
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert pipe.unet.config.cross_attention_dim == pipe.text_encoder.config.hidden_size
    picture = pipe("a red house on the left, on a green meadow", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)


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


def test_pairs_have_pick_a_pic_columns_and_about_an_eighth_ties() -> None:
    table = pq.read_table(world.pairs())
    assert table.num_rows >= 2000
    for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "best_image_uid", "user_id", "model_0"):
        assert name in table.column_names
    label = table["label_0"].to_pylist()
    assert set(label) <= {0.0, 0.5, 1.0}
    assert 0.09 < label.count(0.5) / len(label) < 0.15
    assert Image.open(io.BytesIO(table["jpg_0"][0].as_py())).size == (64, 64)


def test_unseen_prompts_are_in_no_pair() -> None:
    unseen = world.unseen_prompts().read_text().splitlines()
    trained = {scenes.scene_of(c) for c in pq.read_table(world.pairs(), columns=["caption"])["caption"].to_pylist()}
    assert len(unseen) >= 192
    assert not trained & {scenes.scene_of(p) for p in unseen}
    assert all(scenes.is_held_out(scenes.scene_of(p)) for p in unseen)


def test_every_checkpoint_has_a_card_with_measurements() -> None:
    for name in ("mini-sd", "mini-rater", *world.JUDGES):
        assert "| measured | value |" in (world.checkpoint(name) / "README.md").read_text()


def test_sizes_stay_small() -> None:
    def megabytes(folder: Path) -> float:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6

    assert megabytes(world.ROOT / "checkpoints") < 40
    assert megabytes(world.ROOT / "pairs") < 20
