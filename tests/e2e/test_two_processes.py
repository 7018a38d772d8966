"""The whole job started in two processes, as ``accelerate launch -m palate`` starts it."""

from __future__ import annotations

import shutil
import sys
import time
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

from benchmarks.processes import several, trained
from palate.runs import plan, recipe
from palate.runs.loading import denoiser_of, policy_of
from palate.training.log import read_log


def test_two_processes_train_as_one(palate, in_two_processes, tmp_path, model_dir, pairs_dir, cache_dir):
    words = ["train", "quick.yaml", "--max_train_steps", "2", "--output_dir", "two", "--train_batch_size", "2"]
    words += ["--pretrained_model_name_or_path", str(model_dir), "--train_data", str(pairs_dir), "--cache_dir", str(cache_dir)]
    codes, said = zip(*in_two_processes([sys.executable, "-m", "palate", *words], cwd=tmp_path)(120), strict=True)
    assert codes == (0, 0), said
    assert "16 rows: 16 pairs" in said[0]
    assert "rows" not in said[1]
    assert palate("train", max_train_steps=2, output_dir="one")[0] == 0
    one, two = trained(Path("one")), trained(Path("two"))
    for name in one:  # sums in another order, which AdamW's division enlarges: a twentieth of a step of 1e-3 at most
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=5e-5)


HOLDS = """
import sys
from palate.training import sharded

def cut_up(policy, whole=sharded.cut_up):
    whole(policy)
    parts = [p.to_local() for module in policy.modules for p in module.parameters()]
    print("holds", sum({x.untyped_storage().data_ptr(): x.nbytes for x in parts}.values()), file=sys.stderr)

sharded.cut_up = cut_up
"""
"""Before a program: it tells how many bytes of weights the process holds where it holds a part."""
PARTS = {
    "weights and their average": {
        "train_method": "full",
        "ema_decay": "0.9",
        "checkpointing_steps": "1",
        "max_train_steps": "3",
    },
    "perceptual, of several shapes, until accuracy falls": {
        "space": "perceptual",
        "train_method": "full",
        "resolution": "64x96",
        "buckets": "true",
        "bucket_step": "32",
        "validation_fraction": "0.2",
        "eval_steps": "1",
        "early_stopping_patience": "2",
        "max_train_steps": "9",
    },
    "perceptual, with text encoders, of draws that return": {
        "space": "perceptual",
        "space.layers": "all",
        "train_text_encoder": "true",
        "rank": "3",  # which is cut in 2 and 1
        "ema_decay": "0.9",
        "max_train_samples": "4",  # an update is an epoch
        "draws_per_pair": "1",
        "keep_targets": "true",
    },
    "perceptual, of a transformer in 8 bits, beta unknown": {
        "space": "perceptual",
        "objective.beta": "auto",
        "space.layers": "half",
        "space.steps_back": "20",  # a shorter one enlarges rounding
        "quantize": "int8",
        "gradient_checkpointing": "true",
    },
}
"""What is trained where each process holds a part of it."""


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To within a twentieth of a step of AdamW: sums are in another order."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=5e-6)


