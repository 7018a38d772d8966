"""What a space is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from palate.diffusion.denoising import Noised

Embed = Callable[[Tensor], Tensor]  # output of the model (b, ...) -> embedding (b, ...), float32


@runtime_checkable
class Space(Protocol):
    """Where errors are measured. Called once per batch, so that policy, reference and target share what is random."""

    @property
    def t_min(self) -> int:
        """The earliest time at which outputs can be told apart."""
        ...

    def __call__(self, noised: Noised) -> Embed: ...


def draws_noise(space: Space) -> bool:
    """Whether it says that it reads ``Noised.step_noise``, which is then drawn ahead of it."""
    return getattr(space, "draws_noise", False)
