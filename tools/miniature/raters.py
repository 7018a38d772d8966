"""Simulated people who look at pictures and vote."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from palate.miniature.captions import ATTRIBUTES, Scene

QUESTIONS = ("general", "appeal", "following")
"""General preference, visual appeal (the prompt is hidden), prompt following: the three questions of Diffusion-DPO."""

TIE_MARGIN = 0.12
"""Two pictures whose perceived worth differs by less than this are called a tie."""


class Eye(nn.Module):
    """What raters see: a small network that reads every attribute of a scene, and the looks of a picture.

    Trained on renders, whose truth is known. ``(b, 3, 64, 64)`` in [0, 1] -> logits ``(b, 25)`` of all attribute values
    one after the other, appeal ``(b,)``.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
            layers += [nn.Conv2d(b, b, 3, padding=1, groups=8), nn.GroupNorm(8, b), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 160), nn.SiLU())
        self.attributes = nn.Linear(160, sum(map(len, ATTRIBUTES.values())))
        self.looks = nn.Linear(160, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(images * 2 - 1)
        return self.attributes(h), self.looks(h).squeeze(1)

    @staticmethod
    def split(logits: Tensor) -> dict[str, Tensor]:
        """Logits of each attribute ``(b, values)``."""
        return dict(zip(ATTRIBUTES, logits.split([len(v) for v in ATTRIBUTES.values()], dim=1), strict=True))

    @torch.no_grad()
    def look(self, images: Tensor, scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
        """Appeal ``(b,)`` in [0, 1]; following ``(b,)``: mean probability of the asked attributes; hits ``(b, 7)``."""
        logits, looks = self(images)
        asked = torch.tensor([s.labels() for s in scenes])
        parts = self.split(logits).values()
        chances = torch.stack([p.softmax(1).gather(1, asked[:, i : i + 1]).squeeze(1) for i, p in enumerate(parts)], 1)
        hits = torch.stack([p.argmax(1) == asked[:, i] for i, p in enumerate(parts)], 1)
        return looks.clamp(0, 1), chances.mean(1), hits


def load_eye(folder: Path) -> Eye:
    from safetensors.torch import load_file

    eye = Eye()
    eye.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return eye.eval()


@dataclass(frozen=True)
class Rater:
    """One person: how much looks and the prompt matter, and how unsteady the judgement is (Bradley-Terry scale)."""

    name: str
    looks: float
    prompt: float
    noise: float

    def worth(self, appeal: np.ndarray, following: np.ndarray, question: str) -> np.ndarray:
        """The value of pictures ``(n,)`` to this person under one of :data:`QUESTIONS`."""
        if question == "appeal":
            return 2.0 * appeal
        if question == "following":
            return 4.0 * following
        return self.looks * appeal + self.prompt * following

    def vote(self, worth_0: float, worth_1: float, rng: np.random.Generator, margin: float = TIE_MARGIN) -> float:
        """1 if the first picture is preferred, 0 if the second, 0.5 for a tie: a felt difference below the margin.

        The difference plus logistic noise decides, so that without ties P(first) = sigmoid(difference / noise).
        """
        felt = worth_0 - worth_1 + self.noise * rng.logistic()
        return 0.5 if abs(felt) < margin else float(felt > 0)


def crowd(count: int = 12, seed: int = 7) -> list[Rater]:
    """People of different taste, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    return [
        Rater(f"rater-{i:02d}", float(rng.uniform(1.4, 2.6)), float(rng.uniform(2.5, 5.0)), float(rng.uniform(0.1, 0.28)))
        for i in range(count)
    ]
