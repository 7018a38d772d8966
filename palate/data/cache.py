"""A folder of tensors, each file named by what it was computed from."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from palate.base.errors import UserError


class TensorCache:
    """Content-addressed store: one safetensors file per key, in subfolders named by the key's first two letters.

    An entry never goes stale, because its key holds everything it depends on, and is never half written, because it appears
    under its name only when complete. Several processes may share a folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @staticmethod
    def key(**parts: object) -> str:
        """SHA-256 (hex) over the canonical JSON of ``parts``: strings, numbers, booleans, None, and lists of them."""
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, key: str) -> Path:
        """Where the entry of a key lies, whether it exists or not."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether there is an entry that is not empty; nothing is read, so it may yet prove damaged."""
        try:
            return self.path(key).stat().st_size > 0
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unreadable(error) from error

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key; None if there is no such file, or if it was damaged: then it is there no longer."""
        try:
            data = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            header, body = _parts(data)
            if header["__metadata__"]["crc32"] == _checksum(body):
                return load(data)
        except (SafetensorError, ValueError, KeyError, TypeError):
            pass
        self._remove(key)
        return None

    def _remove(self, key: str) -> None:
        """So that the next run, which only asks whether an entry is there, computes it anew."""
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache entry {self.path(key)} is damaged and cannot be removed ({error.strerror}): delete it, or choose "
                "another folder"
            ) from error

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"cannot read the cache folder {self.folder}: {error.strerror}")

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under a key, replacing what was there. Raises ``UserError`` if the folder cannot be written."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # safetensors itself only notices wrong lengths; the checksum also notices wrong values.
        data = save(tensors, {"crc32": _checksum(_parts(save(tensors))[1])})
        path = self.path(key)
        temporary = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the disk of the cache folder {self.folder} is full: free some space there (older entries may be deleted, "
                    "they are computed again when needed) or choose another folder, then run again; finished entries are kept"
                ) from error
            raise UserError(f"cannot write to the cache folder {self.folder}: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _parts(data: bytes) -> tuple[dict, memoryview]:
    """Header and body of a safetensors file: 8 bytes of length, that much JSON, the values."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), memoryview(data)[end:]


def _checksum(body: memoryview) -> str:
    return f"{zlib.crc32(body):08x}"
