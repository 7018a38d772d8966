"""Preferences: pairs of pictures, and single ones; one streaming reader for the files people keep them in."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from tqdm import tqdm

from palate.base.errors import UserError, short
from palate.base.options import MANY
from palate.data import formats, selection, values
from palate.data.formats import DamagedError, File, Place
from palate.data.options import Reading
from palate.data.values import BadValueError, Row

# After the row that is one too many, how far to look for others to tell about.
LISTED, LOOKAHEAD = 5, 1000
LINE = 200  # characters of bad rows in one message


@dataclass(frozen=True)
class PreferencePair:
    """One vote: a prompt, two encoded pictures, and how probably the first is the better one."""

    prompt: str
    image_0: bytes
    image_1: bytes
    label: float  # probability that image_0 is the better one; 0.5 = tie
    weight: float = 1.0
    source: str = ""  # "file, row 17"
    rater: str = ""
    more: Mapping[str, object] = field(default_factory=dict)  # other columns, if they are wished for

    @property
    def pictures(self) -> tuple[bytes, ...]:
        return self.image_0, self.image_1


@dataclass(frozen=True)
class LikedPicture:
    """A prompt, one encoded picture, and how probably it is liked; 1 where a set of pictures says nothing of it."""

    prompt: str
    image: bytes
    label: float = 1.0  # 0 = disliked
    weight: float = 1.0
    source: str = ""
    rater: str = ""
    more: Mapping[str, object] = field(default_factory=dict)

    @property
    def pictures(self) -> tuple[bytes, ...]:
        return (self.image,)


Item = PreferencePair | LikedPicture


class BadRow(NamedTuple):
    """A row that cannot be used; rows are counted from 1, without the header and blank lines, in each file anew."""

    row: int
    column: str
    reason: str
    file: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}, column {self.column}: {self.reason}"


@dataclass
class Counts:
    """What a reader has met so far. A row of rankings gives several pairs; all other rows give one pair or picture."""

    rows: int = 0
    pairs: int = 0  # of a set of single pictures: pictures
    ties_dropped: int = 0
    ties_kept: int = 0
    unlabelled: int = 0  # rows of Pick-a-Pic with has_label = False
    identical: int = 0  # rows of Pick-a-Pic with are_different = False
    left_out: Counter[str] = field(default_factory=Counter)  # by the wish for winners, no repeats, so many a prompt
    bad: list[BadRow] = field(default_factory=list)

    def by_reason(self) -> dict[str, int]:
        """What was met and not used, as it is told; ties and bad rows apart."""
        found = {"without a label": self.unlabelled, "showing one picture twice": self.identical, **self.left_out}
        return {reason: n for reason, n in found.items() if n}


class Reader:
    """The pairs or pictures of a source as an iterable that may be iterated again; made by :func:`read`.

    Memory does not grow with the source: rows are read in small batches and forgotten (of parquet, a page of each column at
    a time, which holds up to 1024 rows as most writers set it; of tar, one sample). ``counts`` belongs to the latest
    iteration and is complete when that has ended.
    """

    def __init__(self, source: str, places: list[Place], reading: Reading, *, keep_columns: bool = False) -> None:
        self.source, self.places, self.reading, self.keep_columns = source, places, reading, keep_columns
        self.mapping = formats.own_names(reading.columns)
        self.voting = {"question": reading.vote_question, "weights": reading.vote_weights}
        self.counts = Counts()
        self.followed = False
        """Whether pictures were read that lie beside the files of rows."""
        self._opened: dict[Place, File | DamagedError] = {}
        self._described, self._shown = formats.described(source, places), set[int]()
        for place in places:
            # What lies elsewhere is fetched when its turn comes.
            if not place.remote or place is places[0]:
                self._open(place)
        found = [file for file in self._opened.values() if isinstance(file, File)]
        if not found:
            raise next(iter(self._opened.values()))  # type: ignore[misc]
        self.single = found[0].single
        """Whether this reads single pictures instead of pairs."""
        if any(file.single != self.single for file in found):
            raise UserError(f"{source} holds pairs in some files and single pictures in others: name them one at a time")

    def _open(self, place: Place) -> File | DamagedError:
        if place not in self._opened:
            try:
                self._opened[place] = formats.open_file(place, self.mapping, self.voting)
            except DamagedError as error:
                self._opened[place] = error
        return self._opened[place]

    def files(self) -> Iterator[File | DamagedError]:
        """Its files, fetched as they are asked for."""
        return map(self._open, self.places)

    def _rows(self) -> Iterator[tuple[File | Path, int, Row | BadValueError]]:
        for place in self.places:
            file = self._open(place)
            if isinstance(file, DamagedError):
                yield place.path, 1, BadValueError("(whole file)", str(file))
            elif file.single != self.single:
                raise UserError(f"{place.path} holds single pictures, unlike the files before it: name them one at a time")
            else:
                found = formats.rows(file, everything=self.keep_columns)
                yield from ((file, number, row) for number, row in enumerate(found, start=1))

    def rows_about(self) -> int | None:
        """About how many rows there are, of which some may yet be left out; None where only reading them would tell."""
        counts = [None if isinstance(file, DamagedError) else formats.count_rows(file) for file in self._opened.values()]
        known = [count for count in counts if count is not None]
        if len(known) < len(self.places):
            return self.reading.max_train_samples
        return min(sum(known), self.reading.max_train_samples or sys.maxsize)

    def __iter__(self) -> Iterator[Any]:  # pairs, or single pictures
        return self.checked(values.defect)

    @functools.cached_property
    def _winners(self) -> set[bytes]:
        """The absolute winners of the whole source: found by reading it once more, without decoding pictures."""
        names = {name: getattr(self.reading, name) for name in ("columns", "caption_prefix", "vote_question", "vote_weights")}
        reader = Reader(self.source, self.places, Reading(ties="keep", max_bad_rows=MANY, **names))
        pairs = tqdm(reader.checked(lambda picture: ""), desc="finding absolute winners", unit=" pairs", disable=None)
        return selection.absolute_winners((pair.prompt, pair.pictures, pair.label) for pair in pairs)

    @functools.cached_property
    def unseen(self) -> Counter[str]:
        """What the folder holds that no row shows, by reason."""
        found = formats.unread(self.source, self.places)
        found += sum((formats.unread_opinions(f) for f in self._opened.values() if isinstance(f, File)), Counter[str]())
        for place in self.places:
            if not place.remote and place.path.is_dir():
                found += formats.Captioned.of(place.path).left_out
        return found

    def checked(self, check: Callable[[bytes], str]) -> Iterator[Any]:
        """The pairs or pictures, where ``check`` tells of each picture why it cannot be used, or nothing.

        One that cannot makes its row a bad one. What is known to be usable need not be decoded again.
        """
        reading = self.reading
        winners = self._winners if reading.absolute_winners else None
        self._shown.clear()
        chosen = selection.Selection(winners, reading.deduplicate, reading.max_pairs_per_prompt)
        self.counts = counts = Counts(left_out=chosen.left_out)
        counts.left_out.update(self.unseen)
        rows = self._rows()
        for file, number, row in rows:
            for item in self._read(file, number, row, check):
                if not chosen.keeps(item.prompt, item.pictures, item.label):
                    continue
                counts.pairs += 1
                counts.ties_kept += item.label == 0.5
                yield item
                if counts.pairs == reading.max_train_samples:
                    return
            if len(counts.bad) > reading.max_bad_rows:
                for later in itertools.islice(rows, LOOKAHEAD):
                    self._read(*later, check)
                    if len(counts.bad) >= reading.max_bad_rows + LISTED:
                        break
                raise self._too_many_bad_rows()
        if self._described is not None and (others := formats.count_pictures(self._described) - len(self._shown)) > 0:
            counts.left_out["pictures that no row names"] = others
        if not counts.pairs:
            raise self._nothing()

    def _read(self, file: File | Path, number: int, row: Row | BadValueError, check: Callable[[bytes], str]) -> Sequence[Item]:
        """What one row holds; counts the row, and what it lacks."""
        self.counts.rows += 1
        try:
            if isinstance(row, BadValueError):
                raise row
            assert isinstance(file, File)
            if self._described is not None:
                self._shown.update(hash(Path(name)) for name in formats.shown(file, row))
            if file.format == "tar" and set(file.names.values()).isdisjoint(row):
                self.counts.rows -= 1
                self.counts.left_out["members of the archive that belong to no sample"] += 1
                return []
            read = {"", *file.names.values()}  # of what nobody asks for nobody minds whether it can be read
            if (bad := next((v for n, v in row.items() if isinstance(v, BadValueError) and n in read), None)) is not None:
                raise bad
            if file.format == "tar" and file.names["prompt"] not in row:
                what = "is missing in this sample, whose members must lie beside each other (tar --sort=name)"
                raise BadValueError(file.names["prompt"], what)
            if (column := formats.late(file, row)) is not None:
                what = f"is in none of the first {formats.SAMPLE[file.format]} rows, by which the file is read"
                raise BadValueError(column, f"{what}: write it in every row, or move this row to the beginning")
            if not self._says(file.names["has_label"], row):
                self.counts.unlabelled += 1
                return []
            if not self._says(file.names["are_different"], row):
                self.counts.identical += 1
                return []
            return self._items(file, number, row, check)
        except BadValueError as bad:
            name = file.name if isinstance(file, Path) else file.path.name
            self.counts.bad.append(BadRow(number, bad.column, bad.reason, name))
            return []

    @staticmethod
    def _says(column: str, row: Row) -> bool:
        """Whether a row may be kept as far as that column goes; one that has no such column may."""
        return column not in row or values.truth(column, row[column])

    def _items(self, file: File, number: int, row: Row, check: Callable[[bytes], str]) -> Sequence[Item]:
        names, layout = file.names, file.layout
        prompt = values.prompt(names["prompt"], row.get(names["prompt"]))
        if self.reading.caption_prefix:
            prompt = f"{self.reading.caption_prefix} {prompt}"
        weight = values.number(names["weight"], row.get(names["weight"]), default=1.0)
        rater = row.get(names["rater"])
        shared: dict[str, Any] = {
            "prompt": prompt,
            "weight": weight,
            "source": f"{file.path.name}, row {number}",
            "rater": "" if rater is None else str(rater),
            "more": formats.others(file, row) if self.keep_columns else {},
        }

        def picture(column: str, value: object) -> bytes:
            self.followed |= not isinstance(value, bytes) and not (isinstance(value, dict) and value.get("bytes") is not None)
            return values.picture(column, value, file.home, check)

        if "images" in layout:
            votes = values.comparisons(names, row, layout)
            # All pictures are read even if only ties show them: a row is good or bad as a whole.
            pictures = [picture(names["images"], image) for image in cast("list[object]", row[names["images"]])]
            kept = [vote for vote in votes if self._keeps(vote[2])]
            return [PreferencePair(image_0=pictures[i], image_1=pictures[j], label=p, **shared) for i, j, p in kept]
        if file.single:
            given = row.get(names["label"]) if "label" in layout else 1.0
            label = values.number(names["label"], given, highest=1.0)
            if not self._keeps(label):
                return []
            return [LikedPicture(image=picture(names["image"], row.get(names["image"])), label=label, **shared)]
        label = values.label(names, row, layout)
        if not self._keeps(label):
            return []
        columns = [names[name] for name in (("chosen", "rejected") if "chosen" in layout else ("image_0", "image_1"))]
        image_0, image_1 = (picture(column, row.get(column)) for column in columns)
        return [PreferencePair(image_0=image_0, image_1=image_1, label=label, **shared)]

    def _keeps(self, label: float) -> bool:
        """Whether a label is kept; counts the ties that are not."""
        dropped = label == 0.5 and self.reading.ties != "keep"
        self.counts.ties_dropped += dropped
        return not dropped

    def _too_many_bad_rows(self) -> UserError:
        bad = self.counts.bad
        alike: dict[tuple[str, str, str], list[BadRow]] = {}
        for row in bad[:LISTED]:
            alike.setdefault((row.file, row.column, row.reason), []).append(row)
        told = [str(first) + _also(rest) for first, *rest in alike.values()]
        # As many as a line holds, and at least one.
        listed = [one for i, one in enumerate(told) if i == 0 or len("; ".join(told[: i + 1])) <= LINE]
        more = "; ..." if len(listed) < len(told) or len(bad) > LISTED else ""
        return UserError(
            f"at least {len(bad)} bad {'row' if len(bad) == 1 else 'rows'} in {self.source}, but max_bad_rows is "
            f"{self.reading.max_bad_rows}: {'; '.join(listed)}{more}. Repair them, or set max_bad_rows to skip that many"
        )

    def _nothing(self) -> UserError:
        counts = self.counts
        if counts.ties_dropped:
            return UserError(f"{self.source} has only ties ({counts.ties_dropped} pairs): keep them as half with ties: keep")
        if counts.left_out and not counts.bad and not counts.unlabelled and not counts.identical:
            told = ", ".join(f"{n} {reason}" for reason, n in counts.left_out.items())
            return UserError(f"nothing of {self.source} is left: {told}; ask for less")
        met = f"{counts.rows} rows, {counts.unlabelled} without a label, {len(counts.bad)} bad"
        first = f"; the first bad one: {counts.bad[0]}" if counts.bad else ""
        return UserError(f"{self.source} is empty: no preference pairs ({met}{first}). Check that it is the file you meant")


def _also(rows: Sequence[BadRow]) -> str:
    return f" (the same in {', '.join(f'row {row.row}' for row in rows)})" if rows else ""


def read(source: str | Path, reading: Reading | None = None, *, keep_columns: bool = False) -> Reader:
    """A streaming reader of pairs or single pictures; formats are recognised by content and columns.

    ``source`` is a parquet, JSONL, JSON, CSV or tar file; a folder or glob of parquet or tar files (all of them, by name); a
    folder with ``metadata.jsonl``, ``metadata.csv`` or ``rankings.jsonl``, or with a ``.txt`` beside each picture; a data set
    of the hub, ``owner/name`` or ``owner/name:split``. Columns, besides the optional ``weight`` and ``rater``:

    - Pick-a-Pic v1 and v2: ``caption, jpg_0, jpg_1, label_0, label_1`` (labels 0, 0.5, 1; rows with ``has_label`` or
      ``are_different`` False are skipped), or in place of labels ``best_image_uid, image_0_uid, image_1_uid``
    - ``prompt, chosen, rejected`` (or ``chosen_file_name, rejected_file_name``)
    - ``prompt, image_0, image_1, label`` (probability that ``image_0`` is the better one; 0.5 is a tie)
    - ``prompt, images`` with ``rankings`` (a list for each rater, 1 = best), with one ``ranking``, or with ``scores`` (higher
      is better): all pairs of them, see :func:`palate.data.values.comparisons`. HPD v2 and ImageReward name these
      ``file_path``, ``image_path``, ``generations``; ``rank``; ``human_preference``
    - ``prompt, prompt_id, image_path, rank``: the same, one row a picture
    - ``prompt, image`` (or ``file_name, text``), with or without ``label`` (or ``liked``): single pictures
    - or the ``votes.db`` of ``palate vote``: the votes on ``vote_question``, weighted by ``vote_weights`` (see ``vote_rows``)

    Pictures are bytes, ``struct<bytes, path>``, or paths relative to the file that do not leave its folder. ``columns`` maps
    names of this list to those in the file. Ties are dropped and counted unless ``ties="keep"``; a dropped tie's pictures
    are not looked at. Every other row is checked, pictures decoded to the end; up to ``max_bad_rows`` bad rows are skipped
    and listed in ``counts.bad``, never replaced. Of a file that is damaged in its middle, what comes before is used, and the
    rest is one bad row.

    ``absolute_winners`` keeps the pairs whose better picture won all comparisons that it took part in under its prompt, which
    takes one more reading; ``deduplicate`` keeps the first of several pairs of the same two pictures under a prompt;
    ``max_pairs_per_prompt`` the first so many of a prompt; ``max_train_samples`` ends the stream after that many.
    ``keep_columns`` gives the texts and numbers of all other columns as ``more``.

    Raises ``UserError`` at once for a source that is missing, empty or lacks a column; while iterating for too many bad
    rows, and at the end if there was nothing.
    """
    reading = reading or Reading()
    reader = Reader(str(source), formats.find(source), reading, keep_columns=keep_columns)
    weights = reading.vote_weights
    if weights != "equal" and not any(isinstance(f, File) and f.format == "votes" for f in reader._opened.values()):
        raise UserError(f"vote_weights is {short(weights)}, but {source} holds no votes of palate vote: leave it out")
    if reading.absolute_winners and reader.single:
        raise UserError(f"{source} holds single pictures, which win over no other: leave out absolute_winners")
    return reader


def read_pairs(source: str | Path, *, keep_columns: bool = False, **reading: Any) -> Reader:
    """:func:`read`, of ``PreferencePair`` alone; ``reading``: options of :class:`Reading`.

    Raises:
        UserError: also for single pictures.
    """
    reader = read(source, Reading(**reading), keep_columns=keep_columns)
    if reader.single:
        raise UserError(f"{source} holds single pictures, not pairs: expected two pictures a row, and which is the better one")
    return reader
