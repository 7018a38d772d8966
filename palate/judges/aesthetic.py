"""LAION's aesthetic predictors: a head on the L2-normalised image embedding of a CLIP model; the prompt is not read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from palate.errors import UserError
from palate.judges.clip import embed_images, load_clip
from palate.judges.pictures import Preprocess

HEADS = ("aesthetic_head.safetensors", "aesthetic_head.pth", "sac+logos+ava1-l14-linearMSE.pth", "sa_0_4_vit_l_14_linear.pth")
"""File names under which a head is looked for, in this order; the last two are LAION's own (v2 and v1 for ViT-L/14)."""


def find_head(folder: str | Path) -> Path:
    """The first of :data:`HEADS` in a folder; raises ``UserError`` if there is none."""
    found = [Path(folder) / name for name in HEADS if (Path(folder) / name).exists()]
    if not found:
        raise UserError(f"{folder} has no aesthetic head; put {HEADS[0]} or LAION's {HEADS[2]} there")
    return found[0]


def load_head(path: str | Path) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """The head as one affine map: ``weight (d,)`` and ``bias ()``, float32.

    Reads a v1 head (one linear layer, keys ``weight`` and ``bias``) or a v2 head (``layers.N.weight``, ``layers.N.bias``; in
    the published one 768-1024-128-64-16-1 at N = 0, 2, 4, 6, 7). The v2 head has dropout but no activation between its
    layers, so they multiply out to a single map; that is done in float64.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no file {path}; expected an aesthetic head (.safetensors or .pth)")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        # LAION saved its v2 head on CUDA.
        state = torch.load(path, weights_only=True, map_location="cpu")
    names = ["weight"] if "weight" in state else [k for k in state if k.startswith("layers.") and k.endswith(".weight")]
    if not names:
        raise UserError(
            f"{path}: no aesthetic head; expected keys 'weight' or 'layers.N.weight', found {', '.join(sorted(state)[:4])}"
        )
    names.sort(key=lambda name: int(name.split(".")[1]) if "." in name else 0)
    width = state[names[0]].shape[1]
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for name in names:
        layer = state[name].double()
        if layer.shape[1] != weight.shape[0]:
            raise UserError(f"{path}: {name} reads {layer.shape[1]} numbers but the layer before it writes {weight.shape[0]}")
        weight, bias = layer @ weight, layer @ bias + state[name.removesuffix("weight") + "bias"].double()
    if weight.shape[0] != 1:
        raise UserError(f"{path}: the last layer writes {weight.shape[0]} numbers; an aesthetic head writes one")
    return weight[0].float(), bias[0].float()


class AestheticJudge:
    """``weight @ embedding + bias``, about 4.5 to 7 with the published v2 head on ``openai/clip-vit-large-patch14``."""

    def __init__(self, model: Any, preprocess: Preprocess, weight: Float[Tensor, " d"], bias: Float[Tensor, ""]):
        width = model.config.projection_dim
        if len(weight) != width:
            raise UserError(f"the aesthetic head has width {len(weight)}, the CLIP model {width}; take a head made for it")
        device = model.logit_scale.device
        self.model, self.preprocess, self.weight, self.bias = model, preprocess, weight.to(device), bias.to(device)

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> AestheticJudge:
        """From a CLIP folder that also holds a head under one of the names in :data:`HEADS`."""
        head = find_head(folder)
        model, _, preprocess = load_clip(folder, device)
        return cls(model, preprocess, *load_head(head))

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.score_pixels(self.preprocess(images.to(self.weight.device)), prompts)

    def score_pixels(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """As a call, of pictures that are already preprocessed."""
        return embed_images(self.model, images.to(self.weight.device)) @ self.weight + self.bias
