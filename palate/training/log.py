"""The log of a run: ``log.jsonl`` for programs, ``train.log`` for people, a tracker on request."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from palate.base.errors import UserError
from palate.base.files import write_atomically
from palate.base.jsonl import JsonObject, read_lines
from palate.training.trackers import open_tracker


class RunLog:
    """Appends to the log files of ``folder``, line by line, so that a killed run loses nothing it has logged.

    Args:
        folder: where ``log.jsonl`` and ``train.log`` lie.
        step: the step the run starts from; lines of later steps, left by a run that ended there, are removed.
        report_to: where else the numbers go; ``none`` for nowhere.
        settings: of the run, told there.
    """

    def __init__(
        self, folder: str | Path, *, step: int = 0, report_to: str = "none", settings: Mapping[str, object] | None = None
    ):
        self.folder = Path(folder)
        self.tracker = open_tracker(report_to, self.folder, step, settings or {})
        truncate(self.folder / "log.jsonl", step)
        if step == 0:
            (self.folder / "train.log").unlink(missing_ok=True)
        self.lines: TextIO = (self.folder / "log.jsonl").open("a", buffering=1, encoding="utf-8")
        self.text: TextIO = (self.folder / "train.log").open("a", buffering=1, encoding="utf-8")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.text.close()
        if self.tracker is not None:
            self.tracker.close()

    def record(self, record: Mapping[str, object]) -> None:
        """Write one line of numbers; ``record["step"]`` must be there."""
        self._write(self.lines, json.dumps(record))
        # Where standard error is no terminal there is no progress bar, so the lines themselves are shown.
        self.say("  ".join(f"{name} {_short(value)}" for name, value in record.items()), show=not sys.stderr.isatty())
        if self.tracker is not None:
            numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
            self.tracker.numbers(int(str(record["step"])), numbers)

    def picture(self, step: int, path: Path) -> None:
        """Tell of sample pictures that were drawn after so many steps."""
        if self.tracker is not None:
            self.tracker.picture(step, path)

    def say(self, line: str, *, show: bool = True) -> None:
        """Write a line for people into ``train.log``, and on standard error if ``show``."""
        self._write(self.text, line)
        if show:
            tqdm.write(line, file=sys.stderr)

    def _write(self, file: TextIO, line: str) -> None:
        try:
            file.write(line + "\n")
        except OSError as error:
            raise UserError(f"{file.name} cannot be written: {error.strerror}; free some space and resume") from error


class Window:
    """Sums between two lines of the log: plain numbers by name, so that a checkpoint can hold them."""

    def __init__(self, sums: Mapping[str, float] | None = None):
        self.sums = dict(sums or {})

    def add(self, totals: Mapping[str, float]) -> None:
        for name, total in totals.items():
            self.sums[name] = self.sums.get(name, 0.0) + total

    def means(self) -> dict[str, float]:
        """Means over pairs (``grad_norm``: over steps), with mean and standard deviation of the logits u."""
        sums = dict(self.sums)
        pairs, steps = sums.pop("pairs"), sums.pop("steps")
        means = {"grad_norm": sums.pop("grad_norm") / steps} | {name: total / pairs for name, total in sums.items()}
        if "logit" in means:
            mean, square = means.pop("logit"), means.pop("logit_square")
            means |= {"logit_mean": mean, "logit_std": math.sqrt(max(0.0, square - mean**2))}
        return means


def read_log(path: str | Path) -> list[JsonObject]:
    """The lines of a ``log.jsonl``, in order. A last line cut short by a crash is left out.

    Raises:
        UserError: the file is missing, or another line is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no log at {path}: expected the log.jsonl of a run")
    return [record for _, record in read_lines(path, may_be_cut=True)]


def truncate(path: Path, step: int) -> None:
    """Drop the lines after ``step`` (all lines if ``step`` is 0: nothing was trained yet)."""
    if not path.exists():
        return
    kept = [record for record in read_log(path) if 0 < step >= record["step"]]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Silent:
    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None: ...
    def record(self, record: Mapping[str, object]) -> None: ...
    def picture(self, step: int, path: Path) -> None: ...
    def say(self, line: str, *, show: bool = True) -> None: ...
