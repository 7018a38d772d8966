"""FLUX.1: joint and single blocks over patches of latents, CLIP and T5 as text encoders."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.diffusion.denoising import Conditioning
from palate.models.denoiser import Card, Kohya
from palate.models.features import TRANSFORMER_LAYERS, BlockFeatures
from palate.models.fit import Config, check_channels
from palate.models.latent import Latent, few_steps
from palate.models.parts import Source, TextEncoder, large

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
GUIDANCE = 1.0
"""What the network is told in training, policy and reference alike: the guidance that pictures show of themselves."""


class Flux(Latent):
    """A folder or hub id in the layout of ``FluxPipeline``: dev, which is told its guidance, or schnell.

    A conditioning holds ``encoder_hidden_states (b, 512, c)`` of T5, whose padding is attended to, as in the pipeline, and
    ``pooled (b, d)`` of CLIP. Args: as :class:`palate.models.latent.Latent`.
    """

    part, part_name = "transformer", "transformer"
    card: ClassVar[Card] = Card("FluxPipeline", "FluxTransformer2DModel", "flux")
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": tuple(f"attn.{name}" for name in ATTENTION),
        "all": (*(f"attn.{name}" for name in ATTENTION), *FEED_FORWARD),
    }
    prompt_arguments: ClassVar[dict[str, str]] = {"encoder_hidden_states": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    feature_layers: ClassVar[tuple[str, ...]] = TRANSFORMER_LAYERS
    patch, flow, spaced, no_fp16 = 2, True, True, True
    negated, edited, last_reads_on = False, False, True

    def _check_fit(self, network: Config) -> None:
        check_channels(network, self.vae.config, self.part, self.name, pack=2)

    def _text_encoders(self, source: Source, dtype: torch.dtype) -> tuple[TextEncoder, ...]:
        return TextEncoder(source), TextEncoder(source, "_2", dtype=large(dtype, source.device), length=512)

    @property
    def caution(self) -> str:
        return "" if self.network.config.guidance_embeds else few_steps(self.name, "FLUX.1-dev")

    def latent_shape(self, shape: Shape) -> tuple[int, ...]:
        channels, *sides = super().latent_shape(shape)
        return channels // 4, *sides

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        clip, t5 = self.texts
        return Conditioning({"encoder_hidden_states": t5(prompts).last_hidden_state, "pooled": clip(prompts).pooler_output})

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """A token is a patch of 2 x 2 latents; ids are (0, row, column), zeros for the prompt."""
        dtype: torch.dtype = network.x_embedder.weight.dtype  # type: ignore[union-attr]
        text, pooled = (cond.tensors[name].to(dtype) for name in ("encoder_hidden_states", "pooled"))
        patches = F.pixel_unshuffle(xt.to(dtype), 2)
        height, width = patches.shape[-2:]
        rows, columns = torch.arange(height), torch.arange(width)
        found = network(
            hidden_states=patches.flatten(2).mT,
            timestep=(t / 1000).float(),
            guidance=xt.new_full((len(xt),), GUIDANCE) if network.config.guidance_embeds else None,  # type: ignore[union-attr]
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=xt.new_zeros(text.shape[1], 3),
            img_ids=torch.cartesian_prod(torch.zeros(1, dtype=torch.long), rows, columns).to(xt.device),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(found.mT.unflatten(2, (height, width)), 2)

    @property
    def features(self) -> BlockFeatures:
        """Joint blocks, then single ones; each gives text, then picture."""
        return BlockFeatures(
            self.predict,
            lambda network: [*network.transformer_blocks, *network.single_transformer_blocks],
            lambda output, x, cond: output[1],
        )

    def _scaled(self, found: Tensor, shape: Shape) -> Tensor:
        least = self.vae.factor * self.patch
        patches = shape.height // least, shape.width // least
        return F.pixel_shuffle(found.mT.unflatten(2, patches), 2)

    @property
    def kohya(self) -> Kohya:
        kind = "dev" if self.network.config.guidance_embeds else "schnell"
        code = "https://github.com/black-forest-labs/flux"
        return Kohya(kohya_name, "flux1", f"flux-1-{kind}", None, code, parts=together)


# Names of layers, of FLUX.1 and FLUX.2 ----------------------------------------------------------------------------------------

JOINT = {
    "attn.to_q": "img_attn_qkv",
    "attn.to_out.0": "img_attn_proj",
    "attn.add_q_proj": "txt_attn_qkv",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp_0",
    "ff.net.2": "img_mlp_2",
    "ff.linear_in": "img_mlp_0",
    "ff.linear_out": "img_mlp_2",
    "ff_context.net.0.proj": "txt_mlp_0",
    "ff_context.net.2": "txt_mlp_2",
    "ff_context.linear_in": "txt_mlp_0",
    "ff_context.linear_out": "txt_mlp_2",
}
SINGLE = {"attn.to_q": "linear1", "proj_out": "linear2", "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
BLOCKS = {"transformer_blocks": ("double_blocks", JOINT), "single_transformer_blocks": ("single_blocks", SINGLE)}
TOGETHER = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
)
"""What is one layer in the original code; the last in the single blocks of FLUX.1."""


def kohya_name(module: str) -> str:
    """A layer by the name that kohya's LoRAs have for it, of layers that are one there for the first.

    >>> kohya_name("single_transformer_blocks.3.attn.to_out")
    'lora_unet_single_blocks_3_linear2'
    """
    blocks, number, layer = _place(module)
    there, names = BLOCKS.get(blocks, ("", {}))
    if layer not in names:
        raise UserError(f"kohya's scripts have no name for the layer {module} of FLUX: use the layout of diffusers")
    return f"lora_unet_{there}_{number}_{names[layer]}"


def together(module: str) -> tuple[str, ...]:
    """The layers that are one with this one in the original code, by their names here."""
    blocks, number, layer = _place(module)
    groups = TOGETHER[2:] if blocks == "single_transformer_blocks" else TOGETHER[:2]
    found = next((group for group in groups if layer in group), None)
    return (module,) if found is None else tuple(f"{blocks}.{number}.{name}" for name in found)


def _place(module: str) -> tuple[str, str, str]:
    """Kind of block, its number, and the layer in it."""
    blocks, _, rest = module.partition(".")
    number, _, layer = rest.partition(".")
    return blocks, number, layer
