"""Kinds of data from the command line to a trained LoRA: shards, single pictures, rankings, choices among pairs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin


@pytest.fixture
def votes(pairs_dir) -> list[dict]:
    return [json.loads(line) for line in (pairs_dir / "metadata.jsonl").read_text().splitlines()]


def shard(path: Path, samples: list[dict]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{number:04}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def about() -> dict:
    return json.loads(Path("out/run.json").read_text())


def test_shards_with_a_damaged_one(palate, votes, pairs_dir, tmp_path):
    (tmp_path / "shards").mkdir()
    samples = [
        {"jpg_0": (pairs_dir / v["chosen"]).read_bytes(), "jpg_1": (pairs_dir / v["rejected"]).read_bytes()}
        | {"txt": v["prompt"].encode(), "label": b"1"}
        for v in votes
    ]
    for part in range(4):
        shard(tmp_path / "shards" / f"{part}.tar", samples[4 * part : 4 * part + 4])
    damaged = tmp_path / "shards" / "1.tar"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    code, _, errors = palate("train", train_data="shards", max_train_steps=2)
    assert code == 2
    assert "1.tar, row " in errors
    assert "damaged" in errors
    assert not Path("out").exists()
    code, _, errors = palate("train", train_data="shards", max_train_steps=2, max_bad_rows=1)
    assert code == 0, errors
    assert "skipped 1.tar, row " in errors
    assert "1 bad rows skipped" in errors
    assert Path("out/pytorch_lora_weights.safetensors").is_file()
    assert len(about()["bad_rows"]) == 1


@pytest.mark.parametrize(("objective", "trained"), [("kto", 16), ("sft", 8)])
def test_likes(palate, votes, pairs_dir, tmp_path, objective, trained):
    rows = [
        {"prompt": v["prompt"], "image": (pairs_dir / v["chosen" if liked else "rejected"]).name, "liked": liked}
        for i, v in enumerate(votes)
        for liked in [i % 2 == 0]
    ]
    for row in rows:
        (tmp_path / row["image"]).write_bytes((pairs_dir / row["image"]).read_bytes())
    (tmp_path / "likes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, errors = palate("train", train_data="likes.jsonl", objective=objective, max_train_steps=2, random_flip="true")
    assert code == 0, errors
    assert "16 rows: 16 pictures" in errors
    assert ("8 disliked pictures left out" in errors) == (objective == "sft")
    assert about()["pictures"] == trained  # sft knows no dislike
    assert f"| trained on | {trained} single pictures |" in Path("out/README.md").read_text()
    code, _, errors = palate("train", train_data="likes.jsonl", objective="dpo", output_dir="other")
    assert code == 2
    assert "dpo compares two pictures, but likes.jsonl holds single ones" in errors


def test_plain_pictures_with_text(palate, votes, pairs_dir, tmp_path):
    (tmp_path / "plain").mkdir()
    for vote in votes[:4]:
        name = vote["chosen"]
        (tmp_path / "plain" / name).write_bytes((pairs_dir / name).read_bytes())
        (tmp_path / "plain" / name).with_suffix(".txt").write_text(vote["prompt"])
    code, _, errors = palate("train", train_data="plain", objective="sft", max_train_steps=1)
    assert code == 0, errors


def test_choices_and_validation_data(palate, votes, pairs_dir, tmp_path):
    def write(name: str, rows: list[dict]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for vote in votes:
        for side in ("chosen", "rejected"):
            (tmp_path / vote[side]).write_bytes((pairs_dir / vote[side]).read_bytes())
    lost = {**votes[0], "chosen": votes[0]["rejected"], "rejected": votes[1]["rejected"]}
    write("train.jsonl", [*votes, votes[3], lost])
    held = {**votes[0], "prompt": votes[0]["prompt"].upper()}
    write("held.jsonl", [{**held, "has_label": True}, {**held, "has_label": False}])
    code, _, errors = palate(
        "train",
        train_data="train.jsonl",
        validation_data="held.jsonl",
        absolute_winners="true",
        deduplicate="true",
        max_train_steps=2,
    )
    assert code == 0, errors
    assert "18 rows: 16 pairs" in errors
    assert "1 repeated" in errors
    assert "1 without an absolute winner" in errors
    assert "2 left out, whose prompts are in held.jsonl" in errors
    assert "held.jsonl: 2 rows: 1 pairs, 1 without a label" in errors
    assert about()["pairs"] == 14
    assert about()["validation"]["unlabelled"] == 1
    log = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert any("held_out_accuracy" in line for line in log)
    code, _, errors = palate("train", train_data="held.jsonl", validation_data="held.jsonl", output_dir="other")
    assert code == 2
    assert "no prompt that the validation data has not" in errors


@pytest.mark.parametrize("verb", ["train", "label", "accuracy"])
def test_what_is_left_out_is_told_whoever_reads(palate, votes, pairs_dir, tmp_path, verb):
    for vote in votes:
        for side in ("chosen", "rejected"):
            (tmp_path / vote[side]).write_bytes((pairs_dir / vote[side]).read_bytes())
    rows = [{**vote, "has_label": ["True", "false", 0.0][min(i, 2)] if i < 3 else 1} for i, vote in enumerate(votes)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judges = {"judges": "[jpeg_compressibility]"}
    if verb == "train":
        code, _, errors = palate("train", train_data="x.jsonl", max_train_steps=1)
        assert about()["unlabelled"] == 2
    elif verb == "label":
        code, _, errors = palate("label", "x.jsonl", output="out.parquet", **judges)
    else:
        code, _, errors = palate("accuracy", "x.jsonl", output="out.json", **judges)
        assert json.loads(Path("out.json").read_text())["left_out"] == {"without a label": 2}
    assert code == 0, errors
    assert "2 without a label" in errors


def test_pictures_of_other_programs_are_voted_on_judged_labelled_and_learned_from(palate, votes, pairs_dir, tmp_path):
    """One folder of outputs with prompts in their metadata, and every verb that takes pictures."""
    (tmp_path / "outputs").mkdir()
    for number, vote in enumerate(votes[:4]):
        for side in ("chosen", "rejected"):
            texts = PngImagePlugin.PngInfo()
            texts.add_text("parameters", f"{vote['prompt']} <lora:x:1>\nSteps: 20, Seed: {number}, Model: dream")
            with Image.open(pairs_dir / vote[side]) as image:
                image.save(tmp_path / "outputs" / f"{number}-{side}.png", pnginfo=texts)
    code, said, errors = palate("score", "outputs", judges="jpeg_compressibility")
    assert code == 0, errors
    assert said.splitlines()[-1].split()[-3:] == ["8", "2", "0"]  # pictures, prompts, bad
    code, said, errors = palate("label", "outputs", judges="jpeg_compressibility", output="pairs.parquet")
    assert code == 0, errors
    assert said.startswith("2 prompts, 12 pairs")
    code, _, errors = palate("train", train_data="outputs", objective="sft", max_train_steps=1)
    assert code == 0, errors
    assert "8 pictures" in errors
    assert Path("out/pytorch_lora_weights.safetensors").is_file()
