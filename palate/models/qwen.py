"""Qwen3 as a text encoder: a prompt is read as a user's turn of a chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from palate.models.parts import TextEncoder

AT_ONCE = 8
"""Prompts: the states of all layers are held at once, 0.1 GB a prompt of Qwen3-4B in bfloat16."""


def chat(*, thinking: bool) -> Callable[[Any, str], str]:
    """(tokenizer, prompt) -> the turn, by the tokenizer's own template; without ``thinking`` an empty thought follows it."""

    def turn(tokenizer: Any, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)

    return turn


def hidden_states(text: TextEncoder, prompts: list[str], layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """States of some layers side by side, (b, length, layers x c), and which tokens are no padding, (b, length)."""
    found, masks = [], []
    for start in range(0, len(prompts), AT_ONCE):
        tokens = text.tokens(prompts[start : start + AT_ONCE])
        encoder = text.pair[1]
        encoder = getattr(encoder, "model", encoder)  # without the words that it would say next
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True, use_cache=False)
        found.append(torch.cat([states.hidden_states[k] for k in layers], dim=-1))
        masks.append(tokens.attention_mask.bool())
    return torch.cat(found), torch.cat(masks)
