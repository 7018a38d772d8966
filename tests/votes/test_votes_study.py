"""A study without the web: what is kept, what is counted, what is refused."""

from __future__ import annotations

import json
import random
import sqlite3
from collections import Counter

import pytest
from party import picture_folder
from PIL import Image

from palate.base.errors import UserError
from palate.votes.store import DiskError, Lock, Store
from palate.votes.study import AHEAD, LEASE, RefusedError, Study, VoteOptions, plain_png


def _join(study, name=""):
    return study.rater(study.join(name))


def _answer(study, rater, choice="1", vote=None):
    """Answer the first open question of the rater's first pair; the new state."""
    state = study.state(rater)
    shown = state["open"][0]
    question = next(q for q in study.questions if q not in shown["answered"])
    name = vote or f"v{random.randrange(16**12):012x}"
    return study.vote(rater, name=name, showing=shown["id"], question=question, choice=choice, seconds=1.0)


def test_compare_pairs_two_models_on_prompt_and_seed(study_of):
    study = study_of(prompts=3)
    assert study.mode == "compare"
    for a, b in study.pairs:
        first, second = study.pictures[a], study.pictures[b]
        assert (first.prompt, first.seed) == (second.prompt, second.seed)
        assert {first.model, second.model} == {"plain", "tuned"}
    assert len(study.pairs) == 3


def test_collect_pairs_all_of_a_prompt(study_of):
    study = study_of(prompts=2, per_prompt=3, models=("plain",))
    assert study.mode == "collect"
    assert len(study.pairs) == 2 * 3  # 3 choose 2, of each prompt
    assert study.questions == ["overall"]


def test_what_the_page_sees_tells_nothing_of_the_model(study_of):
    study = study_of()
    state = json.dumps(study.state(_join(study)))
    assert not any(word in state for word in ("plain", "tuned", ".png"))
    shown = study.state(_join(study))["open"][0]
    for side in (0, 1):
        data = study.picture(shown["pictures"][side])
        assert b"parameters" not in data
        assert b"Model" not in data


def test_the_picture_itself_is_unchanged(study_of, tmp_path):
    from PIL import Image, ImageChops

    study = study_of()
    for number, opaque in study._opaque.items():
        before = Image.open(tmp_path / study.pictures[number].file)
        (tmp_path / "served.png").write_bytes(study.picture(opaque))
        assert ImageChops.difference(before, Image.open(tmp_path / "served.png")).getbbox() is None


