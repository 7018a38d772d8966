"""JSON objects and lines on disk: what is damaged is told with its place, what was cut short may be left out."""

from __future__ import annotations

import pytest

from palate.base.errors import UserError
from palate.base.jsonl import append_lines, read_lines, read_object, write_object


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_object(path, {"prompt": "a kite\u2028é", "n": [1, None]})
    assert read_object(path) == {"prompt": "a kite\u2028é", "n": [1, None]}
    rows = [{"prompt": "one\u2028line"}, {"n": 2}]
    append_lines(tmp_path / "new" / "a.jsonl", rows[:1])
    append_lines(tmp_path / "new" / "a.jsonl", rows[1:])
    assert list(read_lines(tmp_path / "new" / "a.jsonl")) == [(1, rows[0]), (2, rows[1])]


def test_only_a_file_that_may_be_missing_may_be_missing(tmp_path):
    assert read_object(tmp_path / "a.json", optional=True) == {}
    for read in (read_object, lambda path: list(read_lines(path))):
        with pytest.raises(UserError, match=r"a\.json cannot be read"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"null", b"\xff", b"[" * 100_000, rb'{"a": ["\ud83d"]}'])
def test_a_damaged_object_is_told_even_where_none_is_needed(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json .*; begin anew"):
        read_object(path, optional=True, otherwise="begin anew")


@pytest.mark.parametrize(
    ("content", "kept", "may_be_cut"),
    [
        (b'{"a": 1}\n{"a', "line 2: not JSON", False),
        (b'{"a": 1}\n{"a', 1, True),
        (b'{"a": 1}\n{"a\n', "line 2: not JSON", True),  # it has its end: nobody was cut short
        (b'{"a\n{"a": 1}', "line 1: not JSON", True),
        (b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 1}', 2, False),
        (b'{"a": 1}\n[1]', "line 2: expected a JSON object, one a line, found \\[1\\]", True),
        (b'{"a": 1}\n{"b": "\xc3', 1, True),  # inside a character
        (rb'{"\udc00": 1}', "line 1: holds a text that is not valid Unicode", True),
        (b'\xff\n{"a": 1}', "line 1: not in UTF-8 .byte 0xff", True),
    ],
)
def test_lines(tmp_path, content, kept, may_be_cut):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    if isinstance(kept, int):
        assert [row for _, row in read_lines(path, may_be_cut=may_be_cut)] == [{"a": 1}] * kept
        return
    with pytest.raises(UserError, match=kept):
        list(read_lines(path, may_be_cut=may_be_cut))


def test_whole_characters_of_two_halves_are_text(tmp_path):
    (tmp_path / "a.json").write_bytes(rb'{"\ud83d\ude00": 1}')
    assert read_object(tmp_path / "a.json") == {"\U0001f600": 1}


def test_adding_mends_what_was_cut_short_and_keeps_what_was_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a')
    append_lines(path, [{"a": 2}])
    path.write_text(path.read_text().removesuffix("\n"))
    append_lines(path, [{"a": 3}])
    assert [row["a"] for _, row in read_lines(path)] == [1, 2, 3]
