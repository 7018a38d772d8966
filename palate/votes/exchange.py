"""Votes out of a folder and into it: the columns of Pick-a-Pic as parquet, or JSONL and CSV that name the pictures' files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from palate.base.errors import UserError
from palate.base.files import check_file, write_atomically
from palate.base.options import OneOf, check_ranges
from palate.data import pickapic
from palate.data.pairs import PreferencePair, read_pairs
from palate.data.votes import LABELS, PLACES, QUESTIONS, Vote, open_votes, valid_votes
from palate.evaluation.manifest import has_pictures
from palate.votes.store import IMPORTED, NAME, Lock, Store
from palate.votes.study import find_sides, know_pictures, listed_in

SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}
COLUMNS = (
    *("prompt", "image_0", "image_1", "label", "rater", "question", "choice", "model_0", "model_1", "seed", "created_at"),
    "ranking_id",
)
PICKAPIC = {name: kind for name, kind in pickapic.TYPES.items() if name != "num_example_per_prompt"}


@dataclass(frozen=True)
class ExportOptions:
    """Votes of a folder to a file that ``palate train --train_data FILE`` reads."""

    output: str
    """``.parquet`` with Pick-a-Pic's columns and the pictures inside; ``.jsonl`` or ``.csv`` name the pictures' files. Of more
    than two pictures at a time ``.jsonl`` has rankings."""
    question: Annotated[str, OneOf(*QUESTIONS)] = "overall"
    """``overall``, ``appeal`` or ``following``."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ImportOptions:
    """Votes from a file, of any kind that ``palate train --train_data FILE`` reads, into a folder."""

    input: str
    """Parquet, JSONL or CSV; pictures that the folder lacks are copied into it."""
    question: Annotated[str, OneOf(*QUESTIONS)] = "overall"
    """What was asked: ``overall``, ``appeal`` or ``following``."""

    def __post_init__(self) -> None:
        check_ranges(self)


def export_votes(folder: str | Path, options: ExportOptions) -> str:
    """Write the votes on one question; planned repeats and skipped pairs are left out, both bad counts as a tie.

    A row is what a vote says of two pictures; those of one vote have the same ``ranking_id``. JSONL has rankings
    instead, one a vote, if more than two were shown at a time: 1 for the best, null for the others, of which no more is said.

    Returns a sentence about what was written. Raises ``UserError`` for no votes, an unknown ending, or a JSONL or CSV file
    from which the pictures could not be named without leaving its folder.
    """
    folder, output = Path(folder), Path(options.output)
    kinds = {".parquet": _parquet, ".jsonl": _jsonl, ".csv": _csv}
    if output.suffix not in kinds:
        raise UserError(f"--output {output} ends in {output.suffix or 'nothing'!r}; expected {', '.join(kinds)}")
    check_file(output, "output")
    connection = open_votes(folder / NAME)
    try:
        told = valid_votes(connection, folder / NAME)
    finally:
        connection.close()
    votes = [v for v in told if v["question"] == options.question and not v["repeat"]]
    if not votes:
        raise UserError(f"{folder / NAME} holds no votes on the question {options.question!r}; collect some with palate vote")
    for name in {v[side] for v in votes for side in ("image_0", "image_1")}:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder / NAME} names the picture {name}, outside {folder}: it is from elsewhere, or damaged")
    gone = {v["id"] for v in votes if not all((folder / v[side]).is_file() for side in ("image_0", "image_1"))}
    kept = [v for v in votes if v["id"] not in gone]
    if not kept:
        raise UserError(f"none of the pictures that were voted on is left in {folder}")
    kinds[output.suffix](kept, folder, output)
    given, wrote = (len({v["id"] for v in found}) for found in (votes, kept))
    lost = given - wrote
    return f"wrote {wrote} votes to {output}" + (f"; {lost} were left out, their pictures are gone" if lost else "")


