from __future__ import annotations

import pytest

from palate.data.prompts import read_prompts
from palate.errors import UserError


def test_text_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red boat\r\n\n  a \u2028 blue boat \na red boat\n{red|blue} car\n".encode())
    assert read_prompts(path) == ["a red boat", "a \u2028 blue boat", "a red boat", "{red|blue} car"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_jsonl(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"prompt": "a red boat", "seed": 1}\n\n{"prompt": "ein Schloß"}\n', encoding="utf-8")
    assert read_prompts(str(path)) == ["a red boat", "ein Schloß"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "no prompts"),
        ("a.txt", b"\n  \n", "no prompts"),
        ("a.txt", b"caf\xe9\n", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt": \n', "line 3: not a JSON object"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n', r"line 1: 'prompt' must be.*columns: text"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', "line 2: 'prompt' must be a non-empty string, found 3"),
        ("a.jsonl", b'{"prompt": " "}\n', "non-empty"),
        ("a.json", b'["x",\n "y"]\n', "convert it to JSONL"),
        ("a.tsv", b"Prompt\tCategory\nx\ty\n", "is a table"),
    ],
)
def test_errors(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompts(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path)
