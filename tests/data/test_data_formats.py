from __future__ import annotations

import io
import json
import shutil
import tarfile
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from palate.base import hub
from palate.base.errors import UserError
from palate.data import shards
from palate.data.formats import find
from palate.data.options import Reading
from palate.data.pairs import LikedPicture, PreferencePair, read, read_pairs

SHARED = Path(__file__).parents[3] / "shared" / "data" / "preferences"


def picture(color: int, file_format: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    stream = BytesIO()
    Image.new("RGB", size, (color, 2 * color, 50)).save(stream, file_format)
    return stream.getvalue()


A, B, C = picture(1), picture(2, "JPEG"), picture(3, size=(20, 12))


def folder(path: Path) -> Path:
    for name, data in (("a.png", A), ("b.jpg", B), ("c.png", C)):
        (path / name).write_bytes(data)
    return path


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shard(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def voted(key: str, label: str = "1", prompt: str = "a boat") -> list[tuple[str, bytes | str]]:
    return [(f"{key}.jpg_0", A), (f"{key}.jpg_1", B), (f"{key}.txt", prompt), (f"{key}.label", label)]


# ---- tar ----


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (voted("set/0001", "0.25"), PreferencePair("a boat", A, B, 0.25, 1.0, "x.tar, row 1")),
        (
            [("1.0.png", A), ("1.1.jpg", B), ("1.json", '{"prompt": "x", "label": 0, "weight": 2, "rater": "eve"}')],
            PreferencePair("x", A, B, 0.0, 2.0, "x.tar, row 1", "eve"),
        ),
        ([("1.chosen.png", A), ("1.rejected.jpg", B), ("1.caption", "x")], PreferencePair("x", A, B, 1.0, 1.0, "x.tar, row 1")),
        (
            [("1.jpg_0", A), ("1.jpg_1", B), ("1.json", '{"caption": "x", "label_0": 0, "label_1": 1}')],
            PreferencePair("x", A, B, 0.0, 1.0, "x.tar, row 1"),
        ),
        ([("1.png", A), ("1.txt", "x\n")], LikedPicture("x", A, 1.0, 1.0, "x.tar, row 1")),
        ([("1.png", A), ("1.txt", "x"), ("1.liked", "false")], LikedPicture("x", A, 0.0, 1.0, "x.tar, row 1")),
    ],
)
def test_layouts_of_a_shard(tmp_path, members, expected):
    (found,) = read(shard(tmp_path / "x.tar", members))
    assert found == expected


def test_a_folder_of_shards(tmp_path):
    for name in "ba":
        shard(tmp_path / f"{name}.tar", voted("1", prompt=name + "1") + voted("2", prompt=name + "2"))
    assert [pair.prompt for pair in read_pairs(tmp_path)] == ["a1", "a2", "b1", "b2"]


def test_a_damaged_shard_is_named_skipped_and_counted(tmp_path):
    for name in "abc":
        shard(tmp_path / f"{name}.tar", [m for i in range(4) for m in voted(str(i), prompt=f"{name}{i}")])
    whole = (tmp_path / "b.tar").read_bytes()
    # A member takes a block of 512 bytes for its header and one for its content; sample 2 is members 8 to 11.
    for damaged in (whole[: 8 * 1024 + 700], whole[: 8 * 1024], whole[: 8 * 1024] + b"\xff" * 512 + whole[8 * 1024 + 512 :]):
        (tmp_path / "b.tar").write_bytes(damaged)
        reader = read_pairs(tmp_path, max_bad_rows=1)
        prompts = [pair.prompt for pair in reader]
        assert prompts in (
            ["a0", "a1", "a2", "a3", "b0", "b1", "c0", "c1", "c2", "c3"],
            ["a0", "a1", "a2", "a3", "b0", "c0", "c1", "c2", "c3"],  # the last whole sample may lack members that were lost
        )
        (bad,) = reader.counts.bad
        assert (bad.file, bad.column) == ("b.tar", "(rest of file)")
        with pytest.raises(UserError, match=r"b\.tar, row .*damaged after .* samples.*max_bad_rows"):
            list(read_pairs(tmp_path))


