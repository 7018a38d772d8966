"""Training ends when held-out accuracy has not risen for a while; the best weights are a run of their own."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from palate.training.log import read_log

FILE = "pytorch_lora_weights.safetensors"
OPTIONS = {"validation_prompts": "[]", "validation_fraction": 0.3, "eval_steps": 1, "checkpointing_steps": 1}


def accuracies(run: str) -> list[tuple[int, float]]:
    return [
        (line["step"], line["held_out_accuracy"]) for line in read_log(Path(run) / "log.jsonl") if "held_out_accuracy" in line
    ]


def test_it_stops_where_the_rule_says_also_when_resumed(palate):
    options = {**OPTIONS, "early_stopping_patience": 2, "max_train_steps": 12}
    code, _, errors = palate("train", **options)
    assert code == 0, errors
    measured = accuracies("out")
    waited, highest, expected = 0, -1.0, 12
    for step, rate in measured:  # the rule, by hand
        waited, highest = (0, rate) if rate > highest else (waited + 1, highest)
        if waited == 2 and step:
            expected = step
            break
    assert measured[-1][0] == expected < 12
    assert f"training ends after step {expected}: held_out_accuracy has not risen in 2 measurements" in errors
    later = [m for m in measured if m[0]]
    best = json.loads(Path("out/best/found.json").read_text())
    assert best["held_out_accuracy"] == max(rate for _, rate in later)
    assert best["step"] == next(step for step, rate in later if rate == best["held_out_accuracy"])
    assert Path("out/best", FILE).is_file()
    assert Path("out/best/recipe.yaml").is_file()
    assert palate("train", **{**options, "max_train_steps": 1}, output_dir="parts")[0] == 0
    code, _, errors = palate("train", **options, output_dir="parts", resume_from_checkpoint="latest")
    assert code == 0, errors
    assert accuracies("parts")[-1] == measured[-1]
    one, other = (load_file(f"{run}/{FILE}") for run in ("out", "parts"))
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_it_needs_measurements_of_something(palate):
    for options, said in (
        ({"eval_steps": None}, "say how often with eval_steps"),
        ({"validation_fraction": 0}, "needs held-out pairs, and there are none"),
    ):
        code, _, errors = palate("train", **{**OPTIONS, **options}, early_stopping_patience=2)
        assert (code, said in errors, len(errors.strip().splitlines())) == (2, True, 1), errors
