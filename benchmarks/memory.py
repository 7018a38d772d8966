"""What a training run is known to hold in a GPU's memory: weights, gradients and optimizer, counted on the real architectures.

Nothing is loaded or run: the networks are built without storage, of the configurations that were published with the weights.
Activations are not in these sums.

Usage: python benchmarks/memory.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from palate.models import flux, flux2, sd, sd3
from palate.models.zimage import ZImage
from palate.runs import library
from palate.runs import recipe as recipes
from palate.runs.recipe import Recipe

GB = 1e9


@dataclass(frozen=True)
class Architecture:
    """A network as published, and what is encoded with beside it."""

    kind: str
    """Class in diffusers."""
    config: dict[str, object]
    texts: tuple[str, ...]
    targets: dict[str, tuple[str, ...]]
    """Layers of a LoRA by the name a recipe gives them."""


def _klein(joint: int, single: int, heads: int, text: int, encoder: str) -> Architecture:
    config: dict[str, object] = {
        "num_layers": joint,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
    }
    config |= {"guidance_embeds": False}
    return Architecture("Flux2Transformer2DModel", config, (encoder,), flux2.lora_targets(single))


NETWORKS = {
    "SD 1.5": Architecture(
        "UNet2DConditionModel",
        {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
        ("CLIP-L",),
        sd.LORA_TARGETS,
    ),
    "SDXL": Architecture(
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        ("CLIP-L", "CLIP-G"),
        sd.LORA_TARGETS,
    ),
    "SD 3.5 medium": Architecture(
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        ("CLIP-L", "CLIP-G", "T5-XXL"),
        sd3.LORA_TARGETS,
    ),
    "SD 3.5 large": Architecture(
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        ("CLIP-L", "CLIP-G", "T5-XXL"),
        sd3.LORA_TARGETS,
    ),
    "Z-Image": Architecture("ZImageTransformer2DModel", {}, ("Qwen3-4B",), ZImage.lora_targets),
    "FLUX.2 klein 4B": _klein(5, 20, 24, 7680, "Qwen3-4B"),
    "FLUX.2 klein 9B": _klein(8, 24, 32, 12288, "Qwen3-8B"),
    "FLUX.1 dev": Architecture(
        "FluxTransformer2DModel", {"guidance_embeds": True}, ("CLIP-L", "T5-XXL"), flux.Flux.lora_targets
    ),
}
MODELS = {
    "sd15": "SD 1.5",
    "sdxl": "SDXL",
    "sd35": "SD 3.5 medium",
    "zimage": "Z-Image",
    "klein": "FLUX.2 klein 4B",
    "flux": "FLUX.1 dev",
}
"""What a recipe's name begins with -> the network that it trains."""


@cache
def network(name: str) -> nn.Module:
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, NETWORKS[name].kind)(**NETWORKS[name].config)


def lora_size(model: nn.Module, rank: int, layers: tuple[str, ...]) -> int:
    """Numbers in the matrices of a LoRA: rank x (outputs + inputs) a layer, of a convolution inputs x kernel."""
    ends = tuple(f".{target}" for target in layers)
    shapes = [
        m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and f".{n}".endswith(ends)
    ]
    return sum(rank * (shape[0] + math.prod(shape[1:])) for shape in shapes)


def frozen_bytes(model: nn.Module, quantize: str | None) -> float:
    """Of the weights under a LoRA: 2 each, or, in the blocks' linear layers, as :mod:`palate.models.quantised` keeps them."""
    total = 2 * sum(p.numel() for p in model.parameters())
    if quantize is None:
        return total
    inside = [p for n, p in model.named_children() if isinstance(p, nn.ModuleList) or "block" in n]
    layers = [m for part in inside for m in part.modules() if type(m) is nn.Linear]
    kept = {"int8": lambda w: w.numel() + 4 * w.shape[0], "nf4": lambda w: w.numel() / 2 + 4 * w.numel() / 64}[quantize]
    return total + sum(kept(layer.weight) - 2 * layer.weight.numel() for layer in layers)