def test_a_damaged_parquet_file_among_others(tmp_path):
    rows, plain = (
        {"prompt": ["x"] * 3, "chosen": [A] * 3, "rejected": [B] * 3},
        {"use_dictionary": False, "compression": "none"},
    )
    for name in "abc":
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet", write_statistics=False, write_page_checksum=True, **plain)
    whole = bytearray((tmp_path / "b.parquet").read_bytes())
    (tmp_path / "b.parquet").write_bytes(whole[:-20])
    reader = read_pairs(tmp_path, max_bad_rows=1)
    assert len(list(reader)) == 6
    assert "b.parquet" in str(reader.counts.bad[0])
    whole[whole.index(A) + 40] ^= 1  # its footer is fine, a page is not
    (tmp_path / "b.parquet").write_bytes(whole)
    reader = read_pairs(tmp_path, max_bad_rows=1)
    assert len(list(reader)) == 6
    assert "damaged after 0 rows" in str(reader.counts.bad[0])
    with pytest.raises(UserError, match=r"b\.parquet, row 1.*damaged"):
        list(read_pairs(tmp_path))


def test_bad_members_are_bad_rows(tmp_path):
    members = [*voted("1"), ("2.json", "{"), *voted("2"), ("3.json", "[1]"), *voted("3"), *voted("4")[1:], *voted("5")]
    reader = read_pairs(shard(tmp_path / "x.tar", members), max_bad_rows=3)
    assert len(list(reader)) == 2
    assert [(bad.row, bad.column) for bad in reader.counts.bad] == [(2, "json"), (3, "json"), (4, "image_0")]


def test_links_and_paths_in_a_shard_lead_nowhere(tmp_path):
    (tmp_path / "secret.png").write_bytes(A)
    (tmp_path / "set").mkdir()
    path = shard(tmp_path / "set" / "x.tar", [*voted("1"), ("2.json", '{"image_0": "../secret.png"}'), *voted("2")[1:]])
    with pytest.raises(UserError, match="outside"):
        list(read_pairs(path))


