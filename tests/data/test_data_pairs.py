from __future__ import annotations

import csv
import itertools
import json
import math
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from palate.base.errors import UserError
from palate.data.pairs import PreferencePair, read_pairs

GALLERY = Path(__file__).parents[3] / "shared" / "data" / "preferences" / "hpdv2-gallery" / "rankings.jsonl"


def picture(color: int, file_format: str = "PNG") -> bytes:
    stream = BytesIO()
    Image.new("RGB", (8, 8), (color, 2 * color, 50)).save(stream, file_format)
    return stream.getvalue()


A, B = picture(1), picture(2, "JPEG")


def pickapic(path: Path, rows: list[dict], drop: tuple[str, ...] = ()) -> Path:
    full = [{"caption": "a boat", "jpg_0": A, "jpg_1": B, "label_0": 1.0, "label_1": 0.0, "has_label": True, **r} for r in rows]
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if k not in drop} for row in full])
    pq.write_table(table, path, use_dictionary=False, write_batch_size=16)  # 16 rows a page
    return path


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images" / "a.png").write_bytes(A)
    (tmp_path / "images" / "b.jpg").write_bytes(B)
    return tmp_path


VOTE = {"prompt": "a boat", "image_0": "images/a.png", "image_1": "images/b.jpg", "label": 1}


# ---- layouts ----


def test_pickapic(tmp_path):
    path = pickapic(
        tmp_path / "votes.parquet",
        [
            {"user_id": 7},
            {"label_0": 0.0, "label_1": 1.0},
            {"label_0": 0.5, "label_1": 0.5},
            {"has_label": False, "label_0": None, "label_1": None},
        ],
    )
    reader = read_pairs(path)
    pairs = list(reader)
    assert [pair.label for pair in pairs] == [1.0, 0.0]
    assert pairs[0] == PreferencePair("a boat", A, B, 1.0, 1.0, "votes.parquet, row 1", "")
    counts = reader.counts
    assert (counts.rows, counts.pairs, counts.ties_dropped, counts.ties_kept, counts.unlabelled) == (4, 2, 1, 0, 1)
    assert counts.bad == []
    kept = read_pairs(path, ties="keep")
    assert [pair.label for pair in kept] == [1.0, 0.0, 0.5]
    assert (kept.counts.ties_dropped, kept.counts.ties_kept) == (0, 1)


def test_has_label_is_optional(tmp_path):
    assert len(list(read_pairs(pickapic(tmp_path / "x", [{}, {}], drop=("has_label",))))) == 2


def test_folder_and_glob_of_parquet(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("b", "a"):
        pickapic(tmp_path / "data" / f"{name}.parquet", [{"caption": name}, {"caption": name + "2"}])
    expected = ["a", "a2", "b", "b2"]
    assert [pair.prompt for pair in read_pairs(tmp_path)] == expected
    assert [pair.prompt for pair in read_pairs(f"{tmp_path}/data/*.parquet")] == expected
    assert [pair.source for pair in read_pairs(tmp_path)][2] == "b.parquet, row 1"


def test_chosen_rejected_parquet_of_bytes_and_of_structs(tmp_path):
    folder(tmp_path)
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"prompt": ["x"], "chosen": [B], "rejected": [A]}), plain)
    (pair,) = read_pairs(plain)
    assert (pair.image_0, pair.image_1, pair.label) == (B, A, 1.0)
    nested = tmp_path / "nested.parquet"
    structs = {"chosen": [{"bytes": B, "path": "b.jpg"}], "rejected": [{"bytes": None, "path": "images/a.png"}]}
    pq.write_table(pa.table({"prompt": ["x"], **structs}), nested)
    (pair,) = read_pairs(nested)
    assert (pair.image_0, pair.image_1, pair.label) == (B, A, 1.0)


@pytest.mark.parametrize("suffix", ["", "_file_name"])
def test_imagefolder(tmp_path, suffix):
    row = {"prompt": "x", f"chosen{suffix}": "images/a.png", f"rejected{suffix}": "images/b.jpg", "weight": 2, "rater": 5}
    jsonl(folder(tmp_path) / "metadata.jsonl", [row])
    (pair,) = read_pairs(tmp_path)
    assert pair == PreferencePair("x", A, B, 1.0, 2.0, "metadata.jsonl, row 1", "5")


