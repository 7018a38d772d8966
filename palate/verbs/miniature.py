"""``palate miniature``: rebuild the embedded miniature world."""

from __future__ import annotations

from pathlib import Path

from palate.errors import UserError, nearest
from palate.options import overrides


def main(words: list[str]) -> int:
    if not words or words[0] != "build":
        raise UserError("expected: palate miniature build [--work_dir DIR]")
    given = overrides(words[1:])
    unknown = [name for name in given if name != "work_dir"]
    if unknown:
        raise UserError(f"unknown option --{unknown[0]}{nearest(unknown[0], ['work_dir'])}")
    from palate.miniature.build import build_all

    build_all(Path(str(given.get("work_dir", "build"))))
    return 0
