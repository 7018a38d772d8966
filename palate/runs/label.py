"""Picture folders, or an existing set of pairs, labelled by judges."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tqdm import tqdm

from palate.base.errors import UserError, nearest, short
from palate.base.files import check_file
from palate.base.machine import device
from palate.base.options import POSITIVE, Batch, OneOf, at_least, check_ranges
from palate.data import pickapic
from palate.evaluation.labelling import (
    LabelCounts,
    Labelled,
    common,
    disagree,
    finish,
    kind_of,
    label_of,
    pairs_of,
)
from palate.evaluation.manifest import Picture, read_manifest
from palate.evaluation.scoring import score_folder
from palate.miniature import world
from palate.names.judges import NamedJudge, find_judges

if TYPE_CHECKING:
    from palate.data.pairs import PreferencePair

OF_THE_VOTE = re.compile("best_image_uid|ranking_id|user_id|created_at|question|choice|chosen.*|rejected.*")
"""Columns that no longer hold when somebody else decides: Pick-a-Pic's, those of exported votes, those of either side."""


@dataclass(frozen=True)
class LabelOptions:
    """Who decides, and how."""

    output: str
    """The parquet file to write, in Pick-a-Pic v2's columns; it must not be there yet."""
    judges: tuple[str, ...] = ()
    """Names of judges; of several the majority decides. Without any, pairs keep their labels and are only filtered."""
    soft: bool = False
    """Write the probability sigmoid(margin / temperature) instead of the winner."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Of soft labels, in the judge's units: PickScore's model card has 1."""
    threshold: float | dict[str, str] = 0.0
    """Margins up to this are ties, in the judge's units; of several judges ``{judge: number}``, 0 for those not named."""
    ties: Annotated[str, OneOf("drop", "keep")] = "drop"
    """``drop``, or ``keep`` as a label of one half."""
    pairs: Annotated[str, OneOf("all", "extremes")] = "all"
    """Of candidates: ``all`` pairs of a prompt, or its ``extremes``, the best against the worst."""
    absolute_winner: bool = False
    """Keep only pairs that hold the one picture of their prompt that wins all its pairs; ``absolute_winners`` of training, as
    in the NCP paper, takes every picture that wins all its own."""
    max_bad_rows: Annotated[int, at_least(0)] = 0
    """Of an existing set: so many unusable rows are listed and skipped."""
    batch_size: Batch = 32
    """Pictures judged at once."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not isinstance(self.threshold, Mapping) and self.threshold and len(self.judges) > 1:
            each = ", ".join(f"{judge}: {self.threshold:g}" for judge in self.judges)
            raise UserError(
                f"threshold is {self.threshold:g} for {len(self.judges)} judges, whose units differ; give each its own: "
                f"--threshold '{{{each}}}'"
            )
        self.thresholds()
        if self.soft and len(self.judges) > 1:
            raise UserError("soft labels need one judge: margins of several have different units; leave out --soft")
        if not self.soft and self.temperature != type(self).temperature:
            raise UserError("temperature is of soft labels: add --soft true, or leave it out")
        if not self.judges and (self.soft or self.threshold):
            given = "soft" if self.soft else "threshold"
            raise UserError(f"{given} is of what judges say, and none is named: add --judges '[pickscore]', or leave it out")
        if not self.output.endswith(".parquet"):
            raise UserError(f"output is {short(self.output)}; expected a file name that ends in .parquet")

    def thresholds(self) -> list[float]:
        """One for each judge, in order."""
        given = self.threshold if isinstance(self.threshold, Mapping) else dict.fromkeys(self.judges or ("",), self.threshold)
        for name, value in given.items():
            try:
                usable = 0 <= float(value) < math.inf
            except ValueError:
                usable = False
            if not usable:
                raise UserError(f"threshold is {value}{f' for {name}' if name else ''}; expected 0 or more")
            if name and name not in self.judges:
                raise UserError(f"threshold names {short(name)}{nearest(name, self.judges)}, which is not among the judges")
        return [float(given.get(judge, 0)) for judge in self.judges]


def label_folders(folders: Sequence[Path], options: LabelOptions, *, progress: bool = False) -> LabelCounts:
    """Pairs of the candidates that picture folders hold of each prompt between them; scores are kept in the folders.

    Raises:
        UserError: no judge, a folder that cannot be read, pictures without a score, nothing to compare, or the output is
            there already.
    """
    output = _output(options)
    twice = [folder for number, folder in enumerate(folders) if folder.resolve() in {f.resolve() for f in folders[:number]}]
    if twice:
        raise UserError(f"{twice[0]} is given twice, and its pictures would be paired with themselves: give each folder once")
    judges = find_judges(options.judges)
    if not judges:
        raise UserError("candidates are labelled by judges; name one, such as --judges '[pickscore]'")
    manifests = {folder: read_manifest(folder) for folder in folders}
    scores: dict[tuple[Path, str], list[float]] = {}
    bad: Counter[Path] = Counter()
    for named in judges.values():
        judge, header = named.load(device()), named.header()
        for folder, pictures in manifests.items():
            found = score_folder(judge, header, folder, pictures, batch_size=options.batch_size, progress=progress)
            for picture in pictures:
                if picture.file in found.scores:
                    scores.setdefault((folder, picture.file), []).append(found.scores[picture.file])
    candidates: dict[str, dict[tuple[Path, str], list[float]]] = {}
    about: dict[tuple[Path, str], Picture] = {}
    for folder, pictures in manifests.items():
        for picture in pictures:
            key = (folder, picture.file)
            if len(scores.get(key, ())) < len(judges):
                bad[folder] += 1
                continue
            about[key] = picture
            candidates.setdefault(picture.task, {})[key] = scores[key]
    for folder, number in bad.items():
        print(f"{folder}: {number} pictures without a score are left out", file=sys.stderr)
    pairs, disagreements = pairs_of(candidates, _decide(options), which=options.pairs)
    if not pairs:
        raise UserError(f"no prompt has two pictures or more among {len(about)}; generate with --images_per_prompt 2 or more")
    single = sum(len(found) == 1 for found in candidates.values())
    counts = LabelCounts(len(candidates), single, 0, 0, disagreements, 0, 0)
    kept, counts = finish(pairs, counts, absolute_winner=options.absolute_winner, keep_ties=options.ties == "keep")

    def rows() -> Iterator[Mapping[str, pickapic.Value]]:
        for pair in kept:
            (folder_0, file_0), (folder_1, file_1) = pair.first, pair.second
            yield pickapic.row(
                about[pair.first].prompt,
                (folder_0 / file_0).read_bytes(),
                (folder_1 / file_1).read_bytes(),
                pair.label,
                uids=(f"{folder_0.name}/{file_0}", f"{folder_1.name}/{file_1}"),
                model_0=about[pair.first].model,
                model_1=about[pair.second].model,
                rater=_rater(judges),
            )

    told = dict.fromkeys(("model_0", "model_1", "image_0_uid", "image_1_uid", "rater"), str)
    pickapic.write(output, rows(), {**pickapic.COLUMNS, **told})
    return counts


def relabel(source: str, options: LabelOptions, *, progress: bool = False) -> LabelCounts:
    """An existing set with the judges' labels in place of its own; without judges only filtered.

    Weights and what other columns tell in texts and numbers are kept, except what tells of the vote that no longer counts.

    Raises:
        UserError: a set that cannot be read, nothing is left of it, or the output is there already.
    """
    from palate.data.pairs import read_pairs

    judges = find_judges(options.judges)
    if options.pairs != "all":
        raise UserError(f"pairs {options.pairs} is of candidates in picture folders, and {source} holds pairs: leave it out")
    reader = read_pairs(world.find_pairs(source), ties="keep", max_bad_rows=options.max_bad_rows, keep_columns=True)
    output = _output(options, source, [place.path for place in reader.places if not place.remote])
    before: list[Labelled] = []
    kinds: dict[str, set[type]] = {}
    for number, pair in enumerate(reader):
        first, second = (hashlib.sha256(image).digest() for image in (pair.image_0, pair.image_1))
        before.append(Labelled(pair.prompt, first, second, pair.label, number))
        for name, value in _told(pair, judges).items():
            kinds.setdefault(name, set()).add(kind_of(value))
    for row in reader.counts.bad:
        print(f"skipped {row}", file=sys.stderr)
    for reason, count in reader.counts.by_reason().items():
        print(f"{count} {reason}", file=sys.stderr)
    labelled, disagreements, changed = before, 0, None
    if judges:
        margins = list(zip(*(judge_margins(j, reader, options.batch_size, progress) for j in judges.values()), strict=True))
        decide = _decide(options)
        labelled = [replace(pair, label=decide(found)) for pair, found in zip(before, margins, strict=True)]
        disagreements = sum(map(disagree, margins))
        changed = sum(old.winner != new.winner for old, new in zip(before, labelled, strict=True))
    counts = LabelCounts(len({p.prompt for p in before}), 0, 0, 0, disagreements, 0, 0, changed)
    kept, counts = finish(labelled, counts, absolute_winner=options.absolute_winner, keep_ties=options.ties == "keep")
    labels = {pair.source: pair.label for pair in kept}
    # The set is read once more, so that its pictures need not stay in memory.
    rows = (
        {**pickapic.row(p.prompt, p.image_0, p.image_1, labels[i]), **_told(p, judges)}
        for i, p in enumerate(reader)
        if i in labels
    )
    pickapic.write(output, rows, {**pickapic.COLUMNS, **{name: common(found) for name, found in kinds.items()}})
    return counts


def _told(pair: PreferencePair, judges: Collection[str]) -> dict[str, object]:
    """What is written of a pair besides its label; a vote's own columns only while it counts."""
    told = {name: value for name, value in pair.more.items() if not (judges and OF_THE_VOTE.fullmatch(name))}
    told = {"weight": pair.weight, "source": pair.source, **told}
    if rater := _rater(judges) or pair.rater:
        told["rater"] = rater
    return told


