"""How far the weights of several processes are from those of one, at the same effective batch: plain, and with ``shard_model``.

    OMP_NUM_THREADS=1 python benchmarks/processes.py                                  # every case, in 2 and in 4 processes
    OMP_NUM_THREADS=1 python benchmarks/processes.py --processes 2 --cases LoRA full
    OMP_NUM_THREADS=1 python benchmarks/processes.py --kill                           # one of 4 is killed, 2 and 1 go on

Short trainings of the models of the miniature world, on the CPU; processes talk by gloo. Told is by how much the updates move a
weight at most, and of each number of processes the largest difference of a weight after them. All take the same batches of two
pairs, four to an update, and sum them in another order, which AdamW's division enlarges, without bound where a gradient is
rounding alone: ``adam_epsilon`` bounds it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from palate.cli import main as palate

BATCH, MICRO = 8, 2
COMMON = {
    "max_train_samples": 16,
    "validation_fraction": 0,
    "max_train_steps": 3,
    "learning_rate": 1e-4,
    "adam_epsilon": 1e-6,
    "lr_warmup_steps": 0,
    "lr_scheduler": "constant",
    "ema_decay": 0.9,
    "checkpointing_steps": "null",
    "evaluation_prompts": "null",
    "validation_prompts": "[]",
}
FULL: dict[str, object] = {"train_method": "full"}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "LoRA": ("miniature-dpo", {}),
    "full": ("miniature-dpo", FULL),
    "full, perceptual": ("miniature-ncp-dpo", FULL),
    "full, perceptual, of a transformer": ("miniature-flow-ncp-dpo", {**FULL, "gradient_checkpointing": "true"}),
    "LoRA, text encoder": ("miniature-ncp-dpo", {"train_text_encoder": "true"}),
    "LoRA, int8": ("miniature-ncp-dpo", {"quantize": "int8"}),
    "LoRA, buckets": ("miniature-buckets", {}),
    "full, draws_per_pair": ("miniature-ncp-dpo", {**FULL, "draws_per_pair": 1, "keep_targets": "true"}),
}
"""What is trained: a recipe, and what differs from it and from ``COMMON``."""


def words(case: str, out: Path, processes: int = 1, **more: object) -> list[str]:
    """The command that trains a case in so many processes."""
    recipe, options = CASES[case]
    # What one run keeps of the reference is not found by another.
    cache = out.with_name(f"cache-{out.name}" if "draws_per_pair" in options else "cache")
    own = {"cache_dir": cache, "output_dir": out}
    own |= {"train_batch_size": MICRO, "gradient_accumulation_steps": BATCH // MICRO // processes}
    given = {**COMMON, **options, **own, **more}
    return ["train", recipe, *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def several(commands: Sequence[list[str]]) -> list[str]:
    """The program of several commands of Palate, one after the other; it fails where one does."""
    code = "import json, sys; from palate.cli import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"
    return [sys.executable, "-c", code, json.dumps(commands)]


def start(
    program: Sequence[str], processes: int, *, cwd: Path | None = None, environment: Mapping[str, str] = os.environ
) -> list[subprocess.Popen[str]]:
    """A program in so many processes on the CPU, as ``accelerate launch`` starts them; what they print is not kept."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{**environment, **common, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(processes))]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(program, cwd=cwd, env=own, **pipes) for own in ranks]


def finish(workers: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What each has said, once all have ended."""
    return [worker.communicate()[1] for worker in workers]


def succeed(commands: Sequence[list[str]], processes: int = 1) -> None:
    """Raises SystemExit where one fails, with what it said."""
    if processes == 1:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            failed = [command for command in commands if palate(command)]
        if failed:
            raise SystemExit(f"failed: palate {' '.join(failed[0])}")
        return
    said = finish(workers := start(several(commands), processes))
    if any(worker.returncode for worker in workers):
        raise SystemExit("\n".join(said))


def trained(out: Path) -> dict[str, Tensor]:
    """What a run has trained, of a LoRA or a whole network."""
    (path,) = (file for name in ("pytorch_lora_weights", "unet/*", "transformer/*") for file in out.glob(f"{name}.safetensors"))
    return load_file(path)


def difference(one: Path, other: Path) -> str:
    """The largest of any weight."""
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys()
    return f"{max(float((first[name] - second[name]).abs().max()) for name in first):.1e}"


def compare(base: Path, cases: Sequence[str], counts: Sequence[int]) -> None:
    """A row a case."""
    begun = {"learning_rate": 1e-12, "max_train_steps": 1}  # the weights that it begins with
    for number, case in enumerate(cases):
        succeed([words(case, base / f"{number}-begun", **begun), words(case, base / f"{number}-one")])
    columns = {(count, sharded): f"{count}-{sharded}" for count in counts for sharded in (False, True)}
    for count in counts:
        runs = [
            words(case, base / f"{number}-{columns[count, sharded]}", count, shard_model=str(sharded).lower())
            for number, case in enumerate(cases)
            for sharded in (False, True)
        ]
        succeed(runs, count)
    heads = [f"{count}, sharded" if sharded else f"{count}" for count, sharded in columns]
    print("| " + " | ".join(["processes", "moved by", *heads]) + " |")
    for number, case in enumerate(cases):
        others = [difference(base / f"{number}-one", base / f"{number}-{name}") for name in ("begun", *columns.values())]
        print("| " + " | ".join([case, *others]) + " |")


def kill(base: Path, case: str, count: int = 4) -> None:
    """One of so many processes that hold a part each, in the midst; half of them, and one that holds everything, go on."""
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "lr_scheduler": "constant"}
    endless = words(case, base / "killed", count, shard_model="true", **{**options, "max_train_steps": 1000})
    workers = start(several([endless]), count)
    while not (base / "killed/checkpoint-2").exists() and all(worker.poll() is None for worker in workers):
        time.sleep(0.05)
    workers[-1].kill()
    for rank, (worker, said) in enumerate(zip(workers, finish(workers), strict=True)):
        print(f"process {rank} ended with {worker.returncode}: {(said.strip().splitlines() or [''])[-1]}")
    last = max(int(path.name.partition("-")[2]) for path in (base / "killed").glob("checkpoint-*"))
    options["max_train_steps"] = last + 1
    succeed([words(case, base / "straight", **options)])
    for processes in (count // 2, 1):
        out = shutil.copytree(base / "killed", base / f"resumed-{processes}")
        resumed = {"shard_model": "true", "resume_from_checkpoint": "latest", **options}
        succeed([words(case, out, processes, **resumed)], processes)
        print(f"resumed after {last} updates in {processes}: {difference(base / 'straight', out)} from one that never stopped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if options.kill:
            kill(Path(made), "full, perceptual")
        else:
            compare(Path(made), options.cases, options.processes)


if __name__ == "__main__":
    main()
