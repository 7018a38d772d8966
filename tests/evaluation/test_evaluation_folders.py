"""Picture folders compared and reported, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palate.base.errors import UserError
from palate.cli import main
from palate.evaluation.folders import compare_folders, read_result, rewards_in
from palate.evaluation.manifest import Picture, ScoreFile, append_manifest, append_scores, score_path, write_settings

PROMPTS = 12


def picture_folder(
    folder: Path, model: str, shift: float, *, seeds: int = 2, judges=(("fresh", "held out"),), **settings
) -> Path:
    """Noise pictures of 12 prompts in two categories, scored by noise that all folders share, plus ``shift``."""
    rng, pictures = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    own = np.random.default_rng(len(model))
    for p in range(PROMPTS):
        for index in range(seeds):
            file = f"{p}-{index}.png"
            Image.fromarray(own.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / file)
            metadata = {"category": "Animals" if p % 2 else "Food", "id": str(p)}
            pictures.append(Picture(file, f"prompt <{p}>", 100 + index, index, model, metadata=metadata))
    append_manifest(folder, pictures)
    write_settings(folder, {"guidance_scale": 5.0, "versions": {"torch": "2"}, **settings})
    for judge, role in judges:
        noise = rng.normal(size=len(pictures)) + shift * (1 + 0.1 * own.normal(size=len(pictures)))
        header = ScoreFile(judge, judge.partition(":")[0], "abc", role)
        append_scores(score_path(folder, judge), [(p.file, float(s)) for p, s in zip(pictures, noise, strict=True)], header)
    return folder


def told(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(map(str, words)))
    return code, *capsys.readouterr()


def test_two_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judges = (("fresh", "held out"), ("second", "looks"), ("clipscore:x", "labels"))
    a = picture_folder(tmp_path / "a", "base-model", 0, judges=judges)
    b = picture_folder(tmp_path / "b", "tuned-model", 1, judges=judges)
    code, said, errors = told(capsys, "compare", a, b, "--output_dir", "out", "--draws", 500)
    assert (code, errors) == (0, "")
    assert "tuned-model against base-model: An independent judge prefers tuned-model's picture in 100 % of 24 pairs" in said
    assert "clipscore:x *" in said
    assert "category: Animals" in said
    assert "id: " not in said  # as many values as prompts: no category
    assert "mean of 2" in said
    found = json.loads(Path("out/comparison.json").read_text())
    assert [c["judge"] for c in found["comparisons"]] == ["fresh", "second", "clipscore:x"]
    assert found["comparisons"][0]["win_rate"]["wins"] == 24
    assert found["comparisons"][2]["contaminated"] is True
    assert found["macro"]["judges"] == 2
    assert (found["prompts"], found["pictures"], found["folders"]) == (12, 24, ["../a", "../b"])
    shown = [{"prompt": "a", "files": [5]}]
    for name, wrong in (("notes", 5), ("models", [5]), ("folders", []), ("shown", None), ("shown", shown)):
        Path("damaged.json").write_text(json.dumps({**found, name: wrong}))
        with pytest.raises(UserError, match=r"is no comparison that this version wrote .*; compare again"):
            read_result("damaged.json")
    # What was written is read back, and the page can be made anew from it.
    again, _ = read_result("out/comparison.json")
    assert again.versus == compare_folders([a, b], draws=500).versus
    page = Path("out/report.html").read_bytes()
    Path("out/report.html").unlink()
    assert told(capsys, "report", "out")[0] == 0
    assert Path("out/report.html").read_bytes() == page
    assert page.count(b"<img ") == 2 * PROMPTS


def test_three_folders_are_ranked(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [picture_folder(tmp_path / n, n, s) for n, s in (("weak", 0), ("strong", 0.8), ("middling", 0.4))]
    code, said, errors = told(capsys, "compare", *folders, "--draws", 300)
    assert code == 0, errors
    found = compare_folders(folders, draws=300)
    (ranking,) = found.rankings
    assert ranking.models == ["weak", "strong", "middling"]
    assert ranking.elo[1] > ranking.elo[2] > ranking.elo[0]
    assert ranking.shares[1][0] == found.versus[0].comparisons[0].win_rate.rate
    assert [v.model for v in found.versus] == ["strong", "middling"]
    assert said.index("strong against weak") < said.index("beats strong")
    code, said, errors = told(capsys, "report", "comparison", "comparison/comparison.json", "--output", "both.html")
    assert code == 0, errors
    assert Path("both.html").read_text().count("<article ") == 2


@pytest.mark.parametrize(
    ("seeds", "settings", "parts"),
    [
        (1, {}, ["12 of 24 pictures", "have no partner", "seed 101"]),
        (2, {"guidance_scale": 7.5}, ["guidance_scale is 5.0", "and 7.5", "--allow_different_settings true"]),
    ],
)
def test_sides_that_differ_are_refused_unless_told(tmp_path, capsys, monkeypatch, seeds, settings, parts):
    monkeypatch.chdir(tmp_path)
    a = picture_folder(tmp_path / "a", "one", 0)
    b = picture_folder(tmp_path / "b", "other", 1, seeds=seeds, **settings)
    code, said, errors = told(capsys, "compare", a, b)
    assert (code, said) == (2, "")
    assert len(errors.splitlines()) == 1
    assert all(part in errors for part in parts), errors
    assert not Path("comparison").exists()
    code, said, _ = told(capsys, "compare", a, b, "--allow_different_settings", "true", "--draws", 200)
    assert code == 0
    assert "note: Not made alike" in said
    assert json.loads(Path("comparison/comparison.json").read_text())["pictures"] == 12 * seeds


def test_named_judges_score_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = picture_folder(tmp_path / "a", "one", 0), picture_folder(tmp_path / "b", "two", 1)
    code, _, errors = told(capsys, "compare", a, b, "--judges", "[jpeg_compressibility, fresh]", "--draws", 200)
    assert code == 0, errors
    found = json.loads(Path("comparison/comparison.json").read_text())
    assert {c["judge"] for c in found["comparisons"]} == {"jpeg_compressibility", "fresh"}
    assert score_path(b, "jpeg_compressibility").is_file()


def test_other_versions_are_told(tmp_path):
    a, b = picture_folder(tmp_path / "a", "one", 0), picture_folder(tmp_path / "b", "two", 1, versions={"torch": "3"})
    assert "different versions" in compare_folders([a, b], draws=200).notes[0]


def test_bad_input_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = picture_folder(tmp_path / "a", "one", 0), picture_folder(tmp_path / "b", "two", 1)
    bare = picture_folder(tmp_path / "bare", "bare", 0, judges=())
    bare_too = picture_folder(tmp_path / "bare-too", "bare-too", 0, judges=())
    (tmp_path / "empty").mkdir()
    hollow = picture_folder(tmp_path / "hollow", "hollow", 0)
    (hollow / "manifest.jsonl").write_text("")
    other = picture_folder(tmp_path / "other", "other", 0)
    scores = score_path(other, "fresh")
    scores.write_text(scores.read_text().replace('"abc"', '"xyz"'))
    part = picture_folder(tmp_path / "part", "part", 0)
    score_path(part, "fresh").write_text("".join(score_path(part, "fresh").read_text().splitlines(keepends=True)[:-3]))
    cases = [
        ((a,), "two folders or more"),
        ((a, b, "--judges", "mini-heldut"), "did you mean 'mini-heldout'"),
        ((bare, a), "judge fresh has not scored"),
        ((bare, bare_too), "holds no scores"),
        ((a, bare), "judge fresh has not scored"),
        ((a, tmp_path / "empty"), "has no manifest.jsonl"),
        ((a, hollow), "names no pictures"),
        ((a, other), "with different weights"),
        ((a, part), "palate score"),
        ((a, a), "given twice"),
        ((a, b, "--judge", "fresh"), "did you mean 'judges'"),
        ((a, b, "--draws", "5"), "draws is 5; expected 100 to 1000000"),
    ]
    for words, expected in cases:
        code, said, errors = told(capsys, "compare", *words)
        assert (code, said) == (2, ""), words
        assert len(errors.splitlines()) == 1
        assert expected in errors, errors
        assert not Path("comparison").exists()
    for words, part in (((tmp_path / "empty",), "log.jsonl"), ((a, "--out", "x"), "did you mean 'output'")):
        code, _, errors = told(capsys, "report", *words)
        assert code == 2
        assert part in errors
    (tmp_path / "empty" / "metrics.json").write_text('{"comparisons": []}')
    assert "compare again" in told(capsys, "report", tmp_path / "empty")[2]


def test_pictures_without_a_score_leave_all_sides(tmp_path):
    a, b = picture_folder(tmp_path / "a", "one", 0), picture_folder(tmp_path / "b", "two", 1)
    append_scores(score_path(b, "fresh"), [("3-1.png", "is truncated")], ScoreFile("fresh", "fresh", "abc", "held out"))
    found = compare_folders([a, b], draws=200)
    assert (found.pictures, found.prompts) == (23, 12)
    assert "1 pictures without a score" in found.notes[0]


@pytest.mark.parametrize(
    ("judge", "reward", "same"),
    [
        ("pickscore", "pickscore:elsewhere", True),
        ("pickscore?dtype=bfloat16", "pickscore", True),
        ("pickscore", "0.05*pickscore + 0.3*aesthetic", True),
        ("pickscore:a + clipscore", "-1e-2 * clipscore:b", True),
        ("aesthetic_v1", "0.05*pickscore + 0.3*aesthetic", False),
        ("remote:http://127.0.0.1:1?timeout=9", "remote:http://127.0.0.1:1", True),
        ("remote:http://127.0.0.1:1", "remote:http://127.0.0.1:2", False),
        ("remote:http://127.0.0.1:1", "remote", True),  # named by --trained_on
        ("mine:looks", "mine:looks", True),
        ("mine:looks", "mine:counts", False),
    ],
)
def test_whose_taste_training_followed(tmp_path, judge, reward, same):
    a, b = (picture_folder(tmp_path / n, n, 1, judges=((judge, "held out"),)) for n in "ab")
    assert compare_folders([a, b], trained_on=[reward], draws=200).versus[0].comparisons[0].contaminated is same


def scored_by_server(folder: Path, *serves: str) -> None:
    """As if the server of the folder's one judge had told whom it serves."""
    (path,) = (folder / "scores").glob("*.jsonl")
    header, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(header), "serves": serves}) + "\n" + rest)


