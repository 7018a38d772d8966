"""A fingerprint of behaviour: ``python benchmarks/fingerprint.py record|compare [FILE] [--only NAME ...] [--quick]``.

Everything goes through the command line, as a user would, so that the fingerprint outlives any change inside. Recorded are

- small runs of the miniature world, straight, stopped in the middle and resumed, and in two processes: digests of the trained
  tensors, the log without seconds, sample pictures, metrics, recipe, card, report, the names of all files;
- what the other verbs print and write of a trained run;
- the text of every ``--help``;
- the files of the wheel.

``compare`` runs all of it again and tells what differs: first digests, then the logs number by number with the greatest
relative difference. Digests depend on the kind of processor; the file names the one it was recorded on. One thread each.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from processes import finish, start

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "fingerprint.json"
UPDATES = 6

SMALL = {
    "max_train_steps": UPDATES,
    "logging_steps": 1,
    "checkpointing_steps": 3,
    "sample_steps": 3,
    "eval_steps": 3,
    "evaluation.num_evaluation_prompts": 4,
    "num_inference_steps": 4,
    "validation_prompts": "[a red house on the left, a white tower]",
}
OFFLINE = {**SMALL, "max_train_samples": 48, "train_batch_size": 4, "validation_fraction": 0.1}
ONLINE = {
    **SMALL,
    "samples_per_round": 8,
    "sample_batch_size": 8,
    "train_batch_size": 4,
    "sample_num_steps": 4,
    "held_out_pictures": 4,
    "group_size": 4,
    "rounds": 6,
}
TRAJECTORIES = {**ONLINE, "window_size": 3}
RUNS = {
    "dpo": ("miniature-dpo", OFFLINE),
    "ncp-dpo": ("miniature-ncp-dpo", {**OFFLINE, "snr_gamma": 5, "ema_decay": 0.9, "random_flip": "true"}),
    "kto": ("miniature-kto", {**OFFLINE, "caption_dropout": 0.2}),
    "sft": ("miniature-sft", {**OFFLINE, "train_method": "full", "learning_rate": 1e-5}),
    "ddpo-is": ("miniature-ddpo-is", TRAJECTORIES),
    "rwr": ("miniature-rwr", ONLINE),
    "online-dpo": ("miniature-online-dpo", {**ONLINE, "train_batch_size": 2, "inner_epochs": 1}),
    "sdxl-dpo": ("miniature-sdxl-dpo", OFFLINE),
    "sdxl-ncp-dpo": ("miniature-sdxl-ncp-dpo", {**OFFLINE, "space.layers": "all", "gradient_checkpointing": "true"}),
}
VERBS = [
    *("train", "vote", "evaluate", "serve-judge", "generate", "label", "accuracy", "score", "compare", "report", "export"),
    *("recipes", "miniature"),
]
VOLATILE = {"seconds", "command", "versions", "created", "output_dir", "cache_dir", "resume_from_checkpoint"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", nargs="?", type=Path, default=RESULT)
    parser.add_argument("--only", nargs="*", help="names of runs, or of verbs, help, wheel")
    parser.add_argument("--quick", action="store_true", help="straight runs only")
    given = parser.parse_args()
    parts: dict[str, Any] = {}
    jobs = {}
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        work = Path(folder)
        for name in RUNS:
            if not given.only or name in given.only:
                jobs[name] = pool.submit(of_run, name, work / name, given.quick)
        for name, make in (("verbs", of_verbs), ("help", of_help), ("wheel", of_wheel)):
            if not given.only or name in given.only:
                jobs[name] = pool.submit(make, work / name)
        for name, job in jobs.items():
            parts[name] = job.result()
            print(f"{name}: done", file=sys.stderr, flush=True)
    if given.what == "record":
        told = {"processor": processor(), "python": platform.python_version(), "parts": parts}
        given.file.write_text(json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {given.file}")
        return
    known = json.loads(given.file.read_text(encoding="utf-8"))
    if known["processor"] != processor():
        print(f"recorded on {known['processor']}, this is {processor()}: digests may differ, compare the logs")
    found = json.loads(json.dumps(parts))  # tuples to lists
    differing = 0
    for name, part in found.items():
        lines = list(differences(known["parts"].get(name, {}), part))
        if given.quick and name in RUNS:
            lines = [line for line in lines if line.startswith("straight")]
        differing += bool(lines)
        print(f"{name}: {'equal' if not lines else f'{len(lines)} differences'}")
        for line in lines[:40]:
            print(f"  {line}")
    sys.exit(1 if differing else 0)


def of_run(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """A run straight through; stopped after half of it and resumed; in two processes."""
    folder.mkdir(parents=True)
    recipe, options = RUNS[name]
    words = ["train", recipe, *given_as(options), "--cache_dir", str(folder / "cache")]
    found = {}
    said = palate([*words, "--output_dir", "straight"], folder)
    found["straight"] = {**of_folder(folder / "straight"), "said": said}
    if quick:
        return found
    half = [*given_as({**options, "max_train_steps": UPDATES // 2}), "--cache_dir", str(folder / "cache")]
    palate(["train", recipe, *half, "--output_dir", "resumed"], folder)
    palate([*words, "--output_dir", "resumed", "--resume_from_checkpoint", "latest"], folder)
    found["resumed"] = of_folder(folder / "resumed")
    each = options["train_batch_size"] // 2
    in_two([*words, "--train_batch_size", str(each), "--output_dir", "two"], folder)
    found["two"] = of_folder(folder / "two")
    shutil.rmtree(folder)
    return found


def of_verbs(folder: Path) -> dict[str, Any]:
    """What the other verbs make of a trained run, of pictures and of pairs."""
    folder.mkdir(parents=True)
    recipe, options = RUNS["dpo"]
    cache = ["--cache_dir", str(folder / "cache")]
    palate(["train", recipe, *given_as(options), *cache, "--output_dir", "run"], folder)
    pairs = ROOT / "palate" / "miniature" / "pairs" / "train.parquet"
    drawn = "--prompts miniature-unseen --num_prompts 4 --num_inference_steps 4 --images_per_prompt 2"
    said = {}
    for key, words in {
        "evaluate": "evaluate run --evaluation_prompts miniature-unseen --num_evaluation_prompts 3 --judges [mini-clip]",
        "generate base": f"generate mini-sd {drawn} --output_dir base",
        "generate run": f"generate run {drawn} --output_dir tuned --model_name tuned",
        "score": "score base --judges [mini-clip,jpeg_compressibility]",
        "compare": "compare base tuned --judges [mini-clip,mini-pickscore] --output_dir comparison",
        "label": "label base --judges [mini-pickscore] --output pairs.parquet",
        "label pairs": f"label {pairs} --judges [mini-aesthetic] --output again.parquet --max_pairs 12",
        "accuracy": f"accuracy {pairs} --judges [mini-pickscore] --model run --max_pairs 12 --timesteps 2 {' '.join(cache)}",
        "report": "report run comparison --output page.html",
        "export kohya": "export run --format kohya --output run.safetensors",
        "export diffusers": "export run --format diffusers --output as-diffusers",
        "export merged": "export run --format merged-unet --output merged",
        "recipes": "recipes",
        "recipes show": "recipes show miniature-dpo",
        "misspelt": "trian",
        "misspelt option": "train miniature-dpo --learnig_rate 1",
        "out of range": "train miniature-dpo --learning_rate -1",
        "unknown judge": "score base --judges [mini-clop]",
        "no data": "train miniature-dpo --train_data nowhere",
        "wrong objective": "train miniature-dpo --objective dpa",
    }.items():
        said[key] = palate(words.split(), folder, fails=True)
    return {"said": said, "files": of_folder(folder)}


def of_help(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True)
    return {verb: palate([verb, "--help"], folder, fails=True) for verb in VERBS} | {"": palate(["--help"], folder)}


def of_wheel(folder: Path) -> list[str]:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return sorted(wheel.namelist())


def of_folder(folder: Path) -> dict[str, Any]:
    """What lies in a folder: digests of what is exact, text and numbers of what is read."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.split("/")[0] == "cache":
            continue
        if path.suffix == ".safetensors":
            found[name] = of_tensors(path)
        elif path.name == "log.jsonl":
            found[name] = [plain(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.suffix == ".json":
            found[name] = plain(json.loads(path.read_text(encoding="utf-8")))
        elif path.name == "state.pt":
            found[name] = of_state(path)
        elif path.suffix in (".html", ".md", ".yaml", ".jsonl", ".txt") and path.stat().st_size < 4_000_000:
            found[name] = digest(words(path.read_text(encoding="utf-8"), folder).encode())
        elif path.name == "train.log":
            found[name] = digest(re.sub(r"seconds \S+", "", words(path.read_text(encoding="utf-8"), folder)).encode())
        else:
            found[name] = digest(path.read_bytes())
    return found


def of_tensors(path: Path) -> str:
    from safetensors.numpy import load_file

    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return found.hexdigest()[:16]


def of_state(path: Path) -> str:
    """The state of a checkpoint without seconds: numbers, texts and tensors in order."""
    import torch

    def flat(value: Any) -> Iterator[bytes]:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                if key != "seconds":
                    yield f"{key}:".encode()
                    yield from flat(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                yield from flat(part)
        else:
            yield value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()

    found = hashlib.sha256()
    for part in flat(torch.load(path, weights_only=True)):
        found.update(part)
    return found.hexdigest()[:16]


def plain(value: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return re.sub(r"/tmp/\S*?/(?=[^/\s]*$)", "", value) if isinstance(value, str) else value


def words(text: str, folder: Path) -> str:
    """A text without what differs from run to run: folders, seconds, white space between tags."""
    text = text.replace(str(folder.parent), "").replace(str(folder), "")
    text = re.sub(r"(/tmp/tmp\w+|\d+(\.\d+)? s\b|\d+:\d\d(:\d\d)?|seconds \S+)", "", text)
    text = "\n".join(line for line in text.splitlines() if not re.search(r"(it/s|%\||\[\?\?)", line))
    return " ".join(text.split())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def given_as(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def environment() -> dict[str, str]:
    alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **alone, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def palate(given: list[str], folder: Path, *, fails: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "palate", *given], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode and not fails:
        raise SystemExit(f"palate {' '.join(given)}: {done.stderr}")
    status = f"status {done.returncode} " if fails else ""
    shown = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("step "))
    return status + words(shown, folder)


def in_two(given: list[str], folder: Path) -> None:
    workers = start([sys.executable, "-m", "palate", *given], 2, cwd=folder, environment=environment())
    said = finish(workers)
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"two processes: palate {' '.join(given)}: {said}")


def processor() -> str:
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", told)
    return name[1] if name else platform.processor()


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """What differs, by its place; of numbers also by how much."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            if key not in after:
                yield f"{where}{key}: gone"
            elif key not in before:
                yield f"{where}{key}: new"
            else:
                yield from differences(before[key], after[key], f"{where}{key} ")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (a, b) in enumerate(zip(before, after, strict=True)):
            yield from differences(a, b, f"{where}{index} ")
    elif isinstance(before, list) and isinstance(after, list) and all(isinstance(x, str) for x in (*before, *after)):
        yield from (f"{where}{x}: gone" for x in before if x not in after)
        yield from (f"{where}{x}: new" for x in after if x not in before)
    elif before != after:
        size = ""
        if isinstance(before, float) and isinstance(after, float):
            size = f" (relative difference {abs(after - before) / max(abs(before), 1e-300):.1e})"
        yield f"{where}was {str(before)[:300]!r}, is {str(after)[:300]!r}{size}"


if __name__ == "__main__":
    main()
