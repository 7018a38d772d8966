"""Votes as the page of ``palate vote`` keeps them, read as preference pairs. The tables are made by ``palate.votes.store``."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TypedDict, cast

from palate.base.errors import UserError, nearest, said, short

HEAD = b"SQLite format 3\0"
APPLICATION = 0x50414C54  # "PALT", in the file's header
VERSION = 1
QUESTIONS = ("overall", "appeal", "following")
WEIGHTS = ("equal", "agreement", "attention")
SPOILT = "spoilt"
"""The folder beside the votes that holds the spoilt copies of attention checks, and the model they count as."""
LABELS = {"first": 1.0, "second": 0.0, "tie": 0.5, "bad": 0.5}
"""What a choice says of the first picture; ``skip`` says nothing."""
COLUMNS = ("prompt", "image_0", "image_1", "label", "weight", "rater", "model_0", "model_1")
PRIOR = 5.0  # a rater counts as if five of their votes had agreed as often as everybody's


class Vote(TypedDict):
    """A row of :data:`VALID`."""

    id: str
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
    seconds: float | None
    created: str
    swapped: int
    repeat: int
    mode: str


VALID = """
SELECT votes.id, raters.public AS rater, raters.name, a.id AS picture_0, b.id AS picture_1, a.file AS image_0,
    b.file AS image_1, a.prompt, a.seed, a.model AS model_0, b.model AS model_1, a.metadata,
    votes.question, votes.choice, votes.seconds,
    votes.created, showings.swapped, showings.repeat, showings.mode
FROM votes JOIN showings ON showings.id = votes.showing JOIN raters ON raters.id = showings.rater
    JOIN pictures a ON a.id = showings.picture_0 JOIN pictures b ON b.id = showings.picture_1
WHERE votes.undone = 0 AND votes.choice != 'skip' AND showings.mode != 'check'
ORDER BY votes.rowid
"""
CHECKED = """
SELECT raters.public AS rater, count(*) AS seen,
    sum((votes.choice = 'first' AND b.model = 'spoilt') OR (votes.choice = 'second' AND a.model = 'spoilt')) AS passed
FROM votes JOIN showings ON showings.id = votes.showing JOIN raters ON raters.id = showings.rater
    JOIN pictures a ON a.id = showings.picture_0 JOIN pictures b ON b.id = showings.picture_1
WHERE votes.undone = 0 AND votes.choice != 'skip' AND showings.mode = 'check' AND votes.question != 'following'
GROUP BY raters.public
"""
"""Attention checks by rater: answers, and those that preferred the whole picture. A spoilt one may still follow the words."""


def open_votes(path: str | Path) -> sqlite3.Connection:
    """A connection that only reads; rows by name. Raises ``UserError`` unless ``path`` holds votes that we can read."""
    if not Path(path).is_file():
        raise UserError(f"there are no votes at {path}; 'palate vote DIR' collects them in DIR/votes.db")
    connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        check_version(connection, path)
    except UserError:
        connection.close()
        raise
    return connection


def unreadable(path: str | Path, error: Exception) -> UserError:
    """What is said of a damaged database."""
    return UserError(f"{path} is not a readable database of votes ({said(error)}); restore it from a copy")


def check_version(connection: sqlite3.Connection, path: str | Path) -> None:
    """Refuse what is no database of votes, and what a newer Palate wrote."""
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


def vote_rows(path: str | Path, *, question: str = "overall", weights: str = "equal") -> Iterator[dict[str, object]]:
    """Rows of ``COLUMNS``, one a vote, planned repeats left out; pictures as paths relative to the database's folder.

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
        asleep = {row["rater"] for row in connection.execute(CHECKED) if 2 * row["passed"] <= row["seen"]}
    except (sqlite3.Error, TypeError) as error:  # TypeError: numbers that are none
        raise unreadable(path, error) from None
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


def valid_votes(connection: sqlite3.Connection, path: str | Path) -> list[Vote]:
    """All votes that say something, repeats among them, as they came. Raises ``UserError`` for a damaged database."""
    try:
        found = [cast(Vote, dict(row)) for row in connection.execute(VALID)]
    except sqlite3.DatabaseError as error:
        raise unreadable(path, error) from None
    if (unknown := next((vote["choice"] for vote in found if vote["choice"] not in LABELS), None)) is not None:
        raise unreadable(path, ValueError(f"a vote is {short(unknown, 40)}"))
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
