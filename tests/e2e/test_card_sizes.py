"""Recipes that are named by a card's size, on the published architectures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from palate.runs import library, plan, recipe
from palate.runs.loading import denoiser_of, policy_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_recipes_named_by_a_card_keep_to_it(tmp_path):
    """As they were counted on the published architectures; what stays in memory is counted anew for one of them."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("memory", BENCHMARKS / "memory.py")
        memory = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(memory)
    finally:
        sys.path.remove(str(BENCHMARKS))
    results = json.loads((BENCHMARKS / "memory.json").read_text())
    docs = (BENCHMARKS.parent / "docs" / "memory.md").read_text()
    assert results.keys() == dict(memory.sized()).keys()
    for name, found in results.items():
        assert found["of"] == memory.decisive(recipe.load(name)), f"{name} has changed: python benchmarks/memory.py"
        most = max(found["training"], found["drawing"], found["encoding"])
        assert most <= (1 - plan.UNCOUNTED) * float(name.rpartition("-")[2].removesuffix("gb")), name
        assert memory.row(name, found) in docs
        assert f"# Counted: at most {most:.1f} GB " in library.find(name).read_text(), name
    name = "sd15-dpo-12gb"
    of = memory.on(recipe.load(name), memory.skeleton("SD 1.5", tmp_path / "sd15"))
    held = plan.held(policy_of(of, denoiser_of(of, outline="shapes")), of)
    assert round(sum(held.values()) / 1e9, 2) == results[name]["weights, gradients, optimizer"]
