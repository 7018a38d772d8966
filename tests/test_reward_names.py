from __future__ import annotations

import pytest
import torch

from palate.base.errors import UserError
from palate.data.prompts import Prompt
from palate.judges.remote import Identity
from palate.miniature import world
from palate.names.judges import NamedJudge
from palate.names.rewards import NamedReward, find_held_out, find_rewards
from palate.online.bundle import RewardBundle


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "own_taste.py").write_text(
        "def green(images, prompts, metadata):\n    return images[:, 1].mean(dim=(1, 2)), {}\n\nNUMBER = 3\n"
    )
    (tmp_path / "broken_taste.py").write_text("def f(images, prompts, metadata)\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_weights_and_order(mine, judge_dir):
    found = find_rewards({"own_taste:green": "0.5", "jpeg_compressibility": 1, f"pickscore:{judge_dir}": 2.0})
    assert [(r.name, r.weight) for r in found.values()] == [
        ("own_taste:green", 0.5),
        ("jpeg_compressibility", 1.0),
        (f"pickscore:{judge_dir}", 2.0),
    ]
    made = RewardBundle({n: r.load() for n, r in found.items()}, {n: r.weight for n, r in found.items()})
    rewards = made.submit(torch.rand(2, 3, 64, 64), [Prompt("a red house"), Prompt("a blue tree")]).result()
    assert list(rewards.raw) == list(found)
    assert all(r.shape == (2,) and r.isfinite().all() for r in rewards.raw.values())


def test_names_without_weights():
    assert [r.weight for r in find_rewards(["mini-clip", "mini-aesthetic"]).values()] == [1, 1]
    assert list(find_rewards("mini-clip")) == ["mini-clip"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("jpeg_compressability", "'jpeg_compressability' .did you mean 'jpeg_compressibility'"),
        ("mini-clop", "did you mean 'mini-clip'"),
        ("pickscore:/nowhere", "/nowhere"),
        ("own_taste:NUMBER", "own_taste:NUMBER is int; expected a function"),
        ("own_taste:gren", "own_taste:gren: .*expected package.module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("pikscore:models", "did you mean 'pickscore'"),
        ("broken_taste:f", "importing broken_taste raised SyntaxError"),
        ({"mini-clip": "much"}, "the weight of reward mini-clip is 'much'; expected a number"),
        ({"mini-clip": float("nan")}, "expected a number"),
        ({"mini-clip": True}, "expected a number"),
        ({"mini-clip": 1e40}, "expected a number"),
        (["mini-clip", "mini-clip"], "the reward 'mini-clip' is named twice"),
        ({"mini-clip": -1e-40}, "expected a number"),
    ],
)
def test_errors(mine, names, words):
    with pytest.raises(UserError, match=words):
        find_rewards(names)


def test_held_out_is_never_trained_on():
    trained = find_rewards(["mini-clip"])
    assert list(find_held_out("mini-heldout", trained)) == ["mini-heldout"]
    with pytest.raises(UserError, match="mini-clip is trained on and cannot be held out"):
        find_held_out(["mini-clip"], trained)
    # Nor as a part of a sum, nor by another name of the same weights.
    with pytest.raises(UserError, match="mini-clip is trained on and cannot be held out"):
        find_held_out(["mini-clip"], find_rewards(["0.5*mini-clip + 0.5*mini-aesthetic"]))
    again = f"clipscore:{world.checkpoint('mini-clip')}?dtype=bfloat16"
    with pytest.raises(UserError, match="is trained on and cannot be held out"):
        find_held_out([again], trained)
    # Nor behind an address.
    served = NamedJudge("remote:http://127.0.0.1:1", "remote", served=Identity("mini-clip"))
    trained = {served.name: NamedReward(served.name, 1.0, served)}
    with pytest.raises(UserError, match="mini-clip is trained on and cannot be held out"):
        find_held_out(["mini-clip"], trained)