def test_other_formats_are_served_as_png(tmp_path):
    from PIL import Image

    Image.new("RGB", (9, 7), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0" + b"secret")
    data = plain_png(tmp_path / "a.jpg", 0)
    assert data.startswith(b"\x89PNG")
    assert b"secret" not in data
    (tmp_path / "b.png").write_text("<html>")
    with pytest.raises(ValueError, match="not a picture"):
        plain_png(tmp_path / "b.png", 0)


@pytest.mark.parametrize("mode", ["compare", "collect"])
def test_sides_are_counted_right(study_of, mode):
    """Whoever always prefers the tuned model's picture, wherever it stands, has preferred it every time."""
    study = study_of(prompts=24, mode=mode, questions=("overall",), repeats=0.0)
    rater = _join(study)
    tuned = {name for number, name in study._opaque.items() if study.pictures[number].model == "tuned"}
    sides = Counter()
    while study.state(rater)["open"]:
        choice = "1" if study.state(rater)["open"][0]["pictures"][0] in tuned else "2"
        sides[choice] += 1
        _answer(study, rater, choice)
    assert sides.total() == 24
    assert len(sides) == 2  # each side by a coin of its own: all on one side once in eight million studies
    for vote in study.store.valid_votes():
        assert {"first": vote["model_0"], "second": vote["model_1"]}[vote["choice"]] == "tuned"


def test_a_vote_sent_twice_counts_once(study_of):
    study = study_of(questions=("overall",))
    rater = _join(study)
    shown = study.state(rater)["open"][0]["id"]
    vote = {"name": "the-same-vote", "showing": shown, "question": "overall", "choice": "1"}
    assert study.vote(rater, **vote)["done"] == study.vote(rater, **vote)["done"] == 1
    with pytest.raises(RefusedError, match="answered already"):
        study.vote(rater, **{**vote, "name": "another-name"})
    with pytest.raises(RefusedError, match="another vote"):
        study.vote(rater, **{**vote, "showing": study.state(rater)["open"][0]["id"]})
    assert len(study.store.valid_votes()) == 1


def test_undo_and_undo_again(study_of):
    study = study_of(questions=("overall",))
    rater = _join(study)
    first = study.state(rater)["open"][0]["id"]
    _answer(study, rater, "1", "vote-one")
    _answer(study, rater, "skip", "vote-two")
    state = study.undo(rater, "vote-two")
    assert study.undo(rater, "vote-two") == state
    assert state["last"]["vote"] == "vote-one"
    state = study.undo(rater, "vote-one")
    assert state["open"][0]["id"] == first
    assert (state["done"], state["last"]) == (0, None)
    assert not study.store.valid_votes()
    _answer(study, rater, "2")
    assert len(study.store.valid_votes()) == 1


def test_a_skip_whose_place_others_took_is_passed_over(study_of):
    """It stays skipped, undo goes on before it, and nobody sees a pair more often than asked; after a restart as well."""
    study = study_of(prompts=2, raters=1, questions=("overall",), repeats=0.0)
    one, other = _join(study), _join(study)
    skipped = study.state(one)["open"][1]["id"]
    _answer(study, one, "1", "vote-one")
    _answer(study, one, "skip", "vote-two")
    _answer(study, other, "2")
    for again in range(2):
        told = study.undo(one, "vote-two")
        assert told["closed"] == skipped
        assert told["open"] == []
        assert told["last"]["vote"] == study.state(one)["last"]["vote"] == "vote-one"
        if not again:
            study = study_of(prompts=2, raters=1, questions=("overall",), repeats=0.0)
    state = study.undo(one, "vote-one")
    assert "closed" not in state
    assert (len(state["open"]), state["last"]) == (1, None)
    assert study.queue.held.tolist() == [1, 1]
    study.undo(other, study.state(other)["last"]["vote"])  # and where a place is free again, the skip can be taken back
    _answer(study, other, "skip")
    assert [pair["id"] for pair in study.undo(one, "vote-two")["open"]][-1] == skipped


def test_a_restart_leaves_pairs_with_whom_they_went_to(study_of):
    """One rater left and another took their pairs: so it is after a restart, whoever comes first."""
    now = [0.0]
    options = {"prompts": AHEAD, "raters": 1, "questions": ("overall",), "clock": lambda: now[0]}
    study = study_of(**options)
    gone, other = _join(study), _join(study)
    study.state(gone)
    now[0] += LEASE + 1
    before = study.state(other)["open"]
    assert len(before) == AHEAD
    study = study_of(**options)
    assert study.state(gone)["open"] == []
    assert study.state(other)["open"] == before


def test_a_restart_goes_on_where_it_was(study_of):
    """After every step, a study that is opened anew says the same to every rater."""
    chance = random.Random(0)
    study = study_of(prompts=10, repeats=0.3, raters=2)
    raters = [_join(study) for _ in range(3)]
    for _ in range(80):
        rater = chance.choice(raters)
        state = study.state(rater)
        if chance.random() < 0.2 and state["last"]:
            study.undo(rater, state["last"]["vote"])
        elif state["open"]:
            _answer(study, rater, chance.choice(["1", "2", "tie", "bad", "skip"]))
    before = [study.state(rater) for rater in raters]
    held = study.queue.held.tolist()
    study = study_of(prompts=10, repeats=0.3, raters=2)
    assert [study.state(rater) for rater in raters] == before
    assert study.queue.held.tolist() == held
    assert max(held) <= 2


def test_no_more_raters_than_asked_and_no_pair_twice(study_of):
    study = study_of(prompts=5, raters=2, questions=("overall",), repeats=0.0)
    raters = [_join(study) for _ in range(4)]
    while any(study.state(rater)["open"] for rater in raters):
        for rater in raters:
            if study.state(rater)["open"]:
                _answer(study, rater)
    votes = Counter((v["picture_0"], v["picture_1"]) for v in study.store.valid_votes())
    assert set(votes.values()) == {2}
    assert len(votes) == 5
    assert max(Counter((v["rater"], v["picture_0"]) for v in study.store.valid_votes()).values()) == 1


def test_who_leaves_gives_their_pairs_to_others(study_of):
    now = [0.0]
    study = study_of(prompts=AHEAD, raters=1, questions=("overall",), clock=lambda: now[0])
    gone, other = _join(study), _join(study)
    held = study.state(gone)["open"]
    assert len(held) == AHEAD
    assert study.state(other)["open"] == []
    now[0] += LEASE + 1
    assert len(study.state(other)["open"]) == AHEAD
    with pytest.raises(RefusedError, match="enough people"):
        study.vote(gone, name="too-late-1", showing=held[0]["id"], question="overall", choice="1")
    assert study.state(gone)["open"] == []


def test_planned_repeats_measure_consistency_alone(study_of):
    from palate.votes.results import results

    study = study_of(prompts=14, repeats=0.2, questions=("overall",))
    rater = _join(study)
    while study.state(rater)["open"]:
        _answer(study, rater, "1")  # sides change, so "always left" contradicts itself
    told = results(study.store.valid_votes(), mode="compare", raters_per_pair=5)
    assert told["votes"] == 14
    assert told["raters"][0]["repeated"] >= 1
    assert told["raters"][0]["same"] == 0
    assert told["raters"][0]["left"] == 1.0


def test_the_better_picture_is_challenged_again(study_of):
    study = study_of(prompts=2, per_prompt=4, models=("plain",), chain=True, repeats=0.0)
    rater = _join(study)
    shown = study.state(rater)["open"][0]
    champion = shown["pictures"][0]
    for _ in range(3):
        shown = study.state(rater)["open"][0]
        side = "1" if shown["pictures"][0] == champion else "2"
        assert champion in (shown["pictures"][0], shown["pictures"][1])
        _answer(study, rater, side)
    assert champion not in (study.state(rater)["open"][0]["pictures"][0], study.state(rater)["open"][0]["pictures"][1])


def test_whatever_the_answer_its_pictures_were_told_before(study_of):
    """In a chain the next pair hangs on the answer; the page fetches the pictures of every answer ahead."""
    study = study_of(prompts=3, per_prompt=4, models=("plain",), chain=True, repeats=0.2)
    rater, chance, seen = _join(study), random.Random(1), 0
    state = study.state(rater)
    while state["open"]:
        assert len(state["open"]) == 1
        held = study.queue.held.tolist()
        there = {*state["soon"], state["open"][0]["pictures"][0], state["open"][0]["pictures"][1]}
        state = _answer(study, rater, chance.choice(["1", "2", "tie", "bad", "skip"]))
        assert study.state(rater) == state  # looking ahead changes nothing
        assert all({shown["pictures"][0], shown["pictures"][1]} <= there for shown in state["open"])
        assert sum(study.queue.held) <= sum(held) + 1
        seen += 1
    assert seen >= 18


def test_a_picture_deleted_while_serving(study_of, tmp_path, capsys):
    study = study_of(prompts=6, questions=("overall",))
    rater = _join(study)
    shown = study.state(rater)["open"][0]
    number = study._by_opaque[shown["pictures"][0]]
    (tmp_path / study.pictures[number].file).unlink()
    with pytest.raises(RefusedError, match="gone"):
        study.picture(shown["pictures"][0])
    assert shown["id"] not in [pair["id"] for pair in study.state(rater)["open"]]
    assert f"{study.pictures[number].file} is gone" in capsys.readouterr().err
    for file in tmp_path.glob("tuned/*.png"):
        file.unlink()
    assert study.state(_join(study))["open"] == []


def test_a_full_disk_is_told_and_nothing_is_half_kept(study_of):
    study = study_of(prompts=12, questions=("overall",))
    rater = _join(study)
    study.state(rater)
    connection = study.store._connection
    connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")
    acknowledged = 0

    def until_full() -> None:
        nonlocal acknowledged
        while acknowledged < 2000:
            _answer(study, rater, "1")
            acknowledged += 1
            study.undo(rater, study.state(rater)["last"]["vote"])

    with pytest.raises(DiskError, match="full"):
        until_full()
    connection.execute("PRAGMA max_page_count = 1000000")
    assert study.store.rows("SELECT count(*) FROM votes")[0][0] == acknowledged
    _answer(study, rater, "1")
    assert len(study.store.valid_votes()) == 1


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        Study(tmp_path / "nowhere", VoteOptions())
    with pytest.raises(UserError, match=r"has no manifest.jsonl; expected a folder that palate generate wrote, or one of pict"):
        Study(tmp_path, VoteOptions())
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"no prompt with two pictures"):
        Study(tmp_path, VoteOptions())
    folder = picture_folder(tmp_path / "one", models=("plain",))
    with pytest.raises(UserError, match="no two models"):
        Study(folder, VoteOptions(mode="compare"))
    with pytest.raises(UserError, match="no prompt with two pictures"):
        Study(folder, VoteOptions())


