"""The pages say what the scripts print of the results that are kept."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEEDS = [0, 1, 2]
RATE = re.compile(r"\d+ % \(\d+-\d+\)")
INTERVAL = re.compile(rf"{RATE.pattern}|\([+-]?[\d.]+ to [+-]?[\d.]+\)")
ALONE = ("## The demo", "## NCP-DPO on mini-sd")
"""Sections of single commands, whose results are not kept."""


def printed(monkeypatch) -> list[str]:
    """All lines of all tables."""
    monkeypatch.syspath_prepend(str(ROOT / "reproduction"))
    names = ("claims", "flow", "heads", "online_curves", "runs")
    claims, flow, heads, online, runs = map(importlib.import_module, names)
    given = argparse.Namespace(measured=runs.MEASURED, seeds=SEEDS, methods=list(online.METHODS), rewards=list(online.REWARDS))
    tables = [claim.tables(runs.MEASURED, SEEDS) for claim in (*claims.CLAIMS.values(), heads)]
    tables += [table(given) for table in (flow.rates_table, flow.offline_table, flow.unseen_table)]
    tables += [table(given) for table in (online.drawn, online.recipes_table)]
    tables.append(runs.split_table(runs.MEASURED, "mini-sd", [f"generalisation-{seed}" for seed in SEEDS]))
    for name in list(sys.modules):
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).parent == ROOT / "reproduction":
            monkeypatch.delitem(sys.modules, name)
    return [line for table in tables for line in table]


def bare(cell: str) -> bool:
    """Whether it holds intervals and no words."""
    return INTERVAL.search(cell) is not None and not any(map(str.isalpha, cell.replace(" to ", "")))


def test_every_interval_is_one_that_the_scripts_print(monkeypatch):
    lines = printed(monkeypatch)
    cells = {cell.strip().replace("*", "") for line in lines for cell in line.split("|")}
    rates = {rate for line in lines for rate in RATE.findall(line)}
    assert len(cells) > 400
    unknown, section = [], ""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for number, line in enumerate(page.read_text().splitlines(), 1):
            section = line if line.startswith("## ") else section
            if section.startswith(ALONE):
                continue
            found = [cell.strip().replace("*", "") for cell in line.split("|")] if page.name == "results.md" else []
            wrong = [cell for cell in found[1:-1] if bare(cell) and not any(cell in one for one in cells)]
            wrong += [rate for rate in RATE.findall(line) if rate not in rates]
            unknown += [f"{page.relative_to(ROOT)}, line {number}: {what}" for what in wrong]
    assert not unknown
