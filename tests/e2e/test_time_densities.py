"""The times that training draws, from the command line."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from palate.training.log import read_log


def test_every_density_trains_otherwise_and_uniform_is_what_it_was(palate, tmp_path):
    ways = {
        "default": {},
        "uniform": {"time_density": "uniform"},
        "logit_normal": {"time_density": "logit_normal", "time_mean": -0.5, "time_std": 0.8},
        "shifted": {"time_density": "shifted", "time_shift": 2.5, "t_min": 100, "t_max": 900, "snr_gamma": 5},
    }
    losses = {}
    for name, options in ways.items():
        code, _, errors = palate("train", output_dir=name, **{"objective.beta": 500}, **options)
        assert code == 0, errors
        losses[name] = tuple(line["winner_error"] for line in read_log(tmp_path / name / "log.jsonl") if "loss" in line)
    assert losses["default"] == losses["uniform"]
    assert len(set(losses.values())) == 3
    default, uniform = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("default", "uniform"))
    assert all((default[name] == uniform[name]).all() for name in default)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_density": "lognormal"}, "did you mean 'logit_normal'"),
        ({"time_density": "grid"}, "grid is for online training, where the model samples: use shifted"),
        ({"time_shift": 5}, "time_shift does nothing under time_density uniform: it is for shifted"),
        ({"time_density": "shifted", "time_mean": 1}, "time_mean does nothing under time_density shifted"),
        ({"time_density": "shifted", "time_shift": 0}, "time_shift is 0.0; expected a positive number"),
        (
            {"time_density": "shifted", "objective": "ddpo_is", "train_prompts": "miniature-seen", "train_data": None},
            "time_density shifted does nothing with objective ddpo_is",
        ),
        (
            {
                "time_density": "grid",
                "t_min": 990,
                "objective": "sft",
                "train_prompts": "miniature-seen",
                "train_data": None,
                "cache_dir": None,
                "samples_per_round": 4,
                "sample_num_steps": 2,
                "updates_per_round": 1,
            },
            "none of the 2 times of sampling lies in 990 .. 999",
        ),
    ],
)
def test_mistakes_are_told(palate, options, message):
    code, _, errors = palate("train", **options)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
