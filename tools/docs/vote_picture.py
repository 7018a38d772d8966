"""Draws ``docs/images/vote.png``, the page of ``palate vote`` on two pictures of the miniature world, by Chromium::

python -m tools.docs.vote_picture
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from palate.miniature.captions import caption
from tools.miniature import scenes

OUTPUT = Path(__file__).parents[2] / "docs" / "images" / "vote.png"


def pictures(folder: Path, prompts: int = 8) -> None:
    """Two models, of which ``base`` draws flawed pictures."""
    rng = np.random.default_rng(5)
    lines: dict[str, list[str]] = {"base": [], "tuned": []}
    for number in range(prompts):
        scene = scenes.random_scene(rng)
        prompt = caption(scene, rng)
        for model, told in lines.items():
            (folder / model).mkdir(parents=True, exist_ok=True)
            picture = scenes.shoot(scene, rng, flaw_share=float(model == "base"), wrong_share=0.0).image
            picture.resize((512, 512), Image.Resampling.BICUBIC).save(folder / model / f"{number}.png")
            told.append(json.dumps({"file": f"{number}.png", "prompt": prompt, "seed": number, "index": 0, "model": model}))
    for model, told in lines.items():
        (folder / model / "manifest.jsonl").write_text("\n".join(told) + "\n")


def main() -> None:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        pictures(Path(name))
        words = [sys.executable, "-m", "palate", "vote", name, "--questions", "overall", "--repeats", "0", "--port", "0"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = next(found.group() for line in server.stdout if (found := re.search(r"http://\S+", line)))
            options = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
            page = browser.new_page(viewport={"width": 1100, "height": 720})
            page.goto(url)
            page.click("#join button")
            for key in ("ArrowLeft", "ArrowRight"):
                page.wait_for_timeout(500)
                page.keyboard.press(key)
            page.wait_for_timeout(1000)
            page.screenshot(path=OUTPUT)
            browser.close()
            server.terminate()


if __name__ == "__main__":
    main()
