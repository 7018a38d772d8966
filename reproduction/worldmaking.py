"""The tools that built the miniature world: its renderer, and how its models were trained. They are no part of the package."""

from __future__ import annotations

import io
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


class People:
    """Those who voted on the miniature's pairs."""

    def __init__(self) -> None:
        from palate.miniature import world
        from tools.miniature import raters

        self.eye, self.crowd = raters.load_eye(world.checkpoint("mini-rater")), raters.crowd()

    def votes(
        self, prompt: str, pair: tuple[bytes, bytes], raters: int, margin: float, rng: np.random.Generator
    ) -> list[float]:
        """Of so many of them by chance: 1 for the first picture, 0 for the second, 0.5 for a tie."""
        from palate.data.images import to_tensor

        images = to_tensor([Image.open(io.BytesIO(side)).convert("RGB") for side in pair])
        looks, follow, _ = self.eye.look(images, [scene_of(prompt)] * 2)
        found = []
        for person in rng.choice(np.array(self.crowd, dtype=object), raters, replace=False):
            worth = person.worth(looks.numpy(), follow.numpy(), "general")
            found.append(person.vote(float(worth[0]), float(worth[1]), rng, margin))
        return found
