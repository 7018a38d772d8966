"""Published models by their configurations: pipeline folders without weights, for what is counted or run on random ones."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.models import flux, flux2, sd, sd3
from palate.models.zimage import ZImage

SHARP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DYNAMIC = {**FLOW, "use_dynamic_shifting": True}


@dataclass(frozen=True)
class Architecture:
    """A network as published, and what is encoded with beside it."""

    kind: str
    """Class in diffusers."""
    config: dict[str, object]
    texts: tuple[str, ...]
    targets: dict[str, tuple[str, ...]]
    """Layers of a LoRA by the name a recipe gives them."""
    pipeline: str
    scheduler: dict[str, object]
    latents: int = 4
    """Channels of the VAE."""


def _klein(joint: int, single: int, heads: int, text: int, encoder: str) -> Architecture:
    config: dict[str, object] = {
        "num_layers": joint,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "guidance_embeds": False,
    }
    targets = flux2.lora_targets(single)
    return Architecture("Flux2Transformer2DModel", config, (encoder,), targets, "Flux2KleinPipeline", DYNAMIC, 32)


def _sd3(layers: int, positions: int, **more: object) -> Architecture:
    config: dict[str, object] = {
        "num_layers": layers,
        "num_attention_heads": layers,
        "caption_projection_dim": 64 * layers,
        "pos_embed_max_size": positions,
        "qk_norm": "rms_norm",
        **more,
    }
    texts = ("CLIP-L projected", "CLIP-G", "T5-XXL")
    return Architecture("SD3Transformer2DModel", config, texts, sd3.LORA_TARGETS, "StableDiffusion3Pipeline", FLOW, 16)


NETWORKS = {
    "SD 1.5": Architecture(
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        ("CLIP-L",),
        sd.LORA_TARGETS,
        "StableDiffusionPipeline",
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **BETAS},
    ),
    "SDXL": Architecture(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
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
        "StableDiffusionXLPipeline",
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **BETAS},
    ),
    "SD 3.5 medium": _sd3(24, 384, dual_attention_layers=tuple(range(13))),
    "SD 3.5 large": _sd3(38, 192),
    "Z-Image": Architecture(
        "ZImageTransformer2DModel",
        {},
        ("Qwen3-4B",),
        ZImage.lora_targets,
        "ZImagePipeline",
        {**FLOW, "shift": 6.0},
        16,
    ),
    "FLUX.2 klein 4B": _klein(5, 20, 24, 7680, "Qwen3-4B"),
    "FLUX.2 klein 9B": _klein(8, 24, 32, 12288, "Qwen3-8B"),
    "FLUX.1 dev": Architecture(
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        ("CLIP-L", "T5-XXL"),
        flux.Flux.lora_targets,
        "FluxPipeline",
        DYNAMIC,
        16,
    ),
}
MODELS = {
    "sd14": "SD 1.5",
    "sd15": "SD 1.5",
    "sdxl": "SDXL",
    "sd35": "SD 3.5 medium",
    "zimage": "Z-Image",
    "klein": "FLUX.2 klein 4B",
    "flux": "FLUX.1 dev",
}
"""What a recipe's name tells of the network that it trains."""


def text_config(name: str) -> tuple[str, Any]:
    """Class of transformers, and configuration, of a text encoder."""
    from transformers import CLIPTextConfig, Qwen3Config, T5Config

    common = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
    qwen = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    first = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, **common}
    second = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, **common}
    t5 = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return {
        "CLIP-L": ("CLIPTextModel", CLIPTextConfig(**first)),
        "CLIP-L projected": ("CLIPTextModelWithProjection", CLIPTextConfig(projection_dim=768, **first)),
        "CLIP-G": ("CLIPTextModelWithProjection", CLIPTextConfig(projection_dim=1280, **second)),
        "T5-XXL": ("T5EncoderModel", T5Config(feed_forward_proj="gated-gelu", **t5)),
        "Qwen3-4B": ("Qwen3Model", Qwen3Config(hidden_size=2560, intermediate_size=9728, **qwen)),
        "Qwen3-8B": ("Qwen3Model", Qwen3Config(hidden_size=4096, intermediate_size=12288, **qwen)),
    }[name]


def skeleton(name: str, folder: Path) -> Path:
    """A pipeline folder of a published model with configurations alone, and tokenizers of a few words."""
    import diffusers

    made = NETWORKS[name]
    part = "unet" if made.kind.startswith("UNet") else "transformer"
    vae = "AutoencoderKLFlux2" if made.latents == 32 else "AutoencoderKL"
    index: dict[str, object] = {"_class_name": made.pipeline, part: ["diffusers", made.kind], "vae": ["diffusers", vae]}
    down, up = SHARP
    usual = {k: p.default for k, p in inspect.signature(getattr(diffusers, made.kind)).parameters.items()}
    _write(folder / part, "config.json", {"_class_name": made.kind, **usual, **made.config})
    blocks = {"block_out_channels": (128, 256, 512, 512), "down_block_types": down, "up_block_types": up}
    _write(
        folder / "vae", "config.json", {"_class_name": vae, "latent_channels": made.latents, "layers_per_block": 2, **blocks}
    )
    _write(folder / "scheduler", "scheduler_config.json", made.scheduler)
    index["scheduler"] = ["diffusers", made.scheduler["_class_name"]]
    for number, text in enumerate(made.texts, start=1):
        ending = "" if number == 1 else f"_{number}"
        kind, config = text_config(text)
        config.save_pretrained(folder / f"text_encoder{ending}")
        _tokenizer(77 if text.startswith("CLIP") else 512).save_pretrained(folder / f"tokenizer{ending}")
        index |= {
            f"text_encoder{ending}": ["transformers", kind],
            f"tokenizer{ending}": ["transformers", "PreTrainedTokenizerFast"],
        }
    _write(folder, "model_index.json", index)
    return folder


def _write(folder: Path, name: str, content: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def _tokenizer(length: int) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[end]": 0, "a": 1, "picture": 2}, unk_token="[end]"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[end]", eos_token="[end]", model_max_length=length)
    made.chat_template = "{{ messages[0]['content'] }}"
    return made
