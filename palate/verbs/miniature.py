"""``palate miniature``: rebuild the embedded miniature world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palate.base.errors import UserError
from palate.base.options import checked, overrides


@dataclass(frozen=True)
class BuildOptions:
    work_dir: str = "build"
    """Trainings in progress and finished parts; a build that was stopped continues from them."""
    only: str | None = None
    """``mini-sdxl``: that model and its pairs alone, from the embedded mini-sd, mini-clip and raters."""

    def __post_init__(self) -> None:
        if self.only not in (None, "mini-sdxl"):
            raise UserError(f"only is {self.only!r}; expected mini-sdxl, or leave it out to rebuild everything")


def main(words: list[str]) -> int:
    if not words or words[0] != "build":
        raise UserError("expected: palate miniature build [--work_dir DIR] [--only mini-sdxl]")
    options = checked(BuildOptions, overrides(words[1:]), "palate miniature build")
    from palate.miniature.build import build_all, build_xl

    (build_all if options.only is None else build_xl)(Path(options.work_dir))
    return 0
