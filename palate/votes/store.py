"""Votes on disk: one SQLite file beside the pictures. What ``commit`` has returned for survives a killed process and, as far
as the disk keeps its promises, a power cut (write-ahead log with synchronous=FULL)."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from palate.base.errors import UserError, short
from palate.data.votes import (
    APPLICATION,
    INDEXES,
    SHOWINGS,
    SHOWN,
    UPGRADE,
    VERSION,
    VOTES,
    Vote,
    check_version,
    passed_checks,
    run_statements,
    unreadable,
    valid_votes,
)

NAME = "votes.db"
IMPORTED = "imported"
"""The folder beside the votes that holds pictures which came with imported ones, and the model they count as."""
LARGEST = (1 << 63) - 1  # whole number that SQLite holds; ComfyUI's seeds reach twice as far
TABLES = f"""
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pictures (
    id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, seed INTEGER, number INTEGER, model TEXT NOT NULL,
    metadata TEXT NOT NULL DEFAULT '{{}}'
);
CREATE TABLE raters (
    id INTEGER PRIMARY KEY, public TEXT NOT NULL UNIQUE, name TEXT NOT NULL, token TEXT UNIQUE, created TEXT NOT NULL
);
{SHOWINGS};
{VOTES};
{INDEXES};
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION}
"""


class DiskError(UserError):
    """What was to be kept could not be written; nothing of it was."""


class Picture(NamedTuple):
    """A picture that can be voted on; ``file`` is relative to the folder of the database."""

    id: int
    file: str
    prompt: str
    seed: int | None
    number: int
    model: str
    metadata: Mapping[str, object]


class Store:
    """The votes of a folder. One connection, one writer at a time; methods may be called from any thread."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=10)
            self._connection.row_factory = sqlite3.Row
            self._prepare()
            self.secret = self._setting("secret", lambda: secrets.token_hex(32))
            """Decides shuffles, opaque names and links; made once."""
        except sqlite3.OperationalError as error:
            raise DiskError(self._cannot(error)) from None
        except sqlite3.DatabaseError as error:
            raise unreadable(self.path, error) from None

    def _prepare(self) -> None:
        if self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            version = check_version(self._connection, self.path)
            if (found := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(" ".join(found.split()))
            if version < VERSION:
                with self.writing():
                    run_statements(self._connection, UPGRADE)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        if not self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            with self.writing():
                run_statements(self._connection, TABLES)

    def _setting(self, name: str, make: Callable[[], str]) -> str:
        with self.writing():
            found = self._connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
            if found is None:
                self._connection.execute("INSERT INTO settings VALUES (?, ?)", (name, make()))
                return self._setting(name, make)
            return found["value"]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """All that happens inside is kept, or nothing; on disk when the block is left. May be nested.

        Raises ``DiskError`` if the disk does not take it.
        """
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise DiskError(self._cannot(error)) from error
                raise

    def _cannot(self, error: Exception) -> str:
        return f"{self.path} cannot be written ({error}): votes need a folder you may write to, with space"

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # Writing --------------------------------------------------------------------------------------------------------------

    def add_picture(
        self, file: str, prompt: str, *, seed: int | None, number: int, model: str, metadata: Mapping[str, object]
    ) -> int:
        """The picture's number. Raises ``UserError`` if the file was voted on under another prompt."""
        with self.writing():
            found = self._connection.execute("SELECT id, prompt, model FROM pictures WHERE file = ?", (file,)).fetchone()
            if found is None:
                seed = seed if seed is None or abs(seed) <= LARGEST else None
                values = (file, prompt, seed, number, model, json.dumps(dict(metadata), ensure_ascii=False))
                made = self._connection.execute(
                    "INSERT INTO pictures (file, prompt, seed, number, model, metadata) VALUES (?, ?, ?, ?, ?, ?)", values
                )
                return int(made.lastrowid or 0)
            if found["model"].startswith("unnamed") and found["prompt"] == prompt:  # earlier versions knew no better name
                self._connection.execute("UPDATE pictures SET model = ? WHERE id = ?", (model, found["id"]))
            elif (found["prompt"], found["model"]) != (prompt, model):
                raise UserError(
                    f"{file} was of prompt {short(found['prompt'])} by {short(found['model'])} when its votes were given, and "
                    f"now is of {short(prompt)} by {short(model)}: keep new pictures in a new folder, or delete {self.path} "
                    "with its votes"
                )
            return int(found["id"])

    def add_rater(self, name: str, token: str | None, public: str | None = None) -> tuple[int, str]:
        """The rater's number and public name; ``token`` is what recognises them (its hash), None for imported ones."""
        with self.writing():
            public = public or f"rater-{secrets.token_hex(3)}"
            known = self._connection.execute("SELECT id FROM raters WHERE public = ?", (public,)).fetchone()
            if known is not None:
                return int(known["id"]), public
            values = (public, name, token, _now())
            made = self._connection.execute("INSERT INTO raters (public, name, token, created) VALUES (?, ?, ?, ?)", values)
            return int(made.lastrowid or 0), public

    def add_showing(self, rater: int, pictures: tuple[int, ...], *, arrangement: int, repeat: bool, mode: str) -> str:
        """A new opaque name under which this rater is shown these two to four pictures; the lower number comes first.

        ``arrangement`` is how they stand: see ``palate.data.votes.standing``.
        """
        name = secrets.token_urlsafe(12)
        four = (*pictures, None, None)[:4]
        with self.writing():
            self._connection.execute(
                f"INSERT INTO showings (id, rater, {', '.join(SHOWN)}, arrangement, repeat, mode, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (name, rater, *four, arrangement, int(repeat), mode, _now()),
            )
        return name

    def add_vote(self, name: str, showing: str, question: str, choice: str, seconds: float | None, created: str = "") -> None:
        """Raises ``sqlite3.IntegrityError`` if the name is taken or the question is answered."""
        with self.writing():
            values = (name, showing, question, choice, seconds, created or _now())
            self._connection.execute(
                "INSERT INTO votes (id, showing, question, choice, seconds, created) VALUES (?, ?, ?, ?, ?, ?)", values
            )

    def undo_vote(self, name: str) -> None:
        with self.writing():
            self._connection.execute("UPDATE votes SET undone = 1 WHERE id = ?", (name,))

    # Reading --------------------------------------------------------------------------------------------------------------

    def rows(self, query: str, *values: str | int) -> list[sqlite3.Row]:
        try:
            with self._lock:
                return self._connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise unreadable(self.path, error) from None

    def pictures(self) -> list[Picture]:
        found = self.rows("SELECT id, file, prompt, seed, number, model, metadata FROM pictures ORDER BY id")
        try:
            return [Picture(*row[:6], json.loads(row["metadata"])) for row in found]
        except (ValueError, TypeError, RecursionError) as error:
            raise unreadable(self.path, error) from None

    def valid_votes(self) -> list[Vote]:
        """All votes that say something, repeats among them, as they came."""
        with self._lock:
            return valid_votes(self._connection, self.path)

    def passed_checks(self) -> dict[str, tuple[int, int]]:
        """By rater, attention checks passed and seen."""
        with self._lock:
            return passed_checks(self._connection, self.path)


class Lock:
    """One process at a time writes the votes of a folder."""

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / ".votes.lock"
        try:
            self._file = path.open("a+")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): votes need a folder you may write to") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(f"the votes of {folder} are in use by {owner}: use that page, or stop it first") from None
        self.tell(f"process {os.getpid()}")

    def tell(self, owner: str) -> None:
        """What the next one is told who wants the same folder."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(owner)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
