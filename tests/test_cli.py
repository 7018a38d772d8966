"""The command line without the work: help, versions, recipes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palate.base.errors import UserError
from palate.base.machine import versions
from palate.base.options import BARE, overrides
from palate.cli import main
from palate.runs import library, recipe
from palate.verbs.table import VERBS

ROOT = Path(__file__).parents[1]


def test_help_is_quick_and_light():
    code = (
        "import json, sys, time; began = time.perf_counter(); from palate.cli import main; main(['--help']); "
        "print(json.dumps([time.perf_counter() - began, sorted(m for m in sys.modules if '.' not in m)]), file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    taken, modules = json.loads(done.stderr)
    assert {"torch", "diffusers", "transformers", "numpy", "yaml"}.isdisjoint(modules)
    assert taken < 1
    assert time.perf_counter() - began < 5  # with the start of Python, on a busy machine
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help(capsys, words):
    assert main(words) == 0
    assert "palate train" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough():
    code = "import sys; from palate.cli import main; sys.exit(main(['--help']))"
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    worker.stdout.close()
    assert worker.stderr.read() == b""
    assert worker.wait(timeout=60) == 0


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version(capsys, word):
    assert main([word]) == 0
    assert capsys.readouterr().out.strip() == versions()["palate"]


def test_recipes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines if line.startswith("  ")) == list(library.built_in())
    assert [line for line in lines if line[:1].strip()][:2] == ["mini-sd", "mini-sd3"]
    assert main(["recipes", "show", "miniature-dpo"]) == 0
    shown = capsys.readouterr().out
    assert shown == library.find("miniature-dpo").read_text()
    assert main(["recipes", "copy", "miniature-dpo"]) == 0
    assert Path("miniature-dpo.yaml").read_text() == shown
    Path("miniature-dpo.yaml").write_text("mine")
    capsys.readouterr()
    for words in (["copy", "miniature-dpo"], ["copy", "miniature-dpo", "."], ["copy", "miniature-dpo", "miniature-dpo.yaml"]):
        assert main(["recipes", *words]) == 2
        assert "exists; name another file" in capsys.readouterr().err
    assert Path("miniature-dpo.yaml").read_text() == "mine"
    assert main(["recipes", "copy", "miniature-dpo", "other.yaml"]) == 0
    assert recipe.load("other.yaml") == recipe.load("miniature-dpo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command 'trian' (did you mean 'train'?"),
        (["recipes", "copy"], "expected: palate recipes"),
        (["compare", "a", "b", "--drows", "1"], "unknown option --drows (did you mean 'draws'?"),
        (["recipes", "show", "nothing"], "no recipe named 'nothing'"),
        (["score", "pictures\udcff"], "'pictures\\udcff' is not in UTF-8, in which names and texts are written"),
    ],
)
def test_mistakes(capsys, words, message):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_overrides():
    found = overrides(["--a", "1", "--b=x=y", "--c", "[p, q]", "--d", "{r: 1e-4}", "--e", "-1", "--f", "no: w"])
    assert found == {"a": "1", "b": "x=y", "c": ["p", "q"], "d": {"r": 1e-4}, "e": "-1", "f": "no: w"}
    assert overrides(["--a", "--b-c", "1", "--d"]) == {"a": BARE, "b_c": "1", "d": BARE}
    for words in (["a"], ["--"], ["-a", "1"]):
        with pytest.raises(UserError):
            overrides(words)


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise FileNotFoundError(2, "a bug")

    monkeypatch.setattr(library, "built_in", broken)
    with pytest.raises(FileNotFoundError):
        main(["recipes"])


def test_no_free_memory_is_told_in_one_line(capsys, monkeypatch):
    import torch

    def huge(*_):
        torch.empty(2**60, dtype=torch.uint8)

    def small_gpu(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for work in (huge, small_gpu):
        monkeypatch.setattr("palate.verbs.recipes.main", work)
        assert main(["recipes"]) == 2
        assert capsys.readouterr().err.startswith("error: no free memory: lower the batch size (train_batch_size, ")


def test_interrupted_before_training(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "load", interrupted)
    assert main(["train", "miniature-dpo"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped: the same command begins again")


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_given_wherever_it_is_asked_for(verb, capsys):
    assert main([verb, "--help"]) == 0
    asked_alone = capsys.readouterr().out
    assert asked_alone.startswith(f"palate {verb} ")
    for words in (
        [verb, "-h"],
        [verb, "FOLDER", "--help"],
        [verb, "FOLDER", "-h"],
        [verb, "--seed", "1", "--help"],
        [verb, "FOLDER", "--seed", "--help"],
        [verb, "FOLDER", "OTHER", "--no_such_option", "x", "--help"],
        ["help", verb],
        ["--help", verb],
    ):
        assert main(words) == 0, words
        assert capsys.readouterr().out == asked_alone, words


def test_every_error_is_one_readable_line(capsys, monkeypatch):
    def failing(*_):
        raise UserError("read \x1b[31m" + "x" * 100_000 + "\n\tthe end")

    monkeypatch.setattr("palate.verbs.recipes.main", failing)
    assert main(["recipes"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert line.startswith("error: read ?[31mxxx")
    assert line.endswith("x the end")
    assert len(line) < 2100


HOSTILE = ["x" * 40_000, "\x1b[2J\x07", "a\nb\nc", "é" * 3000]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("text", HOSTILE, ids=["long", "control", "lines", "accents"])
def test_what_was_typed_is_never_printed_whole(verb, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--output_dir", "o", "--judges", text, "--prompts", text, "--output", text]
    for words in ([verb, text], [verb, f"--{text}", "1"], [verb, "FOLDER", f"--{text}", "1"], [verb, text, *given]):
        code = main(words)
        said = capsys.readouterr()
        assert code == 2, words[:2]
        lines = said.err.splitlines()
        assert lines[-1].startswith("error: ")
        assert all(line.isprintable() and len(line) < 2100 for line in lines)


def test_a_folder_that_cannot_be_made_is_one_line(capsys, monkeypatch):
    def failing(*_):
        Path("/proc/x/y").mkdir(parents=True)

    monkeypatch.setattr("palate.verbs.recipes.main", failing)
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err.startswith("error: /proc/x cannot be read or written: No such file or directory")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_8bit_adam"], "unknown option --use_8bit_adam (write --optimizer adamw_8bit; "),
        (["--dry_run"], "unknown option --dry_run ('palate plan RECIPE' tells "),
        (
            ["--num_processes", "8"],
            "unknown option --num_processes (it is told to 'accelerate launch'; 'palate plan' calls it processes",
        ),
        (["--beta", "3"], "did you mean --objective.beta?"),
        (["--beta_dpo", "3"], "did you mean --objective.beta?"),
        (["--lr", "3"], "did you mean --learning_rate?"),
        (["--dataset_name", "x"], "did you mean --train_data?"),
        (["--config", "x"], "the recipe stands first"),
        (["--learning-rat", "3"], "did you mean --learning_rate?"),
        (["--seed"], "seed lacks a value; expected a whole number"),
        (["--output_dir", "--seed", "1"], "output_dir lacks a value; expected text"),
        (["--objective"], "--objective lacks a value"),
        (["--objective.beta"], "beta lacks a value"),
        (["--space.layers"], "layers lacks a value"),
    ],
)
def test_options_by_the_names_of_other_programs_and_without_a_value(capsys, words, message):
    # In the recipe's first seconds: the options are read before anything else.
    assert main(["train", "miniature-ncp-dpo", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_switches_may_stand_alone_and_hyphens_for_underscores():
    given = overrides(["--gradient-checkpointing", "--learning-rate", "1e-4", "--random_flip", "--seed=3"])
    made = recipe.load("miniature-dpo", given)
    assert (made.policy.gradient_checkpointing, made.data.random_flip) == (True, True)
    assert (made.training.learning_rate, made.training.seed) == (1e-4, 3)


def test_names_of_other_programs_lead_to_options_that_exist():
    for name, here in recipe.ELSEWHERE.items():
        assert name not in recipe.OPTIONS
        for known in re.findall(r"--([a-z_.]+)", here) if " " in here else [here]:
            head = known.partition(".")[0]
            assert head in recipe.OPTIONS or head in recipe.SECTIONS, (name, here)


@pytest.mark.parametrize("verb", ["generate", "label", "accuracy", "score", "export", "vote", "serve-judge", "train"])
def test_what_comes_before_the_options_is_asked_for(verb, capsys):
    assert main([verb, "--output", "x"]) == 2
    assert f"palate {verb} expects " in capsys.readouterr().err
