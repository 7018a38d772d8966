"""Voting on pictures that people already have: plain folders, with whatever tells their prompts."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from drawn_pictures import draw

from palate.evaluation.manifest import Picture
from palate.votes.store import Store
from palate.votes.study import MANY, NEIGHBOURS, Study, VoteOptions, _within_prompts, find_sides


def prompts_of(study: Study) -> list[str]:
    return sorted(study.pictures[a].prompt for a, _ in study.pairs)


def test_two_plain_folders_are_two_models_that_meet_by_name_or_seed(tmp_path):
    for model in ("base", "tuned"):
        draw(tmp_path / model / "a red boat.png")
        draw(tmp_path / model / "7.png", "a cat", seed=2**64 - 1, model="dream")
        draw(tmp_path / model / "only" / f"{model}.png")
    study = Study(tmp_path, VoteOptions())
    try:
        assert study.mode == "compare"
        assert prompts_of(study) == ["a cat", "a red boat"]
        assert {p.model for p in study.pictures.values()} == {"base", "tuned", "dream (base)", "dream (tuned)"}
        assert {p.seed for p in study.pictures.values() if p.prompt == "a cat"} == {None}  # more than SQLite holds
        assert study.notes[0] == "base: 3 pictures without a manifest.jsonl; prompts: 1 by the picture itself, 2 by its name"
    finally:
        study.close()


def test_one_folder_of_outputs_is_collected_from(tmp_path):
    for number in range(3):
        draw(tmp_path / "2026-11-28" / f"{number}.png", "a cat", seed=number)
    draw(tmp_path / "2026-11-28" / "3.png", "a cat", seed=0, model="other")
    draw(tmp_path / "2026-11-28" / "4.png", "a dog")
    study = Study(tmp_path, VoteOptions())
    assert (study.mode, len(study.pairs)) == ("collect", 6)
    study.close()
    draw(tmp_path / "imported" / "5.png", "what was imported is known to the votes")
    study = Study(tmp_path, VoteOptions())
    assert len(study.pairs) == 6
    study.close()


def test_an_unnamed_model_is_called_like_its_folder_in_votes_of_before_too(tmp_path):
    for name in ("base", "tuned"):
        draw(tmp_path / name / "0.png")
        (tmp_path / name / "manifest.jsonl").write_text(json.dumps({"file": "0.png", "prompt": "x", "seed": 0}) + "\n")
    store = Store(tmp_path)
    store.add_picture("base/0.png", "x", seed=0, number=0, model="unnamed (base)", metadata={})
    store.close()
    study = Study(tmp_path, VoteOptions())
    assert [p.model for p in study.pictures.values()] == ["base", "tuned"]
    study.close()


@pytest.mark.parametrize("count", [2, MANY, MANY + 1, 200])
def test_pairs_of_a_prompt_grow_with_its_pictures_and_not_with_their_square(count):
    listed = [Picture(f"{i}.png", "x", i, 0, "m") for i in range(count)]
    pairs = _within_prompts(listed)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    met = Counter(i for pair in pairs for i in pair)
    expected = count - 1 if count <= MANY else 2 * NEIGHBOURS
    assert dict(met) == dict.fromkeys(range(count), expected)


def test_pictures_here_and_in_folders_below_are_one_set(tmp_path):
    draw(tmp_path / "a.png", "x")
    draw(tmp_path / "more" / "b.png", "x", seed=2)
    sides, _ = find_sides(tmp_path)
    assert [(s.name, len(s.pictures)) for s in sides] == [(tmp_path.name, 2)]
