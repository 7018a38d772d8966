"""What the loop learns from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from palate.base.processes import Processes
from palate.diffusion.batches import Batch


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

    def shape_of(self, index: int) -> Hashable:
        """What items have in common that can be in one batch: the shape of their pictures."""
        ...

    def batch(self, indices: Sequence[int], seeds: Tensor) -> Batch:
        """The items at ``indices``, all of one shape: pairs, single pictures or steps.

        ``seeds[i]`` decides all that is random about the i-th.
        """
        ...
