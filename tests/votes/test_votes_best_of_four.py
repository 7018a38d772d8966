"""More than two pictures at a time: the best beats each other one, and nothing is said of the rest."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from itertools import permutations
from math import comb, factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from party import picture_folder

from palate.base.errors import UserError
from palate.cli import main
from palate.data.pairs import read_pairs
from palate.data.votes import standing, vote_rows
from palate.votes.queue import Dealt, Queue
from palate.votes.results import results
from palate.votes.study import RefusedError, VoteOptions


def _join(study, name=""):
    return study.rater(study.join(name))


def _vote(study, rater, choice, question="overall"):
    shown = study.state(rater)["open"][0]
    return study.vote(
        rater, name=f"v-{shown['id'][:20]}-{question}", showing=shown["id"], question=question, choice=choice, seconds=1.0
    )


@pytest.mark.parametrize(
    ("pictures", "sizes"), [(2, [2]), (3, [3]), (4, [4]), (5, [2, 3]), (6, [3, 3]), (7, [3, 4]), (8, [4, 4]), (9, [3, 3, 3])]
)
def test_every_picture_is_in_one_set_of_its_prompt(study_of, pictures, sizes):
    study = study_of(prompts=2, per_prompt=pictures, models=("plain",), at_once=4)
    assert study.mode == "collect"
    assert sorted(map(len, study.pairs)) == sorted(sizes * 2)
    assert Counter(number for found in study.pairs for number in found) == Counter(list(study.pictures))
    for found in study.pairs:
        assert len({study.pictures[number].prompt for number in found}) == 1
        assert list(found) == sorted(found)


def test_compare_sets_one_picture_of_each_model_side_by_side(study_of):
    study = study_of(prompts=3, models=("a", "b", "c"), at_once=4)
    assert study.mode == "compare"
    for found in study.pairs:
        shown = [study.pictures[number] for number in found]
        assert {p.model for p in shown} == {"a", "b", "c"}
        assert len({(p.prompt, p.seed) for p in shown}) == 1


def test_the_best_beats_each_other_one_and_of_these_nothing_is_said(study_of, tmp_path):
    study = study_of(prompts=1, per_prompt=4, models=("plain",), at_once=4)
    rater = _join(study)
    shown = study.state(rater)["open"][0]["pictures"]
    best, *others = (study._by_opaque[name] for name in (shown[2], *shown[:2], shown[3]))
    assert _vote(study, rater, "3")["done"] == 1
    votes = study.store.valid_votes()
    assert len({v["id"] for v in votes}) == 1
    preferred = [
        (v["picture_0"], v["picture_1"]) if v["choice"] == "first" else (v["picture_1"], v["picture_0"]) for v in votes
    ]
    assert sorted(preferred) == sorted((best, other) for other in others)
    study.close()
    rows = list(vote_rows(tmp_path / "votes.db"))
    assert len(rows) == 3
    assert {row["image_0"] if row["label"] == 1.0 else row["image_1"] for row in rows} == {study.pictures[best].file}


def test_all_alike_is_said_of_every_pair(study_of):
    study = study_of(prompts=1, per_prompt=4, models=("plain",), at_once=4)
    _vote(study, _join(study), "tie")
    assert [v["choice"] for v in study.store.valid_votes()] == ["tie"] * comb(4, 2)


def test_a_choice_of_a_picture_that_is_not_there(study_of):
    study = study_of(prompts=1, per_prompt=3, models=("plain",), at_once=4)
    rater = _join(study)
    with pytest.raises(RefusedError, match="expected 1 to 3, found 4"):
        _vote(study, rater, "4")
    assert study.state(rater)["done"] == 0


def test_undo_restart_and_a_set_that_lost_a_picture(study_of, tmp_path):
    study = study_of(prompts=2, per_prompt=4, models=("plain",), at_once=4, repeats=0.0)
    rater = _join(study)
    before = study.state(rater)["open"]
    state = _vote(study, rater, "4")
    assert state["last"]["showing"]["pictures"] == before[0]["pictures"]
    assert study.undo(rater, state["last"]["vote"])["open"] == before
    again = study_of(prompts=2, per_prompt=4, models=("plain",), at_once=4, repeats=0.0)
    assert again.state(rater)["open"] == before
    lost = again._by_opaque[before[1]["pictures"][0]]
    (tmp_path / again.pictures[lost].file).unlink()
    with pytest.raises(RefusedError):
        again.picture(before[1]["pictures"][0])
    assert [shown["id"] for shown in again.state(rater)["open"]] == [before[0]["id"]]


def test_a_repeat_stands_in_the_reverse_order_and_the_same_picture_is_the_same_answer(study_of):
    study = study_of(prompts=16, per_prompt=3, models=("plain",), at_once=3, repeats=0.5)
    rater = _join(study)
    favourite = {}
    for _ in range(12):
        shown = study.state(rater)["open"][0]["pictures"]
        best = favourite.setdefault(frozenset(shown), shown[0])
        _vote(study, rater, str(1 + shown.index(best)))
    (told,) = study.told()["raters"]
    assert told["repeated"] == told["same"] > 0
    assert told["votes"] == 12 - told["repeated"]


@settings(max_examples=60)
@given(st.integers(2, 4), st.data())
def test_standing_is_an_order_of_all(count, data):
    pictures = data.draw(st.lists(st.integers(0, 99), min_size=count, max_size=count, unique=True))
    orders = [standing(pictures, n) for n in range(factorial(count))]
    assert sorted(orders) == sorted(permutations(pictures))
    assert orders[0] == tuple(pictures)
    assert orders[-1] == tuple(reversed(pictures))
    with pytest.raises(IndexError):
        standing(pictures, factorial(count))


def test_strengths_of_sets_by_hand():
    """The best of (0, 1, 2) has (1 + 1) / (1 + 2) = 2/3, each other 1/3; one not shown yet 1/2."""
    queue = Queue([(0, 1, 2), (0, 3), (1, 2), (1, 3)], raters_per_pair=1)
    queue.take("a", Dealt(0, 0))
    queue.answer("a", 0, 0)
    assert queue.choose("b").pair == 2  # 1/3 and 1/3 are nearest; the others differ by 1/6
    queue.undo_answer("a", 0, 0)
    assert not queue._points.any()
    assert not queue._seen.any()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_raters_who_choose_at_random_agree_on_half(count):
    """Of n pictures two raters choose the same with 1/n, and then agree on n - 1 pairs; else they differ on one."""
    rng = np.random.default_rng(0)
    votes = []
    for number in range(3000):
        shown = tuple(range(10 * number, 10 * number + count))
        for rater in ("r", "s"):
            best = shown[rng.integers(count)]
            for other in (p for p in shown if p != best):
                a, b = min(best, other), max(best, other)
                votes.append(
                    {"id": f"{rater}{number}", "shown": shown, "rater": rater, "name": "", "picture_0": a, "picture_1": b}
                    | {"image_0": "", "image_1": "", "prompt": str(number), "seed": 0, "model_0": "m", "model_1": "m"}
                    | {"metadata": "{}", "question": "overall", "choice": "first" if best == a else "second", "seconds": 1.0}
                    | {"created": "", "swapped": False, "repeat": 0, "mode": "collect"}
                )
    told = results(votes, mode="collect", raters_per_pair=2)
    assert told["votes"] == 6000
    assert told["judged"] == 3000
    assert told["raters"][0]["agreement"] == pytest.approx(0.5, abs=0.03)
    assert abs(told["questions"]["overall"]["alpha"]) < 0.06


@pytest.fixture
def voted(study_of, tmp_path):
    """Two raters on three sets of four and, asked two at a time, on one pair; the second says once that all are alike."""
    picture_folder(tmp_path, prompts=3, per_prompt=2, models=("plain", "tuned"))
    study = study_of(prompts=3, mode="collect", at_once=4, repeats=0.0, raters=2)
    for name, choices in (("Ann", "124"), ("Bob", ("1", "tie", "3"))):
        rater = _join(study, name)
        for choice in choices:
            _vote(study, rater, choice)
    study.close()
    return tmp_path


def _told(source):
    return sorted((p.prompt, p.rater, p.label, p.image_0, p.image_1) for p in read_pairs(source, ties="keep"))


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_every_door_gives_the_same_pairs(voted, tmp_path, capsys, ending):
    output = tmp_path / f"votes.{ending}"
    assert main(["vote", "export", str(voted), "--output", str(output)]) == 0
    assert "wrote 6 votes" in capsys.readouterr().out
    assert len(_told(output)) == 5 * 3 + 6
    assert _told(output) == _told(voted / "votes.db")
    assert main(["vote", "import", str(voted), "--input", str(output)]) == 0  # nothing is counted twice
    assert "added 0 votes" in capsys.readouterr().out
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert main(["vote", "import", str(elsewhere), "--input", str(output)]) == 0
    assert [row[2] for row in _told(elsewhere / "votes.db")].count(0.5) == 6
    assert len(_told(elsewhere / "votes.db")) == 5 * 3 + 6


def test_jsonl_has_rankings(voted, tmp_path):
    output = tmp_path / "votes.jsonl"
    assert main(["vote", "export", str(voted), "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert Counter(json.dumps(sorted(row["ranking"], key=str)) for row in rows) == {
        "[1, null, null, null]": 5,
        "[1, 1, 1, 1]": 1,
    }
    assert all(len(row["images"]) == len(row["models"]) == 4 for row in rows)


def test_the_page_of_results_shows_the_sets(voted, tmp_path):
    output = tmp_path / "results.html"
    assert main(["vote", "results", str(voted), "--output", str(output)]) == 0
    page = output.read_text()
    assert "6 votes by 2 people" in page
    assert "3 of 3 sets of up to 4 judged" in page
    assert page.count("data:image/webp;base64,") == 3 * 4
    assert "the best was chosen" in page


V1 = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, seed INTEGER, number INTEGER, model TEXT NOT NULL,
    metadata TEXT NOT NULL DEFAULT '{}'
);
CREATE TABLE raters (
    id INTEGER PRIMARY KEY, public TEXT NOT NULL UNIQUE, name TEXT NOT NULL, token TEXT UNIQUE, created TEXT NOT NULL
);
CREATE TABLE showings (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, rater INTEGER NOT NULL REFERENCES raters,
    picture_0 INTEGER NOT NULL REFERENCES pictures, picture_1 INTEGER NOT NULL REFERENCES pictures, swapped INTEGER NOT NULL,
    repeat INTEGER NOT NULL, mode TEXT NOT NULL, created TEXT NOT NULL, CHECK (picture_0 < picture_1)
);
CREATE TABLE votes (
    id TEXT NOT NULL PRIMARY KEY, showing TEXT NOT NULL REFERENCES showings (id), question TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('first', 'second', 'tie', 'bad', 'skip')), seconds REAL, created TEXT NOT NULL,
    undone INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX one_showing ON showings (rater, picture_0, picture_1, repeat);
CREATE UNIQUE INDEX one_answer ON votes (showing, question) WHERE undone = 0;
PRAGMA application_id = 1346456660;
PRAGMA user_version = 1;
"""


