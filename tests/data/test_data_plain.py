"""Folders of plain pictures: who tells the prompt, in which order, and that every reader reads the same."""

from __future__ import annotations

import json

import pytest
from drawn_pictures import draw

from palate.base.errors import UserError
from palate.data.pairs import read
from palate.data.plain import read_plain, words_of_name
from palate.evaluation.manifest import is_picture_folder, read_manifest


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "mine"
    draw(home / "1.png", "a boat", seed=5)
    draw(home / "2.png", "a boat", seed=5, colour=50)
    draw(home / "sub" / "3.png", "not this", seed=9, colour=90)
    (home / "sub" / "3.txt").write_text("a cat\n")
    draw(home / "grid-0001.png", "a boat", seed=5, colour=99)
    return home


def test_every_reader_reads_the_same(folder):
    plain = read_plain(folder)
    assert [(p.file, p.prompt, p.seed) for p in plain.pictures] == [
        ("1.png", "a boat", 5),
        ("2.png", "a boat", 5),
        ("sub/3.png", "a cat", 9),
    ]
    assert plain.sentence() == "2 by the picture itself, 1 by a text beside"
    listed = read_manifest(folder)
    assert [(p.file, *p.key, p.model) for p in listed] == [
        ("1.png", "a boat", 5, 0, "dream"),
        ("2.png", "a boat", 5, 1, "dream"),
        ("sub/3.png", "a cat", 9, 0, "dream"),
    ]
    reader = read(folder)
    assert [(item.prompt, item.image) for item in reader] == [(p.prompt, (folder / p.file).read_bytes()) for p in listed]
    assert reader.counts.by_reason() == {"contact sheets": 1}
    assert is_picture_folder(folder)


def test_a_picture_without_words_is_left_out_of_training_refused_by_judges_and_named_for_votes(folder):
    draw(folder / "00012-77-a_red-boat (2).png", colour=7)
    reader = read(folder)
    assert len(list(reader)) == 3
    assert reader.counts.by_reason() == {"contact sheets": 1, "pictures without a prompt": 1}
    with pytest.raises(UserError, match=r"nothing tells the prompts of 1 of its pictures, such as 00012.*write a .txt"):
        read_manifest(folder)
    assert "a red boat" in {p.prompt for p in read_manifest(folder, names=True)}


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("a_red_boat_03", "a red boat"),
        ("00012-345-a_red-boat (2)", "a red boat"),
        ("red-boat", "red boat"),
        ("IMG_1234", "IMG"),
        ("0001", "0001"),
        ("a boat - 2", "a boat"),
        ("3 boats", "3 boats"),
        ("boats of 1990", "boats of 1990"),
        ("ComfyUI_00001_", "ComfyUI"),
        ("日本の舟_2", "日本の舟"),
    ],
)
def test_words_of_a_name(stem, words):
    assert words_of_name(stem) == words


def test_a_table_tells_too_and_stays_inside(folder, tmp_path):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "by a table"}) + "\n")
    assert [(p.file, p.prompt, p.seed, p.told_by) for p in read_plain(folder).pictures] == [
        ("1.png", "by a table", 5, "a table")
    ]
    draw(tmp_path / "out.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "../out.png", "text": "x"}) + "\n")
    with pytest.raises(UserError, match=r"row 1, column file_name: names no picture in the folder"):
        read_plain(folder)
    (folder / "metadata.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "1.png", "rejected": "2.png"}) + "\n")
    with pytest.raises(UserError, match="preference pairs"):
        read_plain(folder)
    assert not is_picture_folder(folder)


def test_a_blank_text_is_told(folder):
    (folder / "1.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"1.png: its prompt must be a non-empty string"):
        read_plain(folder)
    (tmp := folder.parent / "none").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        read_plain(tmp)
