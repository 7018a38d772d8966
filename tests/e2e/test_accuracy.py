"""``palate accuracy``: by hand, by laws of the implicit reward, and on real rankings."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from palate.base.errors import UserError
from palate.data.images import decode
from palate.data.pairs import PreferencePair, read_pairs
from palate.evaluation.accuracy import accuracy
from palate.names.judges import find_judges
from palate.runs.label import judge_margins

REAL = Path(__file__).parents[3] / "shared/data/preferences/hpdv2-gallery"


def test_by_hand():
    # Right, wrong, undecided, right (the label says the second), and a tie of the labels, which does not count.
    found = accuracy([1.0, -1.0, 0.0, -2.0, 9.0], [1.0, 0.8, 0.0, 0.2, 0.5], ["a", "b", "c", "a", "d"])
    assert (found.rate, found.wins, found.ties, found.losses, found.n, found.prompts) == (2.5 / 4, 2, 1, 1, 4, 3)
    assert found.low < found.rate < found.high
    with pytest.raises(UserError, match="all 1 pairs are ties"):
        accuracy([1.0], [0.5], ["a"])


def told(name="accuracy.json"):
    content = json.loads(Path(name).read_text())
    return {one["name"]: one["accuracy"] for one in content["accuracy"]}, content


def test_judges_against_their_own_labels(palate, pairs_dir):
    palate("label", pairs_dir, judges="jpeg_compressibility", output="small.parquet")
    code, said, _ = palate("accuracy", "small.parquet", judges="[jpeg_compressibility, jpeg_incompressibility]")
    assert code == 0
    found, content = told()
    assert found["jpeg_compressibility"]["rate"] == 1
    assert found["jpeg_incompressibility"]["rate"] == 0
    assert content["prompts"] == 8
    assert said.splitlines()[1].split()[:3] == ["jpeg_compressibility", "100.0", "%"]


def test_the_pairs_of_the_miniature_world_by_name(palate, monkeypatch):
    code, said, _ = palate("accuracy", "miniature-pairs", judges="[jpeg_compressibility]", max_pairs=8)
    assert code == 0
    assert "of 8 prompts" in said
    monkeypatch.setattr("palate.miniature.world.pairs", lambda name: Path("accuracy.json"))
    code, _, errors = palate("label", "miniature-pairs", judges="jpeg_compressibility", output="small.parquet")
    assert code == 2
    assert "accuracy.json" in errors


def test_implicit_rewards_in_both_spaces(palate, pairs_dir, cache_dir, model_dir):
    palate("train", learning_rate=0.05, output_dir="run", validation_fraction=0, space="perceptual")
    options = {"model": "run", "cache_dir": cache_dir, "timesteps": 2}
    code, _, errors = palate("accuracy", pairs_dir, **options, space="[latent, perceptual, run]")
    assert code == 0, errors
    found, _ = told()
    assert list(found) == ["run (latent)", "run (perceptual)", "run (run)"]
    assert found["run (perceptual)"] == found["run (run)"]
    assert found["run (latent)"]["n"] == 16
    # Fixed draws: the same again, in other batches; and a change of all labels turns every answer round.
    assert palate("accuracy", pairs_dir, **options, space="latent", batch_size=3, output="again.json")[0] == 0
    assert told("again.json")[0]["run (latent)"] == found["run (latent)"]
    rows = [json.loads(line) for line in (pairs_dir / "metadata.jsonl").read_text().splitlines()]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    shutil.copytree(pairs_dir, "turned")
    Path("turned/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    assert palate("accuracy", "turned", **options, space="latent", output="turned.json")[0] == 0
    assert told("turned.json")[0]["run (latent)"]["rate"] == pytest.approx(1 - found["run (latent)"]["rate"])
    # At scale 0 the model is its own reference, and prefers nothing.
    code, _, errors = palate("accuracy", pairs_dir, **{**options, "model": model_dir}, lora="run:0", output="zero.json")
    assert code == 0, errors
    (nothing,) = told("zero.json")[0].values()
    assert (nothing["rate"], nothing["ties"]) == (0.5, 16)


def test_a_transformer_has_a_perceptual_space_by_name_too(palate, pairs_dir, cache_dir, sd3_dir):
    palate("train", pretrained_model_name_or_path=sd3_dir, output_dir="run", max_train_steps=1)
    options = {"model": "run", "cache_dir": cache_dir, "timesteps": 1, "max_pairs": 2}
    code, _, errors = palate("accuracy", pairs_dir, **options, space="[latent, perceptual]")
    assert code == 0, errors
    assert list(told()[0]) == ["run (latent)", "run (perceptual)"]


def test_mistakes(palate, pairs_dir, model_dir):
    for words, options, said in (
        ((pairs_dir,), {}, "name at least one judge or model"),
        ((), {"judges": "mini-clip"}, "expects a set of pairs first"),
        ((pairs_dir,), {"model": model_dir}, "is not tuned"),
        ((pairs_dir,), {"judges": "mini-clip", "space": "latnt"}, "did you mean 'latent'"),
        ((pairs_dir,), {"model": model_dir, "space": "[]"}, "space is empty; expected one or more of latent"),
        ((pairs_dir,), {"judges": "mini-clip", "lora": "x"}, "lora is put into a model, and none is named"),
        (("gone.parquet",), {"judges": "mini-clip"}, "gone.parquet does not exist"),
        ((pairs_dir,), {"judges": "mini-clip", "timesteps": 0}, "timesteps is 0"),
    ):
        code, _, errors = palate("accuracy", *words, **options)
        assert (code, said in errors, len(errors.splitlines())) == (2, True, 1), errors
    assert not Path("accuracy.json").exists()


def test_a_ranking_is_decoded_once(monkeypatch):
    """Three pictures in three pairs of one prompt, and one of them again under another prompt: four scores, no more."""
    seen = []

    def red(images, prompts):
        seen.extend(prompts)
        return images[:, 0].mean((1, 2)) + torch.tensor([float(len(p)) for p in prompts])

    def png(red):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (red, 0, 0)).save(stream, "PNG")
        return stream.getvalue()

    a, b, c = png(0), png(51), png(153)  # 0, 0.2, 0.6
    pairs = [PreferencePair(p, x, y, 1.0) for p, x, y in (("x", a, b), ("x", c, a), ("x", b, c), ("xx", c, c))]
    (judge,) = find_judges(["jpeg_compressibility"]).values()
    monkeypatch.setattr(type(judge), "load", lambda self, device: red)
    assert judge_margins(judge, pairs, batch_size=2) == pytest.approx([-0.2, 0.6, -0.4, 0.0], abs=1e-6)
    assert sorted(seen) == ["x", "x", "x", "xx"]
    with pytest.raises(UserError, match="row 7: a picture is not a picture"):
        judge_margins(judge, [*pairs, PreferencePair("x", a, b"no", 1.0, source="row 7")])


@pytest.mark.skipif(not REAL.is_dir(), reason="real preferences: put them into ../shared/data/preferences")
def test_real_rankings_by_file_size(palate):
    """Against a plain transcription: which of two pictures is the larger JPEG file at quality 95."""
    code, _, errors = palate("accuracy", REAL, judges="jpeg_incompressibility", max_pairs=36)
    assert code == 0, errors

    def size(data):
        stream = io.BytesIO()
        decode(data).save(stream, "JPEG", quality=95)
        return len(stream.getvalue())

    pairs = [p for p in read_pairs(REAL, ties="keep", max_train_samples=36) if p.label != 0.5]
    sizes = {data: size(data) for p in pairs for data in (p.image_0, p.image_1)}
    right = [np.sign(sizes[p.image_0] - sizes[p.image_1]) == np.sign(p.label - 0.5) for p in pairs]
    found = told()[0]["jpeg_incompressibility"]
    assert (found["n"], found["rate"]) == (len(pairs), pytest.approx(np.mean(right)))
