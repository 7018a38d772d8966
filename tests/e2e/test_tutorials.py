"""The tutorials, every step of them in miniature, from an empty folder to their result; and their notebooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tools.docs.notebooks import FOLDER, NAMES, RUN, text_of

ROOT = Path(__file__).parents[2]
RESULTS = {
    "comfyui": ["out/taste/report.html", "my_taste.safetensors"],
    "lab": ["table/report.html", "table/comparison.json", "win_rates.pdf"],
    "team": ["out/trial/checkpoint-4", "out/brand/report.html", "out/brand/best"],
    "designers": ["results.html", "pictures/votes.db"],
}
"""Tutorial -> what it ends with."""


@pytest.fixture
def shell(tmp_path, quick_python, monkeypatch):
    """Runs a script of the shell in an empty folder, where ``palate`` and ``torchrun`` are those of this environment."""
    programs = tmp_path / ".programs"
    programs.mkdir()
    for name, module in (("torchrun", "-m torch.distributed.run"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "palate").symlink_to(quick_python)
    home = {"HOME": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    home |= {"PYTHON_EXEC": str(programs / "palate")}  # what torchrun starts
    home |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MPLBACKEND": "agg"}
    for name, value in home.items():
        monkeypatch.setenv(name, value)

    def run(script: str) -> None:
        done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"

    return run


@pytest.mark.parametrize("name", RESULTS)
def test_a_tutorial_leads_to_its_result(name, shell, tmp_path):
    """Of those that are notebooks, too, the notebook is run, which holds the page's steps and nothing else."""
    if name in NAMES:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    else:
        for language, title, content in RUN.findall((FOLDER / f"{name}.md").read_text(encoding="utf-8")):
            if language == "python":
                (tmp_path / title).write_text(content)
            else:
                assert title == "In miniature"
                shell(content)
    for path in RESULTS[name]:
        assert (tmp_path / path).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_page(name):
    """After a change of the page: python -m tools.docs.notebooks."""
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == text_of(name)
    cells = json.loads(text)["cells"]
    runs = [block for _, _, block in RUN.findall((FOLDER / f"{name}.md").read_text(encoding="utf-8"))]
    assert len(runs) >= 3
    assert [
        "".join(c["source"]).split("\n", 1)[1].removeprefix("set -e\n") + "\n" for c in cells[1:] if c["cell_type"] == "code"
    ] == runs
