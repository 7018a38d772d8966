"""Prompt sets: the published files, and what stands in the way of reading them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from palate.base.errors import UserError
from palate.data.prompt_sets import SETS, load_prompt_set

REAL = Path(__file__).parents[3] / "shared/data/prompts"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published prompt lists: put them into ../shared/data/prompts")


@real
def test_partiprompts():
    prompts = load_prompt_set("partiprompts", REAL / "PartiPrompts.tsv")
    categories = Counter(p.metadata["category"] for p in prompts)
    assert (len(prompts), len(categories)) == (1632, 12)
    assert len({p.metadata["challenge"] for p in prompts}) == 11
    assert (categories["Animals"], categories["Indoor Scenes"]) == (314, 40)
    assert any('"' in p.text for p in prompts)
    assert prompts[0].text == "bond"


@real
def test_hpsv2():
    prompts = load_prompt_set("hpsv2", REAL / "hpsv2_benchmark.json")
    styles = Counter(p.metadata["category"] for p in prompts)
    assert styles == {"anime": 800, "concept-art": 800, "paintings": 800, "photo": 800}
    assert prompts[0].text.startswith("Spongebob depicted")
    assert len({p.text for p in prompts}) == 3172


@real
def test_the_others():
    assert len({p.text for p in load_prompt_set("pickapic", REAL / "pickapic_v2_test_unique.json")}) == 487
    drawbench = load_prompt_set("drawbench", REAL / "drawbench_x5.txt")
    assert len(drawbench) == len({p.text for p in drawbench}) == 200
    geneval = load_prompt_set("geneval", REAL / "geneval_evaluation_metadata.jsonl")
    assert len(geneval) == 553
    assert Counter(p.metadata["category"] for p in geneval) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert geneval[0].metadata["include"] == [{"class": "bench", "count": 1}]
    assert "prompt" not in geneval[0].metadata


def test_drawbench_as_a_sheet_has_categories(tmp_path):
    (tmp_path / "d.csv").write_text('Prompts,Category\n"A red, car",Colors\nTwo cats,Counting\n')
    found = load_prompt_set("drawbench", tmp_path / "d.csv")
    assert [(p.text, p.metadata["category"]) for p in found] == [("A red, car", "Colors"), ("Two cats", "Counting")]


def test_hpsv2_as_a_folder(tmp_path):
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text(f'["a {style}"]')
    assert [p.text for p in load_prompt_set("hpsv2", tmp_path)] == ["a anime", "a concept-art", "a paintings", "a photo"]


def test_offline_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"(?s)Download https://raw.*PartiPrompts.tsv .* put it at .*partiprompts:FILE"):
        load_prompt_set("partiprompts", cache_dir=tmp_path)
    (tmp_path / "PartiPrompts.tsv").write_text("Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n")
    assert load_prompt_set("partiprompts", cache_dir=tmp_path)[0].metadata == {"category": "Abstract", "challenge": "Basic"}


@pytest.mark.parametrize("name", SETS)
def test_a_file_of_another_format(tmp_path, name):
    path = tmp_path / "other.bin"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(UserError, match=f"is not the file of {name}"):
        load_prompt_set(name, path)
    with pytest.raises(UserError, match="does not exist"):
        load_prompt_set(name, tmp_path / "gone")


def test_a_wrong_name():
    with pytest.raises(UserError, match="did you mean 'partiprompts'"):
        load_prompt_set("partiprompt")
