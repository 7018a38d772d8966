"""What a step needs of frozen weights, kept: where draws return, the reference need not say the same thing twice.

An entry is named by a digest of all that it depends on: the frozen weights, the space and the weighting, the precision, and the
rows that the reference is given (noised latents, time, conditioning, target, noise of the step). So nothing that decides the
draws can be forgotten, and other runs (another beta, rate or objective) find the same entries.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from palate.diffusion.denoising import Noised

REFERENCE, TARGET = "reference", "target"
"""Kinds of entries: errors of the reference, ``(b,)``; embedded targets, ``(b, ...)``. Both float32."""


@runtime_checkable
class Store(Protocol):
    """What keeps tensors by key, such as ``palate.data.cache.TensorCache``."""

    def key(self, **parts: object) -> str: ...
    def get(self, key: str) -> dict[str, Tensor] | None: ...
    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None: ...
    def flush(self) -> None: ...
    def refresh(self) -> None: ...


class References:
    """Of one model, space and precision.

    Args:
        store: where entries lie.
        about: what they depend on beside the rows: plain values that tell frozen weights, space, weighting and precision.
        targets: keep embedded targets too, which a perceptual space computes and which are large.
        together: several processes train, and each epoch deals the pairs out anew: what one computes the others find.
        lacking: whether any process lacks something, of whether this one does: where all must take the same passes, each
            computes what another one lacks.
    """

    def __init__(
        self,
        store: Store,
        about: Mapping[str, object],
        *,
        targets: bool = False,
        together: bool = False,
        lacking: Callable[[bool], bool] = bool,
    ):
        self.store, self.about, self.together, self.lacking = store, dict(about), together, lacking
        self.kinds = (REFERENCE, TARGET) if targets else (REFERENCE,)
        self.computed = self.found = 0
        self._waiting: list[tuple[list[str], Tensor]] = []
        self._lock = threading.Lock()  # batches are looked up in a thread that runs ahead

    def of(self, noised: Noised, shared: int) -> Known:
        """What is known of a batch on the CPU, of whose rows ``shared`` belong to an item, as in ``draw``."""
        digests = _digests(noised, shared)
        keys = {kind: [self.store.key(kind=kind, rows=digest, **self.about) for digest in digests] for kind in self.kinds}
        return Known(self, keys, shared, {kind: self._rows(names) for kind, names in keys.items()})

    def _rows(self, keys: Sequence[str]) -> Tensor | None:
        """In the order of the batch. None if any item's are missing: then all are computed, for the last bits of a row may
        depend on how many are in a pass."""
        with self._lock:
            entries = [self.store.get(key) for key in keys]
            if self.together and None in entries:
                self.store.refresh()
                entries = [self.store.get(key) if entry is None else entry for key, entry in zip(keys, entries, strict=True)]
        items = [entry["rows"] for entry in entries if entry is not None]
        if len(items) < len(keys):
            return None
        self.found += len(items)
        return torch.stack(items, dim=1).flatten(0, 1)

    def keep(self, keys: list[str], rows: Tensor) -> None:
        """Written by the next :meth:`flush`, so that a GPU is not waited for within an update."""
        self._waiting.append((keys, rows.detach()))

    def flush(self) -> None:
        """Store what was computed."""
        waiting, self._waiting = self._waiting, []
        for keys, rows in waiting:
            self.computed += len(keys)
            rows = rows.float().cpu()
            with self._lock:
                for i, key in enumerate(keys):
                    self.store.put(key, {"rows": rows[i :: len(keys)].contiguous()})
        if self.together:
            self.close()

    def close(self) -> None:
        """From here on others find what was stored."""
        with self._lock:
            self.store.flush()


@dataclass(eq=False)
class Known:
    """What is kept of one batch: ``rows`` by kind, None where they must be computed."""

    references: References
    keys: dict[str, list[str]]
    shared: int
    rows: dict[str, Tensor | None]

    def once(self, kind: str, device: torch.device, compute: Callable[[], Tensor]) -> Tensor:
        """Rows of this kind on the device: kept ones, or computed there and from now on kept, if the kind is."""
        if kind not in self.keys:
            return compute()
        rows = self.rows[kind]
        computed = compute() if self.references.lacking(rows is None) else None
        if rows is not None:
            return rows.to(device, non_blocking=True)
        assert computed is not None
        self.references.keep(self.keys[kind], computed)
        return computed

    def pinned(self) -> Known:
        """In memory that a GPU reads by itself."""
        self.rows = {kind: None if rows is None else rows.pin_memory() for kind, rows in self.rows.items()}
        return self


def _digests(noised: Noised, shared: int) -> list[str]:
    """One an item: of the rows i, i + p, ... of its ``shared`` ones."""
    given = {"xt": noised.xt, "t": noised.t, "target": noised.target, **noised.cond.tensors}
    if noised.step_noise is not None:
        given["step noise"] = noised.step_noise
    items = len(noised.xt) // shared
    found = [hashlib.sha256(noised.seeds[i].numpy().tobytes()) for i in range(items)]
    for name in sorted(given):
        rows = given[name].detach().cpu().contiguous()
        kind = f"{name} {rows.dtype} {tuple(rows.shape[1:])}".encode()
        data = rows.reshape(len(rows), -1).view(torch.uint8).numpy()
        for i, digest in enumerate(found):
            digest.update(kind)
            for row in data[i::items]:
                digest.update(row)
    return [digest.hexdigest() for digest in found]
