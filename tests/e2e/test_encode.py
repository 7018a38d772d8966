"""``palate encode``."""

from __future__ import annotations

import pytest


def encode(palate, model_dir, pairs_dir, *words, **options):
    given = {"pretrained_model_name_or_path": model_dir, "train_data": pairs_dir, "cache_dir": "cache", **options}
    return palate("encode", "quick.yaml", *words, **given)


def test_what_is_encoded_beforehand_is_trained_on(palate, tmp_path, model_dir, pairs_dir, monkeypatch):
    code, out, errors = encode(palate, model_dir, pairs_dir)
    assert code == 0, errors
    assert out.startswith("16 pairs encoded in cache, which takes 0.000")
    assert "16 rows: 16 pairs" in errors
    (shard,) = (tmp_path / "cache").iterdir()
    before = shard.read_bytes()
    assert palate("train", cache_dir="cache", max_train_steps=1)[0] == 0
    assert shard.read_bytes() == before
    assert list((tmp_path / "cache").iterdir()) == [shard]


def test_parts_make_up_the_whole(palate, tmp_path, model_dir, pairs_dir):
    for i in (1, 2, 3):
        code, out, errors = encode(palate, model_dir, pairs_dir, shard=f"{i}/3")
        assert code == 0, errors
        assert f"16 pairs, part {i} of 3, encoded" in out
    (shard,) = (tmp_path / "cache").iterdir()
    before = shard.stat().st_size
    assert encode(palate, model_dir, pairs_dir)[0] == 0
    assert shard.stat().st_size - before < 10_000  # the list of pairs, and no picture


def test_half_the_room(palate, tmp_path, model_dir, pairs_dir):
    sizes = {}
    for precision in ("fp32", "fp16"):
        assert encode(palate, model_dir, pairs_dir, cache_dir=precision, cache_precision=precision)[0] == 0
        sizes[precision] = sum(path.stat().st_size for path in (tmp_path / precision).iterdir())
    assert sizes["fp16"] < 0.62 * sizes["fp32"]
    assert palate("train", cache_dir="fp16", cache_precision="fp16", max_train_steps=1)[0] == 0


def test_a_limit(palate, tmp_path, model_dir, pairs_dir):
    code, _, errors = encode(palate, model_dir, pairs_dir, cache_limit=0.00005)
    assert code == 2
    assert "may take 0.0 GB, and cache_limit is 5e-05: encoding stops there" in errors
    assert "cache would grow beyond its limit of 5e-05 GB: raise cache_limit" in errors.splitlines()[-1]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*")) <= 50_000


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "x/2", "1/0"])
def test_a_part_that_there_is_not(palate, model_dir, pairs_dir, shard):
    code, _, errors = encode(palate, model_dir, pairs_dir, shard=shard)
    assert code == 2
    assert f"shard is '{shard}'; expected its number, counted from 1" in errors


def test_nothing_to_encode(palate, model_dir, prompts_file):
    words = {"pretrained_model_name_or_path": model_dir, "train_prompts": prompts_file, "objective": "ddpo_is"}
    code, _, errors = palate("encode", "quick.yaml", **words)
    assert code == 2
    assert "there is nothing to encode beforehand" in errors


def test_help(palate):
    assert palate("encode")[1] == palate("encode", "--help")[1]
    assert "--shard I/N" in palate("encode")[1]
    assert "expects a recipe first" in palate("encode", "--shard", "1/2")[2]
