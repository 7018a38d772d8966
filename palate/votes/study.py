"""A study: a folder's pictures, who is shown which of them, and the votes. All that the page asks for, without the web."""

from __future__ import annotations

import hashlib
import hmac
import io
import re
import secrets
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Annotated, NotRequired, TypedDict

from palate.base.errors import UserError
from palate.base.files import write_atomically
from palate.base.options import Count, OneOf, Port, Range, check_ranges
from palate.data.shards import PICTURES, is_litter
from palate.data.votes import PLACES, QUESTIONS, SHOWN, SPOILT, Vote, standing
from palate.evaluation.manifest import (
    MANIFEST,
    UNNAMED,
    Side,
    differences,
    has_pictures,
    numbered,
    plain_folder,
    read_manifest,
    read_settings,
)
from palate.evaluation.manifest import Picture as Listed
from palate.votes.queue import Dealt, Queue
from palate.votes.results import Results, results
from palate.votes.store import IMPORTED, Store

MODES = ("compare", "collect")
CHOICES = ("1", "2", "3", "4", "tie", "bad", "skip")  # a number is that of the place where the better picture stands
AHEAD = 4  # pairs a rater holds: the one before them and those whose pictures are fetched meanwhile
MAX_BYTES, MAX_PIXELS = 64 << 20, 8192 * 8192  # of a picture that is shown
LEASE = 20 * 60.0  # after so many seconds without a sign of life a rater's untouched pairs go to others
MAX_RATERS = 1000
CHECKS, LIKED = 24, 6  # attention checks of a study; pictures that the thank-you page shows
NAME = re.compile(r"[A-Za-z0-9_-]{8,64}")


class RefusedError(Exception):
    """A request that cannot be met; ``status`` is the answer's HTTP status, the text is for the rater."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class VoteOptions:
    """What is asked of whom, and where."""

    mode: Annotated[str, OneOf(*MODES)] | None = None
    """``compare`` (two models on the same prompt and seed) or ``collect`` (any two pictures of a prompt); compare unless given,
    where the folder has two models."""
    at_once: Annotated[int, Range(at_least=2, at_most=len(SHOWN), expected="a whole number from 2 to 4")] = 2
    """So many pictures are shown together at most; of 3 or 4 the best is chosen, which is then better than each other."""
    questions: Annotated[tuple[str, ...], OneOf(*QUESTIONS)] = ()
    """A list of ``overall``, ``appeal`` (the prompt is hidden), ``following``; all in compare, overall in collect."""
    raters: Count | None = None
    """So many people judge each pair; 5 in compare, 1 in collect unless given."""
    repeats: Annotated[float, Range(at_least=0, at_most=0.5, expected="a share from 0 to 0.5")] = 0.05
    """Share of a rater's pairs that come again with sides changed, to measure consistency; 0 for none."""
    chain: bool = False
    """In collect: the better picture is challenged again by another of its prompt, as in Pick-a-Pic."""
    checks: Annotated[float, Range(at_least=0, at_most=0.2, expected="a share from 0 to 0.2")] = 0.0
    """Share of attention checks: a picture against a spoilt copy of itself, for whoever does not look; they are no votes."""
    allow_different_settings: bool = False
    """In compare: show what two folders have in common although prompts, seeds or settings differ."""

    until: str | None = None
    """When voting closes, in local time: a date (its end), or ``2026-12-05T18:00``; links to vote end then."""
    people: tuple[str, ...] = ()
    """Names that get a link each, printed; then nobody else can vote, and a link on a second device is the same person."""
    thanks: str = ""
    """What raters read at the end, below the thanks."""

    host: str = "127.0.0.1"
    """Address to listen on; anything but this machine alone, such as ``0.0.0.0``, needs the link that is printed."""
    port: Port = 8421
    """If it is taken, the next free one."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self.closes()
        if len(set(self.people)) < len(self.people) or not all(name.strip() for name in self.people):
            raise UserError("people must have different names, which are not blank: each gets a link of their own")
        if self.chain and self.at_once > 2:
            raise UserError("chain challenges the better of two: leave it out, or at_once")
        if self.chain and self.mode == "compare":
            raise UserError(
                "chain is for collecting pairs; in compare every pair is one prompt and seed: leave one of them out"
            )

    def closes(self) -> datetime | None:
        """The moment after which no votes are taken; ``UserError`` for what is no date."""
        if self.until is None:
            return None
        try:
            found = datetime.fromisoformat(self.until)
        except ValueError:
            raise UserError(f"until is {self.until!r}; expected a date such as 2026-12-05, or 2026-12-05T18:00") from None
        found = found if len(self.until) > 10 else found + timedelta(days=1)
        return found.astimezone()


@dataclass
class _Showing:
    id: str
    rater: str
    pair: int | None  # None: no pair of this study, but of an earlier one in the same folder, or a check
    pictures: tuple[int, ...]
    arrangement: int
    repeat: bool
    votes: dict[str, tuple[str, str]]  # question -> choice, name of the vote
    check: bool = False


class Shown(TypedDict):
    """A pair as a rater's page shows it: opaque names of the pictures as they stand, and the questions answered so far."""

    id: str
    pictures: list[str]
    prompt: str
    answered: list[str]


