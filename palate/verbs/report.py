"""``palate report``: runs and comparisons as one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palate.base.errors import UserError
from palate.base.files import check_file
from palate.base.options import Port, check_ranges
from palate.verbs import carry_out

USAGE = "palate report FOLDER [FOLDER ...] [--option value ...]: of palate train or palate compare"


@dataclass(frozen=True)
class Options:
    output: str | None = None
    """The file to write; report.html in the folder unless given, or in the working directory for several folders."""
    watch: bool = False
    """Serve the page to a browser of this machine instead, where it follows runs that go on; stop with Ctrl-C."""
    port: Port = 8360
    """Of the page that is watched."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(words: list[str]) -> int:
    return carry_out(words, Options, _report, usage=USAGE, first="a folder or more", several=True)


def _report(folders: list[str], options: Options) -> None:
    if options.watch:
        _watch(folders, options)
        return
    if options.output is not None:
        check_file(options.output, "output")
    from palate.evaluation.report import chapter_of, write_report

    chapters = [chapter_of(folder) for folder in folders]
    first = Path(folders[0])
    beside = (first if first.is_dir() else first.parent) if len(folders) == 1 else Path()
    path = Path(options.output).expanduser() if options.output is not None else beside / "report.html"
    write_report(path, chapters)
    print(f"wrote {path}")


def _watch(folders: list[str], options: Options) -> None:
    from palate.evaluation.watch import server_of

    if options.output is not None:
        raise UserError("output is not written while the page is watched: leave out one of --output and --watch")
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}; expected that of a run")
    with server_of(folders, options.port) as server:
        print(f"the page: http://127.0.0.1:{server.server_port}/   (stop with Ctrl-C)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the page is closed; the run goes on") from None
