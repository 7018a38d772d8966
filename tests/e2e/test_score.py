"""``palate score``: resuming, bad pictures, several judges, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palate.evaluation import scoring
from palate.evaluation.manifest import Picture, append_manifest, read_all_scores


@pytest.fixture
def folder(palate, tmp_path):
    """Six pictures of three prompts; that of number 4 is truncated."""
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 2 + 40 * i, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:200])
    append_manifest(tmp_path, [Picture(f"{i}.png", f"prompt {i % 3}", i, i // 3, "m") for i in range(6)])
    return tmp_path


def test_scores_of_several_judges_and_a_bad_picture(palate, folder, judge_dir):
    code, said, errors = palate("score", folder, judges=f"[jpeg_incompressibility, 'pickscore:{judge_dir}']")
    assert code == 0
    assert "4.png cannot be decoded" in errors
    found = read_all_scores(folder)
    assert set(found) == {"jpeg_incompressibility", f"pickscore:{judge_dir}"}
    sizes = found["jpeg_incompressibility"]
    assert (set(sizes.scores), set(sizes.bad)) == ({f"{i}.png" for i in (0, 1, 2, 3, 5)}, {"4.png"})
    assert sizes.scores["5.png"] > sizes.scores["0.png"]
    lines = said.splitlines()
    mean = np.mean(list(sizes.scores.values()))
    assert lines[1].split()[:2] == ["jpeg_incompressibility", f"{mean:.4g}"]
    assert lines[1].split()[-3:] == ["5", "3", "1"]
    assert len(lines) == 3


def test_nothing_is_asked_twice_and_an_interruption_loses_nothing(palate, folder, monkeypatch):
    asked = []
    real = scoring.score_files

    def counting(judge, items, **options):
        def watched():
            for item in items:
                asked.append(item[0].name)
                yield item

        for index, found in real(judge, watched(), **options):
            if len(asked) <= 6 and index == 3:
                raise KeyboardInterrupt
            yield index, found

    monkeypatch.setattr(scoring, "score_files", counting)
    code, _, errors = palate("score", folder, judges="jpeg_compressibility", batch_size=1, workers=1)
    assert (code, errors.strip()) == (130, "stopped: the same command scores what is left")
    before = dict(read_all_scores(folder)["jpeg_compressibility"].scores)
    assert set(before) == {"0.png", "1.png", "2.png"}
    first = len(asked)
    asked.extend(["-"] * 6)
    assert palate("score", folder, judges="jpeg_compressibility")[0] == 0
    assert sorted(asked[first + 6 :]) == ["3.png", "4.png", "5.png"]
    assert before.items() < read_all_scores(folder)["jpeg_compressibility"].scores.items()
    # A third time only the bad picture is tried, and nothing is written about it again.
    lines = Path(folder, "scores/jpeg_compressibility.jsonl").read_text()
    assert palate("score", folder, judges="jpeg_compressibility")[0] == 0
    assert asked[-1] == "4.png"
    assert Path(folder, "scores/jpeg_compressibility.jsonl").read_text() == lines
    Image.new("RGB", (8, 8)).save(folder / "4.png")
    assert palate("score", folder, judges="jpeg_compressibility")[2] == ""


def test_mistakes(palate, folder, tmp_path):
    for words, options, said in (
        ((folder,), {"judges": "[pikscore]"}, "no judge 'pikscore'"),
        ((folder,), {"judges": "[]"}, "at least one judge"),
        ((folder,), {}, "needs --judges"),
        ((tmp_path / "none",), {"judges": "jpeg_compressibility"}, "has no manifest.jsonl"),
        ((), {"judges": "jpeg_compressibility"}, "expects a picture folder first"),
    ):
        code, _, errors = palate("score", *words, **options)
        assert (code, said in errors, len(errors.splitlines())) == (2, True, 1), errors
    palate("score", folder, judges="jpeg_compressibility")
    path = folder / "scores/jpeg_compressibility.jsonl"
    head, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(head), "fingerprint": "other"}) + "\n" + "".join(rest))
    code, _, errors = palate("score", folder, judges="jpeg_compressibility")
    assert (code, "whose fingerprint is 'other'" in errors) == (2, True)


# What a score belongs to ----


def lines_of(folder):
    return [json.loads(line) for line in (folder / "scores/jpeg_incompressibility.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("change", ["picture", "prompt", "both"])
def test_what_changed_is_scored_again_and_said_so(palate, folder, change):
    palate("score", folder, judges="jpeg_incompressibility")
    before = dict(read_all_scores(folder)["jpeg_incompressibility"].scores)
    written = len(lines_of(folder))
    if change != "prompt":
        Image.new("RGB", (16, 16)).save(folder / "5.png")
    if change != "picture":
        path = folder / "manifest.jsonl"
        path.write_text(path.read_text().replace('"prompt 0"', '"another"', 1))
    code, _, errors = palate("score", folder, judges="jpeg_incompressibility")
    count = 2 if change == "both" else 1
    assert (code, f"jpeg_incompressibility: {count} pictures or prompts changed since" in errors) == (0, True)
    after = read_all_scores(folder)["jpeg_incompressibility"].scores
    assert (after["5.png"] < before["5.png"]) == (change != "prompt")
    assert {f: s for f, s in after.items() if f != "5.png"} == {f: s for f, s in before.items() if f != "5.png"}
    assert len(lines_of(folder)) == written + count
    assert "changed" not in palate("score", folder, judges="jpeg_incompressibility")[2]


def test_a_picture_that_became_bad_has_no_score_any_more(palate, folder):
    palate("score", folder, judges="jpeg_incompressibility")
    (folder / "5.png").write_bytes(b"no picture")
    palate("score", folder, judges="jpeg_incompressibility")
    found = read_all_scores(folder)["jpeg_incompressibility"]
    assert "5.png" not in found.scores
    assert "5.png" in found.bad


def test_files_of_earlier_versions_are_read_and_scored_again(palate, folder):
    palate("score", folder, judges="jpeg_incompressibility")
    path = folder / "scores/jpeg_incompressibility.jsonl"
    before = read_all_scores(folder)["jpeg_incompressibility"]
    head, *rest = lines_of(folder)
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "of"}) + "\n" for row in (head, *rest)))
    assert read_all_scores(folder)["jpeg_incompressibility"].scores == before.scores
    code, _, errors = palate("score", folder, judges="jpeg_incompressibility")
    assert (code, "5 pictures or prompts were scored by an earlier version" in errors) == (0, True)
    assert read_all_scores(folder)["jpeg_incompressibility"] == before


def test_a_comparison_does_not_use_stale_scores(palate, folder, tmp_path):
    import shutil

    (folder / "4.png").write_bytes((folder / "3.png").read_bytes())
    palate("score", folder, judges="jpeg_incompressibility")
    other = tmp_path.parent / f"{tmp_path.name}-other"
    shutil.copytree(folder, other)
    code, _, errors = palate("compare", folder, other, output_dir=tmp_path.parent / f"{tmp_path.name}-page")
    assert code == 0, errors
    Image.new("RGB", Image.open(other / "5.png").size).save(other / "5.png")
    code, _, errors = palate("compare", folder, other, output_dir=tmp_path.parent / f"{tmp_path.name}-page2")
    assert (code, "5.png before that picture or its prompt changed; run: palate score" in errors) == (2, True)


def test_a_function_whose_source_changed_scores_anew(palate, folder):
    import sys

    def score(level: float) -> tuple[list[float], str]:
        (folder / "own_level.py").write_text(f"def f(images, prompts):\n    return [{level}] * len(prompts)\n")
        sys.modules.pop("own_level", None)
        code, _, errors = palate("score", folder, judges="[own_level:f]")
        assert code == 0, errors
        return sorted(set(read_all_scores(folder)["own_level:f"].scores.values())), errors

    assert score(1.5)[0] == [1.5]
    found, errors = score(22.5)
    assert found == [22.5]
    assert "own_level:f: its source changed since own_level-f.jsonl was written: all is scored again" in errors
    assert "source changed" not in score(22.5)[1]


def test_pictures_that_the_manifest_does_not_name_are_told_of(palate, folder):
    Image.new("RGB", (8, 8)).save(folder / "more.PNG")
    errors = palate("score", folder, judges="jpeg_incompressibility")[2]
    assert f"1 pictures in {folder} are not in its manifest, such as more.PNG: not scored" in errors


FAILS = [("return {'a': 1}", "returned a dict ('a')"), ("import sys; sys.exit(3)", "called sys.exit(3)")]


@pytest.mark.parametrize("verb", ["score", "label", "accuracy"])
@pytest.mark.parametrize(("body", "said"), FAILS)
def test_a_judge_of_ones_own_that_fails_is_one_line(palate, folder, pairs_dir, verb, body, said):
    import sys

    (folder / "own_bad.py").write_text(f"def f(images, prompts):\n    {body}\n")
    sys.modules.pop("own_bad", None)
    options = {"score": {}, "label": {"output": "x.parquet"}, "accuracy": {"output": "x.json"}}[verb]
    code, _, errors = palate(verb, folder if verb == "score" else pairs_dir, judges="[own_bad:f]", **options)
    assert code == 2
    line = errors.splitlines()[-1]
    assert f"judge own_bad:f {said}" in line
    assert "prompt" in line
    assert ("0.png" if verb == "score" else "row 1") in line
    assert not list(folder.glob("x.*"))
