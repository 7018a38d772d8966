"""How a set of pairs or pictures is read: what the reader and a recipe's data section share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from palate.base.options import Count, OneOf, at_least, check_ranges
from palate.data.votes import QUESTIONS, WEIGHTS


@dataclass(frozen=True)
class Reading:
    """Which rows are kept, under which names, and how many bad ones are borne; see :func:`palate.data.pairs.read`.

    Raises:
        UserError: a value out of range or an unknown name.
    """

    ties: Annotated[str, OneOf("drop", "keep")] = "drop"
    """``drop``, or ``keep`` as a label of one half."""
    max_bad_rows: Annotated[int, at_least(0)] = 0
    """So many unusable rows are listed and skipped; one more stops the run before training."""
    max_train_samples: Count | None = None
    """Read no more pairs than this."""
    absolute_winners: bool = False
    """Keep the pairs whose better picture won all its comparisons under that prompt, as Noise-Conditioned Perception does;
    ``palate label`` wants it to be the only such picture."""
    deduplicate: bool = False
    """Of several pairs of the same two pictures under a prompt, keep the first."""
    max_pairs_per_prompt: Count | None = None
    """Keep the first so many pairs of a prompt; all unless given."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to those of the file, such as ``{prompt: text}``."""
    caption_prefix: str = ""
    """Words before every prompt, such as a trigger word; a blank goes between."""
    vote_question: Annotated[str, OneOf(*QUESTIONS)] = "overall"
    """Of ``votes.db``: the votes on ``overall``, ``appeal`` or ``following``."""
    vote_weights: Annotated[str, OneOf(*WEIGHTS)] = "equal"
    """Of ``votes.db``: ``equal``; ``agreement`` to weigh a vote by how far its rater agrees with others beyond chance;
    ``attention`` to leave out raters who did not pass most of their attention checks."""

    def __post_init__(self) -> None:
        check_ranges(self)
