"""What docs/rewards.md tells people to write does run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from palate.data.prompts import LISTS, Prompt
from palate.names.prompts import find_prompts
from palate.names.rewards import find_rewards
from palate.online.bundle import RewardBundle

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(SNIPPETS[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = find_rewards("my_rewards:red")["my_rewards:red"]
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0] = 1.0
    images[1, 2] = 0.5
    bundle = RewardBundle({named.name: named.load()})
    assert bundle.submit(images, [Prompt("red"), Prompt("blue")]).result().total.tolist() == [1.0, -0.25]


def test_pictures_as_pil():
    names = {"images": torch.full((1, 3, 4, 4), 0.2), "Image": Image}
    exec(SNIPPETS[1], names)
    assert names["pictures"][0].getpixel((0, 0)) == (51, 51, 51)


def test_python(capsys):
    exec(SNIPPETS[2], {})
    assert "jpeg_compressibility" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*LISTS, "miniature-gen-train", "miniature-seen"])
def test_counts_of_prompts(name):
    (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
    (count, *_) = re.findall(r"\d+", row.split("|")[2])
    assert len(find_prompts(name)) == int(count)
