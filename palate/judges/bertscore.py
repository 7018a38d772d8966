"""BERTScore's recall (Zhang et al. 2020, "BERTScore", sec. 3): how much of a reference is said by a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from palate.base.errors import UserError
from palate.judges.weights import model_in, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class BertScore:
    """Recall without rescaling or word frequencies, as the authors' package gives it by default.

    Each token of the reference is matched with the token of the candidate most like it (cosine of the states after
    ``layers`` layers); recall is the mean of these cosines. The tokens that begin and end a sentence do not count in the mean,
    but may be matched.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: int):
        if not 1 <= layers <= len(model.encoder.layer):
            raise UserError(f"layer is {layers}; the text encoder has {len(model.encoder.layer)}")
        model.encoder.layer = model.encoder.layer[:layers]
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        # An unset limit of a tokenizer is a huge number.
        self.max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, layers: int) -> BertScore:
        from transformers import AutoModel, AutoTokenizer

        # A pooler is not read here. A .bin of the published encoder is read by torch.load with weights_only=True.
        model = model_in(AutoModel.from_pretrained, folder, torch.float32, spare="pooler")
        tokenizer = reading(folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True))
        return cls(model.to(device), tokenizer, layers)

    def recall(self, candidates: Sequence[str], references: Sequence[str]) -> Float[Tensor, " b"]:
        """``(b,)`` float32; 0 where the candidate or the reference says nothing."""
        said, said_there, said_words = self._embed(candidates)
        meant, _, words = self._embed(references)
        likeness = (meant @ said.mT).masked_fill(~said_there[:, None], -torch.inf)
        best = likeness.max(dim=-1).values
        recall = (best * words).sum(dim=-1) / words.sum(dim=-1).clamp(min=1)
        return torch.where(said_words.any(dim=-1) & words.any(dim=-1), recall, 0.0).float()

    def _embed(self, texts: Sequence[str]) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Normalised states, which tokens are no padding, and which of these are words."""
        tokens = self.tokenizer(
            [text.strip() for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        words = tokens.pop("special_tokens_mask") == 0
        there = tokens["attention_mask"].bool()
        return F.normalize(self.model(**tokens).last_hidden_state, dim=-1), there, words & there
