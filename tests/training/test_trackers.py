"""Trackers are told the numbers, the pictures and the settings of a run; a resumed run goes on in the same curves."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from palate.base.errors import UserError
from palate.training.log import RunLog
from palate.training.options import REPORTERS
from palate.training.trackers import NEEDS, check_reporter, flat

SETTINGS = {"training": {"seed": 3, "report_to": "x"}, "objective": {"name": "dpo"}}


@pytest.fixture
def fake(monkeypatch):
    """Stands for wandb and trackio, whose calls are the same ones, and remembers what it was told."""
    told: list[tuple[str, object, object]] = []

    class Run:
        def log(self, values, step):
            told.append(("log", values, step))

        def finish(self):
            told.append(("finish", None, None))

    def init(**given):
        told.append(("init", given, None))
        return Run()

    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.init, module.Image = init, lambda path: f"image {Path(path).name}"
        module.log, module.finish = Run().log, Run().finish
        monkeypatch.setitem(sys.modules, name, module)
    return told


def log_of(folder: Path, name: str, step: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 4)).save(folder / "step-000002.png")
    with RunLog(folder, step=step, report_to=name, settings=SETTINGS) as log:
        log.record({"step": 1 + step, "loss": 0.5, "round": 3, "told": "text"})
        log.picture(2 + step, folder / "step-000002.png")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_pictures_and_settings_are_told(name, fake, tmp_path):
    log_of(tmp_path / "run", name)
    (_, given, _), *rest = fake
    assert (given["project"], given["name"]) == ("palate", "run")
    assert given["config"] == {"training.seed": 3, "training.report_to": "x", "objective.name": "dpo"}
    assert rest == [
        ("log", {"loss": 0.5, "round": 3}, 1),
        ("log", {"samples": "image step-000002.png"}, 2),
        ("finish", None, None),
    ]


def test_a_resumed_run_goes_on_in_the_same_curves_and_another_does_not(fake, tmp_path):
    log_of(tmp_path / "run", "wandb")
    log_of(tmp_path / "run", "wandb", step=4)
    log_of(tmp_path / "other", "wandb")
    first, again, other = (given["id"] for what, given, _ in fake if what == "init")
    assert first == again != other
    fake.clear()
    log_of(tmp_path / "run", "trackio")
    log_of(tmp_path / "run", "trackio", step=4)
    assert [given["resume"] for what, given, _ in fake if what == "init"] == ["never", "allow"]


def test_tensorboard_has_pictures_and_settings_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_of(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss", "round"]
    (shown,) = events.Images("samples")
    assert (shown.step, shown.width, shown.height) == (2, 8, 4)
    assert b"| training.seed | 3 |" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_what_is_missing_is_named_with_its_remedy(name, monkeypatch):
    monkeypatch.setitem(sys.modules, NEEDS[name], None)
    with pytest.raises(UserError, match=rf"report_to is {name}, which is not installed: pip install 'palate\[{name}\]'"):
        check_reporter(name)


def test_every_reporter_is_known():
    assert set(REPORTERS) == {"none", *NEEDS}
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": None}) == {"a.b": 1, "a.c.d": 2, "e": None}


def test_wandb_itself_keeps_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_of(tmp_path / "run", "wandb")
    assert list((tmp_path / "run").rglob("*.wandb"))


def test_trackio_itself_keeps_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    pytest.importorskip("trackio")
    log_of(tmp_path / "run", "trackio")
    assert any(path.is_file() for path in (tmp_path / "kept").rglob("*")), json.dumps(dict(os.environ).get("TRACKIO_DIR"))
