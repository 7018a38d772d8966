"""How far 8 and 4 bits move what a model says: its predictions at random latents and times, against whole weights.

Usage: python benchmarks/quantised.py [mini-sd | mini-sdxl | FOLDER]
"""

from __future__ import annotations

import sys

import torch

from palate.base.shapes import Shape
from palate.diffusion.denoising import Conditioning
from palate.runs.models import load_base

PROMPTS = ["a red house on the left", "a blue tower in the middle", "a yellow sailboat by the water", "a green tree at night"]


def main(name: str) -> None:
    said = {}
    for quantize in (None, "int8", "nf4"):
        denoiser = load_base(name, quantize=quantize)
        side, g = denoiser.default_resolution, torch.Generator().manual_seed(0)
        with torch.no_grad():
            cond = denoiser.encode_prompts(PROMPTS)
            xt = torch.randn(len(PROMPTS), *denoiser.latent_shape(Shape(side, side)), generator=g)
            t = denoiser.schedule.uniform(torch.arange(len(PROMPTS)), 100, 900, 0, "cpu")
            said[quantize] = denoiser.predict(denoiser.network, xt, t, Conditioning(dict(cond.tensors)))
    whole = said[None]
    print("| format | root mean square of the change, of the prediction's own |\n| --- | ---: |")
    for quantize in ("int8", "nf4"):
        print(f"| {quantize} | {float((said[quantize] - whole).norm() / whole.norm()):.2%} |")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["mini-sd"]))
