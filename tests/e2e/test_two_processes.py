"""The whole job started in two processes, as ``accelerate launch -m palate`` starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def test_two_processes_train_as_one(palate, tmp_path, model_dir, pairs_dir, cache_dir):
    words = ["train", "quick.yaml", "--max_train_steps", "2", "--output_dir", "two", "--train_batch_size", "2"]
    words += ["--pretrained_model_name_or_path", str(model_dir), "--train_data", str(pairs_dir), "--cache_dir", str(cache_dir)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "palate", *words],
            cwd=tmp_path,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert "16 rows: 16 pairs" in said[0]
    assert "rows" not in said[1]
    assert palate("train", max_train_steps=2, output_dir="one")[0] == 0
    one, two = (load_file(Path(folder, "pytorch_lora_weights.safetensors")) for folder in ("one", "two"))
    for name in one:  # sums in another order, which AdamW's division enlarges: a twentieth of a step of 1e-3 at most
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=5e-5)
