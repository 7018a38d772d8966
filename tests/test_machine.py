"""Where a process computes."""

from __future__ import annotations

import pytest
import torch

from palate.base.machine import device


@pytest.mark.parametrize(("gpu", "rank", "expected"), [(False, "1", "cpu"), (True, None, "cuda:0"), (True, "1", "cuda:1")])
def test_every_process_has_a_device_of_its_own(monkeypatch, gpu, rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert device() == expected
