"""A folder of tensors, each found by what it was computed from, packed into few files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import secrets
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from palate.base.errors import UserError

AT_ONCE, BYTES_AT_ONCE = 64, 2**24
"""So many entries, or bytes, are written together: a shard is read by their number when it is opened."""
LATEST = 2**16
"""Entries of this process that are found by a dictionary, before they join the sorted rest."""
SCHEMA = pa.schema([("key", pa.binary(32)), ("check", pa.uint32()), ("value", pa.large_binary())])
ENTRY = np.dtype([("key", "u8", 2), ("shard", "u4"), ("check", "u4"), ("name", "i8"), ("start", "i8"), ("size", "i8")])
"""Half of the key's digits; where the key and the value begin in the shard, and how long the value is, in bytes."""


class TensorCache:
    """Content-addressed store: shards that hold many entries each, which several processes, runs and machines may share.

    An entry never goes stale, because its key holds everything it depends on. It is checked when it is read, and one that is
    damaged counts as missing from then on. ::

        cache = TensorCache(folder)
        key = cache.key(kind="latents", image=digest, resolution=512)
        if not cache.has(key):  # reads nothing
            cache.put(key, {"latents": latents})  # readable at once by this process
        cache.get(key)  # the tensors by name, or None
        cache.flush()  # from here on kept, and seen by what opens the folder or calls refresh()

    A put is written with the next ones, ``AT_ONCE`` of them together; what is killed before loses those alone.

    A shard is an Arrow stream (``MACHINE-....arrow``) of key, CRC-32 and safetensors. One process writes to it at a time, only
    at its end, and holds a lock on it; the next takes it up again. So shards of several machines may lie in one folder, on a
    network disk too, and be copied into another. What a writer that was killed left at the end is cut off by the next. A
    damaged entry is removed by writing zeros over its key. Entries that are a file each, in subfolders named by the first two
    digits of their keys, are taken into a shard where :meth:`has` meets them.

    Args:
        folder: need not exist.
        limit: bytes that the folder's shards may take together; no limit unless given.

    Raises:
        UserError: a folder that cannot be read.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.folder, self.limit = Path(folder), limit
        self._shards: list[_Shard] = []
        self._sorted = np.empty(0, ENTRY)  # by the first half of the key, which is what _firsts holds
        self._firsts = np.empty(0, np.uint64)
        self._latest: dict[bytes, np.void] = {}
        self._pending: dict[bytes, bytes] = {}
        self._writing: tuple[_Shard, BinaryIO] | None = None
        self._lock = threading.RLock()
        self._loose = any(len(path.name) == 2 and path.is_dir() for path in self.folder.glob("*"))
        self._taken_in: list[Path] = []
        self.refresh()

    @staticmethod
    def key(**parts: object) -> str:
        """SHA-256 (hex) over the canonical JSON of ``parts``: strings, numbers, booleans, None, and lists of them."""
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes that the shards of the folder take."""
        return sum(path.stat().st_size for path in self._paths())

    def has(self, key: str) -> bool:
        """Whether there is an entry; no shard is read, so it may yet prove damaged. Raises ``UserError`` as :meth:`put`."""
        name = bytes.fromhex(key)
        there = name in self._pending or next(self._found(name), None) is not None
        return there or (self._loose and self._take_in(key))

    def holds(self, names: np.ndarray) -> bool:
        """Whether there are entries of all keys; their bytes ``(n, 32)``."""
        halves = np.ascontiguousarray(names[:, :16]).view(">u8")
        places = np.searchsorted(self._firsts, halves[:, 0]).clip(max=max(0, len(self._sorted) - 1))
        found = np.zeros(len(names), bool)
        if len(self._sorted):
            entries = self._sorted[places]
            found = (entries["key"] == halves).all(axis=1) & (entries["size"] >= 0)
        return all(self.has(name.tobytes().hex()) for name in names[~found])

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key; None if there are none, or if they were damaged: then they are there no longer.

        Raises:
            UserError: a damaged entry that cannot be removed, or a folder that cannot be read.
        """
        name = bytes.fromhex(key)
        if (value := self._pending.get(name)) is not None:
            return load(value)
        for entry in list(self._found(name)):
            shard = self._shards[entry["shard"]]
            try:
                value = os.pread(shard.file.fileno(), int(entry["size"]), int(entry["start"]))
            except OSError as error:
                raise self._unreadable(error) from error
            if len(value) == entry["size"] and _check(name, value) == entry["check"]:
                with contextlib.suppress(SafetensorError):
                    return load(value)
            self._remove(name, entry)
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under a key. Raises ``UserError`` if the folder cannot be written, or would grow beyond its limit."""
        value = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        with self._lock:
            self._pending[bytes.fromhex(key)] = value
            if len(self._pending) >= AT_ONCE or sum(map(len, self._pending.values())) >= BYTES_AT_ONCE:
                self.flush()

    def flush(self) -> None:
        """Write what was put. Raises ``UserError`` as :meth:`put`; what could not be written is then forgotten."""
        with self._lock:
            entries, self._pending = self._pending, {}
            if not entries:
                return
            checks = [_check(name, value) for name, value in entries.items()]
            columns = [pa.array(list(entries), SCHEMA.field(0).type), pa.array(checks, pa.uint32())]
            batch = pa.record_batch([*columns, pa.array(list(entries.values()), pa.large_binary())], schema=SCHEMA)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._append(batch.serialize())
            except OSError as error:
                raise self._unwritable(error) from error
            for path in self._taken_in:
                path.unlink(missing_ok=True)
            self._taken_in = []

    def refresh(self) -> None:
        """See what others have written since."""
        with self._lock:
            known = {shard.path for shard in self._shards}
            try:
                for path in sorted(self._paths()):
                    if path not in known:
                        self._shards.append(_Shard(path))
                found = [entries for i, shard in enumerate(self._shards) for entries in shard.scan(i)]
            except OSError as error:
                raise self._unreadable(error) from error
            self._merge(found)

    # Finding --------------------------------------------------------------------------------------------------------------

    def _paths(self) -> list[Path]:
        return list(self.folder.glob("*.arrow"))

    def _found(self, name: bytes) -> Iterator[np.void]:
        """The entries of a key: several, where two processes wrote it at once."""
        if (latest := self._latest.get(name[:16])) is not None:
            yield latest
        first, second = np.frombuffer(name[:16], ">u8")
        entries = self._sorted
        for entry in entries[np.searchsorted(self._firsts, np.uint64(first)) :]:
            if entry["key"][0] != first:
                return
            if entry["key"][1] == second and entry["size"] >= 0:
                yield entry

    def _merge(self, found: list[np.ndarray]) -> None:
        if found or self._latest:
            every = np.concatenate([self._sorted, *found, np.array(list(self._latest.values()), ENTRY)])
            every = every[every["size"] >= 0]
            firsts = every["key"][:, 0]
            order = np.argsort(firsts, kind="stable")
            self._sorted, self._firsts, self._latest = every[order], firsts[order], {}

    def _remove(self, name: bytes, entry: np.void) -> None:
        """So that the next run, which only asks whether an entry is there, computes it anew."""
        shard = self._shards[entry["shard"]]
        try:
            with shard.path.open("r+b", buffering=0) as file:
                # What lies there now may be another entry, where a writer has cut the shard off meanwhile; and of a damaged key
                # only this half, by which it is found, is known to be as it was.
                if os.pread(file.fileno(), 16, int(entry["name"])) == name[:16]:
                    os.pwrite(file.fileno(), bytes(len(name)), int(entry["name"]))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(
                f"an entry of the cache's file {shard.path} is damaged and cannot be removed ({error.strerror}): delete the "
                "file, or choose another folder"
            ) from error
        with self._lock:
            self._latest.pop(name[:16], None)
            entry["size"] = -1

    # Writing --------------------------------------------------------------------------------------------------------------

    def _append(self, message: pa.Buffer) -> None:
        if self.limit is not None and self.size + message.size > self.limit:
            raise UserError(
                f"the cache folder {self.folder} would grow beyond its limit of {self.limit / 1e9:g} GB: raise cache_limit, "
                "or name an empty folder with --cache_dir"
            )
        shard, file = self._writing = self._writing or self._taken_up() or self._begun()
        try:
            _write(file, shard.end, message)
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(shard.end)  # nothing half written stays
            raise
        for entries in shard.scan(self._shards.index(shard)):
            self._latest |= {entry["key"].astype(">u8").tobytes(): entry for entry in entries}
        if len(self._latest) > LATEST:
            self._merge([])

    def _taken_up(self) -> tuple[_Shard, BinaryIO] | None:
        """A shard of this machine that nobody writes to, without what was left half written at its end."""
        self.refresh()
        for shard in self._shards:
            if shard.end and shard.path.name.startswith(f"{_machine()}-"):
                with contextlib.suppress(OSError):  # deleted meanwhile, or not ours to write
                    file = shard.path.open("r+b", buffering=0)
                    if _locked(file):
                        self.refresh()  # its last writer may only just have ended
                        file.truncate(shard.end)
                        return shard, file
                    file.close()
        return None

    def _begun(self) -> tuple[_Shard, BinaryIO]:
        path = self.folder / f"{_machine()}-{secrets.token_hex(4)}.arrow"
        file = path.open("x+b", buffering=0)
        try:
            _locked(file)
            _write(file, 0, SCHEMA.serialize())
        except OSError:
            path.unlink()
            raise
        shard = _Shard(path)
        self._shards.append(shard)
        list(shard.scan(len(self._shards) - 1))
        return shard, file

    def _take_in(self, key: str) -> bool:
        """Whether there was a file of this entry alone, which is removed once the entry is in a shard."""
        path = self.folder / key[:2] / f"{key}.safetensors"
        try:
            tensors = _loose_entry(path.read_bytes())
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unreadable(error) from error
        self._taken_in.append(path)
        if tensors is not None:
            self.put(key, tensors)
        return tensors is not None

    # Errors ---------------------------------------------------------------------------------------------------------------

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"cannot read the cache folder {self.folder}: {error.strerror}")

    def _unwritable(self, error: OSError) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(
                f"the disk of the cache folder {self.folder} is full: free some space there (its files may be deleted, what "
                "they hold is computed again when needed) or choose another folder, then run again; finished entries are kept"
            )
        return UserError(f"cannot write to the cache folder {self.folder}: {error.strerror}")