def adafactor_size(model: nn.Module) -> int:
    """Numbers that torch's Adafactor keeps: of a weight the means over each of its last two axes, of a vector all."""
    sizes = [p.shape for p in model.parameters()]
    return sum(s.numel() if len(s) < 2 else s.numel() // s[-1] + s.numel() // s[-2] for s in sizes)


@cache
def encoder_sizes() -> dict[str, tuple[int, int]]:
    """Parameters of text encoders and of the VAE of 16 channels, and bytes of each beside a network in bf16."""
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        Qwen3Config,
        Qwen3Model,
        T5Config,
        T5EncoderModel,
    )

    common = {"vocab_size": 49408, "max_position_embeddings": 77}
    first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **common)
    second = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, **common
    )
    t5 = T5Config(vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    qwen = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    small = Qwen3Config(hidden_size=2560, intermediate_size=9728, **qwen)
    large = Qwen3Config(hidden_size=4096, intermediate_size=12288, **qwen)
    sides = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        parts = {
            "CLIP-L": (CLIPTextModel(first), 4),
            "CLIP-G": (CLIPTextModelWithProjection(second), 4),
            "T5-XXL": (T5EncoderModel(t5), 2),
            "Qwen3-4B": (Qwen3Model(small), 2),
            "Qwen3-8B": (Qwen3Model(large), 2),
            "VAE": (AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **sides), 4),
        }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, (part, _) in parts.items()}
    return {name: (counts[name], counts[name] * each) for name, (_, each) in parts.items()}


def before_bytes(name: str) -> int:
    """Of text encoders and VAE, which are in memory while the network waits."""
    return sum(encoder_sizes()[part][1] for part in (*NETWORKS[name].texts, "VAE"))


def counted(made: Recipe, name: str) -> tuple[float, float]:
    """Bytes while the LoRA of a recipe is trained, and while its prompts and pictures are encoded."""
    size = lora_size(network(name), made.policy.rank, NETWORKS[name].targets[made.policy.lora_layers])
    old = 4 if made.method.names("old") else 0
    average = 4 if made.training.ema_decay is not None else 0
    each = {"adamw": 16, "adamw_8bit": 10}[made.training.optimizer] + old + average
    return frozen_bytes(network(name), made.model.quantize) + each * size, before_bytes(name)


def lora_recipes() -> Iterator[tuple[str, str, Recipe]]:
    """Of published models, with the network each trains."""
    for recipe in library.built_in():
        name, made = MODELS.get(recipe.partition("-")[0]), recipes.load(recipe)
        if name is not None and made.policy.train_method == "lora":
            yield recipe, name, made


def main() -> None:
    print("| model | trained | base | frozen copy | trained weights | gradients | optimizer | sum |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in ("SD 1.5", "SDXL"):
        unet, targets = network(name), NETWORKS[name].targets
        count = sum(p.numel() for p in unet.parameters())
        rows = []
        for rank, layers, optimizer, each in ((64, "attention", "adamw", 8), (64, "attention", "adamw_8bit", 2)):
            rows.append((f"LoRA {rank}, {layers}, {optimizer}", count * 2, 0, lora_size(unet, rank, targets[layers]), each))
        for rank in (32, 16):
            rows.append((f"LoRA {rank}, attention, adamw_8bit", count * 2, 0, lora_size(unet, rank, targets["attention"]), 2))
        rows.append(("LoRA 16, all, adamw_8bit", count * 2, 0, lora_size(unet, 16, targets["all"]), 2))
        rows.append(("full, adamw", 0, count * 4, count, 8))
        rows.append(("full, adafactor", 0, count * 4, count, 4 * adafactor_size(unet) / count))
        for trained, base, copy, numbers, each in rows:
            parts = (base, copy, 4 * numbers, 4 * numbers, each * numbers)
            print(f"| {name} | {trained} | " + " | ".join(f"{x / GB:.2f}" for x in (*parts, sum(parts))) + " |")
    print("\n| model | parameters | LoRA numbers a rank, attention | all | frozen, bf16 | int8 | nf4 | encoders and VAE |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, architecture in NETWORKS.items():
        model = network(name)
        sizes = [sum(p.numel() for p in model.parameters())]
        sizes += [lora_size(model, 1, architecture.targets[layers]) for layers in ("attention", "all")]
        bytes_ = [*(frozen_bytes(model, kind) for kind in (None, "int8", "nf4")), before_bytes(name)]
        print(f"| {name} | {' | '.join(f'{x:,}' for x in sizes)} | {' | '.join(f'{x / GB:.2f}' for x in bytes_)} |")
    print("\n| recipe | model | rank | quantize | training | encoding before it |")
    print("| --- | --- | ---: | --- | ---: | ---: |")
    for recipe, name, made in lora_recipes():
        training, before = counted(made, name)
        told = (recipe, name, made.policy.rank, made.model.quantize or "", f"{training / GB:.1f}", f"{before / GB:.1f}")
        print(f"| {' | '.join(map(str, told))} |")
    print()
    for name, (count, taken) in encoder_sizes().items():
        print(f"{name}: {count:,} parameters, {taken / GB:.2f} GB beside a network in bf16")


if __name__ == "__main__":
    main()
