"""Picture folders: what is written is read, and what is wrong is told in one line."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.base.errors import UserError
from palate.evaluation import manifest
from palate.evaluation.manifest import Picture, ScoreFile

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"picture")
    return tmp_path


def rows(folder, *lines):
    (folder / "manifest.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")


A = {"file": "a.png", "prompt": "a red boat", "seed": 7, "index": 0, "model": "base"}


def test_written_and_appended_is_read(folder):
    first = Picture("a.png", "a red boat", 7, 0, "base", negative="blur", metadata={"category": "ships"})
    second = Picture("b.png", "a red boat", 8, 1, "base")
    manifest.append_manifest(folder, [first])
    manifest.append_manifest(folder, [second])
    assert manifest.read_manifest(folder) == [first, second]
    assert [p.key for p in manifest.read_manifest(folder)] == [("a red boat", 7, 0), ("a red boat", 8, 1)]


@given(prompt=TEXT, negative=st.none() | TEXT, seed=st.integers(0, 2**53))
def test_any_prompt_survives(tmp_path_factory, prompt, negative, seed):
    folder = tmp_path_factory.mktemp("any")
    picture = Picture("a.png", prompt, seed, 0, "m", negative)
    manifest.append_manifest(folder, [picture])
    assert manifest.read_manifest(folder, check_files=False) == [picture]


def test_a_line_that_was_cut_short_is_left_out_and_removed_by_the_next(folder):
    (folder / "manifest.jsonl").write_text(json.dumps(A) + "\n" + '{"file": "b.p')
    assert [p.file for p in manifest.read_manifest(folder)] == ["a.png"]
    manifest.append_manifest(folder, [Picture("b.png", "a red boat", 8, 1, "base")])
    assert [p.file for p in manifest.read_manifest(folder)] == ["a.png", "b.png"]
    # A last line by hand, whole but without its end, is kept.
    (folder / "manifest.jsonl").write_text(json.dumps(A))
    manifest.append_manifest(folder, [Picture("b.png", "a red boat", 8, 1, "base")])
    assert len(manifest.read_manifest(folder)) == 2


def test_by_hand_index_and_model_may_be_left_out(folder):
    rows(folder, {"file": "a.png", "prompt": "a red boat", "seed": 7})
    assert manifest.read_manifest(folder) == [Picture("a.png", "a red boat", 7, 0, "unnamed")]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([A, {**A, "file": "b.png"}], "line 2: the same prompt, seed and index as line 1"),
        ([A, {**A, "seed": 8}], "line 2: the same file as line 1"),
        (["{not json", A], "line 1: not JSON"),
        (["[1]"], "line 1: expected a JSON object"),
        ([{**A, "file": "../a.png"}], "leads outside the folder"),
        ([{**A, "file": "/etc/passwd"}], "leads outside the folder"),
        ([{**A, "prompt": ""}], "prompt must be text"),
        ([{**A, "seed": "seven"}], "seed must be a whole number, found 'seven'"),
        ([{**A, "seed": 1.5}], "seed must be a whole number, found 1.5"),
        ([{**A, "seed": "1e400"}], "seed must be a whole number, found '1e400'"),
        ([{**A, "index": True}], "index must be a whole number"),
        ([{**A, "metadata": 3}], "metadata must be an object"),
        ([A, {**A, "file": "gone.png", "seed": 9}], "lacks 1 of the 2 pictures in manifest.jsonl, the first is gone.png"),
        ([""], "names no pictures"),
        ([{"file_name": "a.png", "text": "x"}], "file is missing; expected file, prompt and seed, found file_name, text"),
        ([{**A, "file": "QUJD" * 3000}], "which looks like a picture in base64"),
        ([{**A, "file": "https://example.com/a.png"}], "an address: download the pictures"),
        ([[A]], "expected a JSON object, one a line, found [{"),
    ],
)
def test_what_is_wrong_is_told(folder, lines, said):
    rows(folder, *lines)
    with pytest.raises(UserError, match=re.escape(said)):
        manifest.read_manifest(folder)


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(UserError, match=r"has no manifest.jsonl; expected a folder that palate generate wrote"):
        manifest.read_manifest(tmp_path)


def test_settings(folder):
    assert manifest.read_settings(folder) == {}
    manifest.write_settings(folder, {"steps": 25})
    assert manifest.read_settings(folder) == {"steps": 25}
    (folder / "settings.json").write_text("[1]")
    with pytest.raises(UserError, match="expected one JSON object"):
        manifest.read_settings(folder)


def test_scores_append_and_the_last_line_counts(folder):
    header = ScoreFile("pickscore:models/Pick Score", "pickscore", "f00", "held out")
    path = manifest.score_path(folder, header.judge)
    assert path == folder / "scores" / "pickscore-models-Pick-Score.jsonl"
    manifest.append_scores(path, [("a.png", 0.5), ("b.png", "is truncated")], header)
    assert manifest.read_scores(path).bad == {"b.png": "is truncated"}
    manifest.append_scores(path, [("b.png", -1.0)], header)
    found = manifest.read_all_scores(folder)[header.judge]
    assert (found.scores, found.bad, found.header()) == ({"a.png": 0.5, "b.png": -1.0}, {}, header.header())
    assert len(path.read_text().splitlines()) == 4
    path.write_text(json.dumps(header.header()) + "\n" + '{"file": "a.png", "score": NaN}\n')
    with pytest.raises(UserError, match="line 2: expected"):
        manifest.read_scores(path)
    path.write_text('{"file": "a.png", "score": 1}\n')
    with pytest.raises(UserError, match="first line must be"):
        manifest.read_scores(path)


# As other programs and systems write it ----


WHOLE = [(1.0, 1), ("1", 1), ("1.0", 1), (" 7 ", 7), ("18446744073709551615", 2**64 - 1), (-3.0, -3)]


@pytest.mark.parametrize(("written", "seed"), WHOLE)
def test_whole_numbers_as_other_programs_write_them(folder, written, seed):
    rows(folder, {**A, "seed": written, "index": 0.0})
    (found,) = manifest.read_manifest(folder)
    assert (found.seed, found.index, type(found.seed)) == (seed, 0, int)


def test_null_is_as_if_it_were_left_out(folder):
    rows(folder, {**A, "index": None, "model": None, "metadata": None, "negative": None, "init_image": None})
    (found,) = manifest.read_manifest(folder)
    rows(folder, {name: A[name] for name in ("file", "prompt", "seed")})
    assert manifest.read_manifest(folder) == [found]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_names_as_other_systems_write_them(folder, form, separator):
    name = unicodedata.normalize(form, "été/über.png")
    other = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], name)
    (folder / name).parent.mkdir()
    (folder / name).write_bytes(b"x")
    rows(folder, {**A, "file": other.replace("/", separator)})
    assert [p.file for p in manifest.read_manifest(folder)] == [name]


def test_pictures_that_no_line_names(folder):
    (folder / "more").mkdir()
    (folder / "b.png").unlink()
    for name in ("a.png", "b.JPG", "notes.txt", "._a.png", "more/c.png", "more/d.webp"):
        (folder / name).write_bytes(b"x")
    rows(folder, A, {**A, "file": "more/c.png", "seed": 9})
    assert manifest.unlisted(folder, manifest.read_manifest(folder)) == ["b.JPG", "more/d.webp"]