def _rater(judges: Collection[str]) -> str:
    """Who decided."""
    return ", ".join(judges)


def _output(options: LabelOptions, source: str | None = None, files: Sequence[Path] = ()) -> Path:
    """Where to write; refused before anything is judged if something would be lost, or read with the set the next time."""
    out = Path(options.output).expanduser()
    if out.exists() and any(file.exists() and file.samefile(out) for file in files):
        raise UserError(f"output {out} is the set that is read, which would be lost; name another file")
    if out.exists():
        raise UserError(f"{out} is there already; name another output, or delete it")
    check_file(out, "output")
    if source is not None and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"output {out} lies in {source}, with which it would be read the next time; name a file elsewhere")
    return out


def judge_margins(named: NamedJudge, pairs: Any, batch_size: int = 32, progress: bool = False) -> list[float]:
    """Score of the first minus score of the second picture of every pair of a reader, in order.

    A picture that several pairs of a prompt show, as those of a ranking do, is decoded and scored once; of each, only a digest
    and a score stay in memory.

    Raises:
        UserError: a picture that the judge gives no finite score.
    """
    from palate.data.images import decode, to_tensor
    from palate.judges.guard import JudgeError
    from palate.judges.stream import score_stream

    where: list[str] = []
    shown: list[int] = []
    numbers: dict[tuple[str, bytes], int] = {}

    def items() -> Iterator[tuple[Any, str]]:
        for pair in pairs:
            for image in (pair.image_0, pair.image_1):
                key = pair.prompt, hashlib.sha256(image).digest()
                shown.append(numbers.setdefault(key, len(numbers)))
                if shown[-1] == len(where):
                    where.append(pair.source)
                    yield (lambda image=image: to_tensor([decode(image)])), pair.prompt

    scores: dict[int, float] = {}
    stream = score_stream(named.load(device()), items(), batch_size=batch_size, workers=2)
    try:
        for index, found in tqdm(stream, desc=named.name, unit=" pictures", disable=not progress):
            if not isinstance(found, float):
                raise UserError(f"{where[index]}: a picture {found}")
            scores[index] = found
    except JudgeError as error:
        raise UserError(f"{error}; it is of {where[error.row or 0]}") from error
    return [scores[a] - scores[b] for a, b in zip(shown[::2], shown[1::2], strict=True)]


def _decide(options: LabelOptions) -> Any:
    temperature = options.temperature if options.soft else None
    return partial(label_of, temperature=temperature, threshold=options.thresholds())
