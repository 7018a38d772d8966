"""What the passes of a training step cost at full size, in floating-point operations: the bound of what a cache can save.

    python benchmarks/step_arithmetic.py

Counted on the real architectures without storage (SD 1.5 at 512 pixels, SDXL at 1024, one pair); nothing is run. "scripts"
encodes pictures in every step, as diffusers' DPO scripts do; prompts are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architectures import NETWORKS
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from palate.models.features import outputs_of
from palate.models.sd import LORA_TARGETS


def operations(run: Callable[[], object]) -> float:
    """In 10^12, a multiplication and an addition counting as two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def passes(name: str, side: int) -> dict[str, float]:
    """Of one pair: two pictures."""
    config: dict[str, Any] = NETWORKS[name].config
    with torch.device("meta"):
        frozen = UNet2DConditionModel(**config).requires_grad_(False)
        lora = UNet2DConditionModel(**config).requires_grad_(False)
        lora.add_adapter(LoraConfig(r=64, target_modules=list(LORA_TARGETS["attention"])))
        full = UNet2DConditionModel(**config)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ).requires_grad_(False)
        given = inputs(config, side)
        pictures = torch.randn(2, 3, 8 * side, 8 * side)

    def features(*, gradient: bool) -> None:
        """The forward pass of the U-Net up to where the features end."""
        x = given["sample"].clone().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient), outputs_of([frozen.down_blocks[-1]]) as found:
            frozen(**{**given, "sample": x})
        if gradient:
            found[0][0].sum().backward()

    with torch.no_grad():
        reference = operations(lambda: frozen(**given))
    return {
        "reference": reference,
        "LoRA": operations(lambda: lora(**given).sample.sum().backward()),
        "full": operations(lambda: full(**given).sample.sum().backward()),
        "VAE": operations(lambda: vae.encode(pictures)),
        "features": operations(lambda: features(gradient=False)),
        "features with gradient": operations(lambda: features(gradient=True)),
    }


def inputs(config: dict[str, Any], side: int) -> dict[str, Any]:
    """What a U-Net is given, of two pictures."""
    text = torch.randn(2, 77, config["cross_attention_dim"])
    given = {
        "sample": torch.randn(2, 4, side, side),
        "timestep": torch.ones(2, dtype=torch.long),
        "encoder_hidden_states": text,
    }
    if "addition_embed_type" in config:
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.zeros(2, 6)}
    return given


def main() -> None:
    for name, side in (("SD 1.5", 64), ("SDXL", 128)):
        found = passes(name, side)
        told = ", ".join(f"{part} {count:.2f}" for part, count in found.items())
        print(f"{name}, {8 * side} pixels, one pair, 10^12 operations: {told}")
        r, v, e, g = (found[part] for part in ("reference", "VAE", "features", "features with gradient"))
        for kind in ("LoRA", "full"):
            policy = found[kind]
            latent = policy + r
            for case, ratio in {
                "scripts / DPO": (latent + v) / latent,
                "scripts / DPO, reference kept": (latent + v) / policy,
                "NCP-DPO / DPO": (latent + 2 * e + g) / latent,
                "NCP-DPO, reference kept / DPO": (policy + e + g) / latent,
                "NCP-DPO, reference and targets kept / DPO": (policy + g) / latent,
                "NCP-DPO, reference and targets kept / DPO, reference kept": (policy + g) / policy,
            }.items():
                print(f"  {kind}: {case}: {ratio:.2f}")


if __name__ == "__main__":
    main()