def test_votes_of_an_earlier_version_are_read_and_brought_up_to_date(study_of, tmp_path):
    study = study_of(prompts=3, questions=("overall",), repeats=0.0)
    rater = _join(study)
    for choice in ("1", "2", "tie"):
        _vote(study, rater, choice)
    now, told, token = study.store.valid_votes(), study.told(), study.store.rows("SELECT token FROM raters")[0]["token"]
    assert token
    study.close()
    (tmp_path / "votes.db").rename(tmp_path / "new.db")
    old = sqlite3.connect(tmp_path / "votes.db")
    old.executescript(V1)
    old.execute("ATTACH ? AS new", (str(tmp_path / "new.db"),))
    for table in ("settings", "pictures", "raters", "votes"):
        old.execute(f"INSERT INTO {table} SELECT * FROM new.{table}")
    columns = "number, id, rater, picture_0, picture_1, arrangement, repeat, mode, created"
    old.execute(f"INSERT INTO showings SELECT {columns} FROM new.showings")
    old.commit()
    old.close()
    shutil.copy(tmp_path / "votes.db", tmp_path / "kept.db")
    assert len(list(vote_rows(tmp_path / "votes.db"))) == 3  # read in memory, the file is as it was
    assert (tmp_path / "votes.db").read_bytes() == (tmp_path / "kept.db").read_bytes()
    again = study_of(prompts=3, questions=("overall",), repeats=0.0)
    assert again.store.valid_votes() == now
    assert again.told() == told
    assert again.store.rows("PRAGMA user_version")[0][0] == 2
    assert again.store.rows("PRAGMA foreign_key_check") == []
    assert _join(again) != rater


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"at_once": 5}, "at_once is 5; expected a whole number from 2 to 4"),
        ({"at_once": 1}, "expected a whole number from 2 to 4"),
        ({"at_once": 4, "chain": True}, "chain challenges the better of two"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        VoteOptions(**options)


def test_a_place_of_more_than_there_are(voted):
    """A damaged cell: the fourth of three pictures."""
    connection = sqlite3.connect(voted / "votes.db")
    connection.execute("UPDATE showings SET picture_3 = NULL, arrangement = 0")
    connection.execute("UPDATE votes SET choice = 'fourth'")
    connection.commit()
    connection.close()
    with pytest.raises(UserError, match="a vote is 'fourth'"):
        list(vote_rows(voted / "votes.db"))
