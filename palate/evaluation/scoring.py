"""A judge past the pictures of a folder: what it said is kept at once, and never asked again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from palate.base.errors import UserError, short
from palate.evaluation.manifest import Picture, ScoreFile, append_scores, content, read_scores, score_path
from palate.judges import Judge
from palate.judges.guard import JudgeError
from palate.judges.stream import score_files

KEPT_EVERY = 64  # scores between two writes


def score_folder(
    judge: Judge,
    header: ScoreFile,
    folder: str | Path,
    pictures: Sequence[Picture],
    *,
    batch_size: int = 32,
    workers: int = 4,
    progress: bool = False,
) -> ScoreFile:
    """Score what ``scores/<judge>.jsonl`` lacks of ``pictures``; memory does not grow with their number.

    What was scored before is scored again, and said so, if the picture's bytes or its prompt are others now, or if nothing
    tells of which they are. Of a judge that is a function all is, once its source is another one. A picture that cannot be
    read is noted with its reason and tried again by the next call.

    Args:
        header: the judge's name, kind, fingerprint and role.

    Raises:
        UserError: the file was begun by another judge or with other weights, or what the judge itself raises.
    """
    folder = Path(folder)
    path = score_path(folder, header.judge)
    known = _known(path, header)
    now = {p.file: content(folder / p.file, p.prompt) for p in pictures}
    wanted = [p for p in pictures if p.file not in known.scores or known.of.get(p.file) != now[p.file]]
    changed = sum(p.file in known.of for p in wanted)
    untold = sum(p.file in known.scores and p.file not in known.of for p in wanted)
    _tell(header.judge, changed, "changed since they were scored")
    _tell(header.judge, untold, "were scored by an earlier version, which did not note of which they are")
    stream = score_files(judge, ((folder / p.file, p.prompt) for p in wanted), batch_size=batch_size, workers=workers)
    waiting: list[tuple[str, float | str]] = []

    def keep() -> None:
        if waiting:
            append_scores(path, waiting, header, now)
            waiting.clear()

    files = [p.file for p in wanted]
    bar = tqdm(stream, total=len(wanted), desc=header.judge, unit=" pictures", disable=not progress)
    try:
        for index, found in bar:
            file = files[index]
            if isinstance(found, float):
                waiting.append((file, found))
            elif known.bad.get(file) != str(found):
                waiting.append((file, str(found)))
            if len(waiting) >= KEPT_EVERY:
                keep()
    except JudgeError as error:
        raise UserError(f"{error}; it is {short(files[error.row or 0], quoted=False)}") from error
    finally:  # also when interrupted
        keep()
    return read_scores(path) if path.is_file() else header


def _known(path: Path, header: ScoreFile) -> ScoreFile:
    """What was scored before by the same judge.

    Raises:
        UserError: another judge, or other weights, wrote that file.
    """
    if not path.is_file() or not path.stat().st_size:
        return header
    known, now = read_scores(path), header.header()
    if header.kind == "function" and known.header() == {**now, "fingerprint": known.fingerprint} != now:
        print(f"{header.judge}: its source changed since {path.name} was written: all is scored again", file=sys.stderr)
        path.unlink()
        return header
    for name, before in known.header().items():
        if before != now[name]:
            raise UserError(
                f"{path} holds scores whose {name} is {short(before)}, now it is {now[name]!r}; "
                "delete that file to score anew, or name the judge that wrote it"
            )
    return known


def _tell(judge: str, count: int, why: str) -> None:
    if count:
        print(f"{judge}: {count} pictures or prompts {why}: scored again", file=sys.stderr)
