"""Votes as the page of ``palate vote`` keeps them, read as preference pairs. They are written by ``palate.votes.store``."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import TypedDict, cast

from palate.base.errors import UserError, nearest, said, short

HEAD = b"SQLite format 3\0"
APPLICATION = 0x50414C54  # "PALT", in the file's header
VERSION = 2
QUESTIONS = ("overall", "appeal", "following")
WEIGHTS = ("equal", "agreement", "attention")
SPOILT = "spoilt"
"""The folder beside the votes that holds the spoilt copies of attention checks, and the model they count as."""
LABELS = {"first": 1.0, "second": 0.0, "tie": 0.5, "bad": 0.5}
"""What a choice says of the first picture; ``skip`` says nothing."""
COLUMNS = ("prompt", "image_0", "image_1", "label", "weight", "rater", "model_0", "model_1")
PRIOR = 5.0  # a rater counts as if five of their votes had agreed as often as everybody's


class Vote(TypedDict):
    """What a vote says of two pictures, ``picture_0 < picture_1``.

    A vote on a pair is one of these. A vote for the best of several is one for each other picture, which the best beats; of two
    that were not chosen it says nothing, unless all were called alike.
    """

    id: str
    """Of the vote; those of one vote have the same."""
    shown: tuple[int, ...]
    """All pictures that were shown together."""
    rater: str
    name: str
    picture_0: int
    picture_1: int
    image_0: str
    image_1: str
    prompt: str
    seed: int | None
    model_0: str
    model_1: str
    metadata: str
    question: str
    choice: str
    """``first`` or ``second`` of the two, ``tie`` or ``bad``."""
    seconds: float | None
    created: str
    swapped: bool
    """Whether the second stood before the first."""
    repeat: int
    mode: str


SHOWN = ("picture_0", "picture_1", "picture_2", "picture_3")
"""Columns of the pictures that are shown together; the last two are null where there are fewer."""
PLACES = ("first", "second", "third", "fourth")
"""The choice of a picture, by its place among those shown, which lie by their numbers; ``standing`` tells where they stood."""
GIVEN = """
SELECT votes.id, votes.question, votes.choice, votes.seconds, votes.created, raters.public AS rater, raters.name,
    showings.picture_0, showings.picture_1, showings.picture_2, showings.picture_3, showings.arrangement, showings.repeat,
    showings.mode
FROM votes JOIN showings ON showings.id = votes.showing JOIN raters ON raters.id = showings.rater
WHERE votes.undone = 0 AND votes.choice != 'skip' AND (showings.mode = 'check') = ?
ORDER BY votes.rowid
"""
SHOWINGS = """
CREATE TABLE showings (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, rater INTEGER NOT NULL REFERENCES raters,
    picture_0 INTEGER NOT NULL REFERENCES pictures, picture_1 INTEGER NOT NULL REFERENCES pictures,
    picture_2 INTEGER REFERENCES pictures, picture_3 INTEGER REFERENCES pictures, arrangement INTEGER NOT NULL,
    repeat INTEGER NOT NULL, mode TEXT NOT NULL, created TEXT NOT NULL,
    CHECK (picture_0 < picture_1 AND coalesce(picture_1 < picture_2, 1) AND coalesce(picture_2 < picture_3, picture_3 IS NULL))
)
"""
VOTES = """
CREATE TABLE votes (
    id TEXT NOT NULL PRIMARY KEY, showing TEXT NOT NULL REFERENCES showings (id), question TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('first', 'second', 'third', 'fourth', 'tie', 'bad', 'skip')), seconds REAL,
    created TEXT NOT NULL, undone INTEGER NOT NULL DEFAULT 0
)
"""
INDEXES = """
CREATE UNIQUE INDEX one_showing ON showings
    (rater, picture_0, picture_1, coalesce(picture_2, 0), coalesce(picture_3, 0), repeat);