def test_the_judge_behind_an_address_may_be_one_that_trained(tmp_path):
    here, there = "remote:http://127.0.0.1:1", "remote:http://127.0.0.1:2"
    for name, judge, serves, reward, noted, dirty in (
        ("both local", "pickscore", (), "pickscore:elsewhere", {}, True),
        ("remote judge", here, ("pickscore:elsewhere",), "pickscore", {}, True),
        ("another one", here, ("aesthetic",), "pickscore", {}, False),
        ("remote reward", "pickscore", (), here, {here: ["pickscore"]}, True),
        ("both remote", there, ("0.5*pickscore + aesthetic",), here, {here: ["pickscore"]}, True),
        ("both remote, apart", there, ("aesthetic",), here, {here: ["pickscore"]}, False),
    ):
        run = tmp_path / name
        sides = [picture_folder(run / "evaluation" / s, s, 1, judges=((judge, "held out"),)) for s in ("base", "tuned")]
        for side in sides:
            scored_by_server(side, *serves)
        (run / "recipe.yaml").write_text(f"online: {{train_prompts: animals, rewards: ['{reward}']}}")
        (run / "run.json").write_text(json.dumps({"serves": noted}))
        found = compare_folders(sides, draws=200)
        assert found.versus[0].comparisons[0].contaminated is dirty, name
        assert any("judged nothing here" in note for note in found.notes) is not dirty
        assert any("as its server said" in note for note in found.notes) is bool(serves)


