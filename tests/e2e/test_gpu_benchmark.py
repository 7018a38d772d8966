"""The check of a GPU in one command, in its form for machines without one."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from palate.runs import plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROW = {"encoder_hidden_states": (torch.Size([40, 16]), torch.float32), "framing": (torch.Size([6]), torch.int64)}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The benchmark; counting, which has tests of its own, is left out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    counted = plan.Needs({"trained weights": 1e6}, 1e6, 0.0, 0.0, {}, 1e9, 0.0, 0.0, ROW, 256)
    monkeypatch.setattr(plan, "count", lambda *_, **__: counted)
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_and_tells(gpu, model_dir, monkeypatch):
    monkeypatch.setitem(gpu.TINY, str(model_dir), "miniature-dpo")
    results = gpu.everything(
        time.monotonic() + 100, {str(model_dir): ("as the recipe", "8-bit AdamW", "fp16")}, ("fp16 and its scaler",)
    )
    found = results["models"][str(model_dir)]
    assert list(found["cases"]) == ["as the recipe", "fp16", "8-bit AdamW"]
    one = found["cases"]["as the recipe"]
    assert one["pairs a second"] > 0
    assert one["counted GB"] == 0.0  # of 2 MB
    assert found["drawing"]["pictures a second"] > 0
    if not gpu.torch.cuda.is_available():
        assert "needs a GPU" in found["cases"]["fp16"]["failed"]  # and the rest goes on
        assert "needs a GPU" in results["checks"]["fp16 and its scaler"]
    assert json.loads(json.dumps(results)) == results
    lines = gpu.table(results)
    assert sum(line.startswith(f"| {model_dir} | ") for line in lines) == 4


def test_no_case_begins_too_late(gpu):
    results = gpu.everything(time.monotonic() - 1, {"SDXL": ("as the recipe", "NCP")}, ("bf16",))
    assert results["left out"] == ["bf16", "SDXL, as the recipe", "SDXL, NCP", "SDXL, drawing"]
    assert results["checks"] == results["models"]["SDXL"]["cases"] == {}


def test_a_full_run_asks_for_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="add --tiny"):
        gpu.main()
