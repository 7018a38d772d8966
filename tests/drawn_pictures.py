"""Pictures as programs write them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, PngImagePlugin


def draw(path: Path, prompt: str | None = None, seed: int = 1, model: str = "dream", colour: int = 0) -> None:
    """A small PNG that tells its prompt as A1111's do, if there is one."""
    texts = PngImagePlugin.PngInfo()
    if prompt is not None:
        texts.add_text("parameters", f"{prompt}\nSteps: 20, Seed: {seed}, Model: {model}")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (colour, 90, 30)).save(path, pnginfo=texts)
