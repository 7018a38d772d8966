"""A judge past the pictures of a folder: what it said is kept at once, and never asked again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from palate.base.errors import UserError
from palate.evaluation.manifest import Picture, ScoreFile, append_scores, read_scores, score_path
from palate.judges import Judge
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

    A picture that cannot be read is noted with its reason and tried again by the next call.

    Args:
        header: the judge's name, kind, fingerprint and role.

    Raises:
        UserError: the file was begun by another judge or with other weights, or what the judge itself raises.
    """
    folder = Path(folder)
    path = score_path(folder, header.judge)
    known = read_scores(path) if path.is_file() and path.stat().st_size else header
    for name, before in known.header().items():
        if before != header.header()[name]:
            raise UserError(
                f"{path} holds scores whose {name} is {before!r}, now it is {header.header()[name]!r}; "
                "delete that file to score anew, or name the judge that wrote it"
            )
    wanted = [p for p in pictures if p.file not in known.scores]
    stream = score_files(judge, ((folder / p.file, p.prompt) for p in wanted), batch_size=batch_size, workers=workers)
    waiting: list[tuple[str, float | str]] = []

    def keep() -> None:
        if waiting:
            append_scores(path, waiting, header)
            waiting.clear()

    bar = tqdm(stream, total=len(wanted), desc=header.judge, unit=" pictures", disable=not progress)
    try:
        for index, found in bar:
            file = wanted[index].file
            if isinstance(found, float):
                waiting.append((file, found))
            elif known.bad.get(file) != str(found):
                waiting.append((file, str(found)))
            if len(waiting) >= KEPT_EVERY:
                keep()
    finally:  # also when interrupted
        keep()
    return read_scores(path) if path.is_file() else header
