"""Pictures as judges are given them, float tensors in [0, 1], and how they become what a CLIP model reads."""

from __future__ import annotations

import json
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from palate.base.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def one_each(pictures: Sized, prompts: Sized) -> None:
    """Refuses pictures and prompts of different number."""
    if len(pictures) != len(prompts):
        raise UserError(f"{len(pictures)} pictures came with {len(prompts)} prompts; give one prompt per picture")


@dataclass(frozen=True)
class Preprocess:
    """CLIP's preprocessing on tensors, differentiable: shortest side to ``size``, centre crop to ``crop`` (h, w), normalise.

    The resize is bicubic with antialiasing, as PIL's is: without it, scores of large pictures shift. Bicubic filters
    overshoot, so the result is clamped to [0, 1], which 8-bit pictures do by themselves.

    ``whole``: nothing is cropped, as HPS does it: *longest* side to ``size``, black bars to a square before normalising. HPS
    resizes float pictures, which do not clamp.

    ``floor``: where the crop lies between two pixels it begins at the first, as transformers has it, for which PickScore was
    trained: of 327 rows the 224 from row 51 on. Else at the even one, as torchvision has it: from row 52 on.
    """

    size: int = 224
    crop: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    whole: bool = False
    floor: bool = False

    @classmethod
    def load(cls, folder: Path, default_size: int, *, floor: bool = False) -> Preprocess:
        """What ``preprocessor_config.json`` in ``folder`` says; CLIP's values at ``default_size`` where it says nothing."""
        path = folder / "preprocessor_config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        size = config.get("size", default_size)
        if isinstance(size, dict):
            if "shortest_edge" not in size:
                raise UserError(f"{path}: size is {size}; a CLIP judge needs {{'shortest_edge': pixels}}")
            size = size["shortest_edge"]
        crop = config.get("crop_size", size)
        height, width = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
        if max(height, width) > size:
            raise UserError(f"{path}: crop_size {height} x {width} exceeds the resized picture ({size}); lower crop_size")
        mean, std = (tuple(map(float, config.get(k, v))) for k, v in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)))
        return cls(size, (height, width), mean, std, floor=floor)

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 H W"]:
        x = images.float()
        x = self._bars(x) if self.whole else self._centre(x)
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def _centre(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 H W"]:
        h, w = x.shape[-2:]
        short = min(h, w)
        if short != self.size:
            x = _resize(x, int(self.size * h / short), int(self.size * w / short))
        x = x.clamp(0, 1)
        h, w = x.shape[-2:]
        top, left = (d // 2 if self.floor else round(d / 2) for d in (h - self.crop[0], w - self.crop[1]))
        return x[..., top : top + self.crop[0], left : left + self.crop[1]]

    def _bars(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 H W"]:
        h, w = x.shape[-2:]
        scale = self.size / max(h, w)
        if scale != 1:
            x = _resize(x, max(1, round(h * scale)), max(1, round(w * scale)))
        down, right = self.size - x.shape[-2], self.size - x.shape[-1]
        return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))


def _resize(x: Float[Tensor, "b 3 h w"], height: int, width: int) -> Float[Tensor, "b 3 H W"]:
    return F.interpolate(x, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
