"""Pairs in Pick-a-Pic v2's columns, as parquet that holds the pictures: the one writer of what ``read_pairs`` reads best."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from palate.base.files import write_atomically

Value = str | bytes | bool | int | float | None
TYPES: dict[str, type] = {
    **dict.fromkeys(("caption", "best_image_uid", "image_0_uid", "image_1_uid"), str),
    **dict.fromkeys(("model_0", "model_1", "created_at", "rater"), str),  # rater is ours
    **dict.fromkeys(("jpg_0", "jpg_1"), bytes),
    **dict.fromkeys(("label_0", "label_1"), float),
    **dict.fromkeys(("has_label", "are_different"), bool),
    **dict.fromkeys(("ranking_id", "user_id", "num_example_per_prompt"), int),
}
COLUMNS = {name: TYPES[name] for name in ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label")}
"""What every pair has, in the order in which it is written."""


def row(
    prompt: str, image_0: bytes, image_1: bytes, label: float, *, uids: tuple[str, str] | None = None, **more: Value
) -> dict[str, Value]:
    """One pair.

    Args:
        label: probability that the first encoded picture is the better one; 0.5 is a tie.
        uids: names of the pictures; the row then also names the better one, or says ``tie``.
        more: further columns.
    """
    made: dict[str, Value] = {"caption": prompt, "jpg_0": image_0, "jpg_1": image_1}
    made |= {"label_0": label, "label_1": 1 - label, "has_label": True, "are_different": image_0 != image_1}
    if uids is not None:
        best = {1.0: uids[0], 0.0: uids[1]}.get(label, "tie")
        made |= {"best_image_uid": best, "image_0_uid": uids[0], "image_1_uid": uids[1]}
    return {**made, **more}


def write(
    path: str | Path,
    rows: Iterable[Mapping[str, Value]],
    columns: Mapping[str, type] = COLUMNS,
    *,
    group: int = 64,
    compression: str = "snappy",
) -> None:
    """Write rows whole or not at all; memory does not grow with their number.

    Args:
        path: of the parquet file.
        rows: as :func:`row` makes them; of what they hold only ``columns`` are written, and what they lack is null.
        columns: in order, as ``bool``, ``int``, ``float``, ``str`` or ``bytes``: some of ``TYPES``, or others of one's own.
        group: rows of a row group, which is held in memory; few, as pictures are large.
        compression: of the columns, as parquet names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string(), bytes: pa.binary()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    stream = iter(rows)

    def fill(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, schema, compression=compression) as writer:
            while part := list(itertools.islice(stream, group)):
                made = [{name: _as(kind, one.get(name)) for name, kind in columns.items()} for one in part]
                writer.write_batch(pa.RecordBatch.from_pylist(made, schema))

    write_atomically(path, fill)


def _as(kind: type, value: Value) -> Value:
    if value is None:
        return None
    return str(value).encode(errors="replace").decode() if kind is str else kind(value)
