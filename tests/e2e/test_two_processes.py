"""The whole job started in two processes, as ``accelerate launch -m palate`` starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def test_two_processes_train_as_one(palate, in_two_processes, tmp_path, model_dir, pairs_dir, cache_dir):
    words = ["train", "quick.yaml", "--max_train_steps", "2", "--output_dir", "two", "--train_batch_size", "2"]
    words += ["--pretrained_model_name_or_path", str(model_dir), "--train_data", str(pairs_dir), "--cache_dir", str(cache_dir)]
    codes, said = zip(*in_two_processes([sys.executable, "-m", "palate", *words], cwd=tmp_path)(120), strict=True)
    assert codes == (0, 0), said
    assert "16 rows: 16 pairs" in said[0]
    assert "rows" not in said[1]
    assert palate("train", max_train_steps=2, output_dir="one")[0] == 0
    one, two = (load_file(Path(folder, "pytorch_lora_weights.safetensors")) for folder in ("one", "two"))
    for name in one:  # sums in another order, which AdamW's division enlarges: a twentieth of a step of 1e-3 at most
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=5e-5)
