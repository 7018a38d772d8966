"""Tutorials as notebooks: ``python -m tools.docs.notebooks`` writes them anew from their pages.

A notebook runs the miniature, so that it needs no GPU and no download; the real commands stand in its text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
NAMES = ("comfyui", "team")
RUN = re.compile(r'^```(sh|python) title="([^"]+)"\n(.*?)^```\n', re.M | re.S)
"""A block that is run: of the shell where its title says that it is the miniature, else a file of that name."""
INSTALL = """\
# On Colab: install Palate from its repository, whose address goes here.
import shutil

if shutil.which("palate") is None:
    print("pip install 'palate[votes]' first")
"""


def notebook(page: str) -> dict[str, object]:
    """The text of a page as cells: prose as it is, blocks that are run as code."""
    cells, place = [_cell("code", INSTALL)], 0
    for block in RUN.finditer(page):
        cells += _prose(page[place : block.start()])
        language, title, content = block.groups()
        cells.append(_cell("code", f"%%bash\nset -e\n{content}" if language == "sh" else f"%%writefile {title}\n{content}"))
        place = block.end()
    cells += _prose(page[place:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def _prose(text: str) -> list[dict[str, object]]:
    return [_cell("markdown", text.strip("\n"))] if text.strip() else []


def _cell(kind: str, text: str) -> dict[str, object]:
    cell: dict[str, object] = {"cell_type": kind, "metadata": {}, "source": text.rstrip("\n").splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def text_of(name: str) -> str:
    """The notebook of a tutorial, as its file holds it."""
    return json.dumps(notebook((FOLDER / f"{name}.md").read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in NAMES:
        (FOLDER / f"{name}.ipynb").write_text(text_of(name), encoding="utf-8")
