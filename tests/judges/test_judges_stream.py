"""Scoring a stream of files: every item answered once, bad pictures named, a bounded number in memory."""

from __future__ import annotations

import io
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from palate.base.errors import UserError
from palate.judges import load_judge, score
from palate.judges.stream import BadPicture, score_files, score_stream


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean(dim=(1, 2, 3)) + torch.tensor([float(p) for p in prompts])


def flat(level: float, size: tuple[int, int] = (4, 4)) -> torch.Tensor:
    return torch.full((1, 3, *size), level)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), max_size=40), st.integers(1, 7), st.integers(1, 3))
def test_every_item_is_answered_once(sizes, batch_size, workers):
    items = [(lambda i=i, s=s: flat(i / 100, (s, 3)), str(i)) for i, s in enumerate(sizes)]
    found = dict(score_stream(brightness, items, batch_size=batch_size, workers=workers))
    assert sorted(found) == list(range(len(sizes)))
    for index, value in found.items():
        assert value == pytest.approx(index + index / 100, rel=1e-5)


def test_batches_are_full_and_in_order():
    seen = []

    def judge(images, prompts):
        seen.append(len(images))
        return brightness(images, prompts)

    items = [(lambda: flat(0.0), str(i)) for i in range(10)]
    assert [i for i, _ in score_stream(judge, items, batch_size=4, workers=2)] == list(range(10))
    assert seen == [4, 4, 2]


def test_an_endless_stream_is_read_only_as_far_as_needed():
    loaded = []

    def items():
        for i in range(10**9):
            yield (lambda i=i: loaded.append(i) or flat(0.0)), str(i)

    stream = score_stream(brightness, items(), batch_size=4, workers=2)
    assert [i for i, _ in islice(stream, 20)] == list(range(20))
    stream.close()
    assert len(loaded) <= 20 + 4 + 2 * 4


def test_pictures_of_odd_sizes_do_not_wait_for_ever():
    """With batches of 2 at most 8 pictures are held: the ninth size finds the first ones scored."""
    open_, most = set(), 0

    def load(i):
        nonlocal most
        open_.add(i)
        most = max(most, len(open_))
        return flat(0.0, (i + 1, 1))

    items = ((lambda i=i: load(i), str(i)) for i in range(50))
    for index, _ in score_stream(brightness, items, batch_size=2, workers=1):
        open_.discard(index)
    assert most <= 4 * 2 + 2 + 1 + 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Good and bad files by name."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(folder / "rgb.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.convert("P").save(folder / "palette.png")
    transparent = image.copy()
    transparent.putalpha(0)
    transparent.save(folder / "transparent.png")
    Image.fromarray(np.full((40, 50), 65535, dtype=np.uint16)).save(folder / "sixteen.png")
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    (folder / "truncated.png").write_bytes(buffer.getvalue()[:-200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    Image.new("1", (9000, 9000)).save(folder / "huge.png")
    return folder


def test_bad_pictures_are_named_and_do_not_stop_the_rest(pictures):
    names = ["rgb.png", "truncated.png", "empty.png", "text.png", "huge.png", "gone.png", "transparent.png", "sixteen.png"]
    found = dict(score_files(brightness, [(pictures / n, "0") for n in names], batch_size=2, workers=2))
    assert [type(found[i]) for i in range(8)] == [float, *[BadPicture] * 5, float, float]
    reasons = [str(found[i]) for i in range(1, 6)]
    for reason, part in zip(
        reasons, ["cannot be decoded", "empty", "not a picture", "too large", "does not exist"], strict=True
    ):
        assert part in reason
    assert found[6] == found[7] == 1.0  # white


def test_odd_modes_are_scored_like_their_rgb(pictures, judge_dir):
    judge = load_judge("pickscore", judge_dir)
    names = ["rgb.png", "cmyk.jpg", "palette.png", "animated.gif"]
    found = dict(score_files(judge, [(pictures / n, "a red house") for n in names]))
    with Image.open(pictures / "rgb.png") as image:
        assert found[0] == pytest.approx(score(judge, [image], ["a red house"]).item(), abs=1e-5)
    assert all(isinstance(found[i], float) for i in range(4))


def test_a_score_that_is_no_number_is_a_bad_picture(pictures):
    found = list(score_files(lambda images, prompts: torch.tensor([float("nan")]), [(pictures / "rgb.png", "")]))
    assert found == [(0, BadPicture("was scored nan by the judge"))]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="at least 1"):
        score_files(brightness, [], batch_size=0)
    with pytest.raises(UserError, match="one prompt per picture"):
        score(brightness, [Image.new("RGB", (4, 4))], [])