def test_a_stream_of_shards_takes_constant_memory(tmp_path):
    def peak(samples: int) -> int:
        path = tmp_path / f"{samples}"
        path.mkdir()
        noise = BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(noise, "PNG")
        for part in range(2):
            rows = range(samples // 2)
            members = [(f"{i}.{k}.png", noise.getvalue() + bytes([i, k, part])) for i in rows for k in (0, 1)]
            texts = {i: [(f"{i}.txt", "x"), (f"{i}.label", "1")] for i in rows}
            shard(path / f"{part}.tar", [m for i in rows for m in (*members[2 * i : 2 * i + 2], *texts[i])])
        reader = iter(read_pairs(path))
        next(reader)
        tracemalloc.start()
        assert sum(1 for _ in reader) == samples - 1
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # 10 and 80 pairs of 2 x 50 kB.
    assert peak(80) < peak(10) + 400_000


@given(st.sampled_from(["0", "1", "chosen", "rejected", "image_0", ""]), st.sampled_from(shards.PICTURES), st.booleans())
def test_names_of_pictures(name, ending, before):
    extension = ".".join(part for part in ((name, ending) if before else (ending, name)) if part)
    assert shards.picture_column(extension) == {"0": "image_0", "1": "image_1", "": "image"}.get(name, name)
    assert shards.picture_column(extension.replace(".", "_")) == shards.picture_column(extension)
    assert shards.picture_column(name or "txt") is None


# ---- rankings and scores ----


def test_hpd_v2_training_list(tmp_path):
    # As the data set unpacks: train.json beside train/ with the pictures it names.
    (tmp_path / "train").mkdir()
    folder(tmp_path / "train")
    row = {"prompt": "x", "file_path": ["a.png", "b.jpg"], "user_hash": "u"}
    rows = [{**row, "human_preference": p} for p in ([0, 1], [1, 0], [1, 1])]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    reader = read_pairs(tmp_path / "train.json")
    assert [(pair.image_0, pair.image_1, pair.label) for pair in reader] == [(A, B, 0.0), (A, B, 1.0)]
    assert reader.counts.ties_dropped == 1


def test_hpd_v2_test_list_and_imagereward(tmp_path):
    folder(tmp_path)
    names = ["a.png", "b.jpg", "c.png"]
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": "x", "image_path": names, "rank": [2, 1, 2]}]))
    (tmp_path / "ir.json").write_text(json.dumps([{"prompt": "x", "generations": names, "ranking": [2, 1, 2]}]))
    for name in ("test.json", "ir.json"):
        # b before a, a equal to c, b before c.
        assert [pair.label for pair in read_pairs(tmp_path / name, ties="keep")] == [0.0, 0.5, 1.0]


def test_imagerewarddb_has_one_row_a_picture(tmp_path):
    folder(tmp_path)
    rows = [
        ("1", "x", "a.png", 2),
        ("1", "x", "b.jpg", 1),
        ("2", "y", "c.png", 1),
        ("2", "y", "a.png", 3),
        ("2", "y", "b.jpg", 2),
    ]
    rows = [dict(zip(("prompt_id", "prompt", "image_path", "rank"), row, strict=True)) for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata-train.parquet")
    pairs = [(p.prompt, p.image_0, p.image_1, p.label) for p in read_pairs(tmp_path / "metadata-train.parquet")]
    # Of y: c (rank 1) against a (3) and b (2), then a against b.
    assert pairs == [("x", A, B, 0.0), ("y", C, A, 1.0), ("y", C, B, 1.0), ("y", A, B, 0.0)]


def test_file_names_with_labels(tmp_path):
    rows = [{"prompt": "x", "file_names": ["a.png", "b.jpg", "c.png"], "labels": [0.1, 0.9, 0.1]}]
    jsonl(folder(tmp_path) / "metadata.jsonl", rows)
    assert [p.label for p in read_pairs(tmp_path, ties="keep")] == [0.0, 0.5, 1.0]


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), min_size=1, max_size=5),
    st.sampled_from(["rankings", "scores"]),
)
def test_expanded_pairs_never_contradict(tmp_path_factory, given_ranks, kind):
    if kind == "scores":
        given_ranks = given_ranks[:1]
    content = given_ranks if kind == "rankings" else given_ranks[0]
    path = folder(tmp_path_factory.mktemp("ranked"))
    row = {"prompt": "x", "images": ["a.png", "b.jpg", "c.png"], kind: content}
    pairs = list(read_pairs(jsonl(path / "x.jsonl", [row]), ties="keep"))
    assert [(p.image_0, p.image_1) for p in pairs] == [(A, B), (A, C), (B, C)]
    ab, ac, bc = (p.label for p in pairs)
    if len(given_ranks) == 1:  # one rater's order is transitive, and each of its pairs certain or a tie
        assert {ab, ac, bc} <= {0.0, 0.5, 1.0}
        assert not (ab > 0.5 and bc > 0.5 and ac <= 0.5)
        assert not (ab < 0.5 and bc < 0.5 and ac >= 0.5)
    turned = {**row, "images": row["images"][::-1], kind: [r[::-1] for r in content] if kind == "rankings" else content[::-1]}
    again = [p.label for p in read_pairs(jsonl(path / "y.jsonl", [turned]), ties="keep")]
    assert again == pytest.approx([1 - bc, 1 - ac, 1 - ab])  # turned round, every pair says the opposite


def test_a_json_list_is_read_an_entry_at_a_time(tmp_path):
    folder(tmp_path)
    row = {"prompt": "x" * 5000, "chosen": "a.png", "rejected": "b.jpg"}
    path = tmp_path / "x.json"
    path.write_text(json.dumps([row] * 40, indent=1))  # three chunks
    assert len(list(read_pairs(path))) == 40
    path.write_text(json.dumps([row, 3, row])[:-40])
    reader = read_pairs(path, max_bad_rows=2)
    assert len(list(reader)) == 1
    assert [bad.column for bad in reader.counts.bad] == ["(whole entry)", "(rest of file)"]


# ---- Pick-a-Pic ----


def test_pickapic_without_labels_but_uids(tmp_path):
    rows = [
        {
            "caption": "x",
            "jpg_0": A,
            "jpg_1": B,
            "image_0_uid": "p",
            "image_1_uid": "q",
            "best_image_uid": best,
            "are_different": d,
        }
        for best, d in (("p", True), ("q", True), ("tie", True), ("none", True), ("p", False), ("r", True))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "v1.parquet")
    reader = read_pairs(tmp_path / "v1.parquet", max_bad_rows=1)
    assert [pair.label for pair in reader] == [1.0, 0.0]
    assert (reader.counts.ties_dropped, reader.counts.identical) == (2, 1)
    assert reader.counts.bad[0].column == "best_image_uid"