class Last(TypedDict):
    """The vote that undo would take back."""

    vote: str
    question: str
    showing: Shown


class State(TypedDict):
    """All that a rater's page needs."""

    rater: str
    name: str
    mode: str
    questions: list[str]
    at_once: int
    done: int
    left: int
    open: list[Shown]
    soon: list[str]
    last: Last | None
    ended: bool
    """Voting is closed."""
    thanks: str
    liked: list[str]
    """Names of pictures that the rater preferred, once nothing is left to judge."""
    closed: NotRequired[str]


class Told(Results):
    """What the owner is told: results, and what of the folder they are of."""

    pairs: int
    gone: int
    elsewhere: int


class Study:
    """Opens the folder's votes, or begins them. Methods may be called from any thread.

    Raises ``UserError`` for a folder without pictures, a prompt or model that changed under votes, a database it cannot read.
    """

    def __init__(
        self,
        folder: str | Path,
        options: VoteOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        today: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self.folder = Path(folder).resolve()
        sides, notes = find_sides(self.folder)
        listed = listed_in(sides, self.folder)
        self.mode = options.mode or ("compare" if not options.chain and _mostly_across(sides, listed) else "collect")
        rows = _rows(listed, self.mode, options.at_once)
        if not rows:
            raise UserError(
                f"{folder} has no two models with pictures of the same prompt and seed: generate both with the same "
                "prompts and seeds, or use --mode collect"
                if self.mode == "compare"
                else f"{folder} has no prompt with two pictures: generate more than one picture of a prompt"
            )
        self.notes = notes + (_check_alike(sides, options.allow_different_settings) if self.mode == "compare" else [])
        """What the owner should know of how the sides were made."""
        # In the paper's order the prompt is seen first; here appeal is asked before it is shown.
        asked = options.questions or (QUESTIONS if self.mode == "compare" else ("overall",))
        self.questions = sorted(set(asked), key=("appeal", "overall", "following").index)
        self.raters_per_pair = options.raters or (5 if self.mode == "compare" else 1)
        self.options, self._clock, self._today, self._lock = options, clock, today, threading.RLock()
        self.until = options.closes()
        self.store = Store(self.folder)
        with self.store.writing():
            ids = know_pictures(self.store, listed)
            self.checks = self._make_checks([(number, p) for number, p in zip(ids, listed, strict=True)])
        self.pictures = {p.id: p for p in self.store.pictures()}
        self._opaque = {number: self._sign("picture", p.file)[:20] for number, p in self.pictures.items()}
        self._by_opaque = {name: number for number, name in self._opaque.items()}
        self.pairs = [tuple(sorted(ids[i] for i in row)) for row in rows]
        self.gone: set[int] = set()
        self._restore()

    def close(self) -> None:
        self.store.close()

    def key(self, role: str) -> str:
        """The secret part of the link for ``rater`` or ``owner``; the same whenever this folder is served."""
        return self._sign("key", role)[:32]

    def personal_key(self, name: str) -> str:
        """The secret part of the link of one of ``people``."""
        return self.key(f"person {name}")

    @property
    def ended(self) -> bool:
        """Whether voting is closed."""
        return self.until is not None and self._today() >= self.until

    # What the page asks for -------------------------------------------------------------------------------------------------

    def join(self, name: str = "") -> str:
        """A token by which a new rater is recognised from now on."""
        self._check_open()
        if self.options.people:
            raise RefusedError(403, "whoever votes here has a link of their own: ask whoever invited you")
        return self._enrol(name, secrets.token_urlsafe(24))

    def enter(self, key: str) -> str | None:
        """The token of whoever of ``people`` has this key in their link."""
        for name in self.options.people:
            if hmac.compare_digest(self.personal_key(name).encode(), key.encode()):
                return key if self.rater(key) is not None else self._enrol(name, key)
        return None

    def _enrol(self, name: str, token: str) -> str:
        with self._lock:
            if len(self._tokens) >= MAX_RATERS:
                raise RefusedError(503, f"{MAX_RATERS} people take part already; ask the owner of this page")
            number, public = self.store.add_rater(" ".join(name.split())[:40], _hash(token))
            self._ids[public], self._tokens[_hash(token)] = number, public
            self._names[public] = name
            return token

    def _check_open(self) -> None:
        if self.ended:
            raise RefusedError(410, "voting is closed; thank you")

    def rater(self, token: str) -> str | None:
        """Who shows this token."""
        return self._tokens.get(_hash(token))

    def state(self, rater: str) -> State:
        """All that a rater's page needs: their pairs, how far they are, and what undo would take back."""
        with self._lock, self._whole():
            self._here(rater)
            if not self.ended:
                self._deal(rater)
            return self._state(rater)

    def vote(self, rater: str, *, name: str, showing: str, question: str, choice: str, seconds: float | None = None) -> State:
        """Keep an answer; what comes again under the same ``name`` counts once. The new state, when the vote is on disk."""
        if not NAME.fullmatch(name) or question not in QUESTIONS or choice not in CHOICES:
            raise RefusedError(400, "not a vote: expected a name, a question and a choice that this page knows")
        self._check_open()
        with self._lock, self._whole():
            shown = self._showing(rater, showing)
            self._here(rater)
            known = self._votes.get(name)
            if known is not None:
                if known != (showing, question):
                    raise RefusedError(409, "another vote has this name; reload the page")
            else:
                self._keep(rater, shown, name, question, choice, seconds)
            self._deal(rater)
            return self._state(rater)

    def undo(self, rater: str, name: str) -> State:
        """Take a vote back; the pair is before the rater again. Twice is once.

        A skipped pair whose place others have taken stays skipped: its name is then in ``closed``, and ``last`` lies before it.
        """
        self._check_open()
        with self._lock, self._whole():
            self._here(rater)
            found = self._votes.get(name)
            shown = self._showing(rater, found[0]) if found else None
            if found is None or shown is None:
                raise RefusedError(404, "there is no such vote to undo")
            question = found[1]
            if shown.votes.get(question, ("", ""))[1] == name:
                if self._closed(shown):
                    return {**self._state(rater), "closed": shown.id}
                before = self._verdict(shown)
                del shown.votes[question]
                self._settle(shown, before)
                self.store.undo_vote(name)
                self._done[rater].remove(name)
            return self._state(rater)

    def picture(self, opaque: str) -> bytes:
        """A picture as PNG without anything that tells where it comes from; ``RefusedError`` 404 or, if it vanished, 410."""
        number = self._by_opaque.get(opaque)
        if number is None:
            raise RefusedError(404, "there is no such picture")
        path = self.folder / self.pictures[number].file
        try:
            if not path.resolve().is_relative_to(self.folder):
                raise ValueError("leads outside the folder")
            return plain_png(path, path.stat().st_mtime_ns)
        except (OSError, ValueError) as error:
            self._lose(number, error)
            raise RefusedError(410, "this picture is gone; the next pair comes") from None

    # What the owner asks for -------------------------------------------------------------------------------------------------

    def votes_here(self) -> list[Vote]:
        """The votes on this study's pairs alone: others, imported or of another mode, answer other questions."""
        pairs = set(self.pairs)
        return [vote for vote in self.store.valid_votes() if vote["shown"] in pairs]

    def told(self) -> Told:
        """What the votes on this study's pairs say."""
        here = self.votes_here()
        elsewhere = {vote["id"] for vote in self.store.valid_votes()} - {vote["id"] for vote in here}
        found = results(here, mode=self.mode, raters_per_pair=self.raters_per_pair, checks=self.store.passed_checks())
        return {**found, "pairs": len(set(self.pairs)), "gone": len(self.gone), "elsewhere": len(elsewhere)}

    # Dealing --------------------------------------------------------------------------------------------------------------

    def _deal(self, rater: str) -> None:
        """Fill up the rater's open pairs."""
        self._let_go()
        open_ = self._open[rater]
        for shown in list(open_.values()):
            if any(p in self.gone for p in shown.pictures):
                del open_[shown.id]
        while len(open_) < (1 if self.options.chain else AHEAD):
            if (check := self._due_check(rater)) is not None:
                self._show(rater, Dealt(-1, int(self._sign("side", f"{rater} {check}")[0], 16) & 1), check)
                continue
            dealt = self.queue.choose(rater, self._champion(rater))
            if dealt is None:
                return
            missing = [p for p in self.pairs[dealt.pair] if not (self.folder / self.pictures[p].file).is_file()]
            if missing:
                self._lose(missing[0], None)
                continue
            self.queue.take(rater, dealt)
            self._show(rater, dealt, self.pairs[dealt.pair])

    def _show(self, rater: str, dealt: Dealt, pictures: tuple[int, ...]) -> None:
        check = dealt.pair < 0
        mode, repeat = ("check", False) if check else (self.mode, dealt.repeat)
        name = self.store.add_showing(self._ids[rater], pictures, arrangement=dealt.arrangement, repeat=repeat, mode=mode)
        self._add(_Showing(name, rater, None if check else dealt.pair, pictures, dealt.arrangement, repeat, {}, check))

    def _due_check(self, rater: str) -> tuple[int, ...] | None:
        """The attention check that is next for a rater, in an order of their own; None while there is none to come."""
        dealt, share = self._dealt[rater], self.options.checks
        # The first comes in the middle of the first 1 / share pairs: short studies have one too.
        if int((len(dealt) + 1) * share + 0.5) <= int(len(dealt) * share + 0.5):
            return None
        left = [pair for pair in self.checks if pair not in dealt]
        return min(left, key=lambda pair: self._sign("check", f"{rater} {pair}"), default=None)

    def _make_checks(self, listed: Sequence[tuple[int, Listed]]) -> list[tuple[int, ...]]:
        """Pairs of a picture and its spoilt copy, which is written beside the votes."""
        if not self.options.checks:
            return []
        readable = (found for found in listed if (self.folder / found[1].file).is_file())
        chosen = sorted(readable, key=lambda found: _hash(found[1].file))[:CHECKS]
        pairs: list[tuple[int, ...]] = []
        for number, picture in chosen:
            file = f"{SPOILT}/{_hash(picture.file)[:24]}.png"
            try:
                if not (self.folder / file).is_file():
                    write_atomically(self.folder / file, spoilt((self.folder / picture.file).read_bytes()))
            except (OSError, ValueError):
                continue  # a picture that cannot be read is told of where it is shown
            made = self.store.add_picture(file, picture.prompt, seed=None, number=0, model=SPOILT, metadata={})
            pairs.append((min(number, made), max(number, made)))
        return pairs

    def _champion(self, rater: str) -> int | None:
        """In a chain, the picture that the rater's latest vote preferred."""
        if not self.options.chain or not self._done[rater]:
            return None
        shown = self._showings[self._votes[self._done[rater][-1]][0]]
        return self._preferred(shown)

    def _soon(self, rater: str) -> list[str]:
        """In a chain, where the next pair hangs on the answer: the pictures that any answer would bring."""
        shown = next(iter(self._open[rater].values()), None)
        if not self.options.chain or shown is None or shown.pair is None:
            return []
        found: dict[int, None] = {}
        for best in (*range(len(shown.pictures)), None):
            if not shown.repeat:
                self.queue.answer(rater, shown.pair, best)
            dealt = self.queue.choose(rater, None if best is None else shown.pictures[best])
            if not shown.repeat:
                self.queue.undo_answer(rater, shown.pair, best)
            found.update(dict.fromkeys(self.pairs[dealt.pair] if dealt else ()))
        return [self._opaque[number] for number in found]

    def _here(self, rater: str) -> None:
        """A sign of life: pairs that were let go come back where there is room, the others leave the rater's list."""
        self._last_seen[rater] = self._clock()
        for shown in list(self._open[rater].values()):
            fresh = shown.pair is not None and not shown.repeat and not shown.votes
            if fresh and not self.queue.resume(rater, shown.pair or 0):
                del self._open[rater][shown.id]

    def _let_go(self) -> None:
        now = self._clock()
        for rater, seen in list(self._last_seen.items()):
            if now - seen > LEASE:
                del self._last_seen[rater]
                for shown in self._open[rater].values():
                    if shown.pair is not None and not shown.repeat and not shown.votes:
                        self.queue.let_go(rater, shown.pair)

    def _lose(self, number: int, error: Exception | None) -> None:
        with self._lock:
            if number not in self.gone:
                self.gone.add(number)
                why = f" ({error})" if error else ""
                print(f"{self.pictures[number].file} is gone{why}: its pairs are shown no more", file=sys.stderr, flush=True)
            for pair, ends in enumerate(self.pairs):
                if number in ends:
                    self.queue.lose(pair)

    # Votes ------------------------------------------------------------------------------------------------------------------

    def _keep(self, rater: str, shown: _Showing, name: str, question: str, choice: str, seconds: float | None) -> None:
        if shown.id not in self._open[rater]:
            raise RefusedError(409, "this pair is answered already, or enough people have judged it meanwhile")
        if question in shown.votes or question not in self.questions:
            raise RefusedError(409, "this question is answered already")
        if choice.isdigit():
            stood = standing(range(len(shown.pictures)), shown.arrangement)
            if int(choice) > len(stood):
                raise RefusedError(
                    400, f"this choice is among {len(stood)} pictures: expected 1 to {len(stood)}, found {choice}"
                )
            choice = PLACES[stood[int(choice) - 1]]
        if seconds is not None:
            seconds = min(max(seconds, 0.0), 3600.0)
        self.store.add_vote(name, shown.id, question, choice, seconds)
        before = self._verdict(shown)
        shown.votes[question] = (choice, name)
        self._votes[name] = (shown.id, question)
        self._done[rater].append(name)
        self._settle(shown, before)

    def _verdict(self, shown: _Showing) -> str | None:
        """The choice that a finished showing counts for, "skip" among them; None while questions are open."""
        choices = {question: choice for question, (choice, _) in shown.votes.items()}
        if "skip" in choices.values():
            return "skip"
        if set(self.questions) - set(choices):
            return None
        return choices.get("overall", choices[self.questions[0]])

    def _preferred(self, shown: _Showing) -> int | None:
        """The picture that a finished showing prefers; None for no such."""
        verdict = self._verdict(shown)
        return shown.pictures[PLACES.index(verdict)] if verdict in PLACES else None

    def _closed(self, shown: _Showing) -> bool:
        """A skip that cannot be undone: others have taken the place."""
        skipped = shown.pair is not None and not shown.repeat and self._verdict(shown) == "skip"
        return skipped and not self.queue.room(shown.pair or 0)

    def _settle(self, shown: _Showing, before: str | None) -> None:
        """Tell queue and list what a vote, or its undoing, changed."""
        after, queue = self._verdict(shown), self.queue
        if before == after:
            return
        if shown.pair is not None and not shown.repeat:
            if before == "skip":
                queue.undo_skip(shown.rater, shown.pair)
            elif before is not None:
                queue.undo_answer(shown.rater, shown.pair, _best(before))
            if after == "skip":
                queue.skip(shown.rater, shown.pair)
            elif after is not None:
                queue.answer(shown.rater, shown.pair, _best(after))
        if after is None:
            self._open[shown.rater][shown.id] = shown
        else:
            self._open[shown.rater].pop(shown.id, None)

    def _state(self, rater: str) -> State:
        done = self._done[rater]
        last: Last | None = None
        for name in reversed(done):
            showing, question = self._votes[name]
            if not self._closed(self._showings[showing]):
                last = {"vote": name, "question": question, "showing": self._told(self._showings[showing])}
                break
        nothing_open = self.ended or not self._open[rater]
        pairs_done = len({self._votes[name][0] for name in done} - set(self._open[rater]))
        return {
            "rater": rater,
            "name": self._names.get(rater, ""),
            "mode": self.mode,
            "questions": self.questions,
            "at_once": self.options.at_once,
            "done": pairs_done,
            "left": 0 if self.ended else self.queue.left(rater) + len(self._open[rater]),
            "open": [] if self.ended else [self._told(s) for s in sorted(self._open[rater].values(), key=self._when)],
            "soon": [] if self.ended else self._soon(rater),
            "last": None if self.ended else last,
            "ended": self.ended,
            "thanks": self.options.thanks,
            "liked": self._liked(rater) if nothing_open else [],
        }

    def _when(self, shown: _Showing) -> int:
        return self._order[shown.id]

    def _liked(self, rater: str) -> list[str]:
        """The pictures that a rater preferred last, newest first, each once."""
        found: dict[int, None] = {}
        for name in reversed(self._done[rater]):
            shown = self._showings[self._votes[name][0]]
            if not shown.check and (picture := self._preferred(shown)) is not None:
                found[picture] = None
        return [self._opaque[number] for number in found if number not in self.gone][:LIKED]

    def _told(self, shown: _Showing) -> Shown:
        return {
            "id": shown.id,
            "pictures": [self._opaque[p] for p in standing(shown.pictures, shown.arrangement)],
            "prompt": self.pictures[shown.pictures[0]].prompt,
            "answered": list(shown.votes),
        }

    # State ------------------------------------------------------------------------------------------------------------------

    def _whole(self) -> _Whole:
        return _Whole(self)

    def _restore(self) -> None:
        """All that is kept in memory, from what is on disk."""
        self.queue = Queue(
            self.pairs, raters_per_pair=self.raters_per_pair, repeats=self.options.repeats, seed=self.store.secret
        )
        raters = self.store.rows("SELECT id, public, name, token FROM raters")
        self._ids = {row["public"]: row["id"] for row in raters}
        self._tokens = {row["token"]: row["public"] for row in raters if row["token"]}
        self._names = {row["public"]: row["name"] for row in raters}
        self._dealt: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        self._last_seen: dict[str, float] = {}
        self._showings: dict[str, _Showing] = {}
        self._order: dict[str, int] = {}
        self._open: dict[str, dict[str, _Showing]] = defaultdict(dict)
        self._votes: dict[str, tuple[str, str]] = {}
        self._done: dict[str, list[str]] = defaultdict(list)
        number = {pair: i for i, pair in enumerate(self.pairs)}
        public = {row["id"]: row["public"] for row in raters}
        for row in self.store.rows("SELECT * FROM showings ORDER BY number"):
            pictures = tuple(row[name] for name in SHOWN if row[name] is not None)
            rater, check = public[row["rater"]], row["mode"] == "check"
            pair = None if check else number.get(pictures)
            self._add(_Showing(row["id"], rater, pair, pictures, row["arrangement"], bool(row["repeat"]), {}, check))
        for row in self.store.rows("SELECT id, showing, question, choice, undone FROM votes ORDER BY rowid"):
            self._votes[row["id"]] = (row["showing"], row["question"])
            if not row["undone"]:
                shown = self._showings[row["showing"]]
                shown.votes[row["question"]] = (row["choice"], row["id"])
                self._done[shown.rater].append(row["id"])
        for shown in self._showings.values():
            if shown.pair is None and not (shown.check and shown.pictures in self.checks):
                del self._open[shown.rater][shown.id]
                continue
            if shown.pair is None:
                self._settle(shown, None)
                continue
            self.queue.take(shown.rater, Dealt(shown.pair, shown.arrangement, shown.repeat))
            self._settle(shown, None)
        # What was let go of before is open again here: where others have taken the place, they keep it.
        for shown in self._showings.values():
            untouched = shown.pair is not None and not shown.repeat and not shown.votes
            if untouched and self.queue.held[shown.pair] > self.raters_per_pair:
                self.queue.let_go(shown.rater, shown.pair or 0)
        for rater, open_ in self._open.items():
            if open_:
                self._last_seen[rater] = self._clock()
        for lost in self.gone:
            self._lose(lost, None)

    def _add(self, shown: _Showing) -> None:
        self._order[shown.id] = len(self._order)
        self._dealt[shown.rater].append(shown.pictures)
        self._showings[shown.id] = shown
        self._open[shown.rater][shown.id] = shown

    def _showing(self, rater: str, name: str) -> _Showing:
        shown = self._showings.get(name)
        if shown is None or shown.rater != rater:
            raise RefusedError(404, "there is no such pair; reload the page")
        return shown

    def _sign(self, kind: str, text: str) -> str:
        return hmac.new(self.store.secret.encode(), f"{kind}\0{text}".encode(), hashlib.sha256).hexdigest()


def know_pictures(store: Store, listed: Sequence[Listed]) -> list[int]:
    """The numbers of pictures, each of which the store knows from then on; errors as :meth:`Store.add_picture`."""
    return [
        store.add_picture(p.file, p.prompt, seed=p.seed, number=p.index, model=p.model, metadata=p.metadata) for p in listed
    ]


class _Whole:
    """One transaction; if it fails, memory is read anew from the disk, so that both always agree."""

    def __init__(self, study: Study) -> None:
        self._study, self._writing = study, study.store.writing()

    def __enter__(self) -> None:
        self._writing.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, RefusedError):  # raised before anything was changed
            self._writing.__exit__(None, None, None)
            return
        try:
            self._writing.__exit__(kind, error, trace)
        except BaseException:
            self._study._restore()
            raise