@pytest.mark.parametrize("damage", ['{"serves": {"remote:', "[]", '{"serves": ["pickscore"]}', "\xff"])
def test_a_damaged_note_of_a_run_is_told(tmp_path, capsys, damage):
    """It says whose taste served rewards had: taken for a missing one, a trained-on judge would pass as untouched."""
    sides = [picture_folder(tmp_path / "run/evaluation" / s, s, i) for i, s in enumerate(("base", "tuned"))]
    (tmp_path / "run/recipe.yaml").write_text("online: {train_prompts: animals, rewards: ['remote:http://127.0.0.1:1']}")
    (tmp_path / "run/log.jsonl").write_text("")
    (tmp_path / "run/run.json").write_bytes(damage.encode("latin-1"))
    for words in (("compare", *sides, "--output_dir", tmp_path / "out"), ("report", tmp_path / "run")):
        code, _, errors = told(capsys, *words)
        assert code == 2
        assert re.search(r"run\.json.*; mend it, or delete it", errors), errors
    (tmp_path / "run/run.json").unlink()  # a missing one is none
    assert told(capsys, "compare", *sides, "--output_dir", tmp_path / "out", "--draws", 200)[0] == 0


def test_a_damaged_note_of_what_drew_the_pictures_is_told(tmp_path):
    a, b = picture_folder(tmp_path / "a", "one", 0), picture_folder(tmp_path / "b", "two", 1)
    (b / "model.json").write_text('{"loras": ["run/py')
    with pytest.raises(UserError, match=r"model\.json cannot be read.*write it again"):
        compare_folders([a, b], draws=200)