def test_pictures_that_differ_in_size_are_not_compared_unless_told(tmp_path):
    """By the pictures themselves: a folder may say nothing of the sizes that it was drawn at."""
    folder = picture_folder(tmp_path, prompts=2)
    with Image.open(folder / "tuned" / "001-0.png") as image:
        image.resize((64, 96)).save(folder / "tuned" / "001-0.png")
    with pytest.raises(UserError, match=r"1 of 2 pictures differ in size, .*: 64 in .*plain and 64x96 in .*tuned"):
        Study(folder, VoteOptions())
    study = Study(folder, VoteOptions(allow_different_settings=True))
    assert "differ in size" in study.notes[0]
    study.close()


def test_sides_that_were_not_made_alike(tmp_path):
    """The check of palate compare: settings and prompts of two models that are compared must agree, or be allowed to differ."""
    folder = picture_folder(tmp_path)
    for model, steps in (("plain", 20), ("tuned", 50)):
        (folder / model / "settings.json").write_text(json.dumps({"num_inference_steps": steps}))
    with pytest.raises(UserError, match=r"num_inference_steps is 20 in .*plain and 50 in .*--allow_different_settings true"):
        Study(folder, VoteOptions())
    assert not (folder / "votes.db").exists()
    study = Study(folder, VoteOptions(allow_different_settings=True))
    assert "num_inference_steps" in study.notes[0]
    study.close()
    Study(folder, VoteOptions(mode="collect")).close()  # judges pictures, not models
    (folder / "tuned" / "settings.json").unlink()
    (folder / "plain" / "settings.json").unlink()
    manifest = folder / "tuned" / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"1 of 4 pictures in .*plain have no partner"):
        Study(folder, VoteOptions())


