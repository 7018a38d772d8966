"""The processes of one run, and how they keep together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palate.base.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those that share some work; ``gather`` puts their rows together in order, on the CPU."""

    index: int = 0
    count: int = 1
    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    local: tuple[int, int] = (0, 1)
    """Index and count among those on this machine."""

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """What fails inside in one process is raised in all: those that went on would wait for the others for ever."""
        failed: UserError | None = None
        try:
            yield
        except UserError as error:
            failed = error
        told = self.gather(torch.tensor([int(failed is not None)]))
        if failed is not None:
            raise failed
        if told.any():
            raise UserError(f"process {int(told.argmax())} failed, see its message")

    def union(self, digests: Collection[str]) -> set[str]:
        """The SHA-256 (hex) that any of them gives; all wait for all."""
        counts: list[int] = self.gather(torch.tensor([len(digests)])).numpy().tolist()
        if not any(counts):
            return set()
        own = np.zeros((1, max(counts), 32), np.uint8)
        own[0, : len(digests)] = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
        every = self.gather(torch.tensor(own)).numpy()
        return {every[i, j].tobytes().hex() for i, count in enumerate(counts) for j in range(count)}

    def any(self, told: bool) -> bool:
        """Whether it is so in any of them; all wait for all."""
        return bool(self.gather(torch.tensor([int(told)])).any())
