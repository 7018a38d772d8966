"""LAION's aesthetic predictors: a head on the L2-normalised image embedding of a CLIP model; the prompt is not read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError
from palate.judges.clip import Clip, check_clip, load_clip
from palate.judges.pictures import Preprocess
from palate.judges.weights import Options, affine, read_weights, reading

OWN = {
    "aesthetic": ("aesthetic_head.safetensors", "aesthetic_head.pth", "sac+logos+ava1-l14-linearMSE.pth"),
    "aesthetic_v1": ("sa_0_4_vit_l_14_linear.pth", "sa_0_4_vit_b_32_linear.pth", "sa_0_4_vit_b_16_linear.pth"),
}
"""Kind -> file names under which a folder may bring its own head, in this order; the last of v2 and those of v1 are LAION's."""
PUBLISHED = Path(__file__).parent / "heads" / "laion.safetensors"
"""LAION's heads multiplied out; names begin with one of those below."""
FITTING = {
    ("aesthetic", 768, 14): "v2_l14",
    ("aesthetic_v1", 768, 14): "v1_l14",
    ("aesthetic_v1", 512, 32): "v1_b32",
    ("aesthetic_v1", 512, 16): "v1_b16",
}
"""Kind, width of the embedding and patch size -> published head. All were made for OpenAI's CLIP models."""


def find_head(kind: str, folder: Path) -> Path | str:
    """The folder's own head, or the name of the published one that was made for its model; reads no weights."""
    found = [folder / name for name in OWN[kind] if (folder / name).is_file()]
    if found:
        return found[0]
    path = folder / "config.json"
    config = reading(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    vision = config.get("vision_config") or {}
    width, patch = config.get("projection_dim", 512), vision.get("patch_size", 32)
    activation = vision.get("hidden_act", "quick_gelu")  # "gelu" is LAION's own CLIP, whose embeddings are others
    if (kind, width, patch) not in FITTING or activation != "quick_gelu":
        raise UserError(
            f"{folder} has no aesthetic head, and none was published for its CLIP model (width {width}, patches of {patch}, "
            f"{activation}); put {OWN['aesthetic'][0]} there, or give the folder of openai/clip-vit-large-patch14"
        )
    return FITTING[kind, width, patch]


def load_head(head: Path | str) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """The head as one affine map: ``weight (d,)`` and ``bias ()``, float32.

    Reads a v1 head (one linear layer) or a v2 head (in the published one 768-1024-128-64-16-1); the v2 head has dropout but
    no activation between its layers, so they multiply out to a single map.
    """
    if isinstance(head, Path):
        return affine(read_weights(head), head)
    state = read_weights(PUBLISHED)
    return state[f"{head}.weight"], state[f"{head}.bias"]


class AestheticJudge:
    """``weight @ embedding + bias``, about 4.5 to 7 with the published v2 head on ``openai/clip-vit-large-patch14``."""

    def __init__(self, clip: Clip, preprocess: Preprocess, weight: Float[Tensor, " d"], bias: Float[Tensor, ""]):
        width = clip.model.config.projection_dim
        if len(weight) != width:
            raise UserError(f"the aesthetic head has width {len(weight)}, the CLIP model {width}; take a head made for it")
        self.clip, self.preprocess = clip, preprocess
        self.weight, self.bias = weight.to(clip.device), bias.to(clip.device)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.score_pixels(self.preprocess(images.to(self.weight.device)), prompts)

    def score_pixels(self, pixels: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """As a call, of pictures that are already preprocessed."""
        return self.clip.embed_images(pixels) @ self.weight + self.bias


def prepare(kind: str, place: Path, options: Options) -> Callable[[str | torch.device], AestheticJudge]:
    """From a CLIP folder, with its own head or the published one."""
    check_clip(place, kind)
    head = find_head(kind, place)

    def load(device: str | torch.device) -> AestheticJudge:
        clip = load_clip(place, kind, device, options.dtype)
        return AestheticJudge(clip, Preprocess.load(place, clip.image_size), *load_head(head))

    return load
