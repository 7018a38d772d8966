"""Nothing is taken for what it is not: truth, columns, pictures that nobody counted, files of other systems."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from palate.base.errors import UserError
from palate.data.options import Reading
from palate.data.pairs import read, read_pairs
from palate.data.values import BadValueError, truth


def picture(seed: int, size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


@pytest.fixture
def home(tmp_path) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    return tmp_path


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(source: object, **options: object) -> str:
    """What is said of a source; always one readable line."""
    with pytest.raises(UserError) as caught:
        list(read(source, **options))
    line = str(caught.value)
    assert "\n" not in line
    return line


# A filter that cannot read a value does not pass it ----

TRUE = [True, 1, 1.0, "true", "True", " TRUE ", "1", "1.0", "yes", "Y", "t", np.float32(1), np.bool_(True)]
FALSE = [False, 0, 0.0, "false", "False", "FALSE", "0", "0.0", "no", "n", "F", np.int64(0), np.bool_(False)]


@pytest.mark.parametrize(("values", "expected"), [(TRUE, True), (FALSE, False)])
def test_truth_is_read_however_it_is_written(values, expected):
    assert [truth("x", value) for value in values] == [expected] * len(values)


@pytest.mark.parametrize("value", ["maybe", 2, 0.5, -1, float("nan"), "nan", None, "", " ", [True], {}, b"x", 10**400])
def test_what_is_neither_true_nor_false_is_a_bad_value(value):
    with pytest.raises(BadValueError):
        truth("x", value)


@pytest.mark.parametrize("column", ["has_label", "are_different"])
@pytest.mark.parametrize("no", FALSE[:11])
def test_rows_that_say_no_are_left_out_in_csv(home, column, no):
    text = "caption,jpg_0,jpg_1,label_0,label_1," + column + "\n"
    (home / "metadata.csv").write_text(text + f"a,0.png,1.png,1.0,0.0,True\nb,1.png,2.png,1.0,0.0,{no}\n")
    reader = read_pairs(home)
    assert [pair.prompt for pair in reader] == ["a"]
    assert reader.counts.unlabelled + reader.counts.identical == 1


@pytest.mark.parametrize(("values", "kept"), [([1.0, 0.0, 1.0], 2), ([True, False, True], 2), ([1, 0, 1], 2)])
def test_rows_that_say_no_are_left_out_in_parquet(tmp_path, values, kept):
    rows = [{"prompt": "x", "chosen": picture(i), "rejected": picture(9), "has_label": v} for i, v in enumerate(values)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert len(list(read_pairs(tmp_path / "x.parquet"))) == kept


@pytest.mark.parametrize("unknown", ["maybe", None, 0.5])
def test_what_the_filter_cannot_read_is_a_bad_row(home, unknown):
    row = {"prompt": "x", "chosen": "0.png", "rejected": "1.png"}
    path = jsonl(home / "x.jsonl", [row, {**row, "has_label": unknown}])
    reader = read_pairs(path, max_bad_rows=1)
    assert len(list(reader)) == 1
    assert reader.counts.bad[0].column == "has_label"


def test_a_vote_for_nobody_is_no_tie(home):
    row = {"prompt": "x", "image_0": "0.png", "image_1": "1.png", "best_image_uid": "p", "image_0_uid": "p", "image_1_uid": "q"}
    path = jsonl(home / "x.jsonl", [row, {**row, "best_image_uid": None}, {**row, "best_image_uid": "TIE"}])
    reader = read_pairs(path, max_bad_rows=1, ties="keep")
    assert [pair.label for pair in reader] == [1.0, 0.5]
    assert reader.counts.bad[0].column == "best_image_uid"


# What rows are is not decided by the first ----


@pytest.mark.parametrize("name", ["liked", "label"])
@pytest.mark.parametrize("form", ["jsonl", "json", "tar"])
def test_a_dislike_is_never_taken_for_a_like(home, name, form):
    rows = [{"prompt": "y", "image": "1.png"}, {"prompt": "z", "image": "2.png", name: False}]
    path = home / f"x.{form}"
    if form == "jsonl":
        jsonl(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        with tarfile.open(path, "w") as archive:
            for i, row in enumerate(rows):
                told = json.dumps({k: v for k, v in row.items() if k != "image"}).encode()
                for ending, data in (("png", picture(i)), ("json", told)):
                    info = tarfile.TarInfo(f"{i}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    found = read(path)
    with pytest.raises(UserError, match=f"row 1, column {name}: is missing"):
        list(found)


def test_a_column_that_comes_too_late_is_a_bad_row(home):
    rows = [{"prompt": str(i), "image": "1.png"} for i in range(300)]
    path = jsonl(home / "x.jsonl", [*rows, {"prompt": "z", "image": "2.png", "liked": False}])
    assert "row 301, column liked: is in none of the first 256 rows" in refusal(path)
    # What tells nothing of the layout may come when it likes.
    path = jsonl(home / "x.jsonl", [*rows, {"prompt": "z", "image": "2.png", "weight": 2, "seed": 7}])
    assert list(read(path))[-1].weight == 2


# What is left out is counted ----


def test_endings_count_in_capitals_too(tmp_path):
    for name in ("IMG_1.JPG", "c.JPEG", "b.png", "d.WebP"):
        (tmp_path / name).write_bytes(picture(len(name), form="PNG"))
    for name in ("IMG_1.txt", "c.TXT", "b.caption", "d.txt"):
        (tmp_path / name).write_text(name)
    reader = read(tmp_path)
    assert sorted(item.prompt for item in reader) == ["IMG_1.txt", "b.caption", "c.TXT", "d.txt"]
    assert not reader.counts.left_out


def test_what_has_no_partner_is_counted(tmp_path):
    for name in ("1.png", "2.png", "3.png", "3.jpg", "5.PNG"):
        (tmp_path / name).write_bytes(picture(1))
    for name in ("1.txt", "3.txt", "3.caption", "readme.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "._1.png").write_bytes(b"Mac")
    reader = read(tmp_path)
    assert len(list(reader)) == 2
    assert dict(reader.counts.left_out) == {
        "pictures without a prompt": 2,
        "further pictures of one name": 1,
        "further texts of one name": 1,
        "texts without a picture": 1,
    }
    assert len(list(reader)) == 2  # and counted anew by a second reading
    assert sum(reader.counts.left_out.values()) == 5


def test_other_data_beside_what_is_read_is_counted(home):
    row = {"prompt": "x", "chosen": "0.png", "rejected": "1.png"}
    jsonl(home / "metadata.jsonl", [row])
    jsonl(home / "more.jsonl", [row])
    reader = read(home)
    list(reader)
    other = {"other files of data, not read ('more.jsonl')": 1}
    assert dict(reader.counts.left_out) == {**other, "pictures that no row names": 2}


@pytest.mark.parametrize("name", ["X.PARQUET", "x.Parquet"])
def test_files_of_a_folder_count_in_capitals_too(tmp_path, name):
    pq.write_table(pa.table({"prompt": ["x"], "chosen": [picture(1)], "rejected": [picture(2)]}), tmp_path / name)
    assert len(list(read_pairs(tmp_path))) == 1


def test_a_shard_from_a_mac(tmp_path):
    members = [("._1.0.jpg", b"Mac"), ("1.0.jpg", picture(1)), ("1.1.jpg", picture(2)), ("1.txt", b"x"), ("1.label", b"1")]
    members += [("__MACOSX/._2.0.jpg", b"Mac"), (".DS_Store", b"Mac")]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert len(list(read_pairs(tmp_path / "x.tar"))) == 1


def test_two_pictures_of_one_column_in_a_sample_are_a_bad_row(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("1.jpg", picture(1)), ("1.png", picture(2)), ("1.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert "column image: is given twice, again by '1.png'" in refusal(tmp_path / "x.tar")


def test_a_picture_that_shows_nothing_is_a_bad_row(home):
    sizes = {"dot": (1, 1), "line": (2000, 1), "bar": (20, 600), "fine": (30, 8)}
    rows = []
    for name, size in sizes.items():
        (home / f"{name}.png").write_bytes(picture(1, size))
        rows.append({"prompt": name, "image": f"{name}.png"})
    reader = read(jsonl(home / "x.jsonl", rows), None)
    with pytest.raises(UserError, match=r"'dot\.png' is 1 x 1 pixels, a placeholder"):
        list(reader)
    reader.reading = type(reader.reading)(max_bad_rows=3)
    assert [item.prompt for item in reader] == ["fine"]


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "rankings.jsonl"])
def test_pictures_that_no_row_names_are_counted(home, table):
    rows = [{"prompt": "x", "images": ["0.png", "1.png"], "rankings": [[1, 2]]}, {"prompt": "y", "images": ["1.png", "0.png"]}]
    if table == "rankings.jsonl":
        jsonl(home / table, [{**row, "rankings": [[1, 2]]} for row in rows])
    elif table == "metadata.csv":
        (home / table).write_text("prompt,chosen,rejected,has_label\nx,0.png,1.png,1\ny,0.png,./1.png,0\n")
    else:
        jsonl(home / table, [{"prompt": "x", "chosen": "0.png", "rejected": "1.png"}, {"prompt": "y", "chosen": "nowhere"}])
    (home / ".ipynb_checkpoints").mkdir()
    (home / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(picture(0))
    reader = read(home, Reading(max_bad_rows=1))
    list(reader)
    lost = 1 if table == "metadata.jsonl" else 2  # its second row names one that is not there
    assert reader.counts.left_out["pictures that no row names"] == lost
    reader = read(home / table, Reading(max_bad_rows=1))  # of a file that is named itself, what lies beside it is no part
    list(reader)
    assert not reader.counts.left_out


@pytest.mark.parametrize("name", [".hidden.png", ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png", "__MACOSX/a.png"])
def test_what_is_hidden_is_no_picture_of_a_set(home, name):
    for i in range(4):
        (home / f"{i}.png").with_suffix(".txt").write_text("seen")
    (home / name).parent.mkdir(exist_ok=True)
    (home / name).write_bytes(picture(9))
    (home / name).with_suffix(".txt").write_text("hidden")
    assert {item.prompt for item in read(home)} == {"seen"}


@pytest.mark.parametrize(
    "names", [("train-0.parquet", "test-0.parquet"), ("data/train/0.parquet", "data/validation/0.parquet")]
)
def test_the_test_split_is_not_trained_on(tmp_path, names):
    for i, name in enumerate((*names, "more.parquet")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        table = {"prompt": [f"{i}"], "chosen": [picture(1)], "rejected": [picture(2)]}
        pq.write_table(pa.table(table), tmp_path / name)
    reader = read_pairs(tmp_path)
    assert {pair.prompt for pair in reader} == {"0", "2"}
    told = f"other files of data, not read ({Path(names[1]).name!r})"
    assert reader.counts.by_reason() == {told: 1}
    (tmp_path / names[0]).unlink()
    assert {pair.prompt for pair in read_pairs(tmp_path)} == {"1", "2"}


def archive(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as found:
        for i, sample in enumerate(samples):
            for ending, data in sample.items():
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(data)
                found.addfile(info, io.BytesIO(data))
    return path


def members_in(path, members):
    with tarfile.open(path, "w") as found:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            found.addfile(info, io.BytesIO(data))
    return path


def test_members_that_nobody_asks_for_refuse_nothing(tmp_path):
    sample = {"png": picture(0), "txt": b"x", "npy": b"\x93NUMPY\xff", "seg.png": b"damaged"}
    (item,) = read(archive(tmp_path / "x.tar", [sample]))
    assert item.prompt == "x"
    for ending in ("label", "json", "txt"):
        assert "of '0." in refusal(archive(tmp_path / "x.tar", [{"png": picture(0), "txt": b"x", ending: b"\x93\xff"}]))


@pytest.mark.parametrize("weight", [1e39, 1e-40])
def test_weights_that_float32_does_not_hold(home, weight):
    rows = [{"prompt": "x", "chosen": "0.png", "rejected": "1.png", "weight": weight}]
    assert "column weight: is 1e" in refusal(jsonl(home / "x.jsonl", rows))


@pytest.mark.parametrize(
    ("name", "data"),
    [("README.md", b"hello"), ("LICENSE", b"x"), ("dataset_info.json", b'{"a": 1}'), ("meta.json", b"[1]"), ("1.cls", b"5")],
)
@pytest.mark.parametrize("first", [True, False])
def test_members_of_no_sample_are_counted(tmp_path, name, data, first):
    sample = [("0.png", picture(0)), ("0.txt", b"x")]
    members = [(name, data), *sample] if first else [*sample, (name, data)]
    reader = read(members_in(tmp_path / "x.tar", members))
    assert len(list(reader)) == 1
    assert (reader.counts.rows, dict(reader.counts.left_out)) == (1, {"members of the archive that belong to no sample": 1})


def test_samples_whose_members_are_apart(tmp_path):
    apart = [("0.png", picture(0)), ("1.png", picture(1)), ("0.txt", b"x"), ("1.txt", b"y")]
    assert "whose members must lie beside each other (tar --sort=name)" in refusal(members_in(tmp_path / "x.tar", apart))


@pytest.mark.parametrize("name", ["._0.png", ".DS_Store", "__MACOSX/0.txt", "Thumbs.db", "~$0.txt", "0.txt.tmp", "0.png.part"])
def test_what_programs_leave_is_no_member(tmp_path, name):
    members = [(name, b"\x00"), ("0.png", picture(0)), (f"a/{name}", b"\x00"), ("0.txt", b"x")]
    reader = read(members_in(tmp_path / "x.tar", members))
    assert len(list(reader)) == 1
    assert not reader.counts.left_out


def test_an_archive_behind_an_archive_is_told(tmp_path):
    one = archive(tmp_path / "x.tar", [{"png": picture(0), "txt": b"x"}])
    one.write_bytes(one.read_bytes() * 2)
    reader = read(one, Reading(max_bad_rows=1))
    assert len(list(reader)) == 1
    assert "a second archive" in reader.counts.bad[0].reason
    one.write_bytes(one.read_bytes()[: one.stat().st_size // 2] + bytes(1 << 16))
    assert len(list(read(one))) == 1


# Tables of other programs ----


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [("prompt", "chosen", "rejected"), (" Prompt ", "CHOSEN", " rejected")])
def test_tables_with_other_delimiters_blanks_and_capitals(home, delimiter, header):
    with (home / "x.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([header, ("a, b; c", "0.png", "1.png"), ("d", "2.png", "3.png")])
    assert [(p.prompt, p.image_0) for p in read_pairs(home / "x.csv")] == [("a, b; c", picture(0)), ("d", picture(2))]


def test_names_of_columns_in_json_and_parquet(home):
    path = jsonl(home / "x.jsonl", [{"Prompt": "x", "Image 0": "0.png", "image-1": "1.png", "LABEL": 1}])
    assert [pair.label for pair in read_pairs(path)] == [1.0]
    pq.write_table(pa.table({"Caption ": ["x"], "Chosen": [picture(1)], "Rejected": [picture(2)]}), home / "x.parquet")
    assert len(list(read_pairs(home / "x.parquet"))) == 1


def test_a_prompt_is_not_cut_at_a_comma(home):
    (home / "x.csv").write_text("image,prompt\n0.png,a red, tall house\n1.png,a boat,\n")
    assert "row 1, column (whole line): has 1 fields more than the header" in refusal(home / "x.csv")


def test_a_long_column_that_nobody_reads(home):
    (home / "x.csv").write_text(f"prompt,image,raw\nx,0.png,{'A' * 300_000}\n")
    assert len(list(read(home / "x.csv"))) == 1


def test_columns_are_separated_as_the_first_line_says(home):
    (home / "x.csv").write_text("sep=|\r\nprompt|image\r\na, b; c|0.png\r\n")
    assert [item.prompt for item in read(home / "x.csv")] == ["a, b; c"]
    (home / "x.csv").write_text("prompt|image\na, b; c|0.png\n")
    assert [item.prompt for item in read(home / "x.csv")] == ["a, b; c"]


@pytest.mark.parametrize(
    ("line", "lost"),
    [('"a "red" house",0.png', "line 3"), ('"a \\"red\\" house",0.png', "line 3"), ('"open,0.png\nx,1.png', "lines 3 to 5")],
)
def test_a_quote_that_takes_in_what_follows_is_told_with_its_lines(home, line, lost):
    (home / "x.csv").write_text(f'prompt,image\nfirst,0.png\n{line}\n"a ""red"" house",1.png\nlast,2.png\n')
    reader = read(home / "x.csv", Reading(max_bad_rows=1))
    prompts = [item.prompt for item in reader]
    assert (prompts[0], prompts[-1]) == ("first", "last")
    assert all('"' not in prompt or prompt == 'a "red" house' for prompt in prompts)
    assert lost in reader.counts.bad[0].reason
    assert reader.counts.rows == len(prompts) + 1


def test_a_quote_that_is_never_closed(home):
    (home / "x.csv").write_text('prompt,image\nfirst,0.png\n"open,1.png\nx,2.png\n')
    reader = read(home / "x.csv", Reading(max_bad_rows=1))
    assert [item.prompt for item in reader] == ["first"]
    assert "lines 3 to 4" in reader.counts.bad[0].reason


@pytest.mark.parametrize("names", [("chosen", "chosen"), ("chosen", "Chosen"), ("chosen", " chosen ")])
def test_of_two_columns_of_one_name_neither_is_chosen_in_silence(home, names):
    (home / "x.csv").write_text(f"prompt,{names[0]},{names[1]},rejected\nx,0.png,1.png,2.png\n")
    assert "has 2 columns 'chosen': rename all but one" in refusal(home / "x.csv")
    if len(set(names)) > 1:
        (pair,) = read(home / "x.csv", Reading(columns={"chosen": names[1]}))
        assert pair.image_0 == picture(1)


@pytest.mark.parametrize("form", ["jsonl", "json", "tar"])
def test_a_name_that_comes_twice_in_an_object_is_a_bad_row(home, form):
    good = '{"prompt": "x", "image": "0.png", "liked": true}'
    bad = '{"prompt": "x", "image": "1.png", "liked": true, "liked": false}'
    if form == "tar":
        with tarfile.open(home / "x.tar", "w") as archive:
            for i, told in enumerate((good, bad)):
                for ending, data in (("png", picture(i)), ("json", told.replace('"image": ', '"path": ').encode())):
                    info = tarfile.TarInfo(f"{i}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    else:
        (home / f"x.{form}").write_text(f"[{good}, {bad}]" if form == "json" else f"{good}\n{bad}\n")
    reader = read(home / f"x.{form}", Reading(max_bad_rows=1))
    assert [item.label for item in reader] == [1.0]
    assert "it has 'liked' twice" in reader.counts.bad[0].reason


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"data": [{"prompt": "x", "image": "0.png"}]}, "holds its rows in 'data': save them alone (jq .data 'x.json' > NEW)"),
        ({"version": 1, "the rows": [{"prompt": "x", "image": "0.png"}]}, "holds its rows in 'the rows': save them alone"),
        ({"prompt": ["x", "y"], "image": ["0.png", "1.png"]}, "holds columns, not rows: save it with to_json"),
        ({"prompt": {"0": "x"}, "image": {"0": "0.png"}}, "holds columns, not rows"),
    ],
)
def test_a_whole_table_in_one_object(home, content, said):
    (home / "x.json").write_text(json.dumps(content))
    assert said in refusal(home / "x.json")


def test_another_encoding_is_told_with_what_converts_it(home):
    (home / "x.csv").write_bytes("prompt,image\ncafé,0.png\n".encode("latin-1"))
    assert "convert it (iconv -f WINDOWS-1252 -t UTF-8 'x.csv' -o NEW)" in refusal(home / "x.csv")


def test_opinions_beside_those_that_are_read_are_told(home):
    path = jsonl(home / "x.jsonl", [{"prompt": "x", "chosen": "0.png", "rejected": "1.png", "label": 0}])
    reader = read_pairs(path)
    assert [pair.label for pair in reader] == [1.0]
    assert reader.counts.by_reason() == {"columns of opinions, not read (label)": 1}


def ranked(home: Path, *rows: tuple) -> Path:
    return jsonl(home / "x.jsonl", [dict(zip(("prompt_id", "prompt", "image_path", "rank"), row, strict=True)) for row in rows])


def test_rows_of_one_prompt_that_are_apart_are_told(home):
    rows = [(7, "a", "0.png", 1), (7, "a", "1.png", 2), (8, "b", "0.png", 1), (8, "b", "2.png", 2), (7, "a", "3.png", 3)]
    assert "7 comes again further down: sort the rows by prompt_id" in refusal(ranked(home, *rows))
    assert len(list(read_pairs(ranked(home, *sorted(rows))))) == 4


@pytest.mark.parametrize("number", [None, ""])
def test_pictures_of_different_prompts_are_never_compared(home, number):
    rows = [("9", "a", "0.png", 1), ("9", "b", "1.png", 2), ("9", "a", "2.png", 2)]
    assert "'9' stands for two prompts" in refusal(ranked(home, *rows))
    nobody = ranked(home, (number, "a", "0.png", 1), (number, "b", "1.png", 2))
    assert "must name the prompt that a picture is of" in refusal(nobody)


# Places and packages ----


def test_pictures_in_a_zip_are_told_of(home):
    path = jsonl(home / "metadata.jsonl", [{"prompt": "x", "image": "images/1.png"}])
    with zipfile.ZipFile(home / "images.zip", "w") as archive:
        archive.writestr("images/1.png", picture(1))
    assert "'images.zip' beside it may hold it: unpack it (unzip 'images.zip')" in refusal(path)
    assert "is a zip archive: unpack it (unzip 'images.zip')" in refusal(home / "images.zip")
    path.unlink()
    for i in range(4):
        (home / f"{i}.png").unlink()
    assert "it holds 'images.zip': unpack it (unzip 'images.zip')" in refusal(home)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"\x1f\x8bxx", "gunzip"),
        (b"BZh9xx", "bunzip2"),
        (b"\xfd7zXZ\0", "unxz"),
        (b"\x28\xb5\x2f\xfdxx", "unzstd"),
        (b"7z\xbc\xaf\x27\x1c", "7z x"),
        (b"Rar!\x1a", "unrar x"),
        ("prompt,image\nä,1.png\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_what_must_be_converted_is_told_with_its_command(tmp_path, head, said):
    (tmp_path / "x.csv").write_bytes(head)
    assert said in refusal(tmp_path / "x.csv")


def saved(folder: Path, parts: int) -> Path:
    """As ``save_to_disk`` of the datasets library lays it out, with a leftover of its own cache."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{parts:05}.arrow" for i in range(parts)]
    for i, name in enumerate([*names, "cache-0123.arrow"]):
        table = pa.table({"prompt": [f"{i}a", f"{i}b"], "chosen": [picture(1)] * 2, "rejected": [picture(2)] * 2})
        with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_data_set_saved_to_disk(tmp_path):
    folder = saved(tmp_path / "set", 2)
    assert [pair.prompt for pair in read_pairs(folder)] == ["0a", "0b", "1a", "1b"]
    assert len(list(read_pairs(folder / "data-00000-of-00002.arrow"))) == 2
    (folder / "state.json").write_text("{}")
    assert "state.json does not name its arrow files" in refusal(folder)


