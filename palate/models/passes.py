"""A pass through a network that is not its own forward pass, and counts as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def as_forward(network: nn.Module, function: Callable[[Tensor], T], x: Tensor) -> T:
    """``function(x)``, which calls parts of the network or ends its run early, as the network's own forward pass.

    So hooks on the network run before and after it: those that gather weights, say, of which each process holds a part.
    """

    def forward(x: Tensor) -> T:
        del network.forward  # which the function may call
        return function(x)

    network.forward = forward  # type: ignore[method-assign]
    return network(x)
