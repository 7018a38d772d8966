"""``palate label``: from drawn candidates to training on them; an existing set; mistakes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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
    assert palate("label", "a", "b", judges="jpeg_incompressibility", output="pairs.parquet")[0] == 2  # it is there
    pairs = list(read_pairs("pairs.parquet"))
    assert {p.rater for p in pairs} == {"jpeg_incompressibility"}
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


def test_every_judge_has_its_own_threshold(palate, pairs_dir):
    """Two judges of opposite taste: where one may not speak, the other decides."""
    both, inf = "[jpeg_compressibility, jpeg_incompressibility]", 1e9
    told = {"ties": "keep", "judges": both}
    for name, quiet in (("none", {}), ("first", {"jpeg_compressibility": inf}), ("second", {"jpeg_incompressibility": inf})):
        given = "{" + ", ".join(f"{judge}: {limit}" for judge, limit in quiet.items()) + "}"
        assert palate("label", pairs_dir, **told, output=f"{name}.parquet", **({"threshold": given} if quiet else {}))[0] == 0
    none, first, second = ([p.label for p in read_pairs(f"{n}.parquet", ties="keep")] for n in ("none", "first", "second"))
    assert set(none) == {0.5}
    assert set(first) <= {0.0, 0.5, 1.0} != {0.5}
    assert [1 - label for label in first] == second


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


def rich_set(path: Path, pairs_dir: Path) -> list[dict]:
    """Pairs with all that a set may tell besides its labels."""
    votes = list(read_pairs(pairs_dir))
    rows = [
        {
            "caption": pair.prompt,
            "jpg_0": pair.image_0,
            "jpg_1": pair.image_1,
            "label_0": pair.label,
            "label_1": 1 - pair.label,
            "weight": 1 + i / 8,
            "rater": "eve",
            "model_0": "plain",
            "model_1": "tuned",
            "split": "train",
            "width": 64 + i,
            "best_image_uid": "x",
            "image_0_uid": f"{i}-0",
            "user_id": 7,
            "chosen_model": "plain",
            "thumbnail": b"123",
        }
        for i, pair in enumerate(votes)
    ]
    pq.write_table(pa.Table.from_pylist([{**row, "shape": {"h": 1}} for row in rows]), path)
    return rows


def test_a_set_keeps_what_does_not_tell_of_the_old_vote(palate, pairs_dir):
    rows = rich_set(Path("rich.parquet"), pairs_dir)
    assert palate("label", "rich.parquet", judges="jpeg_compressibility", output="judged.parquet", ties="keep")[0] == 0
    assert palate("label", "rich.parquet", output="same.parquet", ties="keep")[0] == 0
    kept = ("caption", "jpg_0", "jpg_1", "weight", "model_0", "model_1", "split", "width", "image_0_uid")
    for file, rater in (("judged.parquet", "jpeg_compressibility"), ("same.parquet", "eve")):
        found = pq.read_table(file).to_pylist()
        assert [{name: row[name] for name in kept} for row in found] == [{name: row[name] for name in kept} for row in rows]
        assert {row["rater"] for row in found} == {rater}
        assert [row["source"] for row in found] == [f"rich.parquet, row {i + 1}" for i in range(len(rows))]
        of_the_vote = {"best_image_uid", "user_id", "chosen_model"}
        assert of_the_vote & set(found[0]) == (of_the_vote if rater == "eve" else set())
        assert not {"thumbnail", "shape"} & set(found[0])
    # Labelled again, the first source stays; and a set of text files fares the same.
    assert palate("label", "judged.parquet", output="again.parquet", ties="keep")[0] == 0
    again = pq.read_table("again.parquet").to_pylist()
    assert [(r["source"], r["rater"]) for r in again] == [(r["source"], "jpeg_compressibility") for r in found[: len(again)]]
    assert palate("label", pairs_dir, judges="jpeg_compressibility", output="plain.parquet", ties="keep")[0] == 0
    assert pq.read_table("plain.parquet")["source"].to_pylist()[0] == "metadata.jsonl, row 1"


def test_nothing_is_overwritten(palate, pairs_dir):
    rich_set(Path("rich.parquet"), pairs_dir)
    before = Path("rich.parquet").read_bytes()
    Path("link.parquet").symlink_to("rich.parquet")
    Path("other.parquet").write_bytes(b"mine")
    Path("set").mkdir()
    rich_set(Path("set/a.parquet"), pairs_dir)
    jpeg = {"judges": "jpeg_compressibility"}
    for source, output, said in (
        ("rich.parquet", "rich.parquet", "is the set that is read"),
        ("rich.parquet", "link.parquet", "is the set that is read"),
        ("link.parquet", "./rich.parquet", "is the set that is read"),
        ("set", "set/a.parquet", "is the set that is read"),
        ("set", "set/b.parquet", "lies in set"),
        ("rich.parquet", "other.parquet", "is there already; name another output"),
    ):
        code, _, errors = palate("label", source, **jpeg, output=output)
        assert (code, said in errors, len(errors.splitlines())) == (2, True, 1), errors
    assert Path("rich.parquet").read_bytes() == before
    assert Path("other.parquet").read_bytes() == b"mine"
    assert [p.name for p in Path("set").iterdir()] == ["a.parquet"]


def test_mistakes(palate, pairs_dir, model_dir, prompts_file):
    palate("generate", model_dir, prompts=prompts_file, num_inference_steps=1, num_prompts=2, output_dir="one")
    jpeg = {"judges": "jpeg_compressibility", "output": "p.parquet"}
    two = {**jpeg, "judges": "[jpeg_compressibility, mini-clip]"}
    for words, options, said in (
        (("one",), jpeg, "no prompt has two pictures or more among 2"),
        (("one",), {"output": "p.parquet"}, "labelled by judges"),
        (("one", pairs_dir), jpeg, "has no manifest.jsonl"),
        (("gone",), jpeg, "gone does not exist"),
        ((), jpeg, "expects picture folders or a set of pairs first"),
        (("one",), {**jpeg, "output": "p.csv"}, "ends in .parquet"),
        (("one",), {**jpeg, "threshold": -1}, "threshold is -1"),
        (("one",), {**two, "threshold": 0.5}, "--threshold '{jpeg_compressibility: 0.5, mini-clip: 0.5}'"),
        (("one",), {**two, "threshold": "{mini-clop: 0.5}"}, "did you mean 'mini-clip'"),
        (("one",), {**two, "threshold": "{mini-clip: wide}"}, "threshold is wide for mini-clip; expected 0 or more"),
        (("one",), {**jpeg, "soft": "true", "judges": "[jpeg_compressibility, mini-clip]"}, "soft labels need one judge"),
        (("one",), {**jpeg, "temperature": 2}, "temperature is of soft labels: add --soft true"),
        ((pairs_dir,), {"output": "p.parquet", "soft": "true"}, "soft is of what judges say, and none is named"),
        ((pairs_dir,), {"output": "p.parquet", "threshold": 1}, "threshold is of what judges say, and none is named"),
        ((pairs_dir,), {**jpeg, "pairs": "extremes"}, "pairs extremes is of candidates in picture folders"),
        (("one", "../" + Path().resolve().name + "/one"), jpeg, "/one is given twice"),
    ):
        code, _, errors = palate("label", *words, **options)
        assert (code, said in errors, len(errors.splitlines())) == (2, True, 1), errors
    assert not Path("p.parquet").exists()
