"""What the loop learns from, and how the processes of a run keep together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from palate.base.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those that share a round; ``gather`` puts their rows together in order, on the CPU."""

    index: int = 0
    count: int = 1
    gather: Callable[[Tensor], Tensor] = lambda rows: rows

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
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


class Abandoned(Exception):  # noqa: N818
    """A round was given up because training was asked to stop."""


class BudgetSpent(Exception):  # noqa: N818
    """The KL budget is spent: training ends here."""


@runtime_checkable
class PairSource(Protocol):
    """What training needs of ``palate.data.encoded.EncodedPairs``."""

    def __len__(self) -> int: ...
    def order(self, seed: int, epoch: int) -> list[int]:
        """The indices of one epoch, each once; the same for the same arguments."""
        ...

    def batch(self, indices: Sequence[int], seeds: Tensor) -> Any:
        """The pairs (``PairBatch``) or single pictures (``SampleBatch``) at ``indices``.

        ``seeds[i]`` decides all that is random about the i-th.
        """
        ...
