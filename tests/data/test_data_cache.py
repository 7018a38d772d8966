from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from shards import entries, spoil

from palate.base.errors import UserError
from palate.data.cache import AT_ONCE, LATEST, TensorCache

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


def key(name: object) -> str:
    return TensorCache.key(name=name)


def filled(folder: Path, names) -> TensorCache:
    cache = TensorCache(folder)
    for name in names:
        cache.put(key(name), {"x": torch.full((8,), float(name))})
    cache.flush()
    return cache


def holds(folder: Path, names) -> bool:
    cache = TensorCache(folder)
    return all((found := cache.get(key(name))) is not None and found["x"].tolist() == [float(name)] * 8 for name in names)


# An entry -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.dictionaries(st.text("abc_", min_size=1), st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
                       min_size=1, max_size=4), st.booleans())  # fmt: skip
def test_round_trip(tmp_path_factory, spec, written):
    cache = TensorCache(tmp_path_factory.mktemp("cache"))
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name, (dtype, shape) in spec.items()}
    cache.put(key("a"), tensors)
    if written:
        cache.flush()
    found = cache.get(key("a"))
    assert found is not None
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_views_are_stored_as_they_look(tmp_path):
    cache = TensorCache(tmp_path)
    rows = torch.arange(12.0).view(3, 4)
    cache.put(key("a"), {"row": rows[1], "turned": rows.T})
    assert torch.equal(cache.get(key("a"))["row"], rows[1])
    assert torch.equal(cache.get(key("a"))["turned"], rows.T)


def test_key_is_canonical_and_tells_everything_apart():
    key = TensorCache.key
    assert key(a=1, b="x") == key(b="x", a=1)
    assert len(key(a=1)) == 64
    different = [key(a=1), key(a="1"), key(a=True), key(a=None), key(b=1), key(a=[1]), key(a=1, b=1), key()]
    assert len(set(different)) == len(different)


def test_missing_is_none(tmp_path):
    cache = TensorCache(tmp_path / "nowhere")
    assert cache.get(key("a")) is None
    assert not cache.has(key("a"))
    assert not (tmp_path / "nowhere").exists()


def test_any_reader_of_arrow_reads_a_shard(tmp_path):
    filled(tmp_path, [3])
    assert entries(tmp_path) == {key(3): save({"x": torch.full((8,), 3.0)})}


# Many entries -------------------------------------------------------------------------------------------------------------


def test_thousands_of_entries_lie_in_one_file(tmp_path):
    for run in range(4):  # each a process of its own, one after another
        filled(tmp_path, range(1000 * run, 1000 * run + 1000))
    assert len(list(tmp_path.iterdir())) == 1
    assert holds(tmp_path, range(4000))


