"""Text encoders that are trained with a network: it is told what they read in a prompt, in place of the model's own.

They are a part of the network's module tree, as its ``reading``. So what is done with the network, such as twins, averages,
checkpoints and precision, is done with them; a twin from before has none, and is told what the model's own encoders read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from palate.diffusion.denoising import Conditioning
from palate.models.adapters import twin
from palate.models.parts import TextEncoder, Words

PLACE = "reading"
BEFORE = f"{PLACE}.encoders."
"""How the names of their layers begin in the network."""


class Reading(nn.Module):
    """Text encoders that share the weights of the model's own, so that adapters in them change these alone."""

    def __init__(self, texts: Sequence[TextEncoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {f"text_encoder{t.ending}": twin(t.pair[1], share=True).requires_grad_(False) for t in texts}
        )
        self.words, self._masked = Words(texts), [text.masked for text in texts]

    def forward(self, tokens: Mapping[str, Tensor]) -> list[Any]:
        """What each encoder gives, with all hidden states; as the cache holds it, outside autocast."""
        found: list[Any] = []
        for encoder, (name, masked) in zip(self.encoders.values(), zip(tokens, self._masked, strict=True), strict=True):
            device = next(encoder.parameters()).device
            ids, mask = tokens[name].to(device).clamp(min=0).unbind(1)
            with torch.autocast(device.type, enabled=False):
                found.append(encoder(ids, attention_mask=mask if masked else None, output_hidden_states=True))
        return found


def reading_of(network: nn.Module) -> Reading | None:
    """The text encoders that are trained with a network."""
    return getattr(network, PLACE, None)


def tokens_in(cond: Conditioning) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in cond.tensors.items() if name.startswith("tokens")}


@contextmanager
def apart(network: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Inside, the network is without its text encoders; they are given, by the names of their parts."""
    reading = reading_of(network)
    if reading is None:
        yield {}
        return
    delattr(network, PLACE)
    try:
        yield dict(reading.encoders.items())
    finally:
        setattr(network, PLACE, reading)


def text_layer(name: str) -> tuple[str, str] | None:
    """A layer's name in a network -> its text encoder's part and its name there, as files have it; None if it is in none.

    >>> text_layer("reading.encoders.text_encoder_2.encoder.layers.0.self_attn.q_proj")
    ('text_encoder_2', 'text_model.encoder.layers.0.self_attn.q_proj')
    """
    if not name.startswith(BEFORE):
        return None
    part, _, rest = name.removeprefix(BEFORE).partition(".")
    return part, in_files(rest)


def in_files(name: str) -> str:
    """Files name CLIP's layers with the model around them, which the class without a projection is itself."""
    return f"text_model.{name.removeprefix('text_model.')}"