def find_sides(folder: Path) -> tuple[list[Side], list[str]]:
    """A picture folder, or all picture folders inside it, without scores; and what to know.

    Folders without a manifest are plain pictures, of which the folder is the model unless they name one themselves; what
    nothing else tells is told by their names. Two folders of one model are told apart by the folders' names.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; expected one of pictures")
    folders, notes = _picture_folders(folder), list[str]()
    read: dict[Path, list[Listed]] = {}
    for inner in folders:
        plain = None if (inner / MANIFEST).is_file() else plain_folder(inner, names=True)
        listed = read_manifest(inner, check_files=False) if plain is None else numbered(plain)
        read[inner] = [p for p in listed if not _own(folder, inner / p.file)]
        if plain is not None:
            notes.append(f"{inner.name}: {len(read[inner])} pictures without a {MANIFEST}; prompts: {plain.sentence()}")
    told = [model for inner, listed in read.items() for model in {_model(inner, p) for p in listed}]
    sides = []
    for inner, listed in read.items():
        found = []
        for p in listed:
            if not (inner / p.file).resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{inner} names {p.file}, outside {folder}: copy the picture into the folder")
            model = _model(inner, p)
            model = model if told.count(model) == 1 else f"{model} ({inner.name})"
            found.append(replace(p, model=model))
        sides.append(Side(inner.name, inner, {p.key: p for p in found}, read_settings(inner), {}))
    return sides, notes


def _picture_folders(folder: Path) -> list[Path]:
    """The folder itself, or those in it that have manifests, or those that have pictures."""
    inside = sorted(
        p for p in folder.iterdir() if p.is_dir() and p.name not in (IMPORTED, SPOILT) and not p.name.startswith(".")
    )
    if (folder / MANIFEST).is_file():
        return [folder]
    if listed := [p for p in inside if (p / MANIFEST).is_file()]:
        return listed
    here = any(p.suffix.lower().removeprefix(".") in PICTURES and not is_litter(p.name) for p in folder.iterdir())
    if here or not (found := [p for p in inside if has_pictures(p)]):
        return [folder]
    return found


def _model(folder: Path, picture: Listed) -> str:
    return folder.name if picture.model == UNNAMED else picture.model


def _own(folder: Path, file: Path) -> bool:
    """Whether ``palate vote`` has put it there itself: imported with a prompt of its own, or an attention check."""
    return any(file.is_relative_to(folder / own) for own in (IMPORTED, SPOILT))


def _check_alike(sides: Sequence[Side], allowed: bool) -> list[str]:
    """``palate compare``'s check of any two folders that are compared; what it finds, where that is allowed, or of plain
    pictures, which people have as they are."""
    allowed = allowed or not _have_manifests(sides)
    compared = [(a, b) for a, b in combinations(sides, 2) if _across_models([*a.pictures.values(), *b.pictures.values()])]
    notes = [note for pair in compared for note in differences(pair, allowed)]
    return list(dict.fromkeys(notes))


def listed_in(sides: Sequence[Side], folder: Path) -> list[Listed]:
    """All their pictures, files relative to ``folder``, in which the sides lie."""
    return [
        replace(p, file=(side.folder.relative_to(folder) / p.file).as_posix()) for side in sides for p in side.pictures.values()
    ]


def _across_models(listed: Sequence[Listed]) -> list[tuple[int, int]]:
    groups: dict[tuple[str, int, int], list[int]] = {}
    for i, p in enumerate(listed):
        groups.setdefault((p.prompt, p.seed, p.index), []).append(i)
    return [(a, b) for rows in groups.values() for a, b in combinations(rows, 2) if listed[a].model != listed[b].model]


def _have_manifests(sides: Sequence[Side]) -> bool:
    return all((side.folder / MANIFEST).is_file() for side in sides)


def _mostly_across(sides: Sequence[Side], listed: Sequence[Listed]) -> bool:
    """Whether two models drew the same prompts and seeds; of plain pictures, where that may be chance, half of them."""
    across = _across_models(listed)
    if _have_manifests(sides):
        return bool(across)
    return 2 * len({i for pair in across for i in pair}) >= len(listed)


def _rows(listed: Sequence[Listed], mode: str, at_once: int) -> list[tuple[int, ...]]:
    """What is shown together: all pairs, or, of more at once, each picture in one set of its prompt (in compare, of its prompt
    and seed, with one picture of each model), shuffled, the sets as even as can be."""
    if at_once == 2:
        return list(_across_models(listed) if mode == "compare" else _within_prompts(listed))
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, p in enumerate(listed):
        key = (p.prompt, p.seed, p.index) if mode == "compare" else (p.prompt,)
        if mode != "compare" or p.model not in {listed[j].model for j in groups.get(key, ())}:
            groups.setdefault(key, []).append(i)
    found: list[tuple[int, ...]] = []
    for rows in groups.values():
        shuffled = sorted(rows, key=lambda i: _hash(listed[i].file))
        sets = -(-len(rows) // at_once)
        found += [tuple(shuffled[n::sets]) for n in range(sets) if len(rows) > 1]
    return found


MANY = 64  # pictures of a prompt; of more, not all pairs are asked for: they would be thousands
NEIGHBOURS = 31


def _within_prompts(listed: Sequence[Listed]) -> list[tuple[int, int]]:
    """All pairs of a prompt's pictures; of more than ``MANY`` pictures, each with its ``NEIGHBOURS`` on a shuffled ring."""
    groups: dict[str, list[int]] = {}
    for i, p in enumerate(listed):
        groups.setdefault(p.prompt, []).append(i)
    found: list[tuple[int, int]] = []
    for rows in groups.values():
        if len(rows) <= MANY:
            found += combinations(rows, 2)
            continue
        ring = sorted(rows, key=lambda i: _hash(listed[i].file))
        found += [(ring[i], ring[(i + step) % len(ring)]) for i in range(len(ring)) for step in range(1, NEIGHBOURS + 1)]
    return found


