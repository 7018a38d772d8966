"""What helps at a prompt and in an editor: help of the few, lists that are filtered, completion, the schema of recipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from palate.base.options import parse
from palate.cli import main
from palate.runs import library, recipe
from palate.runs.help import FEW
from palate.runs.schema import schema
from palate.verbs.every import records
from palate.verbs.table import GROUPS, VERBS

ROOT = Path(__file__).parents[1]
SCREEN = 64


@pytest.fixture
def said(capsys):
    def of(*words: str) -> str:
        assert main(list(words)) == 0
        return capsys.readouterr().out

    return of


@pytest.mark.parametrize("words", [[], *([verb, "--help"] for verb in VERBS)])
def test_help_fits_a_screen(words, said):
    lines = said(*words).splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 128


@pytest.mark.parametrize("words", [["train"], ["train", "--help"], ["train", "no-such-recipe", "--help"]])
def test_help_of_train_tells_the_few_and_where_the_rest_is(words, said):
    text = said(*words)
    told = [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]
    assert told == [*(name for names in FEW.values() for name in names), "objective", "space"]
    assert set(told) <= {*recipe.OPTIONS, *recipe.SECTIONS}
    assert "  --learning_rate (default: 1.0e-05)\n" in text
    assert "palate train --help all" in text


def test_all_options_are_told_when_they_are_asked_for(said):
    text = said("train", "--help", "all")
    assert all(f"\n  --{name}" in text for name in recipe.OPTIONS)
    assert "  --optimizer adamw | adamw_8bit | adafactor | package.module:Class (default: adamw)\n" in text


@pytest.mark.parametrize("name", ["sd15-dpo-12gb", "mine.yaml"])
def test_help_of_a_recipe_shows_its_values(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(library.find("sd15-dpo-12gb"), "mine.yaml")
    text = said("train", name, "--help")
    assert text.startswith(f"palate train {name} ")
    assert "on one GPU of 12 GB" in text
    assert "  --rank (here: 64)\n" in text
    assert "Here {name: dpo, beta: 5000.0}" in text
    assert "  --lr_warmup_steps (here: 100)\n" in said("train", name, "--help", "all")


def test_no_help_says_none(said):
    for words in (*([verb, "--help"] for verb in VERBS), ["train", "--help", "all"]):
        assert " None" not in said(*words)
        assert "on_sample" not in said(*words)


def test_recipes_are_filtered_by_all_words(said, capsys):
    lines = said("recipes", "SDXL", "24gb").splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        name for name in library.built_in() if "sdxl" in name and "24gb" in name
    ]
    assert main(["recipes", "sdxxl"]) == 2
    assert "no recipe named 'sdxxl' (did you mean 'sdxl'?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--version"], ["recipes"], ["recipes", "show", "miniature-dpo"]])
def test_what_needs_no_tensor_loads_none(words):
    code = (
        f"import sys; from palate.cli import main; main({words!r}); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, timeout=60)


# Completion --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("palate tr", "train"),
        ("palate train sdxl-dpo-2", "sdxl-dpo-24gb"),
        ("palate train sdxl-dpo-24gb --learn", "--learning_rate"),
        ("palate train sdxl-dpo-24gb --optimizer ada", "adamw adamw_8bit adafactor"),
        ("palate train r --objective ip", "ipo"),
        ("palate score d --judges pick", "pickscore"),
        ("palate recipes copy sd35-nc", "sd35-ncp-dpo-24gb"),
        ("palate export out --format k", "kohya"),
    ],
)
def test_bash_completes(line, expected, said):
    script = said("completion", "bash")
    *before, last = line.split(" ")
    words = " ".join([*before, last])
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(before)}; _palate; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True, timeout=20)
    assert [w for w in done.stdout.split() if w.startswith(last)] == done.stdout.split()
    assert done.stdout.split() == expected.split()


def test_other_shells_get_the_same_words(said):
    assert said("completion", "zsh").split("\n", 1)[1] == said("completion", "bash")
    fish = said("completion", "fish")
    for name in recipe.OPTIONS:
        assert f"'__fish_seen_subcommand_from train' -l {name}" in fish
    assert "-l optimizer -x -a 'adamw adamw_8bit adafactor'" in fish
    assert main(["completion", "tcsh"]) == 2


def test_every_verb_has_its_records():
    assert [verb for group in GROUPS.values() for verb in group] == list(VERBS)
    for verb in set(VERBS) - {"recipes", "completion"}:
        assert all(hasattr(kind, "__dataclass_fields__") for kind in records(verb).values()), verb


# Schema ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", library.built_in())
def test_every_recipe_is_one_by_the_schema(name):
    jsonschema.validate(parse(library.find(name).read_text(), name), schema())
    jsonschema.validate(json.loads(json.dumps(recipe.load(name).as_dict())), schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"trainng": {}},
        {"training": {"lerning_rate": 1e-4}},
        {"training": {"optimizer": "sgdx"}},
        {"training": {"learning_rate": "fast"}},
        {"training": {"learning_rate": 0}},
        {"policy": {"rank": 0}},
        {"policy": {"gradient_checkpointing": 3}},
        {"objective": "dppo"},
        {"objective": {"beta": 3}},
    ],
)
def test_what_the_recipe_refuses_the_schema_refuses(wrong):
    jsonschema.Draft202012Validator.check_schema(schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema())


def test_the_schema_is_written_where_it_is_asked_for(said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "yaml-language-server" in said("recipes", "schema", "s.json")
    assert json.loads(Path("s.json").read_text()) == json.loads(json.dumps(schema())) == json.loads(said("recipes", "schema"))
    assert main(["recipes", "schema", "s.json"]) == 2
