"""What a policy is conditioned on, one row for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palate.data.prompts import Prompt
from palate.diffusion.denoising import Conditioning
from palate.diffusion.sampling import join


@dataclass(frozen=True)
class Encoded:
    """Conditioning that holds each text once: a prompt of SDXL is 0.6 MB, and one negative prompt serves all."""

    texts: Conditioning
    own: Tensor
    negative: Tensor

    def rows(self, which: Tensor) -> Conditioning:
        """Those of the prompts with these numbers, each joined with its negative prompt."""
        return join(self.texts.rows(self.own[which]), self.texts.rows(self.negative[which]))


def encode(
    encode_prompts: Callable[[list[str]], Conditioning],
    unconditional: Conditioning,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 32,
) -> Encoded:
    """What a model is conditioned on for each prompt, joined with its negative prompt, on the CPU.

    unconditional: one row, what a prompt without a negative one is guided away from.
    """
    texts = list(dict.fromkeys(text for p in prompts for text in (p.text, p.negative) if text is not None))
    parts = [encode_prompts(texts[i : i + batch_size]).to("cpu") for i in range(0, len(texts), batch_size)]
    place: dict[str | None, int] = {text: i for i, text in enumerate([*texts, None])}
    return Encoded(
        Conditioning.cat([*parts, unconditional.to("cpu")]),
        torch.tensor([place[p.text] for p in prompts]),
        torch.tensor([place[p.negative] for p in prompts]),
    )