def spoilt(data: bytes) -> bytes:
    """A picture of which nobody who looks says that it is the better one: its details gone, its colours washed out; as PNG.

    Raises ``ValueError`` for what is no picture.
    """
    from PIL import Image, ImageEnhance

    from palate.data.images import decode

    image = decode(data)
    small = image.resize((max(1, image.width // 24), max(1, image.height // 24)), Image.Resampling.BOX)
    grey = ImageEnhance.Color(small.resize(image.size, Image.Resampling.NEAREST)).enhance(0.3)
    out = io.BytesIO()
    grey.save(out, format="PNG", compress_level=1)
    return out.getvalue()


@lru_cache(maxsize=32)
def plain_png(path: Path, changed: int) -> bytes:
    """The picture as PNG, pixels and colour profile only: texts and EXIF often name the model. ``changed`` renews the cache.

    Raises ``OSError`` or ``ValueError`` for a file that is missing, no picture, or too large for a browser.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"has {size >> 20} MB, at most {MAX_BYTES >> 20} are shown")
    data = path.read_bytes()
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = struct.unpack(">II", data[16:24].ljust(8, b"\0"))  # of IHDR, the first chunk
        if width * height > MAX_PIXELS:
            raise ValueError(f"is too large ({width} x {height} pixels, at most {MAX_PIXELS} are shown)")
        return _without_texts(data)
    from palate.data.images import decode

    out = io.BytesIO()
    decode(data).save(out, format="PNG", compress_level=1)
    return out.getvalue()


KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT")


def _without_texts(data: bytes) -> bytes:
    """A PNG without the chunks that are not pixels or colour (PNG specification, third edition, section 5.3)."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunk = data[at : at + 12 + length]
        if len(chunk) < 12 + length:
            break
        if chunk[4:8] in KEPT:
            parts.append(chunk)
        if chunk[4:8] == b"IEND":
            return b"".join(parts)
        at += 12 + length
    raise ValueError("is a PNG that ends too early")


def _best(verdict: str) -> int | None:
    """The place of the preferred picture; None for a tie, and where all are bad."""
    return PLACES.index(verdict) if verdict in PLACES else None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