# ---- single pictures ----


def test_likes(tmp_path):
    rows = [{"prompt": "x", "image": "a.png", "liked": True}, {"prompt": "y", "image": "b.jpg", "liked": 0, "weight": 3}]
    reader = read(jsonl(folder(tmp_path) / "x.jsonl", rows))
    assert list(reader) == [LikedPicture("x", A, 1.0, 1.0, "x.jsonl, row 1"), LikedPicture("y", B, 0.0, 3.0, "x.jsonl, row 2")]
    with pytest.raises(UserError, match="single pictures, not pairs"):
        read_pairs(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="absolute_winners"):
        read(tmp_path / "x.jsonl", Reading(absolute_winners=True))
    bad = read(
        jsonl(tmp_path / "y.jsonl", [rows[0], {**rows[0], "liked": 2}, {**rows[0], "image": "../a.png"}]),
        Reading(max_bad_rows=2),
    )
    assert len(list(bad)) == 1
    assert [row.column for row in bad.counts.bad] == ["liked", "image"]


def test_imagefolder_with_text(tmp_path):
    jsonl(folder(tmp_path) / "metadata.jsonl", [{"file_name": "a.png", "text": "x"}])
    assert list(read(tmp_path)) == [LikedPicture("x", A, 1.0, 1.0, "metadata.jsonl, row 1")]


def test_an_imagefolder_of_several_splits(tmp_path):
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        jsonl(folder(tmp_path / split) / "metadata.jsonl", [{"file_name": "a.png", "text": split}])
    with pytest.raises(UserError, match=r"name one of them: .*test, .*train"):
        read(tmp_path)
    assert [item.prompt for item in read(tmp_path / "train")] == ["train"]
    shutil.rmtree(tmp_path / "test")
    assert [item.prompt for item in read(tmp_path)] == ["train"]


def test_pictures_with_a_text_beside_each(tmp_path):
    (tmp_path / "sub").mkdir()
    folder(tmp_path / "sub")
    (tmp_path / "sub" / "a.txt").write_text("a boat\n")
    (tmp_path / "sub" / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "notes.txt").write_text("belongs to no picture")
    reader = read(tmp_path, Reading(max_bad_rows=1))
    assert [(item.prompt, item.image) for item in reader] == [("a boat", A)]
    assert "b.txt" in str(reader.counts.bad[0])


def test_both_kinds_in_one_folder_are_refused(tmp_path):
    shard(tmp_path / "a.tar", voted("1"))
    shard(tmp_path / "b.tar", [("1.png", A), ("1.txt", "x")])
    with pytest.raises(UserError, match="pairs in some files and single pictures in others"):
        read(tmp_path)


def test_a_compressed_shard_says_what_to_do(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    with pytest.raises(UserError, match="gunzip"):
        read(tmp_path / "x.tar")


# ---- which are kept ----


def votes(tmp_path: Path, rows: list[tuple[str, str, str, float]]) -> Path:
    names = ("prompt", "image_0", "image_1", "label")
    return jsonl(folder(tmp_path) / "votes.jsonl", [dict(zip(names, row, strict=True)) for row in rows])


def test_absolute_winners(tmp_path):
    path = votes(
        tmp_path,
        [
            ("chain", "a.png", "b.jpg", 1),  # a beats b, b beats c: a alone is never beaten
            ("chain", "b.jpg", "c.png", 1),
            ("Chain ", "c.png", "a.png", 0),  # the same prompt but for a capital and a space
            ("tied", "a.png", "b.jpg", 1),
            ("tied", "a.png", "c.png", 0.5),  # a drew once: no absolute winner
            ("circle", "a.png", "b.jpg", 1),
            ("circle", "b.jpg", "a.png", 1),  # two raters disagree
        ],
    )
    reader = read_pairs(path, absolute_winners=True)
    assert [(pair.prompt, pair.label) for pair in reader] == [("chain", 1.0), ("Chain ", 0.0)]
    assert reader.counts.left_out == {"without an absolute winner": 4}
    assert reader.counts.ties_dropped == 1
    assert len(list(reader)) == 2  # and again


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("xy"), st.permutations(["a.png", "b.jpg", "c.png"]), st.sampled_from([0, 0.5, 0.8, 1])))
)
def test_laws_of_absolute_winners(tmp_path_factory, rows):
    rows = [("z", "a.png", "b.jpg", 1), *((p, order[0], order[1], label) for p, order, label in rows)]
    kept = list(read_pairs(votes(tmp_path_factory.mktemp("v"), rows), absolute_winners=True))
    losers = {(p, o[0] if label <= 0.5 else o[1]) for p, *o, label in rows} | {
        (p, o[1]) for p, *o, label in rows if label == 0.5
    }
    data = {"a.png": A, "b.jpg": B, "c.png": C}
    losing = {(p, data[name]) for p, name in losers}
    for pair in kept:
        assert (pair.prompt, pair.image_0 if pair.label > 0.5 else pair.image_1) not in losing
    wanted = [r for r in rows if r[3] != 0.5 and (r[0], data[r[1] if r[3] > 0.5 else r[2]]) not in losing]
    assert len(kept) == len(wanted)


