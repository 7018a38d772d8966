"""Files appear whole, with the rights of their folder, and never where nobody named a place."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from palate.base.errors import UserError
from palate.base.files import check_file, check_folder, replacing
from palate.training import checkpoints


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)


def rights(file) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_file_may_be_read_by_whoever_may_read_its_folder(tmp_path, umask):
    """The library writes it for its owner alone; a ComfyUI of another user has to read it."""

    def write(folder: str) -> None:
        os.makedirs(f"{folder}/part")
        for name in ("a", "part/b"):
            save_file({"x": torch.ones(1)}, f"{folder}/{name}.safetensors", metadata={"format": "pt"})

    whole = replacing(tmp_path / "model", write)
    alone = replacing(tmp_path / "lora.safetensors", write, "a.safetensors")
    saved = checkpoints.save(tmp_path, 1, weights={"x": torch.ones(1)}, state={}, recipe={})
    files = [whole / "a.safetensors", whole / "part/b.safetensors", alone, *saved.iterdir()]
    assert {file.name: rights(file) for file in files} == {file.name: umask for file in files}


@pytest.mark.parametrize("check", [check_folder, check_file])
@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_working_directory(check, name):
    with pytest.raises(UserError, match=f"output is '{name}': give it a name, or . for the working directory"):
        check(name, "output")
    check_folder(".", "output")


@pytest.mark.parametrize("verb", ["export", "generate", "score", "label", "report", "accuracy", "evaluate", "serve-judge"])
def test_an_empty_word_is_none(palate, verb):
    code, _, errors = palate(verb, "")
    assert (code, errors) == (2, f"error: palate {verb} was given an empty name{errors.partition('empty name')[2]}")
