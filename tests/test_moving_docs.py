"""The pages on outputs and on moving here name only options, formats and recipes that exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from palate.base.errors import UserError
from palate.models.files import KOHYA_FILE, LORA_FILE
from palate.runs import export, library, recipe

DOCS = Path(__file__).parents[1] / "docs"


def here(line: str) -> str:
    """Of a row of a table "theirs ... | here | note", the part that is ours."""
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    return cells[2] + (cells[3] if len(cells) > 3 else "") if len(cells) > 2 else cells[-1]


def test_options_on_the_page_of_moving_exist():
    text = (DOCS / "moving-from-diffusers-dpo.md").read_text()
    ours = [here(line) for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    named = {name for part in ours for name in re.findall(r"--([a-z_.]+)", part)} - {"judges", "output"}  # of palate label
    assert len(named) > 25
    for name in sorted(named):
        section, _, key = name.rpartition(".")
        if section in ("objective", "space"):
            assert key in ("beta", "bc_weight", "weight", "layers", "normalise", "target_time")
        else:
            assert key in recipe.OPTIONS or name in recipe.SECTIONS, name


@pytest.mark.parametrize("page", ["moving-from-diffusers-dpo.md", "outputs.md", "memory.md", "../README.md"])
def test_recipes_and_exports_that_pages_name_exist(page):
    text = (DOCS / page).read_text()
    for name in re.findall(r"palate train ((?:sd|sdxl|sd15)-[\w-]+)", text):
        library.find(name)
    for words in re.findall(r"palate export \S+ (--.*?)(?:\s+#.*)?$", text, flags=re.M):
        options = dict(re.findall(r"--(\w+) (\S+)", words))
        assert options.keys() <= {f.name for f in dataclasses.fields(export.ExportOptions)}
        try:
            export.ExportOptions(**{k: int(v) if k == "rank" else v for k, v in options.items()})
        except UserError as error:
            raise AssertionError(words) from error


def test_names_of_files():
    text = (DOCS / "outputs.md").read_text()
    assert f"`{LORA_FILE}`" in text
    assert f"`{KOHYA_FILE}`" in text


def test_objectives_on_the_page_of_moving_from_flow_grpo_exist():
    text = (DOCS / "moving-from-flow-grpo.md").read_text()
    names = set(re.findall(r"objective.name: (\w+)", text))
    assert len(names) == 5
    keywords = {key for name in names for key in recipe.complete_objective({"name": name})}
    assert set(re.findall(r"`objective\.(\w+)`", text)) <= keywords


@pytest.mark.parametrize("page", ["moving-from-trl-ddpo.md", "moving-from-flow-grpo.md"])
def test_options_on_the_pages_of_moving_to_online_training_exist(page):
    text = (DOCS / page).read_text()
    sections = {name for name in recipe.SECTIONS if name != "objective"}
    named = {(s, n) for s, n in re.findall(r"`([a-z]+)\.([a-z_]+)", text) if s in sections}
    assert len(named) > 20
    kinds = {name: {f.name for f in dataclasses.fields(getattr(recipe.Recipe(), name))} for name, _ in named}
    for section, name in sorted(named - {("training", "adam_")}):
        assert name in kinds[section], f"{section}.{name}"
