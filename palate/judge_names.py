"""Judges by the names that recipes and commands use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from palate.errors import UserError, nearest
from palate.judges import KINDS, check_judge
from palate.miniature import world

if TYPE_CHECKING:
    import torch

    from palate.judges import Judge


@dataclass(frozen=True)
class NamedJudge:
    """A judge that is known to be loadable, but not loaded."""

    name: str
    kind: str
    folder: Path | None
    role: str = "held out"
    """What it tells: "held out", or for a miniature judge such as "looks"."""

    def load(self, device: str | torch.device = "cpu") -> Judge:
        from palate.judges import load_judge

        return load_judge(self.kind, self.folder, device=device)


def find_judges(names: Iterable[str]) -> dict[str, NamedJudge]:
    """The judges of these names, each once, in order; no weights are read.

    A name is a judge of the miniature world (``mini-heldout``), a kind that needs no weights (``jpeg_compressibility``),
    or ``kind:folder`` (``pickscore:models/PickScore_v1``).

    Raises:
        UserError: an unknown name, or a folder in which something is missing.
    """
    return {name: _find(name) for name in names}


def _find(name: str) -> NamedJudge:
    if name in world.JUDGES:
        kind, role = world.JUDGES[name]
        found = NamedJudge(name, kind, world.checkpoint(name), role)
    else:
        kind, _, folder = name.partition(":")
        if kind not in KINDS or not (folder or kind.startswith("jpeg")):
            raise UserError(f"no judge {name!r}{nearest(name, [*world.JUDGES, *(f'{k}:FOLDER' for k in KINDS)])}")
        found = NamedJudge(name, kind, Path(folder).expanduser() if folder else None)
    check_judge(found.kind, found.folder)
    return found