def test_splits_saved_to_disk(tmp_path):
    saved(tmp_path / "all" / "train", 1)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(list(read_pairs(tmp_path / "all"))) == 2
    saved(tmp_path / "all" / "test", 1)
    assert "holds 2 splits of a saved data set; name one of them" in refusal(tmp_path / "all")


def test_arrow_files_of_the_other_form_and_damaged_ones(tmp_path):
    table = pa.table({"prompt": ["x"], "chosen": [picture(1, (64, 64))], "rejected": [picture(2)]})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    assert len(list(read_pairs(tmp_path / "x.arrow"))) == 1
    whole = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(whole[: len(whole) // 2])
    refusal(tmp_path / "x.arrow")


def test_names_as_other_systems_write_them(tmp_path):
    (tmp_path / "img").mkdir()
    composed = unicodedata.normalize("NFC", "café.png")
    (tmp_path / "img" / composed).write_bytes(picture(1))
    for name in ("img\\" + composed, "img/" + unicodedata.normalize("NFD", composed), "img/" + composed):
        assert len(list(read(jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "image": name}])))) == 1
    assert len(list(read(jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "image": "img\\\\" + composed[:-3] + "PNG"}])))) == 1
    jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "image": "img/" + composed}])
    (tmp_path / "img" / composed).rename(tmp_path / "img" / unicodedata.normalize("NFD", composed))
    assert len(list(read(tmp_path / "x.jsonl"))) == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("..\\secret.png", "leads outside"),
        ("C:\\pictures\\1.png", "an absolute path"),
        ("/home/somebody/1.png", "leads outside the folder of the file (an absolute path)"),
        ({"bytes": None, "path": "/home/somebody/.cache/1.png"}, "an absolute path"),
        ("link.png", "is a link that leads outside the folder of the file: copy the picture there (cp -L)"),
        ("linked/x.png", "linked folder"),
        ("dead.png", "is a link to '/nowhere/1.png', which does not exist"),
        ("https://example.com/1.png", "an address: download the pictures"),
        ("data:image/png;base64,AAAA", "looks like a picture in base64"),
        ("/9j/4AAQSkZJRgABAQ", "looks like a picture in base64"),
        ("iVBORw0KGgo" * 3000, "looks like a picture in base64"),
        ("a long story, " * 3000, "a text of 42000 characters"),
        ("folder/" * 60 + "1.png", "does not exist"),
        ("gone/../1.png", "does not exist"),
        ("gone/../../1.png", "leads outside"),
        (".", "is a folder; expected the path of a picture"),
    ],
    ids=range(16),
)
def test_what_names_no_picture_of_the_set(tmp_path, value, said):
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "x.png").write_bytes(picture(1))
    root = tmp_path / "set"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "away" / "x.png")
    (root / "linked").symlink_to(tmp_path / "away")
    (root / "dead.png").symlink_to("/nowhere/1.png")
    line = refusal(jsonl(root / "x.jsonl", [{"prompt": "x", "image": value}]))
    assert said in line
    assert len(line.replace(str(root), "")) <= 300


def test_messages_about_many_columns_are_short(tmp_path):
    row = {f"column {i} {'x' * 100}": i for i in range(200)}
    line = refusal(jsonl(tmp_path / "x.jsonl", [row]))
    assert len(line.replace(str(tmp_path), "")) <= 400
