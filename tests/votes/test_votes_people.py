"""Links with an end, links of one's own, attention checks, and the page of results that is sent."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from party import picture_folder

from palate.base.errors import UserError
from palate.cli import main
from palate.data.votes import SPOILT, vote_rows
from palate.votes.study import RefusedError, Study, VoteOptions

NOON = datetime(2026, 12, 5, 12).astimezone()


@pytest.fixture
def open_study(tmp_path):
    """A study of two models in ``tmp_path``, and a clock that may be set."""
    picture_folder(tmp_path, prompts=4)
    opened, clock = [], [NOON]

    def make(**options) -> Study:
        opened.append(Study(tmp_path, VoteOptions(questions=("overall",), repeats=0.0, **options), today=lambda: clock[0]))
        opened[-1].clock = clock
        return opened[-1]

    yield make
    for study in opened:
        study.close()


def answer(study: Study, rater: str, choose) -> int:
    """Answers all there is: ``choose`` gets the showing and says left or right. How many answers were given."""
    given = 0
    while shown := study.state(rater)["open"]:
        study.vote(rater, name=f"vote-{rater}-{given:04d}", showing=shown[0]["id"], question="overall", choice=choose(shown[0]))
        given += 1
    return given


@pytest.mark.parametrize(
    ("until", "closes"),
    [
        ("2026-12-05", datetime(2026, 12, 6)),
        ("2026-12-05T18:00", datetime(2026, 12, 5, 18)),
        ("2026-12-05 18:30", datetime(2026, 12, 5, 18, 30)),
    ],
)
def test_a_date_closes_at_its_end_and_a_time_at_itself(until, closes):
    assert VoteOptions(until=until).closes() == closes.astimezone()


def test_after_the_end_nobody_votes_and_everybody_is_thanked(open_study):
    study = open_study(until="2026-12-05T18:00", thanks="Cake at four.")
    rater = study.rater(study.join("Ann"))
    shown = study.state(rater)["open"][0]
    study.vote(rater, name="vote-00000001", showing=shown["id"], question="overall", choice="1")
    study.clock[0] = NOON + timedelta(hours=6)
    state = study.state(rater)
    assert (state["ended"], state["open"], state["left"], state["thanks"], state["name"]) == (
        True,
        [],
        0,
        "Cake at four.",
        "Ann",
    )
    assert state["liked"] == [shown["pictures"][0]]
    other = {"name": "vote-00000002", "showing": study.state(rater)["rater"], "question": "overall", "choice": "1"}
    for attempt in (
        lambda: study.join("Bob"),
        lambda: study.vote(rater, **other),
        lambda: study.undo(rater, "vote-00000001"),
    ):
        with pytest.raises(RefusedError, match="voting is closed") as error:
            attempt()
        assert error.value.status == 410


def test_people_have_a_link_each_and_nobody_else_votes(open_study, client_of):
    study = open_study(people=("Ann", "Ben"))
    keys = [study.personal_key(name) for name in study.options.people]
    assert len({*keys, study.key("rater"), study.key("owner")}) == 4
    phone, laptop = client_of(study, host="0.0.0.0"), client_of(study, host="0.0.0.0")
    assert phone.get("/").status_code == 403
    for device in (phone, laptop):  # the same person on two devices
        assert device.get(f"/enter/{keys[0]}").headers["location"] == "/"
        state = device.get("/api/state").json()
        assert (state["name"], len(state["open"])) == ("Ann", 4)
    assert phone.vote(state["open"][0]["id"], "overall", "1").status_code == 200
    assert laptop.get("/api/state").json()["done"] == 1
    stranger = client_of(study, host="0.0.0.0")
    assert stranger.get("/enter/" + "0" * 32).status_code == 403
    stranger.get(f"/enter/{study.key('rater')}")
    assert stranger.tell("/api/join", name="Eve").status_code == 403
    assert stranger.get("/api/state").json()["personal"]


def test_the_link_of_a_person_outlives_a_restart(open_study):
    study = open_study(people=("Ann",))
    token = study.enter(study.personal_key("Ann"))
    rater = study.rater(token)
    study.close()
    again = open_study(people=("Ann", "Ben"))
    assert again.rater(again.enter(again.personal_key("Ann"))) == rater
    assert again.enter("") is None


def test_checks_find_who_does_not_look_and_are_no_votes(open_study, tmp_path):
    study = open_study(checks=0.2, raters=2)
    spoilt = {study._opaque[n] for n, p in study.pictures.items() if p.model == SPOILT}
    awake, asleep = (study.rater(study.join(name)) for name in ("Ann", "Bob"))

    def look(shown) -> str:
        return "1" if shown["pictures"][1] in spoilt else "2"

    def sleep(shown) -> str:
        return "2" if shown["pictures"][1] in spoilt else "1"

    assert answer(study, awake, look) == answer(study, asleep, sleep) == 5  # four pairs, and one check among them
    told = study.told()
    assert (told["votes"], told["pairs"], told["judged"]) == (8, 4, 4)
    by_name = {row["name"]: (row["passed"], row["checked"]) for row in told["raters"]}
    assert by_name == {"Ann": (1, 1), "Bob": (0, 1)}
    assert {row["rater"] for row in vote_rows(tmp_path / "votes.db")} == {awake, asleep}
    assert {row["rater"] for row in vote_rows(tmp_path / "votes.db", weights="attention")} == {awake}
    before = [(row["file"], row["model"]) for row in study.store.rows("SELECT file, model FROM pictures ORDER BY id")]
    study.close()
    again = open_study(checks=0.2, raters=2)  # nothing is made twice, and the spoilt are no pictures of the folder
    assert [(row["file"], row["model"]) for row in again.store.rows("SELECT file, model FROM pictures ORDER BY id")] == before
    assert again.state(awake)["open"] == []
    assert again.told()["raters"] == told["raters"]


def test_a_check_that_was_open_is_open_after_a_restart_and_gone_without_checks(open_study):
    study = open_study(checks=0.2)
    rater = study.rater(study.join())
    spoilt = {study._opaque[n] for n, p in study.pictures.items() if p.model == SPOILT}
    while shown := [s for s in study.state(rater)["open"] if not spoilt & {*s["pictures"]}]:
        study.vote(rater, name=f"vote-{shown[0]['id']}", showing=shown[0]["id"], question="overall", choice="1")
    (check,) = study.state(rater)["open"]
    study.close()
    again = open_study(checks=0.2)
    assert [shown["id"] for shown in again.state(rater)["open"]] == [check["id"]]
    again.close()
    assert open_study().state(rater)["open"] == []


def test_the_page_of_results_stands_alone_and_names_nobody(open_study, tmp_path, capsys):
    study = open_study(raters=2, checks=0.2)
    for name in ("Ann <b>", "Bob"):
        rater = study.rater(study.join(name))
        answer(study, rater, lambda shown: "1")
    study.close()
    output = tmp_path / "sent" / "results.html"
    output.parent.mkdir()
    assert main(["vote", "results", str(tmp_path), "--output", str(output)]) == 0
    assert "8 votes, without the raters' names" in capsys.readouterr().out
    page = output.read_text()
    assert "8 votes by 2 people" in page
    assert "4 of 4 pairs judged, by up to 2 people each" in page
    assert page.count("data:image/webp;base64,") == 8
    assert not re.search(r"Ann|Bob|rater-[0-9a-f]{6}", re.sub(r"base64,[^\"]*", "", page))
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "&lt;b&gt;&amp;0" in page  # a prompt with markup


def test_the_owner_saves_page_and_table(open_study, client_of):
    study = open_study(raters=1)
    rater = study.rater(study.join("=1+1"))
    answer(study, rater, lambda shown: "1")
    visitor = client_of(study)
    for path in ("/results/page", "/results/votes.csv"):
        assert visitor.get(path).status_code == 403
    visitor.get(f"/enter/{study.key('owner')}")
    page = visitor.get("/results/page")
    assert page.headers["content-disposition"].startswith('attachment; filename="')
    assert "4 votes by 1 person" in page.text
    table = visitor.get("/results/votes.csv").text.splitlines()
    assert table[0].startswith("prompt,image_0,image_1,label,rater")
    assert len(table) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"until": "soon"}, "until is 'soon'; expected a date such as 2026-12-05"),
        ({"people": ("Ann", "Ann")}, "people must have different names"),
        ({"people": (" ",)}, "people must have different names"),
        ({"checks": 0.5}, "checks is 0.5; expected a share from 0 to 0.2"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        VoteOptions(**options)


def test_results_of_nothing(tmp_path, capsys):
    picture_folder(tmp_path)
    assert main(["vote", "results", str(tmp_path), "--output", "r.html"]) == 2
    assert "holds no votes; 'palate vote" in capsys.readouterr().err
    Study(tmp_path, VoteOptions()).close()
    assert main(["vote", "results", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 2
    assert "no votes on its pictures yet" in capsys.readouterr().err
    assert main(["vote", "results", str(tmp_path), "--output", "r.pdf"]) == 2
    assert not Path("r.html").exists()
