"""The tools that built the miniature world: its renderer, and how its models were trained. They are no part of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from palate.miniature.captions import scene_of

sys.path.append(str(Path(__file__).parents[1]))


def render(prompt: str, seed: int) -> Image.Image:
    """A picture of a prompt at its best; what the prompt leaves open follows from the seed."""
    from tools.miniature import scenes

    return scenes.render(scene_of(prompt), np.random.default_rng(seed))


def jpeg(image: Image.Image) -> bytes:
    """As the pictures of the miniature's pairs are kept."""
    import torch

    from tools.miniature import voting

    return voting.jpeg(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def base_model() -> ModuleType:
    """How mini-sd was trained."""
    from tools.miniature import base_model

    return base_model