def test_an_entry_is_found_before_and_after_it_is_written(tmp_path):
    cache = TensorCache(tmp_path)
    for name in range(3 * AT_ONCE):
        assert not cache.has(key(name))
        cache.put(key(name), {"x": torch.tensor(name)})
        assert cache.has(key(name))
        assert all(cache.get(key(n))["x"] == n for n in (0, name // 2, name))


def test_the_latest_entries_join_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr("palate.data.cache.LATEST", 100)
    cache = filled(tmp_path, range(1000))
    assert len(cache._latest) <= 100 + AT_ONCE < LATEST
    assert all(cache.get(key(name))["x"][0] == name for name in range(1000))


def test_presence_is_told_without_reading(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put(key("a"), {"x": torch.arange(100.0)})
    cache.flush()
    spoil(tmp_path, key("a"))
    assert cache.has(key("a"))
    assert TensorCache(tmp_path).has(key("a"))


def test_what_others_write_is_seen_after_a_refresh(tmp_path):
    one, two = TensorCache(tmp_path), filled(tmp_path, [1])
    assert not one.has(key(1))
    one.refresh()
    assert one.has(key(1))
    two.put(key(2), {"x": torch.zeros(1)})
    two.flush()
    one.refresh()
    assert one.get(key(2)) is not None


def test_shards_that_are_copied_together_hold_the_entries_of_all(tmp_path):
    filled(tmp_path / "one", range(5))
    filled(tmp_path / "two", range(3, 9))
    for path in (tmp_path / "two").iterdir():
        path.rename(tmp_path / "one" / path.name)
    assert holds(tmp_path / "one", range(9))


# Damage -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["zeros", "one bit", "header", "text"])
def test_a_damaged_entry_counts_as_missing_and_is_rewritten(tmp_path, damage):
    filled(tmp_path, range(3))
    spoil(tmp_path, key(1), damage)
    cache = TensorCache(tmp_path)
    assert cache.get(key(1)) is None
    assert not cache.has(key(1))  # it is gone, so that nobody takes it for an entry
    assert not TensorCache(tmp_path).has(key(1))
    assert holds(tmp_path, [0, 2])
    filled(tmp_path, [1])
    assert holds(tmp_path, range(3))


def test_of_two_copies_the_sound_one_is_read(tmp_path):
    one, two = TensorCache(tmp_path), TensorCache(tmp_path)
    for cache in (one, two):
        cache.put(key(1), {"x": torch.full((8,), 1.0)})
        cache.flush()
    first = min(tmp_path.iterdir())
    first.write_bytes(first.read_bytes().replace(save({"x": torch.full((8,), 1.0)}), bytes(len(entries(tmp_path)[key(1)]))))
    assert holds(tmp_path, [1])


@settings(max_examples=40)
@given(share=st.floats(0, 1), damage=st.sampled_from(["cut", "bit", "zeros"]))
def test_damage_anywhere_loses_entries_but_never_changes_one(tmp_path_factory, share, damage):
    folder = tmp_path_factory.mktemp("cache")
    for batch in range(3):
        filled(folder, range(4 * batch, 4 * batch + 4))
    (path,) = folder.iterdir()
    data = bytearray(path.read_bytes())
    place = int(share * (len(data) - 1))
    if damage == "bit":
        data[place] ^= 4
    else:
        data[place:] = b"" if damage == "cut" else bytes(len(data) - place)
    path.write_bytes(data)
    cache = TensorCache(folder)
    for name in range(12):
        found = cache.get(key(name))
        assert found is None or found["x"].tolist() == [float(name)] * 8
    filled(folder, [name for name in range(12) if not TensorCache(folder).has(key(name))])
    assert holds(folder, range(12))


# Several processes --------------------------------------------------------------------------------------------------------

WRITER = """
import sys, torch
from palate.data.cache import TensorCache
cache = TensorCache(sys.argv[1])
for name in range(int(sys.argv[2]), int(sys.argv[3])):
    cache.put(cache.key(name=name), {"x": torch.full((8,), float(name))})
    print(name, flush=True)
cache.flush()
"""


def writer(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once_and_a_kill_leaves_a_cache_that_goes_on(tmp_path):
    one, two = writer(tmp_path, 0, 500), writer(tmp_path, 500, 10**9)
    for line in two.stdout:
        if int(line) > 1500:
            two.send_signal(signal.SIGKILL)
            break
    assert one.communicate(timeout=60) is not None
    two.wait(timeout=60)
    two.stdout.close()
    assert one.returncode == 0
    assert holds(tmp_path, [*range(500), *range(500, 1400)])
    filled(tmp_path, range(2000, 2100))
    assert holds(tmp_path, range(2000, 2100))
    assert len(list(tmp_path.iterdir())) <= 2


def test_what_a_writer_left_half_written_is_cut_off_by_the_next(tmp_path):
    filled(tmp_path, range(10))
    (path,) = tmp_path.iterdir()
    whole = path.stat().st_size
    filled(tmp_path, range(10, 20))
    os.truncate(path, whole + 100)
    assert holds(tmp_path, range(10))
    filled(tmp_path, range(20, 30))
    assert list(tmp_path.iterdir()) == [path]
    assert holds(tmp_path, [*range(10), *range(20, 30)])
    assert pa.ipc.open_stream(path.read_bytes()).read_all().num_rows == 20


def test_a_shard_of_another_machine_is_read_and_never_written(tmp_path, monkeypatch):
    filled(tmp_path, [1])
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    monkeypatch.setattr("palate.data.cache._machine", lambda: "elsewhere")
    filled(tmp_path, [2])
    assert path.read_bytes() == before
    assert holds(tmp_path, [1, 2])


# A folder that does not play along ----------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch):
    cache = filled(tmp_path, [1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file, data, where):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    cache.put(key(2), {"x": torch.zeros(3)})
    with pytest.raises(UserError, match=r"disk.*full.*free some space") as caught:
        cache.flush()
    assert str(tmp_path) in str(caught.value)
    assert cache.get(key(2)) is None
    assert cache.get(key(1)) is not None
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = TensorCache(tmp_path / "file")
    cache.put(key("a"), {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="cannot write"):
        cache.flush()


def test_a_limit_is_kept(tmp_path):
    cache = TensorCache(tmp_path, limit=100_000)

    def fill():
        for name in range(1000):
            cache.put(key(name), {"x": torch.zeros(100)})

    with pytest.raises(UserError, match=r"limit of 0\.0001 GB.*cache_limit"):
        fill()
    assert 50_000 < cache.size <= 100_000
    assert cache.has(key(0))


# Entries that are a file each ---------------------------------------------------------------------------------------------


def loose(folder: Path, name: object, tensors: dict[str, torch.Tensor]) -> Path:
    """As they were written one by one: safetensors, with the CRC-32 of the values in the header."""
    plain = save(tensors)
    body = plain[8 + int.from_bytes(plain[:8], "little") :]
    path = folder / key(name)[:2] / f"{key(name)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(tensors, {"crc32": f"{zlib.crc32(body):08x}"}))
    return path


def test_an_entry_in_a_file_of_its_own_is_taken_in(tmp_path):
    paths = [loose(tmp_path, name, {"x": torch.full((8,), float(name))}) for name in range(3)]
    spoilt = bytearray(paths[1].read_bytes())
    spoilt[-1] ^= 1
    paths[1].write_bytes(spoilt)
    cache = TensorCache(tmp_path)
    assert [cache.has(key(name)) for name in range(3)] == [True, False, True]
    assert all(path.exists() for path in paths)  # until they are in a shard
    cache.flush()
    assert not any(path.exists() for path in paths)
    assert holds(tmp_path, [0, 2])
