"""Every command that the README and the docs print is one that Palate takes; templates and snippets run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from palate.base.errors import UserError
from palate.base.options import checked, overrides
from palate.cli import main
from palate.runs import library, recipe
from palate.runs.sections import EvaluationOptions
from palate.verbs.every import records
from palate.verbs.table import VERBS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
INVENTED = {"RECIPE": "miniature-dpo", "mine.yaml": "miniature-dpo", "out/recipe.yaml": "miniature-dpo"}
"""Names that stand for a recipe of the reader's own -> one like it."""


def fenced(text: str) -> list[tuple[str, str]]:
    """Language and content of every code block."""
    return re.findall(r"^ *```([\w-]*)[^\n]*\n(.*?)^ *```", text, re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The words of every ``palate`` command in code blocks and between back quotes, without comments and redirections."""
    lines = [
        line.strip().removeprefix("$ ")
        for language, block in fenced(text)
        if language in ("", "sh", "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    inline = re.findall(r"`(palate [^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S).replace("\n", " "))
    found = []
    for line in [*lines, *inline]:
        line = re.sub(r"^(torchrun|accelerate launch) .*-m palate ", "palate ", line)
        line = line.replace("$objective", "dpo").replace("$seed", "0")  # of loops
        if not line.startswith("palate ") or "..." in line or "VERB" in line:  # a way of speaking, not a command
            continue
        words = shlex.split(line, comments=True)
        end = next((i for i, word in enumerate(words) if word in ("|", ">", "2>", "&&", ";", "&")), len(words))
        found.append(words[1:end])
    return found


def check(words: list[str]) -> None:
    """Refuse what the command line would refuse before it reads any file."""
    verb, rest = words[0], words[1:]
    if verb.startswith("-"):
        assert verb in ("--help", "--version")
        return
    assert verb in VERBS, verb
    if not rest or {"-h", "--help"} & set(rest) or verb in ("recipes", "completion"):
        return
    if verb == "vote" and f"palate vote {rest[0]}" in records(verb):
        kinds = records(verb)
        kind, rest = kinds[f"palate vote {rest[0]}"], rest[1:]
    else:
        kind = next(iter(records(verb).values()))
    first = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    if verb == "train":
        check_train(rest[0], overrides(rest[first:]))
    elif verb in ("encode", "plan"):  # take the options of train, and their own
        given = overrides(rest[first:])
        checked(kind, {name: given.pop(name) for name in kind.__dataclass_fields__ if name in given}, f"palate {verb}")
        check_train(rest[0], given)
    elif verb == "evaluate":
        found = overrides(rest[first:])
        assert set(found) <= {*recipe.OPTIONS, "objective"}
        checked(EvaluationOptions, {k: v for k, v in found.items() if recipe.OPTIONS[k] == "evaluation"}, "palate evaluate")
    else:
        given = overrides(rest[first:])
        try:
            checked(kind, given, f"palate {verb}")
        except UserError as error:
            if " needs --" not in str(error):  # a page may show the options that it speaks of alone
                raise


def check_train(name: str, given: dict[str, object]) -> None:
    own = {key for key in ("objective", "space") if ":" in str(given.get(key, ""))}  # from a file that is not here
    for key in [k for k in given if k.partition(".")[0] in own]:
        del given[key]
    if name in INVENTED or not (name in library.built_in() or name.endswith(".yaml")):
        name = INVENTED.get(name, "miniature-ddpo-is" if "train_prompts" in given or "rewards" in given else "miniature-dpo")
    recipe.load(INVENTED.get(name, name), given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_printed_commands_are_commands(page):
    for words in commands(page.read_text(encoding="utf-8")):
        try:
            check(words)
        except UserError as error:
            raise AssertionError(f"palate {shlex.join(words)}: {error}") from error


def test_they_are_many():
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) > 100


def test_recipes_that_are_named_exist():
    """Of names with a recipe's form: a family, a method, and mostly a size. The changelog names those of before, too."""
    form = re.compile(
        r"`((?:miniature|sd15|sd14|sdxl|sd35|ddpo|klein|zimage|flux)-[a-z0-9-]*(?:dpo|cpo|sft|gb|is|sf|nft|awm|grpo|rwr|lora))`"
    )
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    named = {name for page in pages for name in form.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 20
    assert named <= set(library.built_in())


def test_python_snippets_of_readme_and_running_import_what_exists():
    for page in ("README.md", "docs/running.md", "docs/extending.md"):
        for language, block in fenced((ROOT / page).read_text(encoding="utf-8")):
            if language == "python":
                compile(block, page, "exec")
                for line in re.findall(r"^(?:from palate[\w.]* import .*|import palate)$", block, re.M):
                    subprocess.run([sys.executable, "-c", line], cwd=ROOT, check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("number", range(5))
def test_templates_of_extensions_run_as_they_stand(number, palate, tmp_path, monkeypatch, cache_dir):
    """Every command of the page, each beside the module that the page's blocks make."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text("\n".join(block for language, block in fenced(text) if language == "python"))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    found = [words for words in commands(text) if words[0] == "train"]
    if number >= len(found):
        assert number == len(found) == 4
        return
    small = ["--train_batch_size", "2", "--num_inference_steps", "2", "--validation_prompts", "[]", "--logging_steps", "1"]
    if "miniature-ddpo-is" in found[number]:
        small += [
            "--samples_per_round",
            "8",
            "--updates_per_round",
            "1",
            "--sample_num_steps",
            "6",
            "--num_evaluation_prompts",
            "2",
        ]
    else:
        small += ["--max_train_samples", "8", "--evaluation_prompts", "null", "--judges", "[]", "--cache_dir", str(cache_dir)]
    assert main([*found[number], *small, "--lr_warmup_steps", "0"]) == 0
    sys.modules.pop("mine", None)


# What a release consists of ----------------------------------------------------------------------------------------------


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_holds_every_file_of_the_package():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["palate"]
    package = ROOT / "palate"
    held = {path for pattern in told for path in package.glob(pattern)}
    there = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in there - held if path.suffix != ".py"} == set()


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_forms_are_readable(path):
    content = yaml.safe_load(path.read_text())
    if path.parent.name == "workflows":
        runs = [step["run"] for job in content["jobs"].values() for step in job["steps"] if "run" in step]
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)) | {"docs", "dist"}
        assert {word for run in runs for word in re.findall(r"make ([a-z-]+)", run)} <= targets
        for run in runs:
            for line in re.findall(r"palate (train .*)", run):
                check(shlex.split(line))
        assert content["permissions"] == {"contents": "read"}
    elif path.name != "config.yml":
        assert {"name", "description", "body"} <= content.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda path: path.name)
def test_dockerfiles_copy_what_is_there_and_run_as_a_user(path):
    text = path.read_text().replace("\\\n", " ")
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        assert all((ROOT / source).exists() for source in line.split()[:-1])
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
    assert re.search(r"^USER palate$", text, re.M)
    assert re.findall(r"^(FROM|USER|WORKDIR|ENTRYPOINT|CMD)", text, re.M)[0] == "FROM"
