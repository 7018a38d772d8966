"""Judges by name: every form of a name, and what is refused before weights are read."""

from __future__ import annotations

import pytest
import torch

from palate.errors import UserError
from palate.judge_names import find_judges
from palate.miniature import world


def test_judges_of_every_form(judge_dir):
    names = ["mini-aesthetic", "jpeg_compressibility", f"pickscore:{judge_dir}"]
    found = find_judges(names)
    assert list(found) == names
    assert [j.kind for j in found.values()] == ["aesthetic", "jpeg_compressibility", "pickscore"]
    assert [j.folder for j in found.values()] == [world.checkpoint("mini-aesthetic"), None, judge_dir]
    assert [j.role for j in found.values()] == ["looks", "held out", "held out"]
    x = torch.rand(2, 3, 32, 32)
    for judge in found.values():
        assert judge.load()(x, ["a red house", "a tower"]).shape == (2,)


def test_home_is_written_out(judge_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(judge_dir.parent))
    assert find_judges([f"pickscore:~/{judge_dir.name}"]).popitem()[1].folder == judge_dir


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mini-held", "did you mean 'mini-heldout'"),
        ("pikscore:models", "did you mean 'pickscore:FOLDER'"),
        ("pickscore", "no judge 'pickscore'"),
        ("clipscore:nowhere", "no folder nowhere"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        find_judges([name])
