"""Encoding that several processes share, and sources that are not read twice."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import entries, spoil
from test_data_encode import PAIRS, Encoders, P, defaults, picture

from palate.base.errors import UserError
from palate.base.processes import Processes
from palate.data.cache import TensorCache
from palate.data.encode import encode
from palate.data.items import EncodedPair, EncodedPicture, Items
from palate.data.pairs import Reader, read_pairs
from palate.data.remembered import signature

# Items by column ----------------------------------------------------------------------------------------------------------

KEY = TensorCache.key
ROWS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=9)


def single(i: int, _: int, label: float) -> EncodedPicture:
    return EncodedPicture(f"é {i}", KEY(t=i), (KEY(p=i), KEY(p=i, flip=True)), label, i / 2, f"f, row {i}")


def pair(i: int, j: int, label: float) -> EncodedPair:
    return EncodedPair("" if i % 3 else "a", KEY(t=i), (KEY(p=i),), (KEY(p=j),), label, 1.0, "")


@settings(max_examples=50)
@given(ROWS, st.sampled_from([single, pair]), st.data())
def test_items_are_those_that_were_added(rows, make, data):
    given_items = [make(*row) for row in rows]
    items = Items.of(given_items)
    assert [*items] == given_items
    assert [*items.prompts] == [item.prompt for item in given_items]
    assert items.label.tolist() == [item.label for item in given_items]
    assert [*items[1:]] == given_items[1:]
    assert items[-1] == given_items[-1]
    chosen = data.draw(st.lists(st.booleans(), min_size=len(items), max_size=len(items)))
    some = items.where(torch.tensor(chosen).numpy())
    assert [*some] == [item for item, kept in zip(given_items, chosen, strict=True) if kept]
    keys = {key for item in some for key in (item.text, *(key for variants in item.pictures for key in variants))}
    assert {key.tobytes().hex() for key in some.keys} == keys


# Several processes --------------------------------------------------------------------------------------------------------


def together(count: int, work, local: int | None = None) -> list:
    """``work(processes, i)`` in as many threads that wait for each other as processes do; what each returned or raised.

    local: how many of them share a machine; all unless given.
    """
    barrier, rows, results = threading.Barrier(count, timeout=60), [None] * count, [None] * count
    local = local or count

    def run(index: int) -> None:
        def gather(own):
            rows[index] = own
            barrier.wait()
            found = torch.cat(rows)
            barrier.wait()
            return found

        try:
            results[index] = work(Processes(index, count, gather, (index % local, local)), index)
        except UserError as error:
            results[index] = error
            barrier.abort()
        except threading.BrokenBarrierError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=[index]) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("options", [{}, {"random_flip": True}, {"center_crop": False}])
@pytest.mark.parametrize("count", [2, 5])
def test_processes_share_the_encoding_and_nothing_is_encoded_twice(tmp_path, count, options):
    encoders = [Encoders() for _ in range(count)]
    encoded = together(count, lambda processes, i: encoders[i].encode(PAIRS, tmp_path, processes=processes, **options))
    alone = Encoders()
    expected = alone.encode(PAIRS, tmp_path / "alone", **options)
    assert sum(sum(one.pictures) for one in encoders) == sum(alone.pictures)
    assert sorted(prompt for one in encoders for prompt in one.prompts) == ["a", "b"]
    seeds = torch.arange(3)
    for one in encoded:
        assert [*one.items] == [*expected.items]
        assert torch.equal(one.batch([0, 1, 2], seeds).latents, expected.batch([0, 1, 2], seeds).latents)
    assert entries(tmp_path) == entries(tmp_path / "alone")


def test_machines_that_share_no_folder_fill_their_own(tmp_path):
    encoders = [Encoders() for _ in range(4)]
    folders = [tmp_path / "one", tmp_path / "one", tmp_path / "two", tmp_path / "two"]
    encoded = together(4, lambda processes, i: encoders[i].encode(PAIRS, folders[i], processes=processes), local=2)
    for one in encoded:
        one.batch([0, 1, 2], torch.arange(3))
    assert entries(folders[0]) == entries(folders[2])
    for machine in (encoders[:2], encoders[2:]):
        assert sum(sum(one.pictures) for one in machine) == 4


def test_parts_that_do_not_wait_make_up_the_whole(tmp_path):
    encoders = [Encoders() for _ in range(3)]
    for i, one in enumerate(encoders):
        one.encode(PAIRS, tmp_path / str(i), part=(i, 3))
    assert sum(sum(one.pictures) for one in encoders) == 4
    (tmp_path / "all").mkdir()
    for i in range(3):
        for path in (tmp_path / str(i)).glob("*.arrow"):  # none, where nothing fell to it
            path.rename(tmp_path / "all" / f"{i}-{path.name}")
    rest = Encoders()
    rest.encode(PAIRS, tmp_path / "all").batch([0, 1, 2], torch.arange(3))
    assert (rest.pictures, rest.prompts) == ([], [])


def votes(folder: Path, pictures: list[bytes]) -> Path:
    """Each picture against the next one, as JSONL; the prompts are the letters."""
    folder.mkdir(exist_ok=True)
    for i, data in enumerate(pictures):
        (folder / f"{i}.png").write_bytes(data)
    rows = [{"prompt": chr(97 + i), "chosen": f"{i}.png", "rejected": f"{i + 1}.png"} for i in range(len(pictures) - 1)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_bad_row_is_bad_for_all_processes(tmp_path):
    data = votes(tmp_path / "data", [P[0], P[1], b"text", P[2], P[3], P[4], picture(9)])
    # Rows 2 and 3 show what is no picture; of the others the first three are wanted.
    reading = {"max_bad_rows": 2, "max_train_samples": 3}
    alone = read_pairs(data, **reading)
    expected = encode(alone, Encoders().needed(), **defaults(tmp_path / "alone"))
    assert expected.prompts == ["a", "d", "e"]
    readers = [read_pairs(data, **reading) for _ in range(3)]
    how = defaults(tmp_path / "cache")
    found = together(3, lambda processes, i: encode(readers[i], Encoders().needed(), **how, processes=processes))
    for one, reader in zip(found, readers, strict=True):
        assert [*one.items] == [*expected.items]
        assert reader.counts == alone.counts
    strict = [read_pairs(data) for _ in range(2)]
    found = together(2, lambda processes, i: encode(strict[i], Encoders().needed(), **how, processes=processes))
    told = [str(one) for one in found if isinstance(one, UserError)]
    assert any("row 2" in one and "not a picture" in one for one in told)


# Not read twice -----------------------------------------------------------------------------------------------------------


class Unread(Reader):
    """Must not be iterated."""

    def checked(self, check):
        pytest.fail("the source was read again")


def test_a_source_that_is_as_it_was_is_not_read_again(tmp_path, monkeypatch):
    data = votes(tmp_path / "data", [P[0], P[1], b"text", P[2]])
    reader = read_pairs(data, max_bad_rows=2)
    first = encode(reader, Encoders().needed(), **defaults(tmp_path / "cache"))
    again = read_pairs(data, max_bad_rows=2)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "checked", Unread.checked)
        second = encode(again, Encoders().needed(), **defaults(tmp_path / "cache"))
    assert [*second.items] == [*first.items]
    assert again.counts == reader.counts
    assert len(again.counts.bad) == 2


def _replace(folder: Path) -> None:
    (folder / "1.png").write_bytes(P[4])


def _touch(folder: Path) -> None:
    """The same size, and the time of the last change as it was: as ``cp -p`` leaves it."""
    before = os.stat(folder / "1.png")
    other = bytearray(P[1])
    other[-20] ^= 1
    (folder / "new.png").write_bytes(other)
    os.utime(folder / "new.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(folder / "new.png", folder / "1.png")


def _swap(folder: Path) -> None:
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(reversed(rows)) + "\n")


@pytest.mark.parametrize("change", [_replace, _touch, _swap, lambda folder: (folder / "1.png").unlink()])
def test_a_source_that_has_changed_is_read_again(tmp_path, change):
    data = votes(tmp_path / "data", [P[0], P[1], P[2]])
    before = signature(read_pairs(data))
    assert signature(read_pairs(data)) == before
    assert signature(read_pairs(data, max_train_samples=1)) != before
    change(data)
    assert signature(read_pairs(data)) != before


def test_files_that_hold_their_pictures_are_known_by_size_and_time(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(data: bytes) -> None:
        pq.write_table(pa.table({"prompt": ["a"], "chosen": [data], "rejected": [P[1]]}), tmp_path / "a.parquet")

    write(P[0])
    before = signature(read_pairs(tmp_path / "a.parquet"))
    assert signature(read_pairs(tmp_path / "a.parquet")) == before
    write(P[2])
    assert signature(read_pairs(tmp_path / "a.parquet")) != before


def test_pictures_beside_a_parquet_file_are_read_every_time(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = votes(tmp_path / "data", [P[0], P[1]])
    (data / "metadata.jsonl").unlink()
    pq.write_table(pa.table({"prompt": ["a"], "chosen": ["0.png"], "rejected": ["1.png"]}), data / "a.parquet")
    encode(read_pairs(data / "a.parquet"), Encoders().needed(), **defaults(tmp_path / "cache"))
    (data / "1.png").write_bytes(P[3])
    encoders = Encoders()
    encode(read_pairs(data / "a.parquet"), encoders.needed(), **defaults(tmp_path / "cache"))
    assert encoders.pictures == [1]


def test_counts_are_remembered_with_what_was_left_out_and_bad(tmp_path):
    data = votes(tmp_path / "data", [P[0], P[1], b"text", P[2], P[3]])
    rows = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(rows + rows.splitlines()[0])
    reading = {"max_bad_rows": 2, "deduplicate": True}
    first, second = (read_pairs(data, **reading) for _ in range(2))
    encode(first, Encoders().needed(), **defaults(tmp_path / "cache"))
    encode(second, Encoders().needed(), **defaults(tmp_path / "cache"))
    assert first.counts.left_out
    assert len(first.counts.bad) == 2
    assert second.counts == first.counts


def test_what_has_gone_from_the_cache_is_encoded_again(tmp_path):
    data = votes(tmp_path / "data", [P[0], P[1], P[2]])
    encode(read_pairs(data), Encoders().needed(), **defaults(tmp_path / "cache"))
    encoded = encode(read_pairs(data), Encoders().needed(), **defaults(tmp_path / "cache"))
    spoil(tmp_path / "cache", encoded.items[0].winner[0])
    assert encoded.cache.get(encoded.items[0].winner[0]) is None
    encoders = Encoders()
    encode(read_pairs(data), encoders.needed(), **defaults(tmp_path / "cache")).batch([0, 1], torch.arange(2))
    assert encoders.pictures == [1]


def test_what_has_an_entry_is_not_decoded_again(tmp_path, monkeypatch):
    data = votes(tmp_path / "data", [P[0], P[1], P[2]])
    encode(read_pairs(data), Encoders().needed(), **defaults(tmp_path / "cache"))
    monkeypatch.setattr("palate.data.encode.decode_usable", lambda data: pytest.fail("decoded again"))
    encoded = encode(read_pairs(data, max_train_samples=1), Encoders().needed(), **defaults(tmp_path / "cache"))
    assert encoded.prompts == ["a"]


def test_the_pace_is_told_where_there_is_no_bar(tmp_path, monkeypatch, capsys):
    data = votes(tmp_path / "data", [P[0], P[1], P[2], P[3], P[4]])
    clock = iter(range(0, 1000, 50))  # read once at the beginning, then once a pair
    monkeypatch.setattr("palate.data.encode.time.monotonic", lambda: next(clock))
    encode(read_pairs(data), Encoders().needed(), **defaults(tmp_path / "cache"))
    # Before the second pair 100 s have passed, in which one was done, of about as many as there are line ends, and one.
    assert capsys.readouterr().err.splitlines() == ["encoding: 1 items of about 5, 7 minutes left at 0.01 a second"]
