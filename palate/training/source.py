"""What the loop learns from, and how the processes of a run keep together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from palate.base.errors import UserError
from palate.diffusion.batches import Batch


@dataclass(frozen=True)
class Processes:
    """This process among those that share a round; ``gather`` puts their rows together in order, on the CPU."""

    index: int = 0
    count: int = 1
    gather: Callable[[Tensor], Tensor] = lambda rows: rows

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


class Abandoned(Exception):  # noqa: N818
    """A round was given up because training was asked to stop."""


class BudgetSpent(Exception):  # noqa: N818
    """The KL budget is spent: training ends here."""


@runtime_checkable
class Rounds(Protocol):
    """What a source has whose items are found anew where each epoch begins, such as ``palate.online.rollouts.Rollouts``."""

    def begin(self, number: int, processes: Processes, stop: Callable[[], bool]) -> dict[str, object]:
        """Find the items of round ``number`` (from 0); returns what the log should tell of it.

        Raises:
            Abandoned: ``stop()`` became true on the way.
            BudgetSpent: no further round is wanted.
        """
        ...

    def counted(self, position: int) -> dict[str, int | float]:
        """What the log counts in place of epochs and pairs, where ``position`` items of all rounds are done."""
        ...

    def state_dict(self, position: int) -> Mapping[str, object]:
        """What a checkpoint must keep to go on from there."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Source(Protocol):
    """What training learns from: ``palate.data.encoded.EncodedPairs``, say."""

    @property
    def rounds(self) -> Rounds | None:
        """None where the items are there from the start."""
        ...

    def __len__(self) -> int:
        """Items of an epoch."""
        ...

    def order(self, seed: int, epoch: int) -> list[int]:
        """The indices of one epoch, each once; the same for the same arguments."""
        ...

    def batch(self, indices: Sequence[int], seeds: Tensor) -> Batch:
        """The items at ``indices``: pairs, single pictures or steps.

        ``seeds[i]`` decides all that is random about the i-th.
        """
        ...
