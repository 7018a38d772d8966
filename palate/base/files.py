"""Results appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write under a temporary name in the same folder (made if need be), then rename.

    content: the bytes, or what writes a file of the name it is given, where the whole is too large to be held twice.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content) if isinstance(content, bytes) else content(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
