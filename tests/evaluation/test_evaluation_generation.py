"""Drawing into a picture folder: seeds, resuming, shards; with a painter in place of a model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from palate.base.errors import UserError
from palate.data.prompts import Prompt
from palate.evaluation.generation import Shard, generate, picture_seed, plan
from palate.evaluation.manifest import read_manifest

PROMPTS = [Prompt("a red boat", metadata={"category": "ships"}), Prompt("two cats", negative="dogs"), Prompt("a red boat")]
SETTINGS = {"num_inference_steps": 3, "versions": {"torch": "2"}}


class Painter:
    """A picture of one colour, which the seed decides."""

    def __init__(self, stop_after=None):
        self.drawn, self.stop_after = [], stop_after

    def __call__(self, pictures):
        if self.stop_after is not None and len(self.drawn) >= self.stop_after:
            raise KeyboardInterrupt
        self.drawn += [p.key for p in pictures]
        return [Image.new("RGB", (8, 8), (p.seed % 256, p.seed // 256 % 256, p.index)) for p in pictures]


def pixels(folder):
    return {p.file: np.asarray(Image.open(folder / p.file)) for p in read_manifest(folder)}


def test_a_plan_names_every_picture_once():
    found = plan(PROMPTS, model="m", images_per_prompt=2, seed=5, negative="blur")
    assert [p.file for p in found] == [f"0000{n}-0{i}.png" for n, i in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (2, 3))]
    assert [p.negative for p in found] == ["blur", "blur", "dogs", "dogs", "blur", "blur"]
    assert found[0].metadata == {"category": "ships"}
    assert len({p.key for p in found}) == len({p.seed for p in found}) == 6
    assert found[3].seed == picture_seed(5, "two cats", 1)


def test_the_seed_by_hand():
    # printf '0 1 a red boat' | sha256sum: the first eight digits
    assert picture_seed(0, "a red boat", 1) == 0x4083DD9D


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6, unique=True), st.integers(0, 9), st.randoms())
def test_a_picture_keeps_its_seed_in_any_list(texts, seed, random):
    shuffled = random.sample(texts, len(texts))
    first, second = (
        {p.key[::2]: p.seed for p in plan([Prompt(t) for t in some], model=m, images_per_prompt=n, seed=seed)}
        for some, m, n in ((texts, "a", 3), (shuffled, "b", 2))
    )
    assert second.items() <= first.items()


def test_an_interrupted_folder_is_gone_on_with(tmp_path):
    pictures = plan(PROMPTS, model="m", images_per_prompt=2)
    whole = tmp_path / "whole"
    assert generate(Painter(), pictures, whole, settings=SETTINGS, batch_size=4) == 6
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        generate(Painter(stop_after=2), pictures, folder, settings=SETTINGS, batch_size=2)
    assert len(read_manifest(folder)) == 2
    (folder / "00002-02.png").write_bytes(b"drawn, but not in the manifest")
    painter = Painter()
    assert generate(painter, pictures, folder, settings=SETTINGS, batch_size=3) == 4
    assert painter.drawn == [p.key for p in pictures[2:]]
    assert read_manifest(folder) == read_manifest(whole) == pictures
    assert all((a == b).all() for a, b in zip(pixels(folder).values(), pixels(whole).values(), strict=True))
    (folder / "00001-00.png").unlink()
    assert generate(painter, pictures, folder, settings=SETTINGS) == 1
    assert read_manifest(folder) == pictures
    assert not list(folder.glob(".*"))


def test_shards_share_the_work(tmp_path):
    pictures = plan(PROMPTS, model="m", images_per_prompt=2)
    painters = [Painter() for _ in range(4)]
    for number, painter in enumerate(painters):
        generate(painter, pictures, tmp_path, settings=SETTINGS, shard=Shard(number, 4))
    assert [len(p.drawn) for p in painters] == [2, 2, 1, 1]
    assert sorted(read_manifest(tmp_path), key=lambda p: p.file) == pictures


def test_shards_by_name_and_by_launcher(monkeypatch):
    assert [Shard.parse(f"{number}/4") for number in (1, 4)] == [Shard(0, 4), Shard(3, 4)]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Shard.parse(None) == Shard(1, 2)
    for text in ("0/4", "5/4", "1", "-1/4", "a/b", "1/"):
        with pytest.raises(UserError, match="expected its number, counted from 1, and how many there are: 1/4 to 4/4"):
            Shard.parse(text)


def test_what_does_not_fit_the_folder_is_refused(tmp_path):
    folder, pictures = tmp_path / "f", plan(PROMPTS, model="m")
    generate(Painter(), pictures, folder, settings=SETTINGS, model={"name": "m"})
    newer = {**SETTINGS, "versions": {"torch": "3"}}
    assert generate(Painter(), pictures, folder, settings=newer, model={"name": "m"}) == 0
    assert json.loads((folder / "settings.json").read_text()) == SETTINGS
    for settings, model, said in (
        ({**SETTINGS, "num_inference_steps": 4}, "m", "begun with num_inference_steps 3, now 4"),
        (SETTINGS, "n", "begun with name 'm', now 'n'"),
    ):
        with pytest.raises(UserError, match=said):
            generate(Painter(), pictures, folder, settings=settings, model={"name": model})
    for others, said in (
        ([Prompt("a dog")], "shows 'a red boat', not 'a dog'"),
        (PROMPTS[::-1], "00000-00.png was drawn with seed"),
    ):
        with pytest.raises(UserError, match=said):
            generate(Painter(), plan(others, model="m", seed=1), folder, settings=SETTINGS, model={"name": "m"})
    for named, said in (({"negative": "fog"}, "was drawn with negative None, not 'fog'"), ({"seed": 7}, "drawn with seed")):
        with pytest.raises(UserError, match=said):
            generate(Painter(), plan(PROMPTS, model="m", **named), folder, settings=SETTINGS, model={"name": "m"})
    # More of the same is welcome.
    assert generate(Painter(), plan([*PROMPTS, Prompt("x")], model="m"), folder, settings=SETTINGS, model={"name": "m"}) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        generate(Painter(), pictures, tmp_path / "file", settings=SETTINGS)


def test_a_prompts_own_seed_goes_first_and_counts_on():
    prompts = [Prompt("a", seed=2**64 - 1), Prompt("b")]
    own, other = (plan(prompts, model="m", images_per_prompt=2, seed=seed) for seed in (0, 1))
    assert [p.seed for p in own[:2]] == [p.seed for p in other[:2]] == [2**64 - 1, 0]
    assert [p.seed for p in own[2:]] == [picture_seed(0, "b", 0), picture_seed(0, "b", 1)]
    assert [p.index for p in own] == [0, 1, 0, 1]
