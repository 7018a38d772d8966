"""``palate score``: what judges say of the pictures of a folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from palate.base.errors import UserError, short
from palate.base.machine import device
from palate.base.options import Batch, at_least, check_ranges
from palate.verbs import carry_out

USAGE = "palate score DIR --judges '[pickscore, aesthetic]' [--option value ...]"


@dataclass(frozen=True)
class ScoreOptions:
    """Who judges, and how fast."""

    judges: tuple[str, ...]
    """Names of judges, such as ``mini-heldout``, ``pickscore``, ``pickscore:FOLDER``, ``jpeg_compressibility``; one after
    the other."""
    batch_size: Batch = 32
    """Pictures judged at once."""
    workers: Annotated[int, at_least(1, 256)] = 4
    """Threads that read pictures."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(words: list[str]) -> int:
    about = ("DIR is a picture folder, as palate generate writes it.", "")
    return carry_out(words, ScoreOptions, _score, usage=USAGE, about=about, first="a picture folder")


def _score(first: list[str], options: ScoreOptions) -> None:
    from palate.evaluation.manifest import read_manifest, unlisted
    from palate.evaluation.scoring import score_folder
    from palate.evaluation.statistics import mean_difference
    from palate.evaluation.tables import columns
    from palate.names.judges import find_judges

    judges = find_judges(options.judges)
    if not judges:
        raise UserError("palate score needs at least one judge, such as --judges '[jpeg_compressibility]'")
    folder = first[0]
    pictures = read_manifest(folder, check_files=False)  # missing ones are told of as all bad pictures are

    if beside := unlisted(folder, pictures):
        print(f"{len(beside)} pictures in {folder} are not in its manifest, such as {beside[0]}: not scored", file=sys.stderr)
    rows = [("judge", "mean", "95 % interval", "pictures", "prompts", "bad")]
    for name, named in judges.items():
        try:
            found = score_folder(
                named.load(device()),
                named.header(),
                folder,
                pictures,
                batch_size=options.batch_size,
                workers=options.workers,
                progress=sys.stderr.isatty(),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command scores what is left") from None
        here = [p for p in pictures if p.file in found.scores]
        bad = [p.file for p in pictures if p.file in found.bad]
        for file in bad[:5]:
            print(f"{name}: {short(file, quoted=False)} {short(found.bad[file], 200, quoted=False)}", file=sys.stderr)
        if len(bad) > 5:
            print(f"{name}: and {len(bad) - 5} more bad pictures", file=sys.stderr)
        if not here:
            raise UserError(f"{name} could score none of the {len(pictures)} pictures of {folder}")
        scores = [found.scores[p.file] for p in here]
        mean = mean_difference([0.0] * len(here), scores, [p.task for p in here])
        prompts = len({p.task for p in here})
        interval = f"{mean.low:.4g} to {mean.high:.4g}" if prompts > 1 else "-"
        rows.append((name, f"{mean.difference:.4g}", interval, str(len(here)), str(prompts), str(len(bad))))
    print("\n".join(columns(rows)))
