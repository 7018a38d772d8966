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
    """``mini-sdxl`` or ``mini-sd3``: that model and its pairs alone, from the embedded mini-sd, mini-clip and raters;
    ``mixed-pairs``: those of several sizes alone."""

    def __post_init__(self) -> None:
        if self.only not in (None, "mini-sdxl", "mini-sd3", "mixed-pairs"):
            raise UserError(
                f"only is {self.only!r}; expected mini-sdxl, mini-sd3 or mixed-pairs, or leave it out to rebuild everything"
            )


def main(words: list[str]) -> None:
    if "-h" in words or "--help" in words:
        print("\n".join(["python -m tools.miniature [--option value ...]", "", *help_lines(BuildOptions)]))
        return
    options = checked(BuildOptions, overrides(words), "python -m tools.miniature")
    from tools.miniature.build import build_all, build_mixed, build_sd3, build_xl

    if options.only == "mixed-pairs":
        build_mixed()
        return
    build = {None: build_all, "mini-sdxl": build_xl, "mini-sd3": build_sd3}[options.only]
    build(Path(options.work_dir))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