class _Shard:
    """A file of entries, and how far it has been read."""

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, 0
        self.file = path.open("rb", buffering=0)

    def scan(self, number: int) -> Iterator[np.ndarray]:
        """The entries that were written since, of which the values are not read; what is cut short or garbled ends it."""
        if os.fstat(self.file.fileno()).st_size <= self.end:
            return
        with pa.memory_map(str(self.path)) as source:
            while True:
                source.seek(self.end)
                try:
                    message = pa.ipc.read_message(source)
                    after = source.tell()
                    if self.end == 0:
                        if message.type != "schema" or pa.ipc.read_schema(message) != SCHEMA:
                            return
                    else:
                        yield _entries(message, number, after)
                except (EOFError, OSError, ValueError, pa.ArrowException):
                    return
                self.end = after


def _entries(message: pa.Message, number: int, after: int) -> np.ndarray:
    """Where the entries of a message lie that ends ``after`` so many bytes."""
    batch = pa.ipc.read_record_batch(message, SCHEMA)
    names, checks, values = batch.columns
    (_, name), (_, offsets, data) = names.buffers(), values.buffers()
    begin = after - message.body.size - message.body.address
    ends = np.frombuffer(offsets, np.int64, len(batch) + 1)
    found = np.empty(len(batch), ENTRY)
    found["key"] = np.frombuffer(name, ">u8", 4 * len(batch)).reshape(-1, 4)[:, :2]
    found["shard"], found["check"] = number, checks.to_numpy()
    found["name"] = begin + name.address + 32 * np.arange(len(batch))
    found["start"], found["size"] = begin + data.address + ends[:-1], np.diff(ends)
    # Removed, or offsets that cannot be.
    return found[found["key"].any(axis=1) & (ends[:-1] >= 0) & (found["size"] >= 0) & (ends[1:] <= data.size)]


def _loose_entry(data: bytes) -> dict[str, Tensor] | None:
    """Of a file of its own: safetensors with the CRC-32 of its values in the header. None if it is damaged."""
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        if json.loads(data[8:end])["__metadata__"]["crc32"] == f"{zlib.crc32(memoryview(data)[end:]):08x}":
            return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError):
        pass
    return None


def _check(name: bytes, value: bytes) -> int:
    """Of the key as well: a value under the key of another is noticed."""
    return zlib.crc32(value, zlib.crc32(name))


def _write(file: BinaryIO, where: int, data: pa.Buffer) -> None:
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file.fileno(), rest, where)
        rest, where = rest[done:], where + done


def _locked(file: BinaryIO) -> bool:
    """Whether nobody else holds the lock of a file, which this process does from here on."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@functools.cache
def _machine() -> str:
    """This machine until it is started anew, as part of a file's name: locks that others hold are not always seen."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:13]
    except OSError:  # not Linux
        return "".join(c if c.isalnum() else "_" for c in platform.node()) or "machine"