def test_folders_that_share_nothing_are_not_compared(tmp_path):
    """A run's folders of seen and unseen prompts side by side: only those of the same prompts must be alike."""
    for part, prompts in (("seen", 2), ("unseen", 3)):
        picture_folder(tmp_path, prompts=prompts, models=(f"plain-{part}", f"tuned-{part}"))
        for model in ("plain", "tuned"):
            inner = tmp_path / f"{model}-{part}"
            lines = [json.loads(line) for line in (inner / "manifest.jsonl").read_text().splitlines()]
            told = [json.dumps({**line, "prompt": f"{part} {line['prompt']}"}) + "\n" for line in lines]
            (inner / "manifest.jsonl").write_text("".join(told))
            (inner / "settings.json").write_text(json.dumps({"resolution": 64 + 64 * (part == "seen")}))
    study = Study(tmp_path, VoteOptions())
    assert len(study.pairs) == 5
    study.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "colect"}, "did you mean 'collect'"),
        ({"questions": ("apeal",)}, "did you mean 'appeal'"),
        ({"raters": 0}, "expected at least 1"),
        ({"repeats": 0.9}, "expected a share"),
        ({"port": 70000}, "expected a number"),
        ({"chain": True, "mode": "compare"}, "chain is for collecting"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        VoteOptions(**options)


def test_databases_that_are_refused(study_of, tmp_path):
    study = study_of()
    study.close()
    path = tmp_path / "votes.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(UserError, match="newer Palate"):
        Store(tmp_path)
    for ending in ("", "-wal", "-shm"):
        (tmp_path / f"votes.db{ending}").unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(UserError, match="not of votes"):
        Store(tmp_path)
    path.write_bytes(b"SQLite format 3\0" + bytes(5000))
    with pytest.raises(UserError, match="restore it"):
        Store(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path)


def test_a_damaged_database_is_refused_at_once(study_of, tmp_path, capsys):
    from palate.cli import main

    study = study_of(prompts=30)
    rater = _join(study)
    while study.state(rater)["open"]:
        _answer(study, rater)
    study.close()
    path = tmp_path / "votes.db"
    data = bytearray(path.read_bytes())
    data[8192:20480] = bytes(12288)  # three pages in the middle
    path.write_bytes(data)
    assert main(["vote", str(tmp_path)]) == 2
    assert "restore it from a copy" in capsys.readouterr().err


ODD_CELLS = [
    ("votes", "choice", "maybe"),
    ("votes", "choice", b"\xff"),
    ("showings", "picture_0", "many"),
    ("pictures", "metadata", "{"),
    ("pictures", "metadata", None),
]


@pytest.mark.parametrize(("table", "column", "value"), ODD_CELLS)
def test_odd_cells_of_a_database_are_refused_at_every_door(study_of, tmp_path, capsys, table, column, value):
    import sqlite3

    from palate.cli import main
    from palate.data.pairs import read_pairs

    study = study_of(prompts=2)
    rater = _join(study)
    while study.state(rater)["open"]:
        _answer(study, rater)
    study.close()
    path = tmp_path / "votes.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    try:
        connection.execute(f"UPDATE {table} SET {column} = ?", (value,))
    except sqlite3.IntegrityError:
        pytest.skip("the table itself refuses it")
    connection.commit()
    connection.close()
    for words in (
        ["export", str(tmp_path), "--output", str(tmp_path / "v.jsonl")],
        ["results", str(tmp_path), "--output", str(tmp_path / "v.html")],
    ):
        code = main(["vote", *words])
        error = capsys.readouterr().err
        assert code == 0 or (code == 2 and error.count("\n") == 1), words
        assert code == 0 or not (tmp_path / words[-1]).exists()
    if table == "votes":
        assert code == 2
        with pytest.raises(UserError, match="restore it from a copy"):
            list(read_pairs(path))


def test_no_link_and_no_foreign_database_leads_out_of_the_folder(tmp_path, capsys):
    from PIL import Image

    from palate.cli import main

    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    folder = picture_folder(tmp_path / "pictures")
    study = Study(folder, VoteOptions())
    number, opaque = next(iter(study._opaque.items()))
    inside = folder / study.pictures[number].file
    inside.unlink()
    inside.symlink_to(secret)
    with pytest.raises(RefusedError, match="gone"):
        study.picture(opaque)
    study.close()
    with pytest.raises(UserError, match="outside"):
        Study(folder, VoteOptions())
    inside.unlink()
    inside.symlink_to(folder / "tuned" / "000-0.png")  # links inside are as good as files
    study = Study(folder, VoteOptions(questions=("overall",)))
    assert study.picture(opaque)
    rater = _join(study)
    for _ in range(4):
        _answer(study, rater)
    study.store._connection.execute("UPDATE pictures SET file = ? WHERE id = ?", (str(secret), number))
    study.close()
    assert main(["vote", "export", str(folder), "--output", str(tmp_path / "out.parquet")]) == 2
    assert "outside" in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()


def test_a_picture_bomb_is_not_passed_on(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="60000 x 60000"):
        plain_png(tmp_path / "bomb.png", 0)
    (tmp_path / "short.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="ends too early"):
        plain_png(tmp_path / "short.png", 0)
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ValueError, match="65 MB"):
        plain_png(tmp_path / "huge.png", 0)


def test_pictures_that_changed_under_their_votes(study_of, tmp_path):
    study_of().close()
    manifest = tmp_path / "plain" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("&0", "&changed"))
    with pytest.raises(UserError, match="new folder"):
        study_of(mode="collect")


