"""Votes out and in, and into training."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from party import picture_folder

from palate.base.errors import UserError
from palate.cli import main
from palate.data.pairs import read_pairs
from palate.data.votes import PRIOR, agreement_weights, vote_rows
from palate.votes.study import Study, VoteOptions


@pytest.fixture
def voted(tmp_path):
    """Two raters on six prompts of two models: Ann prefers the tuned model, so does Bob, after a tie, a bad and a skip."""
    folder = picture_folder(tmp_path / "pictures", prompts=6)
    study = Study(folder, VoteOptions(repeats=0.0))
    tuned = {name for number, name in study._opaque.items() if study.pictures[number].model == "tuned"}
    for name in ("Ann", "Bob"):
        rater = study.rater(study.join(name))
        for turn in range(6):
            shown = study.state(rater)["open"][0]
            best = "1" if shown["pictures"][0] in tuned else "2"
            choice = best if name == "Ann" else ("tie", "bad", "skip", best, best, best)[turn]
            for question in study.questions:
                vote = f"{name}-{turn}-{question}"
                study.vote(rater, name=vote, showing=shown["id"], question=question, choice=choice, seconds=2.0)
                if choice == "skip":
                    break
    study.close()
    return folder


def _told(source):
    """What a reader of pairs makes of it: both pictures, who says what."""
    pairs = read_pairs(source, ties="keep")
    return sorted(
        (p.prompt, *(sorted([p.image_0, p.image_1])), p.label if p.image_0 < p.image_1 else 1 - p.label, p.rater) for p in pairs
    )


def test_training_reads_the_votes(voted):
    assert len(list(read_pairs(voted / "votes.db", ties="keep"))) == 11  # 12 showings, one skipped
    pairs = list(read_pairs(voted / "votes.db"))
    assert len(pairs) == 9  # without the tie and the bad
    ann = [p for p in pairs if p.rater == pairs[0].rater]
    tuned = {path.read_bytes() for path in voted.glob("tuned/*.png")}
    assert len(ann) == 6
    assert all((p.image_0 if p.label == 1 else p.image_1) in tuned for p in ann)
    assert pairs[0].source == "votes.db, row 1"


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_out_and_in_again(voted, tmp_path, capsys, ending):
    before = _told(voted / "votes.db")
    output = tmp_path / f"votes.{ending}"
    assert main(["vote", "export", str(voted), "--output", str(output)]) == 0
    assert "wrote 11 votes" in capsys.readouterr().out
    assert _told(output) == before
    assert main(["vote", "import", str(voted), "--input", str(output)]) == 0
    assert "added 0 votes" in capsys.readouterr().out
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert main(["vote", "import", str(other), "--input", str(output)]) == 0
    said = capsys.readouterr().out
    assert "added 11 votes" in said
    assert "of their pictures were not here and are in imported/ now" in said
    assert main(["vote", "import", str(other), "--input", str(output)]) == 0
    assert "added 0 votes" in capsys.readouterr().out
    assert _told(other / "votes.db") == before


def test_parquet_has_the_columns_of_pick_a_pic(voted, tmp_path):
    assert main(["vote", "export", str(voted), "--output", str(tmp_path / "v.parquet"), "--question", "appeal"]) == 0
    table = pq.read_table(tmp_path / "v.parquet")
    wanted = "caption jpg_0 jpg_1 label_0 label_1 has_label are_different best_image_uid model_0 model_1 user_id created_at"
    assert set(wanted.split()) <= set(table.column_names)
    for row in table.to_pylist():
        assert row["label_0"] + row["label_1"] == 1
        best = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"], 0.5: "tie"}[row["label_0"]]
        assert row["best_image_uid"] == best
        assert {row["model_0"], row["model_1"]} == {"plain", "tuned"}


@pytest.mark.parametrize("opened", [True, False])
def test_imported_votes_join_the_study(voted, tmp_path, opened):
    """Another folder with the same pictures gets the votes, and asks these raters no more, whether or not it was opened."""
    twin = picture_folder(tmp_path / "twin", prompts=6)
    if opened:
        Study(twin, VoteOptions()).close()
    assert main(["vote", "export", str(voted), "--output", str(tmp_path / "v.parquet")]) == 0
    assert main(["vote", "import", str(twin), "--input", str(tmp_path / "v.parquet")]) == 0
    study = Study(twin, VoteOptions(questions=("overall",), raters=2))
    assert study.queue.held.sum() == 11
    assert not (twin / "imported").exists()
    study.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "{voted}", "--output", "v.xlsx"], "ends in '.xlsx'"),
        (["export", "{tmp}", "--output", "v.csv"], "there are no votes"),
        (["export", "{voted}", "--output", "{tmp}/deep/v.csv"], "outside its folder"),
        (["export", "{voted}", "--output", "v.csv", "--question", "apeal"], "did you mean 'appeal'"),
        (["import", "{voted}", "--input", "{tmp}/none.csv"], "does not exist"),
        (["import", "{tmp}/none", "--input", "v.csv"], "there is no folder"),
    ],
)
def test_bad_words(voted, tmp_path, capsys, words, message):
    assert main(["vote", *(word.format(voted=voted, tmp=tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_shares_of_many_raters_are_no_votes(voted, tmp_path, capsys):
    row = {"prompt": "p", "image_0": "plain/000-0.png", "image_1": "tuned/000-0.png", "label": 0.7}
    (voted / "shares.jsonl").write_text(json.dumps(row))
    assert main(["vote", "import", str(voted), "--input", str(voted / "shares.jsonl")]) == 2
    assert "share of several raters" in capsys.readouterr().err
    assert len(_told(voted / "votes.db")) == 11


def test_no_import_while_a_page_serves(voted, tmp_path, capsys):
    from palate.votes.store import Lock

    lock = Lock(voted)
    assert main(["vote", "import", str(voted), "--input", "v.csv"]) == 2
    assert "in use" in capsys.readouterr().err
    lock.close()


def test_agreement_weights_by_hand():
    # a and b agree on two pairs; c contradicts both there. Comparisons of pair x: ab 1, ac 0, bc 0.
    votes = [(rater, pair, label) for pair in "xy" for rater, label in (("a", 1.0), ("b", 1.0), ("c", 0.0))]
    everybody = (2 * 2) / 12  # of 12 sides of comparisons, a and b agree with each other on each of two pairs
    a = (2 + PRIOR * everybody) / (4 + PRIOR)  # 3.667 / 9
    assert a < 0.5
    with pytest.raises(UserError, match="no rater agrees"):
        agreement_weights(votes)
    votes = [(rater, pair, 1.0 if rater != "c" else 0.0) for pair in "xy" for rater in "abdec"]
    # 5 raters: each of a, b, d, e agrees with 3 of 4 others, c with none: 12 of 20 sides, everybody = 0.6.
    good, bad = (6 + 5 * 0.6) / 13, (0 + 5 * 0.6) / 13
    raw = 2 * good - 1  # c: 2 * 0.231 - 1 < 0, so 0
    mean = 8 * raw / 10
    weights = agreement_weights(votes)
    assert weights["a"] == pytest.approx(raw / mean)
    assert bad < 0.5
    assert weights["c"] == 0
    assert sum(weights[rater] for rater, _, _ in votes) == pytest.approx(len(votes))
    assert agreement_weights([("a", "x", 1.0), ("a", "y", 0.0)]) == {"a": 1.0}


def test_weights_reach_the_pairs(voted):
    weights = {p.rater: p.weight for p in read_pairs(voted / "votes.db", vote_weights="agreement")}
    assert len(weights) == 2
    assert sum(row["weight"] for row in vote_rows(voted / "votes.db", weights="agreement")) == pytest.approx(11)
    (voted / "one.jsonl").write_text('{"prompt": "p", "chosen": "plain/000-0.png", "rejected": "tuned/000-0.png"}')
    with pytest.raises(UserError, match="holds no votes"):
        read_pairs(voted / "one.jsonl", vote_weights="agreement")


def test_train_on_the_votes(palate, voted):
    """The loop is closed: a recipe learns from votes.db."""
    code, _, err = palate("train", train_data=voted / "votes.db", max_train_steps=1, validation_fraction=0)
    assert code == 0, err
    assert "11 rows: 9 pairs, 2 ties dropped" in err
    code, _, err = palate("train", train_data=voted / "votes.db", output_dir="b", vote_question="apeal")
    assert code == 2
    assert "did you mean 'appeal'" in err
