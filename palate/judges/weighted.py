"""Several judges as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from palate.judges import Judge
from palate.judges.guard import read_answer


class Weighted:
    """Sum of weight * score; the judges keep their own units, which the weights have to balance."""

    def __init__(self, parts: Sequence[tuple[float, Judge]]):
        self.parts = tuple(parts)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        scores = [
            weight * read_answer(judge(images, prompts), len(images))[0].to(images.device) for weight, judge in self.parts
        ]
        return torch.stack(scores).sum(dim=0)
