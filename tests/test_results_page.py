"""The pages say what the scripts print of the results that are kept."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RATE = re.compile(r"\d+ % \(\d+-\d+\)")
ENDS = re.compile(r"\(([+-]?[\d.]+ to [+-]?[\d.]+)\)")
ALONE = ("## The demo", "## NCP-DPO on mini-sd")
"""Sections of single commands, whose results are not kept."""


def printed(monkeypatch) -> list[str]:
    """All lines of all tables."""
    monkeypatch.syspath_prepend(str(ROOT / "reproduction"))
    names = ("claims", "flow", "heads", "online_curves", "runs")
    claims, flow, heads, online, runs = map(importlib.import_module, names)
    given = argparse.Namespace(
        measured=runs.MEASURED, seeds=runs.SEEDS, methods=list(online.METHODS), rewards=list(online.REWARDS)
    )
    tables = [claim.tables(runs.MEASURED, claims.seeds_of(name)) for name, claim in claims.CLAIMS.items()]
    tables.append(heads.tables(runs.MEASURED, heads.SEEDS))
    tables += [table(given) for table in (flow.rates_table, flow.offline_table, flow.unseen_table)]
    tables += [table(given) for table in (online.drawn, online.recipes_table)]
    tables.append(runs.split_table(runs.MEASURED, "mini-sd", [f"generalisation-{seed}" for seed in runs.SEEDS]))
    for name in list(sys.modules):
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).parent == ROOT / "reproduction":
            del sys.modules[name]  # their names are short ones
    return [line for table in tables for line in table]


def bare(cell: str) -> bool:
    """Whether it holds intervals and no words."""
    return (RATE.search(cell) or ENDS.search(cell)) is not None and not any(map(str.isalpha, cell.replace(" to ", "")))


def unsigned(ends: str) -> tuple[str, ...]:
    """As a sentence says of a loss how large it is."""
    return tuple(sorted(end.lstrip("+-") for end in ends.split(" to ")))


def test_every_interval_is_one_that_the_scripts_print(monkeypatch):
    lines = printed(monkeypatch)
    cells = {cell.strip().replace("*", "") for line in lines for cell in line.split("|")}
    rates, intervals = ({one for line in lines for one in kind.findall(line)} for kind in (RATE, ENDS))
    intervals = set(map(unsigned, intervals))
    parts = {part for cell in cells for part in cell.split("; ")}
    assert len(cells) > 400
    unknown, section = [], ""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for number, line in enumerate(page.read_text().splitlines(), 1):
            section = line if line.startswith("## ") else section
            if section.startswith(ALONE):
                continue
            found = [cell.strip().replace("*", "") for cell in line.split("|")] if page.name == "results.md" else []
            wrong = [part for cell in found[1:-1] if bare(cell) for part in cell.split("; ") if part not in parts]
            wrong += [rate for rate in RATE.findall(line) if rate not in rates]
            wrong += [ends for ends in ENDS.findall(line) if page.name == "results.md" and unsigned(ends) not in intervals]
            unknown += [f"{page.relative_to(ROOT)}, line {number}: {what}" for what in wrong]
    assert not unknown
