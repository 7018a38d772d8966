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