def test_repeats_and_so_many_a_prompt(tmp_path):
    rows = [("x", "a.png", "b.jpg", 1), ("X", "b.jpg", "a.png", 1), ("x", "a.png", "c.png", 1), ("y", "a.png", "b.jpg", 1)]
    reader = read_pairs(votes(tmp_path, rows), deduplicate=True)
    assert [pair.source[-1] for pair in reader] == ["1", "3", "4"]
    assert reader.counts.left_out == {"repeated": 1}
    reader = read_pairs(tmp_path / "votes.jsonl", max_pairs_per_prompt=2, max_train_samples=3)
    assert [pair.source[-1] for pair in reader] == ["1", "2", "4"]
    assert reader.counts.left_out == {"beyond max_pairs_per_prompt": 1}
    with pytest.raises(UserError, match="max_pairs_per_prompt is 0"):
        read_pairs(tmp_path / "votes.jsonl", max_pairs_per_prompt=0)


def test_nothing_left(tmp_path):
    path = votes(tmp_path, [("x", "a.png", "b.jpg", 1), ("x", "b.jpg", "a.png", 1)])
    with pytest.raises(UserError, match="2 without an absolute winner"):
        list(read_pairs(path, absolute_winners=True))


# ---- the hub ----


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A data set as the hub's client keeps it on disk, links and all, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(files: dict[str, bytes]) -> None:
        repo = tmp_path / "datasets--owner--votes"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("c0ffee")
        (repo / "blobs").mkdir()
        for number, (name, data) in enumerate(files.items()):
            (repo / "blobs" / str(number)).write_bytes(data)
            link = repo / "snapshots" / "c0ffee" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(repo / "blobs" / str(number))

    return add


def parquet(prompt: str) -> bytes:
    stream = BytesIO()
    pq.write_table(pa.table({"prompt": [prompt], "chosen": [A], "rejected": [B]}), stream)
    return stream.getvalue()


def test_a_data_set_of_the_hub(hub_cache):
    names = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"]
    hub_cache({name: parquet(name) for name in names})
    assert [pair.prompt for pair in read_pairs("owner/votes")] == names[:2]
    assert [pair.prompt for pair in read_pairs("owner/votes:test")] == names[2:]
    with pytest.raises(UserError, match="no files of a split 'validation'"):
        find("owner/votes:validation")


def test_an_imagefolder_of_the_hub(hub_cache):
    row = json.dumps({"prompt": "x", "chosen_file_name": "a.png", "rejected_file_name": "b.jpg"})
    hub_cache({"metadata.jsonl": row.encode(), "a.png": A, "b.jpg": B})
    (pair,) = read_pairs("owner/votes")
    assert (pair.image_0, pair.image_1) == (A, B)


def test_an_imagefolder_of_the_hub_with_splits(hub_cache):
    rows = {split: json.dumps({"file_name": "a.png", "text": split}).encode() for split in ("test", "train")}
    hub_cache(
        {f"{split}/{name}": data for split, row in rows.items() for name, data in (("metadata.jsonl", row), ("a.png", A))}
    )
    assert [item.prompt for item in read("owner/votes")] == ["train"]
    assert [item.prompt for item in read("owner/votes:test")] == ["test"]
    with pytest.raises(UserError, match="no files of a split 'validation'"):
        find("owner/votes:validation")