def import_votes(folder: str | Path, options: ImportOptions) -> str:
    """Add the votes of a file. What the folder knows already, the same rater on the same two pictures, is not added again.

    The folder's own pictures are known from then on, whether or not a page was ever opened: votes on them count there.

    Returns a sentence about what was added. Raises ``UserError`` for a file that cannot be read (nothing is added then), and
    while a page serves the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; make it, or name the one whose pictures were judged")
    lock = Lock(folder)
    try:
        pairs = read_pairs(options.input, ties="keep")
        store = Store(folder)
        try:
            with store.writing():
                if has_pictures(folder):
                    here = folder.resolve()
                    know_pictures(store, listed_in(find_sides(here)[0], here))
                own = len(store.pictures())
                added, known = _add(store, folder, pairs, options.question)
                copied = len(store.pictures()) - own
        finally:
            store.close()
    finally:
        lock.close()
    told = [f"added {added} votes to {folder / NAME}"]
    told += [f"{known} were there already"] if known else []
    told += [f"{copied} of their pictures were not here and are in {IMPORTED}/ now, which no page shows"] if copied else []
    return "; ".join(told)


def _add(store: Store, folder: Path, pairs: Iterable[PreferencePair], question: str) -> tuple[int, int]:
    numbers = {_digest((folder / p.file).read_bytes()): p for p in store.pictures() if (folder / p.file).is_file()}
    by_prompt = {(digest, p.prompt): p.id for digest, p in numbers.items()}

    def picture(data: bytes, pair: PreferencePair) -> int:
        digest = _digest(data)
        if (digest, pair.prompt) not in by_prompt:
            # The name holds the prompt too: the same picture may have been judged under another.
            name = f"{IMPORTED}/{_digest(pair.prompt.encode())[:8]}-{digest[:24]}{_suffix(data)}"
            if not (folder / name).is_file():
                write_atomically(folder / name, data)
            by_prompt[digest, pair.prompt] = store.add_picture(
                name, pair.prompt, seed=None, number=0, model=IMPORTED, metadata={}
            )
        return by_prompt[digest, pair.prompt]

    added = known = 0
    # A vote for the best of several has said it, too.
    there = {(v["rater"], v["picture_0"], v["picture_1"], v["question"]) for v in store.valid_votes()}
    for pair in pairs:
        first, second = picture(pair.image_0, pair), picture(pair.image_1, pair)
        if first == second:
            raise UserError(f"{pair.source}: both pictures are the same; remove the row")
        label = pair.label if first < second else 1 - pair.label
        choice = {1.0: "first", 0.0: "second", 0.5: "tie"}.get(label)
        if choice is None:
            raise UserError(
                f"{pair.source}: label {pair.label:g} is a share of several raters; expected votes of one: 0, 0.5 or 1"
            )
        rater, public = store.add_rater("", None, pair.rater or f"imported {Path(pair.source.partition(', row')[0]).stem}")
        pictures = (min(first, second), max(first, second))
        if (public, *pictures, question) in there:
            known += 1
            continue
        shown = store.rows(
            "SELECT id FROM showings WHERE rater = ? AND picture_0 = ? AND picture_1 = ? AND picture_2 IS NULL AND repeat = 0",
            rater,
            *pictures,
        )
        showing = shown[0]["id"] if shown else store.add_showing(rater, pictures, arrangement=0, repeat=False, mode="import")
        name = _digest("\0".join((public, str(pictures), question)).encode())[:32]
        try:
            store.add_vote(name, showing, question, choice, None)
            added += 1
        except sqlite3.IntegrityError:
            known += 1
    return added, known


def _parquet(votes: list[Vote], folder: Path, output: Path) -> None:
    raters = {rater: i for i, rater in enumerate(dict.fromkeys(v["rater"] for v in votes))}
    numbers = _numbers(votes)

    def rows() -> Iterator[Mapping[str, pickapic.Value]]:
        for vote in votes:
            image_0, image_1 = ((folder / vote[side]).read_bytes() for side in ("image_0", "image_1"))
            yield pickapic.row(
                vote["prompt"],
                image_0,
                image_1,
                LABELS[vote["choice"]],
                uids=(_digest(image_0)[:32], _digest(image_1)[:32]),
                model_0=vote["model_0"],
                model_1=vote["model_1"],
                ranking_id=numbers[vote["id"]],
                user_id=raters[vote["rater"]],
                created_at=vote["created"],
                rater=vote["rater"],
            )

    pickapic.write(output, rows(), PICKAPIC)


def _jsonl(votes: list[Vote], folder: Path, output: Path) -> None:
    prefix = _prefix(folder, output)
    rows = _rankings(votes, prefix) if any(len(v["shown"]) > 2 for v in votes) else _rows(votes, prefix)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(output, "".join(lines).encode())


def _csv(votes: list[Vote], folder: Path, output: Path) -> None:
    write_atomically(output, _table(_rows(votes, _prefix(folder, output))).encode())


def votes_csv(votes: Sequence[Vote]) -> str:
    """Votes as a table, with planned repeats left out; pictures are named as the folder of the votes has them."""
    return _table(_rows([vote for vote in votes if not vote["repeat"]], Path()))


def _table(rows: Iterable[Mapping[str, object]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _prefix(folder: Path, output: Path) -> Path:
    """How the file that is written names the folder."""
    here, base = folder.resolve(), output.parent.resolve()
    if not here.is_relative_to(base):
        raise UserError(
            f"{output} would name pictures outside its folder, which no reader follows: write it to "
            f"{folder / output.name}, or export .parquet, which holds the pictures"
        )
    return here.relative_to(base)


def _numbers(votes: Sequence[Vote]) -> dict[str, int]:
    """A number for each vote."""
    return {name: i for i, name in enumerate(dict.fromkeys(v["id"] for v in votes))}


def _rows(votes: Sequence[Vote], prefix: Path) -> Iterator[dict[str, object]]:
    numbers = _numbers(votes)
    for vote in votes:
        yield {
            "prompt": vote["prompt"],
            **{side: (prefix / vote[side]).as_posix() for side in ("image_0", "image_1")},
            "label": LABELS[vote["choice"]],
            **{name: vote[name] for name in ("rater", "question", "choice", "model_0", "model_1", "seed")},
            "created_at": vote["created"],
            "ranking_id": numbers[vote["id"]],
        }


def _rankings(votes: Sequence[Vote], prefix: Path) -> Iterator[dict[str, object]]:
    together: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        together[vote["id"]].append(vote)
    for said in together.values():
        named = {v[f"picture_{n}"]: (v[f"image_{n}"], v[f"model_{n}"]) for v in said for n in (0, 1)}
        best = {v[f"picture_{PLACES.index(v['choice'])}"] for v in said if v["choice"] in PLACES}
        vote, shown = said[0], said[0]["shown"]
        yield {
            "prompt": vote["prompt"],
            "images": [(prefix / named[number][0]).as_posix() for number in shown],
            # Of two pictures, or if all are alike, the others' rank is known.
            "ranking": [1 if number in best or not best else 2 if len(shown) == 2 else None for number in shown],
            "models": [named[number][1] for number in shown],
            **{name: vote[name] for name in ("rater", "question", "seed")},
            "created_at": vote["created"],
        }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _suffix(data: bytes) -> str:
    return next((suffix for head, suffix in SUFFIXES.items() if data.startswith(head)), ".img")
