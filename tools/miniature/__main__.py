"""``python -m tools.miniature``: rebuild the embedded miniature world, in a checkout of the repository."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from palate.base.errors import UserError
from palate.base.options import checked, help_lines, overrides


@dataclass(frozen=True)
class BuildOptions:
    work_dir: str = "build"
    """Trainings in progress and finished parts; a build that was stopped continues from them."""
    only: str | None = None
    """``mini-sdxl``: that model and its pairs alone, from the embedded mini-sd, mini-clip and raters."""

    def __post_init__(self) -> None:
        if self.only not in (None, "mini-sdxl"):
            raise UserError(f"only is {self.only!r}; expected mini-sdxl, or leave it out to rebuild everything")


def main(words: list[str]) -> None:
    if "-h" in words or "--help" in words:
        print("\n".join(["python -m tools.miniature [--option value ...]", "", *help_lines(BuildOptions)]))
        return
    options = checked(BuildOptions, overrides(words), "python -m tools.miniature")
    from tools.miniature.build import build_all, build_xl

    (build_all if options.only is None else build_xl)(Path(options.work_dir))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
