"""Where a process computes."""

from __future__ import annotations

import pytest
import torch

from palate.base.errors import UserError
from palate.base.machine import device, found_device


@pytest.mark.parametrize(("gpu", "rank", "expected"), [(False, "1", "cpu"), (True, None, "cuda:0"), (True, "1", "cuda:1")])
def test_every_process_has_a_device_of_its_own(monkeypatch, gpu, rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert device() == expected


def test_a_device_is_there_or_refused():
    assert found_device("cpu") == "cpu"
    assert found_device(None) == device()
    for name in ("tpu", "meta", "", "cpu:7", "cuda:x", "cuda:-1"):
        with pytest.raises(UserError, match=f"device is '{name}'; expected cpu, cuda"):
            found_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"there is no device cuda here .*: use cpu, or leave it out"):
            found_device("cuda")