def test_a_damaged_line_of_a_log_is_told_and_one_cut_short_left_out(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert told(capsys, "report", tmp_path, "--output", tmp_path / "page.html")[0] == 0
    assert "loss from 1 to 0.5" in (tmp_path / "page.html").read_text()
    log.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n{"step": 3, "loss": 0.5}\n')
    assert "log.jsonl, line 2: not JSON" in told(capsys, "report", tmp_path, "--output", tmp_path / "page.html")[2]


def test_rewards_of_the_run_are_contaminated(tmp_path):
    judges = (("pickscore:here", "held out"), ("fresh", "held out"))
    a = picture_folder(tmp_path / "run/evaluation/base", "base", 0, judges=judges)
    b = picture_folder(tmp_path / "run/evaluation/tuned", "tuned", 1, judges=judges)
    (tmp_path / "run/recipe.yaml").write_text("online: {train_prompts: animals, rewards: [pickscore:elsewhere, mod:f]}")
    found = compare_folders([a, b], draws=200)
    assert {c.judge: c.contaminated for c in found.versus[0].comparisons} == {"pickscore:here": True, "fresh": False}
    assert found.notes == ["Training followed mod:f, which judged nothing here."]
    # The same where the picture folder says which weights drew it.
    (tmp_path / "away").mkdir()
    c = picture_folder(tmp_path / "away/x/y/z", "tuned", 1, judges=judges)
    (c / "model.json").write_text(json.dumps({"loras": [str(tmp_path / "run" / "pytorch_lora_weights.safetensors")]}))
    d = picture_folder(tmp_path / "away/x/y/w", "base", 0, judges=judges)
    assert compare_folders([d, c], draws=200).versus[0].comparisons[-1].contaminated
    assert compare_folders([d, c], trained_on=["fresh"], draws=200).versus[0].macro is None
    assert rewards_in({"online": {"rewards": ["x"]}}) == []  # offline: nothing was rewarded
    with pytest.raises(UserError, match="two picture folders"):
        compare_folders([a])
