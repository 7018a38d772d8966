"""What is missing on the machine is told in the first seconds: before weights are read and before anything is encoded."""

from __future__ import annotations

import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from palate.base.errors import UserError
from palate.base.files import check_file, check_folder, nearest_there
from palate.base.hub import is_hub_id
from palate.runs import recipe
from palate.runs.ready import tell_needs

ONLINE = {"objective": "ddpo_is", "rewards": "jpeg_compressibility", "samples_per_round": 4, "sample_batch_size": 4}
ONLINE |= {"sample_num_steps": 2, "updates_per_round": 2, "rounds": 1, "max_train_steps": None, "train_data": None}


@pytest.fixture
def early(palate, monkeypatch):
    """Runs a verb that must fail before weights are read or data encoded; returns its one line."""
    from palate.models.parts import Source

    def used(*_, **__):
        raise AssertionError("weights were read")

    def run(verb: str, *words: object, **options: object) -> str:
        code, said, errors = palate(verb, *words, **options)
        (line,) = errors.splitlines()
        assert (code, said) == (2, "")
        return line

    monkeypatch.setattr(Source, "read", used)
    return run


@pytest.fixture
def without(monkeypatch):
    """Makes packages look as if they were not installed."""

    def hide(*names: str) -> None:
        for name in names:
            for known in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                monkeypatch.delitem(sys.modules, known)
            monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.parametrize("online", [False, True])
def test_packages_that_a_recipe_needs(early, without, prompts_file, online):
    more = {**ONLINE, "train_prompts": prompts_file, "cache_dir": None} if online else {}
    without("bitsandbytes", "tensorboard", "torch.utils.tensorboard")
    assert "pip install 'palate[8bit]'" in early("train", optimizer="adamw_8bit", **more)
    assert "pip install 'palate[4bit]'" in early("train", quantize="nf4", **more)
    assert "pip install 'palate[tensorboard]'" in early("train", report_to="tensorboard", **more)
    assert not Path("out").exists()


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_packages_that_the_page_of_votes_needs(early, without, missing, tmp_path):
    without(missing, "palate.votes.server")
    sys.modules.pop("palate.votes.server", None)
    assert f"the page needs {missing}; install it with: pip install 'palate[votes]'" in early("vote", tmp_path)


PLACES = {"a file": "file", "below a file": "file/sub", "of no disk": "/proc/palate/x", "too long": "x/" + "n" * 300}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_folders_that_cannot_be_made(early, place, model_dir, prompts_file, pairs_dir, judge_dir):
    Path("file").write_text("")
    if place != "file":  # of which train has its own words
        assert "output_dir" in early("train", output_dir=place)
    assert "cache_dir" in early("train", cache_dir=place)
    assert "output_dir" in early("generate", model_dir, prompts=prompts_file, output_dir=place)
    assert "output_dir" in early("compare", "a", "b", output_dir=place)
    below = f"{place}/x"
    assert "output" in early("label", pairs_dir, judges=f"[pickscore:{judge_dir}]", output=f"{below}.parquet")
    assert "output" in early("accuracy", pairs_dir, judges=f"[pickscore:{judge_dir}]", output=below)
    assert "output" in early("export", "run", format="kohya", output=f"{below}.safetensors")
    assert sorted(p.name for p in Path().iterdir()) == ["file", "quick.yaml"]


def test_nothing_is_left_of_the_trial(tmp_path):
    check_folder(tmp_path / "a" / "b", "output_dir")
    check_file(tmp_path / "a" / "b.txt", "output")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"output .* is a folder; expected the name of a file"):
        check_file(tmp_path, "output")
    (tmp_path / "broken").symlink_to("nowhere")
    assert nearest_there(tmp_path / "broken" / "x") == tmp_path / "broken"
    with pytest.raises(UserError, match=r"broken.* cannot be written to"):
        check_folder(tmp_path / "broken" / "x", "output_dir")


