"""Z-Image (arXiv 2511.22699): one stream of image and text tokens, Qwen3 as text encoder, FLUX.1's VAE."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from palate.diffusion.denoising import Conditioning
from palate.models.denoiser import Card
from palate.models.features import TRANSFORMER_LAYERS, BlockFeatures
from palate.models.fit import Config, check_channels
from palate.models.latent import Latent, few_steps
from palate.models.parts import Source, TextEncoder, large
from palate.models.qwen import chat, hidden_states

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TURBO_SHIFT = 3.0
"""Of the sampler of Z-Image-Turbo; that of Z-Image is 6."""


class ZImage(Latent):
    """A folder or hub id in the layout of ``ZImagePipeline``.

    A conditioning holds ``encoder_hidden_states (b, 512, c)``, zeros behind each prompt's own ``length (b,)``.
    Args: as :class:`palate.models.latent.Latent`.
    """

    part, part_name = "transformer", "transformer"
    card: ClassVar[Card] = Card("ZImagePipeline", "ZImageTransformer2DModel", "z-image")
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ATTENTION,
        "all": (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    }
    feature_layers: ClassVar[tuple[str, ...]] = TRANSFORMER_LAYERS
    text_recipe = "layer -2"
    patch, flow, spaced, no_fp16, edited = 2, True, True, True, False

    def _check_fit(self, network: Config) -> None:
        check_channels(network, self.vae.config, self.part, self.name)

    def _text_encoders(self, source: Source, dtype: torch.dtype) -> tuple[TextEncoder, ...]:
        return (TextEncoder(source, dtype=large(dtype, source.device), length=512, template=chat(thinking=True)),)

    @property
    def caution(self) -> str:
        return few_steps(self.name, "Z-Image") if self._scheduler_config.get("shift") == TURBO_SHIFT else ""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """The last layer but one of Qwen3."""
        (text,) = self.texts
        hidden, said = hidden_states(text, prompts, [-2])
        length = said.sum(1)
        found = torch.zeros_like(hidden)
        found[torch.arange(hidden.shape[1], device=length.device) < length[:, None]] = hidden[said]
        return Conditioning({"encoder_hidden_states": found, "length": length})

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's own time runs from noise to picture, and so does its output: both are turned round."""
        dtype: torch.dtype = network.cap_embedder[1].weight.dtype  # type: ignore[index, union-attr]
        pictures = list(xt.to(dtype).unsqueeze(2))  # of one frame
        found = network(pictures, (1 - t / 1000).float(), said(cond, dtype), return_dict=False)[0]
        return -torch.stack(found).squeeze(2)

    @property
    def features(self) -> BlockFeatures:
        """Of the blocks behind the refiners, which picture and text share; the picture's tokens come first."""
        tokens = self.patch**2
        return BlockFeatures(
            self.predict, lambda network: list(network.layers), lambda output, x, cond: output[:, : x[0, 0].numel() // tokens]
        )

    def _asked(self, given: Conditioning, away: Conditioning, guidance_scale: float) -> dict[str, object]:
        """The pipeline's c + s (c - u) is u + (s + 1) (c - u): its s = 0 is the 1 that means no guidance here."""
        prompts = {"prompt_embeds": said(given), "negative_prompt_embeds": said(away)}
        return {**prompts, "guidance_scale": guidance_scale - 1}


def said(cond: Conditioning, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Without padding, (length, c) of each prompt."""
    hidden, lengths = (cond.tensors[name] for name in ("encoder_hidden_states", "length"))
    return [row[:length].to(dtype) for row, length in zip(hidden, lengths.tolist(), strict=True)]
