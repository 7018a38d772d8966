"""Rewards by the names that recipes use."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from palate.base.errors import UserError, short
from palate.base.options import LARGEST, SMALLEST, foreign
from palate.judges import KINDS
from palate.names.judges import NamedJudge, find_judges

if TYPE_CHECKING:
    import torch

    from palate.judges.reward import Reward


@dataclass(frozen=True)
class NamedReward:
    """A reward that is known to be loadable, but not loaded."""

    name: str
    weight: float
    source: NamedJudge | Callable[..., Any]

    @property
    def serves(self) -> tuple[str, ...]:
        """Names of the judges that it is a sum of, and of those behind its addresses, as their servers tell."""
        if not isinstance(self.source, NamedJudge):
            return ()
        return (*self.source.serves, *(member.name for member in self.source.members[1:]))

    @property
    def weights(self) -> tuple[str, ...]:
        """Where the weights of its judges lie, however they are named."""
        members = self.source.members if isinstance(self.source, NamedJudge) else ()
        return tuple(f"{member.kind} in {member.folder.resolve()}" for member in members if member.folder)

    def load(self, device: str | torch.device = "cpu") -> Reward:
        from palate.judges.reward import from_function, from_judge

        if isinstance(self.source, NamedJudge):
            return from_judge(self.source.load(device))
        return from_function(self.source, name=self.name, device=device)


def find_rewards(names: str | Iterable[str] | Mapping[str, int | float | str]) -> dict[str, NamedReward]:
    """The rewards of these names, in order; a mapping gives weights. No weights of models are read.

    A name is that of a judge (``mini-clip``, ``jpeg_compressibility``, ``aesthetic:FOLDER``, ``remote:URL``; see
    :func:`palate.names.judges.find_judges`) or ``module:function``, importable from the working directory; see
    :func:`palate.judges.reward.from_function`.

    Raises:
        UserError: an unknown name, one that comes twice, a folder in which something is missing, a function that cannot be
            imported, or a weight that is no number.
    """
    names = [names] if isinstance(names, str) else names if isinstance(names, Mapping) else list(names)
    if twice := [name for name, count in Counter([*names]).items() if count > 1]:
        raise UserError(f"the reward {short(twice[0])} is named twice, and would count once: give it a weight, {{NAME: 2}}")
    weights = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    return {name: NamedReward(name, _weight(name, weight), _source(name)) for name, weight in weights.items()}


def find_held_out(names: str | Iterable[str], trained: Mapping[str, NamedReward]) -> dict[str, NamedReward]:
    """As :func:`find_rewards`, for rewards that must not be among the ``trained`` ones, at whatever address."""
    found = find_rewards(names)
    followed = {known for name, reward in trained.items() for known in (name, *reward.serves, *reward.weights)}
    for name, reward in found.items():
        if not followed.isdisjoint((name, *reward.serves, *reward.weights)):
            raise UserError(f"{name} is trained on and cannot be held out as well; name a judge that the rewards do not hold")
    return found


def _weight(name: str, weight: int | float | str) -> float:
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if number and not SMALLEST <= abs(number) <= LARGEST:
        raise UserError(f"the weight of reward {name} is {short(weight)}; expected a number, such as rewards: {{{name}: 1.0}}")
    return number


def _source(name: str) -> NamedJudge | Callable[..., Any]:
    # A judge by function gets no metadata, so functions are loaded here.
    if re.fullmatch(r"[\w.]+:\w+", name) and name.partition(":")[0] not in KINDS:
        return foreign(name, KINDS)
    return find_judges([name])[name]
