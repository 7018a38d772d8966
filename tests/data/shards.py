"""What a cache's shards hold, found by Arrow's own reader, and ways to spoil them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa


def entries(folder: Path) -> dict[str, bytes]:
    """The values by key, of all shards."""
    tables = [pa.ipc.open_stream(path.read_bytes()).read_all() for path in sorted(folder.glob("*.arrow"))]
    return {row["key"].hex(): row["value"] for table in tables for row in table.to_pylist() if any(row["key"])}


def spoil(folder: Path, key: str, damage: str = "one bit") -> None:
    """Damage the value of a key where it lies."""
    value = entries(folder)[key]
    changed = bytearray(value)
    changed[-1 if damage == "one bit" else 12] ^= 1  # a number, or a letter of the header
    spoilt = {"zeros": bytes(len(value)), "text": (b"hello" * len(value))[: len(value)]}.get(damage, bytes(changed))
    for path in folder.glob("*.arrow"):
        path.write_bytes(path.read_bytes().replace(value, spoilt))