CREATE UNIQUE INDEX one_answer ON votes (showing, question) WHERE undone = 0
"""
# Version 1 knew pairs alone, whose second picture stood left or, where they were swapped, right.
UPGRADE = f"""
ALTER TABLE showings RENAME TO pairs; ALTER TABLE votes RENAME TO given;
DROP INDEX one_showing; DROP INDEX one_answer;
{SHOWINGS};
{VOTES};
INSERT INTO showings SELECT number, id, rater, picture_0, picture_1, NULL, NULL, swapped, repeat, mode, created FROM pairs;
INSERT INTO votes SELECT id, showing, question, choice, seconds, created, undone FROM given ORDER BY rowid;
DROP TABLE given; DROP TABLE pairs;
{INDEXES};
PRAGMA user_version = 2
"""


def run_statements(connection: sqlite3.Connection, statements: str) -> None:
    """Statements one after another, in the transaction at hand (``executescript`` would commit it)."""
    for statement in statements.split(";"):
        connection.execute(statement)


def standing(pictures: Sequence[int], arrangement: int) -> tuple[int, ...]:
    """The pictures of a showing as they stood, from the number of their order: 0 is as given, the last the reverse.

    Raises ``IndexError`` for an order that so many pictures do not have.
    """
    return list(permutations(pictures))[arrangement]


def open_votes(path: str | Path) -> sqlite3.Connection:
    """A connection that only reads; rows by name. Raises ``UserError`` unless ``path`` holds votes that we can read."""
    if not Path(path).is_file():
        raise UserError(f"there are no votes at {path}; 'palate vote DIR' collects them in DIR/votes.db")
    connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
    try:
        if check_version(connection, path) < VERSION:  # what is only read is brought up to date in memory
            copy = sqlite3.connect(":memory:")
            connection.backup(copy)
            connection.close()
            connection = copy
            run_statements(connection, UPGRADE)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise unreadable(path, error) from None
    except UserError:
        connection.close()
        raise
    connection.row_factory = sqlite3.Row
    return connection


def unreadable(path: str | Path, error: Exception) -> UserError:
    """What is said of a damaged database."""
    return UserError(f"{path} is not a readable database of votes ({said(error)}); restore it from a copy")


def check_version(connection: sqlite3.Connection, path: str | Path) -> int:
    """The version of the tables. Refuses what is no database of votes, and what a newer Palate wrote."""
    try:
        (application,), (version,) = (connection.execute(f"PRAGMA {p}").fetchone() for p in ("application_id", "user_version"))
    except sqlite3.DatabaseError as error:
        raise unreadable(path, error) from None
    if application != APPLICATION:
        raise UserError(f"{path} is a database, but not of votes; expected the votes.db that 'palate vote' writes")
    if version > VERSION:
        raise UserError(
            f"{path} was written by a newer Palate (version {version} of its tables, here {VERSION}): update Palate"
        )
    return version


def vote_rows(path: str | Path, *, question: str = "overall", weights: str = "equal") -> Iterator[dict[str, object]]:
    """Rows of ``COLUMNS``, one for each two pictures that a vote compares, planned repeats left out. Pictures are
    paths relative to the database's folder.

    ``weights="agreement"`` weighs a vote by how far its rater's agreement with others exceeds chance (``agreement_weights``);
    ``"attention"`` leaves out whoever did not pass most of their attention checks.
    Raises ``UserError`` for an unknown question or kind of weight.
    """
    if question not in QUESTIONS:
        raise UserError(f"vote_question is {question!r}{nearest(question, QUESTIONS)}")
    if weights not in WEIGHTS:
        raise UserError(f"vote_weights is {weights!r}{nearest(weights, WEIGHTS)}")
    connection = open_votes(path)
    try:
        rows = [row for row in valid_votes(connection, path) if row["question"] == question and not row["repeat"]]
        asleep = {rater for rater, (passed, seen) in passed_checks(connection, path).items() if 2 * passed <= seen}
    finally:
        connection.close()
    weight = {}
    if weights == "agreement":
        weight = agreement_weights([(r["rater"], (r["picture_0"], r["picture_1"]), LABELS[r["choice"]]) for r in rows])
    if weights == "attention":
        rows = [row for row in rows if row["rater"] not in asleep]
    for row in rows:
        yield {
            "prompt": row["prompt"],
            "image_0": row["image_0"],
            "image_1": row["image_1"],
            "label": LABELS[row["choice"]],
            "weight": weight.get(row["rater"], 1.0),
            "rater": row["rater"],
            "model_0": row["model_0"],
            "model_1": row["model_1"],
        }


def valid_votes(connection: sqlite3.Connection, path: str | Path, *, checks: bool = False) -> list[Vote]:
    """All votes that say something, repeats among them, as they came; or, with ``checks``, those on attention checks.

    Raises ``UserError`` for a damaged database.
    """
    try:
        pictures = {row["id"]: row for row in connection.execute("SELECT * FROM pictures")}
        return [said for row in connection.execute(GIVEN, (int(checks),)) for said in _comparisons(row, pictures)]
    except (
        sqlite3.DatabaseError,
        TypeError,
        LookupError,
        ValueError,
    ) as error:  # numbers that are none, pictures that are not there
        raise unreadable(path, error) from None


def _comparisons(row: sqlite3.Row, pictures: Mapping[int, sqlite3.Row]) -> Iterator[Vote]:
    """What a vote says, pair by pair."""
    shown = tuple(row[name] for name in SHOWN if row[name] is not None)
    choices = (*PLACES[: len(shown)], "tie", "bad")
    if (choice := row["choice"]) not in choices:
        raise ValueError(f"a vote is {short(choice, 40)}")
    stood = standing(shown, row["arrangement"])
    best = shown[choices.index(choice)] if choice in PLACES else None
    common = {name: row[name] for name in ("id", "rater", "name", "question", "seconds", "created", "repeat", "mode")}
    for a, b in combinations(shown, 2):
        if best not in (None, a, b):
            continue
        first, second = pictures[a], pictures[b]
        yield cast(
            Vote,
            {
                **common,
                **{name: first[name] for name in ("prompt", "seed", "metadata")},
                "picture_0": a,
                "picture_1": b,
                "image_0": first["file"],
                "image_1": second["file"],
                "model_0": first["model"],
                "model_1": second["model"],
                "shown": shown,
                "choice": choice if best is None else "first" if best == a else "second",
                "swapped": stood.index(b) < stood.index(a),
            },
        )


def passed_checks(connection: sqlite3.Connection, path: str | Path) -> dict[str, tuple[int, int]]:
    """By rater, how many attention checks preferred the whole picture, of how many; a spoilt one may still follow the words."""
    found: dict[str, tuple[int, int]] = {}
    for vote in valid_votes(connection, path, checks=True):
        if vote["question"] != "following":
            passed, seen = found.get(vote["rater"], (0, 0))
            spoilt = {"first": vote["model_1"], "second": vote["model_0"]}.get(vote["choice"])
            found[vote["rater"]] = passed + (spoilt == SPOILT), seen + 1
    return found


def agreement_weights(votes: Sequence[tuple[str, object, float]]) -> Mapping[str, float]:
    """A weight per rater from ``(rater, pair, label)``: twice the agreement less one, at least 0, of mean 1 over the votes.

    The agreement of two votes on one pair is 1 - abs(difference of labels). A rater's is the mean over all comparisons with
    others, shrunk towards everybody's mean as if ``PRIOR`` comparisons had been average: few votes weigh like anybody's.
    """
    by_pair: dict[object, list[tuple[str, float]]] = defaultdict(list)
    for rater, pair, label in votes:
        by_pair[pair].append((rater, label))
    agreed, compared = defaultdict(float), defaultdict(int)
    for given in by_pair.values():
        for (one, x), (other, y) in combinations(given, 2):
            if one != other:
                for rater in (one, other):
                    agreed[rater] += 1 - abs(x - y)
                    compared[rater] += 1
    everybody = sum(agreed.values()) / sum(compared.values()) if compared else 1.0
    raters = [rater for rater, _, _ in votes]
    raw = {r: max(0.0, 2 * (agreed[r] + PRIOR * everybody) / (compared[r] + PRIOR) - 1) for r in raters}
    mean = sum(raw[r] for r in raters) / max(len(raters), 1)
    if mean == 0 and raters:
        raise UserError("no rater agrees with the others more than chance: their agreement gives no weights; use equal weights")
    return {r: w / mean for r, w in raw.items()}