def test_csv(tmp_path):
    with (folder(tmp_path) / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "image_0", "image_1", "label", "weight", "rater"])
        writer.writerow(['a "boat",\nred', "images/a.png", "images/b.jpg", "0.25", "", "eve"])
    (pair,) = read_pairs(tmp_path)
    assert pair == PreferencePair('a "boat",\nred', A, B, 0.25, 1.0, "metadata.csv, row 1", "eve")


def test_columns_map_our_names_to_theirs(tmp_path):
    path = jsonl(folder(tmp_path) / "v.jsonl", [{"text": "x", "win": "images/a.png", "lose": "images/b.jpg", "who": 3}])
    (pair,) = read_pairs(path, columns={"caption": "text", "chosen": "win", "rejected": "lose", "rater": "who"})
    assert (pair.prompt, pair.image_0, pair.rater) == ("x", A, "3")


@settings(max_examples=20)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_soft_labels_pass_unchanged(tmp_path_factory, labels):
    path = jsonl(folder(tmp_path_factory.mktemp("v")) / "v.jsonl", [{**VOTE, "label": label} for label in labels])
    reader = read_pairs(path, ties="keep")
    assert [pair.label for pair in reader] == labels
    assert reader.counts.ties_kept == labels.count(0.5)


def test_reading_is_lazy_and_repeatable(tmp_path):
    path = jsonl(folder(tmp_path) / "v.jsonl", [VOTE, VOTE, {**VOTE, "label": 7}])
    reader = read_pairs(path, max_train_samples=2)
    assert len(list(reader)) == 2
    assert len(list(reader)) == 2
    assert reader.counts.rows == 2  # the bad third row was never met
    with pytest.raises(UserError, match="row 3"):
        list(read_pairs(path))


def test_parquet_is_streamed_not_read_ahead(tmp_path):
    # One row group of 20 MB in pages of 16 rows (0.8 MB a column); rows after the first are not pictures, nor looked at yet.
    rest = [{"jpg_0": os.urandom(50_000), "jpg_1": os.urandom(50_000)} for _ in range(200)]
    path = pickapic(tmp_path / "x.parquet", [{}, *rest])
    before = pa.total_allocated_bytes()
    stream = iter(read_pairs(path))
    assert next(stream).image_0 == A
    assert pa.total_allocated_bytes() - before < 10e6
    stream.close()


# ---- bad rows ----

BAD_VOTES = [
    ({"prompt": ""}, "prompt", "non-empty string, found ''"),
    ({"prompt": None}, "prompt", "non-empty string, found None"),
    ({"prompt": 3}, "prompt", "non-empty string, found 3"),
    ({"prompt": "\ud800"}, "prompt", "Unicode"),
    ({"label": math.nan}, "label", r"in \[0, 1\], found nan"),
    ({"label": 1.01}, "label", r"in \[0, 1\]"),
    ({"label": -1}, "label", r"in \[0, 1\]"),
    ({"label": "left"}, "label", "'left'"),
    ({"label": None}, "label", "missing"),
    ({"weight": -1}, "weight", "0 or more"),
    ({"weight": math.inf}, "weight", "0 or more"),
    ({"image_0": "images/none.png"}, "image_0", "does not exist"),
    ({"image_0": "images"}, "image_0", "is a folder"),
    ({"image_1": ""}, "image_1", "missing"),
    ({"image_1": 5}, "image_1", "bytes or path"),
    ({"image_1": "../outside.png"}, "image_1", "outside"),
    ({"image_1": "images/link.png"}, "image_1", "outside"),
    ({"image_1": "/etc/hostname"}, "image_1", "outside"),
    ({"image_1": "a\0b"}, "image_1", "cannot be read"),
    ({"image_1": "images/text.png"}, "image_1", "not a picture"),
    ({"image_1": "images/empty.png"}, "image_1", "empty"),
    ({"image_1": "images/short.png"}, "image_1", "cannot be decoded"),
]


@pytest.mark.parametrize(("change", "column", "words"), BAD_VOTES)
def test_bad_values_are_told_with_row_and_column(tmp_path, change, column, words):
    (tmp_path / "set").mkdir()
    root = folder(tmp_path / "set")
    (tmp_path / "outside.png").write_bytes(A)
    (root / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "images" / "text.png").write_text("hello")
    (root / "images" / "empty.png").write_bytes(b"")
    (root / "images" / "short.png").write_bytes(A[:-20])
    path = jsonl(root / "v.jsonl", [VOTE, "", {**VOTE, **change}, VOTE])
    with pytest.raises(UserError, match=rf"v\.jsonl, row 2, column {column}: .*{words}.*max_bad_rows"):
        list(read_pairs(path))
    reader = read_pairs(path, max_bad_rows=1)
    assert len(list(reader)) == 2
    ((row, bad_column, _reason, file),) = reader.counts.bad
    assert (row, bad_column, file) == (2, column, "v.jsonl")
    assert (reader.counts.rows, reader.counts.pairs) == (3, 2)


