from __future__ import annotations

import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.base.errors import UserError
from palate.data.cache import TensorCache

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text("abc_", min_size=1), st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
                       min_size=1, max_size=4))  # fmt: skip
def test_round_trip(tmp_path_factory, spec):
    cache = TensorCache(tmp_path_factory.mktemp("cache"))
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name, (dtype, shape) in spec.items()}
    key = cache.key(spec=str(spec))
    cache.put(key, tensors)
    found = cache.get(key)
    assert found is not None
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_views_are_stored_as_they_look(tmp_path):
    cache = TensorCache(tmp_path)
    rows = torch.arange(12.0).view(3, 4)
    cache.put("ab", {"row": rows[1], "turned": rows.T})
    assert torch.equal(cache.get("ab")["row"], rows[1])
    assert torch.equal(cache.get("ab")["turned"], rows.T)


def test_key_is_canonical_and_tells_everything_apart():
    key = TensorCache.key
    assert key(a=1, b="x") == key(b="x", a=1)
    assert len(key(a=1)) == 64
    different = [key(a=1), key(a="1"), key(a=True), key(a=None), key(b=1), key(a=[1]), key(a=1, b=1), key()]
    assert len(set(different)) == len(different)


def test_missing_is_none(tmp_path):
    cache = TensorCache(tmp_path / "nowhere")
    assert cache.get("ab") is None
    assert not cache.has("ab")


def test_presence_is_told_without_reading(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put("ab", {"x": torch.arange(100.0)})
    cache.path("ab").write_bytes(b"not read")
    assert cache.has("ab")
    cache.path("ab").write_bytes(b"")
    assert not cache.has("ab")


@pytest.mark.parametrize("damage", ["empty", "short", "zeros", "one bit", "text"])
def test_a_damaged_entry_counts_as_missing_and_is_rewritten(tmp_path, damage):
    cache = TensorCache(tmp_path)
    tensors = {"x": torch.arange(100.0)}
    cache.put("ab", tensors)
    path = cache.path("ab")
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-5] ^= 1
    damaged = {"empty": b"", "short": data[:-1], "zeros": bytes(len(data)), "one bit": bytes(flipped), "text": b"hello" * 50}
    path.write_bytes(damaged[damage])
    assert cache.get("ab") is None
    assert not cache.has("ab")  # it is gone, so that nobody takes it for an entry
    cache.put("ab", tensors)
    assert cache.has("ab")
    assert torch.equal(cache.get("ab")["x"], tensors["x"])


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch):
    cache = TensorCache(tmp_path)
    cache.put("abold", {"x": torch.zeros(3)})

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"disk.*full.*free some space") as caught:
        cache.put("abnew", {"x": torch.zeros(3)})
    assert str(tmp_path) in str(caught.value)
    assert cache.get("abnew") is None
    assert cache.get("abold") is not None
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["abold.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        TensorCache(tmp_path / "file").put("ab", {"x": torch.zeros(1)})
