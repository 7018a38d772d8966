"""What a training run is known to hold in a GPU's memory: weights, gradients and optimizer, counted on the real architectures.

Nothing is loaded or run: the networks are built without storage. Activations are not in these sums.

Usage: python benchmarks/memory.py
"""

from __future__ import annotations

import math

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from palate.models import sd3
from palate.models.sd import LORA_TARGETS

UNETS = {
    "SD 1.5": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "SDXL": {
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
}


TRANSFORMERS = {
    "SD 3.5 medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "SD 3.5 large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}


def lora_size(network: nn.Module, rank: int, layers: tuple[str, ...]) -> int:
    """Numbers in the matrices of a LoRA: rank x (outputs + inputs) a layer, of a convolution inputs x kernel."""
    ends = tuple(f".{target}" for target in layers)
    shapes = [m.weight.shape for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n.endswith(ends)]
    return sum(rank * (shape[0] + math.prod(shape[1:])) for shape in shapes)


def adafactor_size(unet: nn.Module) -> int:
    """Numbers that torch's Adafactor keeps: of a weight the means over each of its last two axes, of a vector all."""
    sizes = [p.shape for p in unet.parameters()]
    return sum(s.numel() if len(s) < 2 else s.numel() // s[-1] + s.numel() // s[-2] for s in sizes)


def encoder_sizes() -> dict[str, int]:
    """Parameters of the text encoders and of the VAE, all computed in float32 before training."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    common = {"vocab_size": 49408, "max_position_embeddings": 77}
    first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **common)
    second = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, **common
    )
    t5 = T5Config(vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        parts = {
            "text encoder": CLIPTextModel(first),
            "SDXL's second text encoder": CLIPTextModelWithProjection(second),
            "SD3's T5": T5EncoderModel(t5),
            "VAE": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
        }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def main() -> None:
    print("| model | trained | base | frozen copy | trained weights | gradients | optimizer | sum |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, config in UNETS.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        count = sum(p.numel() for p in unet.parameters())
        rows = []
        for rank, layers, optimizer, each in ((64, "attention", "adamw", 8), (64, "attention", "adamw_8bit", 2)):
            rows.append(
                (f"LoRA {rank}, {layers}, {optimizer}", count * 2, 0, lora_size(unet, rank, LORA_TARGETS[layers]), each)
            )
        for rank in (32, 16):
            rows.append(
                (f"LoRA {rank}, attention, adamw_8bit", count * 2, 0, lora_size(unet, rank, LORA_TARGETS["attention"]), 2)
            )
        rows.append(("LoRA 16, all, adamw_8bit", count * 2, 0, lora_size(unet, 16, LORA_TARGETS["all"]), 2))
        rows.append(("full, adamw", 0, count * 4, count, 8))
        rows.append(("full, adafactor", 0, count * 4, count, 4 * adafactor_size(unet) / count))
        for trained, base, copy, numbers, each in rows:
            parts = (base, copy, 4 * numbers, 4 * numbers, each * numbers)
            print(f"| {name} | {trained} | " + " | ".join(f"{x / 1e9:.2f}" for x in (*parts, sum(parts))) + " |")
    print("\n| model | parameters | LoRA numbers a rank, attention | all |\n| --- | ---: | ---: | ---: |")
    for name, config in TRANSFORMERS.items():
        with torch.device("meta"):
            network = SD3Transformer2DModel(**config)
        sizes = [lora_size(network, 1, layers) for layers in sd3.LORA_TARGETS.values()]
        print(f"| {name} | " + " | ".join(f"{x:,}" for x in (sum(p.numel() for p in network.parameters()), *sizes)) + " |")
    print()
    for name, count in encoder_sizes().items():
        print(f"{name}: {count:,} parameters, {4 * count / 1e9:.2f} GB in float32")


if __name__ == "__main__":
    main()