def test_absolute_paths_are_refused_even_if_they_lead_inside(tmp_path):
    path = jsonl(folder(tmp_path) / "v.jsonl", [{**VOTE, "image_0": str(tmp_path / "images" / "a.png")}])
    with pytest.raises(UserError, match=r"row 1, column image_0.*must be relative"):
        list(read_pairs(path))


@pytest.mark.parametrize("line", ['{"prompt": ', "[1, 2]", '"text"'])
def test_lines_that_are_not_objects(tmp_path, line):
    path = jsonl(folder(tmp_path) / "v.jsonl", [VOTE, line, VOTE])
    with pytest.raises(UserError, match=r"row 2.*JSON"):
        list(read_pairs(path))
    assert len(list(read_pairs(path, max_bad_rows=1))) == 2


def test_a_line_that_is_not_utf8_is_one_bad_row(tmp_path):
    path = jsonl(folder(tmp_path) / "v.jsonl", [VOTE])
    path.write_bytes(path.read_bytes() + b'{"prompt": "caf\xe9"}\n' + path.read_bytes())
    assert len(list(read_pairs(path, max_bad_rows=1))) == 2


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"label_0": 1.0, "label_1": 1.0}, "label_1"),
        ({"label_0": math.nan}, "label_0"),
        ({"label_1": None}, "label_1"),
        ({"jpg_0": A[:-20]}, "jpg_0"),
        ({"jpg_1": None}, "jpg_1"),
        ({"caption": None}, "caption"),
    ],
)
def test_bad_rows_of_pickapic(tmp_path, change, column):
    path = pickapic(tmp_path / "x.parquet", [{}, {}, change])
    with pytest.raises(UserError, match=f"row 3, column {column}"):
        list(read_pairs(path))


def test_the_first_few_bad_rows_are_listed(tmp_path):
    path = jsonl(folder(tmp_path) / "v.jsonl", [VOTE, *[{**VOTE, "label": 2}] * 9])
    with pytest.raises(UserError, match=r"row 2,.*row 3,.*row 6\).*max_bad_rows") as caught:
        list(read_pairs(path))
    assert "row 7" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(list(read_pairs(path, max_bad_rows=9))) == 1


def test_a_dropped_tie_is_not_looked_at_but_a_kept_one_is(tmp_path):
    path = jsonl(folder(tmp_path) / "v.jsonl", [VOTE, {**VOTE, "label": 0.5, "image_0": "none.png"}])
    assert len(list(read_pairs(path))) == 1
    with pytest.raises(UserError, match="row 2, column image_0"):
        list(read_pairs(path, ties="keep"))


# ---- wrong sources and arguments ----


def test_only_ties(tmp_path):
    path = jsonl(folder(tmp_path) / "v.jsonl", [{**VOTE, "label": 0.5}] * 3)
    with pytest.raises(UserError, match=r"only ties \(3 pairs\).*ties: keep"):
        list(read_pairs(path))


