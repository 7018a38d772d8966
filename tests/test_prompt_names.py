from __future__ import annotations

import pytest

from palate.base.errors import UserError
from palate.miniature import prompt_lists, world
from palate.miniature.captions import scene_of
from palate.names.prompts import find_prompts


def test_files_lists_and_functions(tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text("a\nb\n")
    (tmp_path / "own_prompts.py").write_text("def numbers():\n    return [str(i) for i in range(3)]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [p.text for p in find_prompts("own.txt")] == ["a", "b"]
    assert [p.text for p in find_prompts(tmp_path / "own.txt")] == ["a", "b"]
    assert [p.text for p in find_prompts("own_prompts:numbers")] == ["0", "1", "2"]
    assert len(find_prompts("animals")) == 45
    assert [p.text for p in find_prompts("miniature-unseen")] == world.unseen_prompts().read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("animal", "no file and no list of prompts 'animal' .did you mean 'animals'"),
        ("miniature-unsen", "did you mean 'miniature-unseen'"),
        ("nowhere.txt", "nowhere.txt does not exist"),
        ("no_such_module:f", "no_such_module"),
    ],
)
def test_errors(name, words):
    with pytest.raises(UserError, match=words):
        find_prompts(name)


def test_a_published_set_from_its_file(tmp_path):
    file = tmp_path / "drawbench.txt"
    file.write_text("a red car\na red car\na blue car\n")
    assert [p.text for p in find_prompts(f"drawbench:{file}")] == ["a red car", "a blue car"]


def test_seen_and_unseen_do_not_meet():
    seen, unseen = (find_prompts(f"miniature-{side}") for side in ("seen", "unseen"))
    assert len(seen) == len(unseen) == 400
    assert not {scene_of(p.text) for p in seen} & {scene_of(p.text) for p in unseen}


def test_the_split_tests_what_it_says():
    found = {name: find_prompts(name) for name in prompt_lists.SPLIT}
    assert {name: len(prompts) for name, prompts in found.items()} == {
        "miniature-gen-train": 96,
        "miniature-gen-objects": 96,
        "miniature-gen-places": 48,
        "miniature-gen-combinations": 48,
    }

    def values(name, *attributes):
        return {tuple(p.metadata[a] for a in attributes) for p in found[f"miniature-gen-{name}"]}

    assert not values("train", "object") & values("objects", "object")
    assert values("objects", "ground") == values("train", "ground")
    assert not values("train", "ground") & values("places", "ground")
    assert values("places", "object") == values("train", "object")
    assert not values("train", "object", "ground") & values("combinations", "object", "ground")
    assert values("combinations", "object") == values("train", "object")
    assert values("combinations", "ground") == values("train", "ground")
    for prompts in found.values():  # all else is spread alike
        assert len({p.text for p in prompts}) == len(prompts)
        assert {p.metadata["sky"] for p in prompts} == {"day", "dawn", "sunset", "night"}
        assert {p.metadata["colour"] for p in prompts} == {"red", "blue", "yellow", "purple", "white"}