def test_each_of_two_holds_a_part(palate, in_two_processes, tmp_path, model_dir, sd3_dir, pairs_dir, cache_dir):
    """As much as is counted; they come to the weights of one, which goes on from their checkpoint, and stop where it stops."""
    shaped = shutil.copytree(pairs_dir, tmp_path / "shaped")
    for number, file in enumerate(sorted(shaped.glob("*.png"))):
        Image.open(file).resize([(64, 64), (96, 64), (64, 96)][number // 2 % 3]).save(file)
    common = {"max_train_steps": "2", "validation_fraction": "0", "evaluation_prompts": "null", "validation_prompts": "[]"}
    common |= {"learning_rate": "1e-4", "adam_epsilon": "1e-5"}  # no weight moves by the rounding of a gradient that is 0
    runs = []
    for what, options in PARTS.items():
        own = {"pretrained_model_name_or_path": str(sd3_dir if "transformer" in what else model_dir)}
        own |= {"train_data": str(shaped if "buckets" in options else pairs_dir)}
        runs.append({**common, **own, "cache_dir": str(cache_dir), **options})

    def words(run: int) -> list[str]:
        own = {"output_dir": f"two-{run}", "train_batch_size": "2", "shard_model": "true", "cache_dir": "cache"}
        return ["train", "quick.yaml", *(part for name, value in {**runs[run], **own}.items() for part in (f"--{name}", value))]

    *python, program, commands = several([words(run) for run in range(len(runs))])
    codes, said = zip(*in_two_processes([*python, HOLDS + program, commands], cwd=tmp_path)(300), strict=True)
    assert codes == (0, 0), said
    first, second = ([int(line.split()[1]) for line in errors.splitlines() if line.startswith("holds ")] for errors in said)
    for run, options in enumerate(runs):
        of = recipe.load("quick.yaml", {**options, "shard_model": True})
        counted = plan.held(policy_of(of, denoiser_of(of, outline="shapes")), of, 2)
        assert second[run] <= first[run] == sum(counted[part] for part in plan.WEIGHTS)
        same = {"train_batch_size": "2", "gradient_accumulation_steps": "2", "output_dir": f"one-{run}"}  # the same batches
        code, _, errors = palate("train", **{**options, **same})
        assert code == 0, errors
        close(trained(Path(f"one-{run}")), trained(Path(f"two-{run}")))
    assert Path("two-1/best/found.json").read_text() == Path("one-1/best/found.json").read_text()
    assert 3 <= len(read_log(Path("two-1/log.jsonl"))) == len(read_log(Path("one-1/log.jsonl"))) < 9  # before the last
    close(trained(Path("one-1/best")), trained(Path("two-1/best")))
    shutil.copytree("two-0", "again")
    for made in ("checkpoint-2", "checkpoint-3", "unet"):
        shutil.rmtree(Path("again", made))
    code, _, errors = palate("train", **runs[0], output_dir="again", resume_from_checkpoint="latest")
    assert code == 0, errors
    close(trained(Path("one-0")), trained(Path("again")))


def test_where_one_is_killed_the_other_ends_and_one_alone_goes_on(
    palate, in_two_processes, tmp_path, model_dir, pairs_dir, cache_dir
):
    words = ["train", "quick.yaml", "--max_train_steps", "2000", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    words += ["--pretrained_model_name_or_path", model_dir, "--train_data", pairs_dir, "--cache_dir", cache_dir]
    words += ["--output_dir", "out", "--train_batch_size", "2", "--validation_prompts", "[]"]
    finished = in_two_processes([sys.executable, "-m", "palate", *words], cwd=tmp_path)
    end = time.monotonic() + 200
    while not (Path("out/checkpoint-2").exists() or Path("out/checkpoint-3").exists()):
        assert time.monotonic() < end
        time.sleep(0.05)
    finished.workers[1].kill()
    codes, said = zip(*finished(60), strict=True)
    assert codes[0] == 2, said
    assert "another process of this run has ended: see its message; --resume_from_checkpoint latest goes on" in said[0]
    (*_, last) = sorted(int(folder.name.partition("-")[2]) for folder in Path("out").glob("checkpoint-*"))
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    code, _, errors = palate("train", max_train_steps=last + 1, evaluation_prompts="null", validation_prompts="[]", **options)
    assert code == 0, errors
    assert f"resumed after step {last} of {last + 1}" in errors


DIES = """
import os
from palate.training import place, sharded

def cut_up(policy, whole=sharded.cut_up):
    if os.environ["RANK"] == "1":
        os._exit(9)
    whole(policy)

def align(self, whole=place.Place.align):
    if os.environ["RANK"] == "1":
        os._exit(9)
    whole(self)

sharded.cut_up, place.Place.align = cut_up, align
"""
"""Before a program: the second process ends where the model is cut up, or where weights are made the same, as the kernel ends
one that takes too much memory."""


@pytest.mark.usefixtures("palate")
@pytest.mark.parametrize("shard", ["true", "false"])
def test_where_one_is_killed_before_the_first_update_the_other_ends_and_leaves_nothing(
    in_two_processes, tmp_path, model_dir, pairs_dir, cache_dir, shard
):
    words = ["train", "quick.yaml", "--pretrained_model_name_or_path", str(model_dir), "--train_data", str(pairs_dir)]
    words += ["--cache_dir", str(cache_dir), "--train_batch_size", "2", "--shard_model", shard, "--output_dir", "out"]
    *python, program, commands = several([words])
    codes, said = zip(*in_two_processes([*python, DIES + program, commands], cwd=tmp_path)(60), strict=True)
    assert codes == (2, 9), said
    assert said[0].splitlines()[-1] == "error: another process of this run has ended: see its message"
    assert not (tmp_path / "out").exists()


def shards(folder: Path) -> list[list[bytes]]:
    """The keys of each shard of a cache."""
    tables = [pa.ipc.open_stream(path.read_bytes()).read_all() for path in sorted(folder.glob("*.arrow"))]
    return [table["key"].to_pylist() for table in tables]


def test_two_processes_share_the_encoding(palate, quick_python, in_two_processes, tmp_path, model_dir, pairs_dir):
    words = ["encode", "quick.yaml", "--pretrained_model_name_or_path", str(model_dir), "--train_data", str(pairs_dir)]
    started = in_two_processes([quick_python, "-m", "palate", *words, "--cache_dir", "two"], cwd=tmp_path)
    codes, said = zip(*started(300), strict=True)
    assert codes == (0, 0), said
    assert palate(*words, cache_dir="one")[0] == 0
    one, two = shards(tmp_path / "one"), shards(tmp_path / "two")
    assert sorted(chain(*two)) == sorted(chain(*one))  # each once
    assert len(two) == 2
    assert min(map(len, two)) >= 10  # of 41: 32 pictures, 8 prompts, and the set itself
    # Nothing is left to do, of which another run of one process knows.
    assert palate(*words, cache_dir="two")[0] == 0
    assert shards(tmp_path / "two") == two


def test_where_one_process_fails_the_other_ends_too(palate, quick_python, in_two_processes, tmp_path, model_dir, pairs_dir):
    data = shutil.copytree(pairs_dir, tmp_path / "data")
    (data / "15-rejected.png").write_bytes(b"spoilt")
    words = ["encode", "quick.yaml", "--pretrained_model_name_or_path", str(model_dir), "--train_data", "data"]
    started = in_two_processes([quick_python, "-m", "palate", *words, "--cache_dir", "cache"], cwd=tmp_path)
    codes, said = zip(*started(300), strict=True)
    assert codes == (2, 2), said
    lines = sorted(errors.strip().splitlines()[-1] for errors in said)
    assert "another process of this run has ended: see its message" in lines[0]
    assert "row 16, column rejected" in lines[1]
    # What was encoded is kept: of the one that fails a whole batch; how far the other is by then, only time tells.
    assert sum(map(len, shards(tmp_path / "cache"))) >= 8
