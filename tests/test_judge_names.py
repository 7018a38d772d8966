"""Judges by name: every form of a name, and what is refused before weights are read."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from palate.base.errors import UserError
from palate.judges.kinds import KINDS
from palate.miniature import world
from palate.names.judges import NamedJudge, find_judges


def test_judges_of_every_form(judge_dir):
    names = ["mini-aesthetic", "jpeg_compressibility", f"pickscore:{judge_dir}"]
    found = find_judges(names)
    assert list(found) == names
    assert [j.kind for j in found.values()] == ["aesthetic", "jpeg_compressibility", "pickscore"]
    assert [j.folder for j in found.values()] == [world.checkpoint("mini-aesthetic"), None, judge_dir]
    assert [j.role for j in found.values()] == ["looks", "held out", "held out"]
    x = torch.rand(2, 3, 32, 32)
    for judge in found.values():
        assert judge.load()(x, ["a red house", "a tower"]).shape == (2,)


def test_home_is_written_out(judge_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(judge_dir.parent))
    assert find_judges([f"pickscore:~/{judge_dir.name}"]).popitem()[1].folder == judge_dir


def test_weighted_sum(judge_dir):
    x = torch.rand(2, 3, 32, 32)
    prompts = ["a red house", "a tower"]
    name = f"0.5*mini-aesthetic + -2e-1 * pickscore:{judge_dir} + jpeg_compressibility"
    found = find_judges([name])[name]
    assert [(w, j.kind) for w, j in found.parts] == [(0.5, "aesthetic"), (-0.2, "pickscore"), (1.0, "jpeg_compressibility")]
    a, b, c = (part.load()(x, prompts) for _, part in found.parts)
    torch.testing.assert_close(found.load()(x, prompts), 0.5 * a - 0.2 * b + c)


def test_your_own_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_taste.py").write_text("def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n")
    judge = find_judges(["my_taste:red"])["my_taste:red"].load()
    assert judge(torch.full((1, 3, 4, 4), 0.25), [""]).item() == 0.25


def test_options(judge_dir):
    name = f"pickscore:{judge_dir}?dtype=bfloat16"
    found = find_judges([name])[name]
    assert found.options == {"dtype": "bfloat16"}
    x, exact = torch.rand(1, 3, 32, 32), find_judges([f"pickscore:{judge_dir}"]).popitem()[1]
    # Of a cosine times 14.3, the scale of a new CLIP, bfloat16 keeps 8 bits: a few times 14.3 / 256.
    assert found.load()(x, ["a"]).item() == pytest.approx(exact.load()(x, ["a"]).item(), abs=0.2)
    assert found.fingerprint() != exact.fingerprint()
    with pytest.raises(UserError, match="did you mean 'dtype'"):
        find_judges([f"pickscore:{judge_dir}?dtipe=bfloat16"])
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        find_judges([f"pickscore:{judge_dir}?dtype=bf16"])
    with pytest.raises(UserError, match="name=value"):
        find_judges([f"pickscore:{judge_dir}?fast"])


def test_fingerprint_follows_the_weights(judge_dir, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(judge_dir, copy)
    first, second = (find_judges([f"pickscore:{folder}"]).popitem()[1] for folder in (judge_dir, copy))
    assert first.fingerprint() == second.fingerprint() != find_judges([f"clipscore:{copy}"]).popitem()[1].fingerprint()
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert first.fingerprint() != second.fingerprint()


def test_two_judges_of_one_folder_share_its_weights(judge_dir):
    names = [f"pickscore:{judge_dir}", f"clipscore:{judge_dir}"]
    pick, clip = (judge.load() for judge in find_judges(names).values())
    assert pick.clip is clip.clip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mini-held", "did you mean 'mini-heldout'"),
        ("picscore", "did you mean 'pickscore'"),
        ("pickscore?dtype=bf16", "did you mean 'bfloat16'|hf download yuvalkirstain/PickScore_v1"),
        ("pikscore:models", "did you mean 'pickscore:FOLDER'"),
        ("pickscore", r"\(there is no network, or HF_HUB_OFFLINE is set\).*hf download yuvalkirstain/PickScore_v1"),
        ("pickscore:someone/her-model", "--local-dir someone/her-model"),
        ("remote.judge:score", "no judge"),
        ("json:dumbs", "dumbs"),
        ("jpeg_compressibility:models", "needs no weights"),
        ("mini-heldout + mini-eye", "no judge 'mini-eye'"),
        ("clipscore:nowhere", "no folder nowhere"),
    ],
)
def test_unknown_names_are_refused(name, message, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        find_judges([name])


def test_scores_from_before_a_kind_scored_otherwise_are_none_of_its(judge_dir, monkeypatch):
    (named,) = find_judges([f"clipscore:{judge_dir}"]).values()
    before = named.fingerprint()
    monkeypatch.setitem(KINDS, "clipscore", replace(KINDS["clipscore"], version=2))
    assert named.fingerprint() != before


# What a fingerprint holds ----


def test_a_function_is_known_by_its_source_and_by_what_it_uses_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    texts = {"fp_judge": "from fp_helper import level\n\ndef f(images, prompts):\n    return [level] * len(prompts)\n"}
    texts |= {"fp_helper": "level = 1\n", "fp_apart": "level = 1\n"}

    def fingerprint(**changed: str) -> str:
        for name, text in {**texts, **changed}.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return find_judges(["fp_judge:f"])["fp_judge:f"].fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(fp_apart="level = 2\n") == first
    assert fingerprint(fp_helper="level = 2\n") != first
    assert fingerprint(fp_judge=texts["fp_judge"] + "# other\n") != first
    # And so is a sum that holds it.
    total = "2*fp_judge:f + jpeg_compressibility"
    before = find_judges([total])[total].fingerprint()
    fingerprint(fp_helper="level = 3\n")
    assert find_judges([total])[total].fingerprint() != before


NAMED = {
    "Path('fp_weights.json').read_text()": "fp_weights.json",
    "torch.load('sub/fp_head.pt')": "sub/fp_head.pt",
    "importlib.import_module('fp_late')": "fp_late.py",
    "AutoModel.from_pretrained('fp_model')": "fp_model/config.json",
}


@pytest.mark.parametrize("reads", NAMED)
def test_files_that_a_function_names_are_a_part_of_it(tmp_path, monkeypatch, reads):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    file = tmp_path / NAMED[reads]
    file.parent.mkdir(exist_ok=True)
    (tmp_path / "fp_names.py").write_text(f"def f(images, prompts):\n    return {reads}, 'fp.log'\n")
    sys.modules.pop("fp_names", None)
    importlib.invalidate_caches()

    def fingerprint(text: str) -> str:
        file.write_text(text)
        return find_judges(["fp_names:f"])["fp_names:f"].fingerprint()

    first = fingerprint("1")
    (tmp_path / "fp.log").write_text("what it writes is no part of it")
    assert fingerprint("1") == first
    assert fingerprint("2") != first


def test_a_function_that_another_file_makes_is_known_by_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fingerprint(level: int, more: int) -> str:
        Path("made_of.py").write_text(f"def g(images, prompts, level):\n    return [level + {more}] * len(prompts)\n")
        Path("made_by.py").write_text(
            f"import functools, made_of\nf = functools.partial(made_of.g, level={level})\ng = made_of.g\n"
        )
        for name in ("made_of", "made_by"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return "".join(find_judges([n])[n].fingerprint() for n in ("made_by:f", "made_by:g"))

    first = fingerprint(1, 1)
    assert fingerprint(1, 1) == first
    for other in (fingerprint(2, 1), fingerprint(1, 2)):
        assert all(a != b for a, b in zip((first[:16], first[16:]), (other[:16], other[16:]), strict=True))


def test_a_file_that_an_option_names_is_part_of_the_fingerprint(tmp_path):
    file = tmp_path / "questions.jsonl"

    def fingerprint(text: str) -> str:
        file.write_text(text)
        return NamedJudge("x", "vlm_strict", options={"questions": str(file), "layer": 3}).fingerprint()

    assert fingerprint("a") == fingerprint("a")
    assert fingerprint("a") != fingerprint("b")