def test_nothing_usable(tmp_path):
    with pytest.raises(UserError, match="1 without a label"):
        list(read_pairs(pickapic(tmp_path / "x", [{"has_label": False}])))
    header = tmp_path / "v.csv"
    header.write_text("prompt,chosen,rejected\n")
    with pytest.raises(UserError, match="no preference pairs"):
        list(read_pairs(header))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b"", "is empty"),
        ("x.jsonl", b" \n\n", "is empty"),
        ("x.jsonl", b"{broken\n", "no line is a JSON object"),
        ("x.json", b'[{"prompt": "x"}]', "'image' or 'file_name' is missing"),
        ("x.parquet", b"PAR1 and then it ends", "not a complete parquet file"),
        ("x.csv", b"caf\xe9,b\n", "cannot be read as CSV"),
        ("x.csv", b"prompt,choosen,rejected\n", r"'chosen' or 'chosen_file_name' is missing \(did you mean 'choosen'\?"),
        ("x.csv", b"promt,chosen,rejected\n", r"'prompt' or 'caption' or 'text' is missing \(did you mean 'promt'.*columns: "),
        ("x.csv", b"prompt,image_0,image_1\n", "'label' or 'liked' is missing.*choose from image_0, image_1, prompt"),
        ("x.csv", b"prompt,images\n", "'rankings' is missing"),
    ],
)
def test_files_that_cannot_be_used_are_refused_at_once(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_pairs(tmp_path / name)


def test_missing_sources(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(f"{tmp_path}/*.parquet")
    with pytest.raises(UserError, match=r"metadata\.jsonl.*parquet"):
        read_pairs(tmp_path)


def test_missing_pickapic_column(tmp_path):
    with pytest.raises(UserError, match=r"'label_1' is missing.*did you mean 'label_0'"):
        read_pairs(pickapic(tmp_path / "x", [{}], drop=("label_1",)))


def test_wrong_arguments(tmp_path):
    path = jsonl(folder(tmp_path) / "v.jsonl", [VOTE])
    with pytest.raises(UserError, match=r"ties is 'kept'.*did you mean 'keep'"):
        read_pairs(path, ties="kept")
    with pytest.raises(UserError, match="max_bad_rows"):
        read_pairs(path, max_bad_rows=-1)
    with pytest.raises(UserError, match="max_train_samples"):
        read_pairs(path, max_train_samples=0)
    with pytest.raises(UserError, match=r"unknown name 'promt'.*did you mean 'prompt'"):
        read_pairs(path, columns={"promt": "prompt"})
    with pytest.raises(UserError, match=r"maps 'prompt' to 'text'.*missing"):
        read_pairs(path, columns={"prompt": "text"})


# ---- rankings ----


def ranked(tmp_path: Path, rankings: list, images: list | None = None) -> Path:
    folder(tmp_path)
    (tmp_path / "images" / "c.png").write_bytes(picture(3))
    row = {"prompt": "x", "images": images or ["images/a.png", "images/b.jpg", "images/c.png"], "rankings": rankings}
    return jsonl(tmp_path / "rankings.jsonl", [row])


def test_rankings_give_the_share_of_annotators(tmp_path):
    # Before b, a is put by persons 1, 2, 4 and half by 3: 3.5 / 4; before c by all but 4: 3 / 4.
    # Before c, b is put by persons 1 and 3: 2 / 4, a tie.
    path = ranked(tmp_path, [[1, 2, 3], [1, 3, 2], [1, 1, 2], [2, 3, 1]])
    pairs = list(read_pairs(path, ties="keep"))
    assert [pair.label for pair in pairs] == [0.875, 0.75, 0.5]
    assert [(pair.image_0, pair.image_1) for pair in pairs] == [(A, B), (A, picture(3)), (B, picture(3))]
    assert {pair.weight for pair in pairs} == {1.0}
    reader = read_pairs(tmp_path)
    assert [pair.label for pair in reader] == [0.875, 0.75]
    assert (reader.counts.rows, reader.counts.pairs, reader.counts.ties_dropped) == (1, 2, 1)


@pytest.mark.parametrize(
    ("rankings", "images", "column"),
    [
        ([], None, "rankings"),
        ([[1, 2]], None, "rankings"),
        ([[1, 2, None]], None, "rankings"),
        ([[1, 2, 3]], ["images/a.png"], "images"),
        ([[1, 2, 3]], ["images/a.png", "images/b.jpg", "none.png"], "images"),
    ],
)
def test_bad_rankings(tmp_path, rankings, images, column):
    with pytest.raises(UserError, match=f"row 1, column {column}"):
        list(read_pairs(ranked(tmp_path, rankings, images)))


@pytest.mark.skipif(not GALLERY.exists(), reason="real preferences: put them into ../shared/data/preferences")
def test_real_rankings():
    reader = read_pairs(GALLERY, ties="keep", max_train_samples=3 * 36)
    pairs = list(reader)
    assert reader.counts.rows == 3  # nine pictures a prompt: 9 * 8 / 2 = 36 pairs
    # The first row's second picture is ranked before its first by all ten people.
    assert pairs[0].label == 0.0
    rows = [json.loads(line) for line in GALLERY.read_text().splitlines()[:3]]
    for row, start in zip(rows, (0, 36, 72), strict=True):
        # Borda's law: a picture's summed share over its eight rivals is the mean number of pictures ranked after it.
        shares = np.zeros(9)
        for (i, j), pair in zip(itertools.combinations(range(9), 2), pairs[start : start + 36], strict=True):
            shares[i] += pair.label
            shares[j] += 1 - pair.label
        assert shares == pytest.approx(9 - np.mean(row["rankings"], axis=0))
