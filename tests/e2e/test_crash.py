"""Killed at any moment and run again, a job ends with the very same files and tensors. Only with PALATE_CRASH_TEST=ROUNDS set.

Each round kills every job once (SIGKILL) at a point drawn from a fixed seed, between its start and its end, then runs the same
command again until it ends by itself, with ``--resume_from_checkpoint latest`` where there is a checkpoint, and compares.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROUNDS = int(os.environ.get("PALATE_CRASH_TEST", "0"))
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not ROUNDS, reason="crash tests: set PALATE_CRASH_TEST to a number of rounds")

TRIED = 5
"""Times that a job is begun anew because it ended before it was killed."""

TRAIN = """\
training: {seed: 5, train_batch_size: 2, learning_rate: 1e-3, logging_steps: 1, checkpointing_steps: 1, max_train_steps: 6,
  ema_decay: 0.9, eval_steps: 3}
policy: {rank: 4}
evaluation: {num_inference_steps: 2, validation_prompts: [a red house]}
"""
ONLINE = """\
objective: {name: ddpo_is}
online: {rewards: [jpeg_compressibility], samples_per_round: 4, sample_batch_size: 2, sample_num_steps: 2, updates_per_round: 2,
  rounds: 3, kl_samples: 1, held_out_rewards: [jpeg_incompressibility], held_out_pictures: 2}
training: {seed: 5, train_batch_size: 4, learning_rate: 1e-3, logging_steps: 1, checkpointing_steps: 1, eval_steps: 2}
policy: {rank: 4}
"""


@dataclass(frozen=True)
class Job:
    """A command of which ``out`` is what it writes, and how its results are compared."""

    words: list[str]
    out: Path
    results: Callable[[Path], dict[str, object]]
    resumes: bool = False


def start(job: Job, cwd: Path, *more: str) -> subprocess.Popen[bytes]:
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "palate", *job.words, *more]
    return subprocess.Popen(command, cwd=cwd, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(job: Job, cwd: Path) -> float:
    """Run to the end; seconds it took."""
    began = time.monotonic()
    more = ["--resume_from_checkpoint", "latest"] if job.resumes and list(job.out.glob("checkpoint-*")) else []
    if job.resumes and not more:
        shutil.rmtree(job.out, ignore_errors=True)  # nothing was reached: as the message says, the folder is deleted
    worker = start(job, cwd, *more)
    errors = worker.communicate(timeout=1800)[1].decode()
    assert worker.returncode == 0, errors
    return time.monotonic() - began


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{name}": x for name, x in load_file(file).items()}


def trained(out: Path) -> dict[str, object]:
    """Weights, the last checkpoint, and the log but for its clock."""
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found: dict[str, object] = {"last": last.name}
    for file in [*sorted(out.glob("*.safetensors")), *sorted(last.glob("*.safetensors"))]:
        found |= tensors(file)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found["log"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    found |= {path.name: path.read_bytes() for path in sorted(out.glob("samples/*.png"))}
    found["recipe"] = (out / "recipe.yaml").read_text()
    return found


def pictures(out: Path) -> dict[str, object]:
    found: dict[str, object] = {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}
    found["manifest"] = sorted((out / "manifest.jsonl").read_text().splitlines())
    return found


def scores(out: Path) -> dict[str, object]:
    return {path.name: sorted(path.read_text().splitlines()) for path in sorted((out / "scores").glob("*.jsonl"))}


def labelled(out: Path) -> dict[str, object]:
    import pyarrow.parquet as pq

    return {"rows": pq.read_table(out).to_pylist()}


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of what is not the very same in both."""
    found = sorted(one.keys() ^ other.keys())
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        found += [] if same else [name]
    return found


@pytest.fixture
def jobs(tmp_path, model_dir, pairs_dir, judge_dir, prompts_file) -> dict[str, Callable[[str], Job]]:
    (tmp_path / "offline.yaml").write_text(TRAIN)
    (tmp_path / "online.yaml").write_text(ONLINE)
    model = ["--pretrained_model_name_or_path", str(model_dir)]

    def training(name: str, *more: str) -> Callable[[str], Job]:
        # The recipe tells the folder, which must be the same: runs lie in working directories of their own.
        return lambda run: Job(
            ["train", str(tmp_path / f"{name}.yaml"), *model, "--output_dir", "out", "--cache_dir", "cache", *more],
            tmp_path / run / "out",
            trained,
            resumes=True,
        )

    def drawn(run: str) -> Path:
        """A folder of pictures, drawn once and copied."""
        once, copy = tmp_path / "drawn", tmp_path / run / "pictures"
        if not once.is_dir():
            words = ["generate", str(model_dir), "--prompts", str(prompts_file), "--output_dir", str(once)]
            more = ["--num_inference_steps", "1", "--images_per_prompt", "6", "--batch_size", "4"]
            finish(Job([*words, *more], once, pictures), tmp_path)
        shutil.copytree(once, copy)
        return copy

    def scoring(run: str) -> Job:
        folder = drawn(run)
        return Job(["score", str(folder), "--judges", f"[pickscore:{judge_dir}]", "--batch_size", "1"], folder, scores)

    def labelling(run: str) -> Job:
        folder, out = drawn(run), tmp_path / run / "new.parquet"
        words = ["label", str(folder), "--judges", f"[pickscore:{judge_dir}]", "--batch_size", "1", "--output", str(out)]
        return Job(words, out, labelled)

    def generating(run: str) -> Job:
        out = tmp_path / run / "pictures"
        words = ["generate", str(model_dir), "--prompts", str(prompts_file), "--output_dir", str(out), "--batch_size", "2"]
        return Job([*words, "--num_inference_steps", "4", "--images_per_prompt", "8"], out, pictures)

    return {
        "offline": training("offline", "--train_data", str(pairs_dir)),
        "online": training("online", "--train_prompts", str(prompts_file)),
        "generate": generating,
        "score": scoring,
        "label": labelling,
    }


@pytest.mark.parametrize("name", ["offline", "online", "generate", "score", "label"])
def test_killed_at_any_moment_and_run_again(jobs, tmp_path, name):
    make = jobs[name]

    def place(run: str) -> tuple[Job, Path]:
        (tmp_path / run).mkdir()
        return make(run), tmp_path / run

    whole, cwd = place("whole")
    seconds = finish(whole, cwd)
    wanted = whole.results(whole.out)
    draw, killed, met = random.Random(f"crash {name}"), 0, []
    for number in range(ROUNDS):
        # The first seconds are Python's own start; most kills fall where there is something to lose.
        moment = seconds * draw.uniform(0.3, 1.0)
        for tried in range(TRIED):
            job, cwd = place(f"run{number}-{tried}")
            worker = start(job, cwd)
            try:
                worker.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                worker.send_signal(signal.SIGKILL)
                worker.communicate()
                killed += 1
                break
            moment *= 0.8  # the machine is less busy than it was
        # A set of labels appears whole, and is not written over.
        if worker.returncode != 0 and not (job.results is labelled and job.out.exists()):
            finish(job, cwd)
        met += [f"round {number}, killed after {moment:.2f} s: {what}" for what in differences(wanted, job.results(job.out))]
        shutil.rmtree(cwd)
    print(f"{name}: {killed} of {ROUNDS} killed, {len(met)} differences of {len(wanted)} results each")
    assert met == []