def test_one_writer_at_a_time(tmp_path):
    lock = Lock(tmp_path)
    lock.tell("the page http://127.0.0.1:8421")
    with pytest.raises(UserError, match=r"in use by the page http://127.0.0.1:8421"):
        Lock(tmp_path)
    lock.close()
    Lock(tmp_path).close()


def test_results_by_hand():
    """Two raters, three pairs of one prompt each; b has 4.5 points of 6 votes and the majority of two pairs."""
    from palate.votes.results import results

    said = {"x": ((1, "second"), (2, "second")), "y": ((1, "second"), (2, "tie")), "z": ((1, "first"), (2, "second"))}
    votes = [
        {
            "id": f"{prompt}{rater}", "rater": f"r{rater}", "name": "", "picture_0": i, "picture_1": i + 10, "prompt": prompt,
            "model_0": "a", "model_1": "b", "metadata": "{}", "question": "overall", "choice": choice, "seconds": 2.0,
            "swapped": False, "repeat": 0, "shown": (i, i + 10),
        }
        for i, (prompt, row) in enumerate(said.items())
        for rater, choice in row
    ]  # fmt: skip
    told = results(votes, mode="compare", raters_per_pair=2)["questions"]["overall"]["comparisons"][0]
    rate = told["win_rate"]
    assert (rate["wins"], rate["ties"], rate["losses"]) == (4, 1, 1)
    assert rate["rate"] == pytest.approx(4.5 / 6)
    # Means of b: x 1, y 0.75, z 0.5.
    assert told["majority"] == {"a": 0, "ties": 1, "b": 2, "unanimous": 1, "shared": 3}
    agreement = {row["rater"]: row["agreement"] for row in results(votes, mode="compare", raters_per_pair=2)["raters"]}
    assert agreement == {"r1": pytest.approx(0.5), "r2": pytest.approx(0.5)}  # (1 + 0.5 + 0) / 3
