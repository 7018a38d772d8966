"""What is skipped is said in the last line, with what would enable it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from skipped import not_tested


def test_reasons_are_counted_and_cases_that_do_not_exist_are_left_out():
    browser = "the pages in a browser: apt-get install chromium"
    fuzzing = "fuzzing: set PALATE_FUZZ to a number of inputs"
    assert (
        not_tested([fuzzing, browser, browser, "SDXL alone has names of its own"]) == f"not run: 2 of {browser}; 1 of {fuzzing}"
    )
    assert not_tested([]) == not_tested(["SDXL alone"]) == ""


def test_it_is_the_last_line():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/e2e/test_fuzz.py", "-k", "fuzz"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.stdout.rstrip().splitlines()[-1].startswith("not run: "), run.stdout