Disk = namedtuple("Disk", "total used free")


def test_a_full_disk_is_told_before_anything_is_read(early, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9, 10**6))
    assert "the disk of output_dir out is full" in early("train")


def test_room_for_the_cache_and_the_checkpoints_is_told(palate, monkeypatch, model_dir, tmp_path):
    free = 2**25
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**12, 0, free))
    code, _, errors = palate("train", max_train_steps=1, cache_dir=tmp_path / "new")
    assert code == 0
    assert "GB" not in errors  # 16 pairs of small pictures
    from palate.models.families import load_denoiser

    denoiser = load_denoiser(str(model_dir))
    made = recipe.build({"data": {"resolution": 64, "random_flip": True}, "policy": {"train_method": "full"}})
    told: list[str] = []
    monkeypatch.setattr("palate.runs.ready.tell", told.append)

    class Large:
        single = False

        def rows_about(self):
            return 300_000

    tell_needs(made, denoiser, [Large()])
    # 2 pictures, twice for the flip, of 16 x 16 x 4 numbers; a prompt of 40 x 16: four bytes each, 300,000 times.
    wanted = 300_000 * 4 * (4 * 16 * 16 * 4 + 40 * 16)
    assert told == [
        f"warning: the cache of encoded pictures (about 300000 rows) may take {wanted / 1e9:.1f} GB, and 0.0 GB are free in "
        "~/.cache/palate: free some space, or name a folder elsewhere with --cache_dir"
    ]
    told.clear()
    free = 10**12
    tell_needs(made, denoiser, [Large()])
    assert told == [
        f"the cache of encoded pictures (about 300000 rows) may take {wanted / 1e9:.1f} GB; 1000.0 GB are free in "
        "~/.cache/palate"
    ]


SLIPS = ["out/mine", "models/my-sdxl", "here/gone", "./gone/x", "owner/lora.safetensors", "owner/recipe.yaml", "runs/a"]


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_in_a_path_is_a_missing_folder_at_once(early, tmp_path, monkeypatch, name, prompts_file):
    monkeypatch.setattr("palate.base.hub.fetch", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("palate.models.families.fetch", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "here" / "mine").mkdir(parents=True)
    assert not is_hub_id(name)
    began = time.monotonic()
    for line in (
        early("train", pretrained_model_name_or_path=name),
        early("generate", name, prompts=prompts_file, output_dir="drawn"),
    ):
        assert f"no model at {name}: " in line
        assert "is no folder" in line
    assert time.monotonic() - began < 10


def test_the_nearest_folder_is_named(early, tmp_path):
    (tmp_path / "here" / "mine").mkdir(parents=True)
    assert "here is no folder 'mien', but 'mine'" in early("train", pretrained_model_name_or_path="here/mien")


@pytest.mark.parametrize("name", ["stabilityai/sdxl-turbo", "stable-diffusion-v1-5/stable-diffusion-v1-5", "a/b.c"])
def test_what_may_be_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(name)
    (tmp_path / name.split("/")[0]).mkdir()
    assert not is_hub_id(name)
    for kind in ("models", "datasets"):  # fetched before: a folder of that owner here makes no slip of it
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / kind))
        (tmp_path / kind / f"{kind}--{name.replace('/', '--')}").mkdir(parents=True)
        assert is_hub_id(name)
    (tmp_path / name).mkdir()
    assert not is_hub_id(name)


def test_a_hub_id_in_a_folder_of_that_owner_is_told_what_to_do(early, tmp_path):
    (tmp_path / "stabilityai").mkdir()
    line = early("train", pretrained_model_name_or_path="stabilityai/sdxl-turbo")
    assert "stabilityai is no folder" in line or "is no folder 'sdxl-turbo'" in line
    assert "hf download stabilityai/sdxl-turbo --local-dir stabilityai/sdxl-turbo" in line


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    from palate.base import hub

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    assert not hub._network()
    assert time.monotonic() - began < 2
