"""Where the embedded world lies, by name."""

from __future__ import annotations

from pathlib import Path

from palate.base.errors import UserError

ROOT = Path(__file__).parent
MODELS = ("mini-sd", "mini-sdxl", "mini-sd3")
PAIRS = {
    "miniature-pairs": "pairs",
    "miniature-sdxl-pairs": "pairs-sdxl",
    "miniature-sd3-pairs": "pairs-sd3",
    "miniature-mixed-pairs": "pairs-mixed",
}
"""Name -> folder of the votes on pictures of the model in the same place of :data:`MODELS`; the last on renders of several
shapes."""
JUDGES = {
    "mini-heldout": ("pickscore", "held out"),
    "mini-pickscore": ("pickscore", "preference"),
    "mini-clip": ("clipscore", "prompt following"),
    "mini-aesthetic": ("aesthetic", "looks"),
}
"""Judge -> (kind of adapter, what it tells)."""


def checkpoint(name: str) -> Path:
    """Folder of a miniature model or judge."""
    folder = ROOT / "checkpoints" / name
    if not folder.is_dir():
        raise UserError(f"the miniature checkpoint {name} is missing from this installation; install Palate again")
    return folder


def find_model(name: str) -> str:
    """The folder of a name in :data:`MODELS`; whatever else ``name`` is, itself."""
    return str(checkpoint(name)) if name in MODELS else name


def pairs(name: str = "miniature-pairs") -> Path:
    """The voted pairs of a name in :data:`PAIRS`, in Pick-a-Pic v2's columns."""
    return _file(ROOT / PAIRS[name] / "train.parquet")


def find_pairs(source: str) -> str | Path:
    """The pairs of a name in :data:`PAIRS`; whatever else ``source`` is, itself."""
    return pairs(source) if source in PAIRS else source


def unseen_prompts() -> Path:
    """Captions of scenes that no pair shows."""
    return _file(ROOT / "prompts" / "unseen.txt")


def seen_prompts() -> Path:
    """Captions that pairs were made from, as many as there are unseen ones."""
    return _file(ROOT / "prompts" / "seen.txt")


def _file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path.name} of the miniature world is missing from this installation; install Palate again")
    return path
