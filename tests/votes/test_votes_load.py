"""Twenty raters at once, the server killed in the middle: no acknowledged vote is lost, none counts twice."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_kill_in_the_middle(tmp_path):
    spec = importlib.util.spec_from_file_location("vote_load", Path(__file__).parents[2] / "benchmarks" / "vote_load.py")
    vote_load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vote_load)
    found = vote_load.run(tmp_path, raters=20, votes=10, kills=2)
    assert found["failed"] == []
    assert found["acknowledged"] == 200
    assert (found["lost"], found["counted_twice"], found["never_asked_for"]) == (0, 0, 0)
    assert found["sent_again"] > 0  # the kill was felt
    assert found["most_raters_of_a_pair"] <= 5