def test_later_files_of_the_hub_are_fetched_when_their_turn_comes(monkeypatch, tmp_path):
    fetched = []

    def fetch(repo, file, **options):
        fetched.append((repo, file, options["kind"]))
        (tmp_path / file).write_bytes(parquet(file))
        return tmp_path / file

    monkeypatch.setattr(hub, "files", lambda repo, **options: ["a.parquet", "b.parquet", "README.md"])
    monkeypatch.setattr(hub, "fetch", fetch)
    stream = iter(read_pairs("owner/votes"))
    assert next(stream).prompt == "a.parquet"
    assert fetched == [("owner/votes", "a.parquet", "dataset")]
    assert next(stream).prompt == "b.parquet"
    assert fetched[1:] == [("owner/votes", "b.parquet", "dataset")]


def test_a_data_set_that_cannot_be_had(hub_cache):
    with pytest.raises(UserError, match=r"owner/other is not on this machine.*no network.*If you meant a folder"):
        read_pairs("owner/other")


def test_scripts_of_a_data_set_are_never_run(monkeypatch):
    monkeypatch.setattr(hub, "files", lambda repo, **options: ["votes.py", "train.zip"])
    with pytest.raises(UserError, match="scripts are never run"):
        read_pairs("owner/votes")


@pytest.mark.parametrize(
    "name", ["train.parquet", "data/train-0.parquet", "default/train/0.parquet", "my_train.tar", "a.parquet"]
)
def test_names_of_splits(monkeypatch, name):
    others = ["test.parquet", "data/training_notes.parquet"] if "train" in name else []
    monkeypatch.setattr(hub, "files", lambda repo, **options: [name, *others])
    assert [place.path.as_posix() for place in find("owner/votes")] == [name]


# ---- the page that describes all this ----


def blocks(kind: str) -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    return [part.split("\n", 1)[1] for part in text.split("```")[1::2] if part.startswith(f"{kind}\n")]


@pytest.mark.parametrize(("kind", "number"), [*(("json", i) for i in range(len(blocks("json")))), ("csv", 0)])
def test_the_examples_of_the_docs_are_read(tmp_path, kind, number):
    content = blocks(kind)[number]
    (tmp_path / "images").mkdir()
    for i in range(1, 9):
        for name in (f"{i}.jpg", f"{i}.png", f"images/{i}.png"):
            (tmp_path / name).write_bytes(picture(i))
    (tmp_path / f"x.{kind}").write_text(content)
    reader = read(tmp_path / f"x.{kind}", Reading(ties="keep"))
    assert len(list(reader)) >= reader.counts.rows == len(content.splitlines()) - (kind == "csv")


# ---- real files ----


@pytest.mark.skipif(not SHARED.exists(), reason="real preferences: put them into ../shared/data/preferences")
def test_real_imagereward_sample(tmp_path):
    source = SHARED / "imagereward-sample"
    for name in ("1.webp", "2.webp", "3.webp", "4.webp"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    row = {"prompt": "a painting of an ocean", "generations": [f"{i}.webp" for i in (1, 2, 3, 4)], "ranking": [1, 2, 3, 4]}
    (tmp_path / "x.json").write_text(json.dumps([row]))
    pairs = list(read_pairs(tmp_path / "x.json"))
    assert [pair.label for pair in pairs] == [1.0] * 6
    assert len(list(read_pairs(tmp_path / "x.json", absolute_winners=True))) == 3


@pytest.mark.skipif(not SHARED.exists(), reason="real preferences: put them into ../shared/data/preferences")
def test_real_absolute_winners():
    rankings = SHARED / "hpdv2-gallery" / "rankings.jsonl"
    reader = read_pairs(rankings, absolute_winners=True, max_train_samples=8)
    # All nine pictures of a prompt were compared: at most one is unbeaten, and it beat the other eight.
    pairs = [(pair.prompt, *sorted(pair.pictures, key=lambda p: (p == pair.image_1) == (pair.label > 0.5))) for pair in reader]
    assert len({(prompt, winner) for prompt, winner, _ in pairs}) == 1
    assert len({loser for _, _, loser in pairs}) == 8
