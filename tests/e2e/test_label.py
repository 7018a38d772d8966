"""``palate label``: from drawn candidates to training on them; an existing set; mistakes."""

from __future__ import annotations

from pathlib import Path

from palate.data.pairs import read_pairs
from palate.evaluation.manifest import read_all_scores, read_manifest


def test_generate_label_train(palate, model_dir, prompts_file):
    options = {"prompts": prompts_file, "num_inference_steps": 1, "num_prompts": 3, "resolution": 64}
    assert palate("generate", model_dir, **options, output_dir="a", images_per_prompt=2)[0] == 0
    assert palate("generate", model_dir, **options, output_dir="b", seed=1)[0] == 0
    code, said, errors = palate("label", "a", "b", judges="jpeg_incompressibility", output="pairs.parquet")
    assert code == 0, errors
    assert said.startswith("3 prompts, 9 pairs: ")  # three pictures of each prompt: 3 choose 2
    sizes = {
        (Path(folder) / p.file).read_bytes(): read_all_scores(folder)["jpeg_incompressibility"].scores[p.file]
        for folder in ("a", "b")
        for p in read_manifest(folder)
    }
    pairs = list(read_pairs("pairs.parquet"))
    assert pairs
    assert all((sizes[p.image_0] > sizes[p.image_1]) == (p.label == 1) for p in pairs)
    # Soft labels, ties kept, only the extremes.
    code, _, _ = palate(
        "label", "a", "b", judges="jpeg_incompressibility", output="soft.parquet", soft="true", pairs="extremes", ties="keep"
    )
    soft = list(read_pairs("soft.parquet", ties="keep"))
    assert (code, len(soft)) == (0, 3)
    assert any(0 < p.label < 1 and p.label != 0.5 for p in soft)
    code, _, errors = palate("train", train_data="pairs.parquet", max_train_steps=1, validation_fraction=0)
    assert code == 0, errors


def test_an_existing_set(palate, pairs_dir):
    votes = list(read_pairs(pairs_dir))
    code, said, _ = palate("label", pairs_dir, judges="jpeg_compressibility", output="again.parquet", ties="keep")
    assert code == 0
    again = list(read_pairs("again.parquet", ties="keep"))
    assert [(p.prompt, p.image_0, p.image_1) for p in again] == [(p.prompt, p.image_0, p.image_1) for p in votes]
    changed = sum(
        (p.label > 0.5) != (q.label > 0.5) or (p.label == 0.5) != (q.label == 0.5) for p, q in zip(votes, again, strict=True)
    )
    assert f"{changed} labels changed; 16 written" in said
    opposite = palate("label", pairs_dir, judges="jpeg_incompressibility", output="other.parquet", ties="keep")
    assert opposite[0] == 0
    other = list(read_pairs("other.parquet", ties="keep"))
    assert all(p.label + q.label == 1 for p, q in zip(again, other, strict=True))
    # Without a judge the votes stay, here two pairs a prompt whose winners never met: no absolute winner.
    code, _, errors = palate("label", pairs_dir, output="none.parquet", absolute_winner="true")
    assert (code, "16 without the absolute winner" in errors) == (2, True)
    assert not Path("none.parquet").exists()


def test_mistakes(palate, pairs_dir, model_dir, prompts_file):
    palate("generate", model_dir, prompts=prompts_file, num_inference_steps=1, num_prompts=2, output_dir="one")
    jpeg = {"judges": "jpeg_compressibility", "output": "p.parquet"}
    for words, options, said in (
        (("one",), jpeg, "no prompt has two pictures or more among 2"),
        (("one",), {"output": "p.parquet"}, "labelled by judges"),
        (("one", pairs_dir), jpeg, "has no manifest.jsonl"),
        (("gone",), jpeg, "gone does not exist"),
        ((), jpeg, "expects picture folders or a set of pairs first"),
        (("one",), {**jpeg, "output": "p.csv"}, "ends in .parquet"),
        (("one",), {**jpeg, "threshold": -1}, "threshold is -1"),
        (("one",), {**jpeg, "soft": "true", "judges": "[jpeg_compressibility, mini-clip]"}, "soft labels need one judge"),
    ):
        code, _, errors = palate("label", *words, **options)
        assert (code, said in errors, len(errors.splitlines())) == (2, True, 1), errors
    assert not Path("p.parquet").exists()
