"""Online training from the command line: on a tiny Stable Diffusion and a tiny SDXL, with every way of learning."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palate.judges.remote import Identity
from palate.judges.server import serve_judge
from palate.names.judges import find_judges
from palate.runs import library, recipe
from palate.runs.models import find_model
from palate.training.log import read_log

FAST = {
    "objective": "ddpo_is",
    "rewards": "jpeg_compressibility",
    "samples_per_round": 4,
    "sample_batch_size": 4,
    "sample_num_steps": 2,
    "updates_per_round": 2,
    "rounds": 2,
    "kl_samples": 1,
    "max_train_steps": None,
    "train_data": None,
    "cache_dir": None,
    "logging_steps": 1,
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def log(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder / "log.jsonl")]


@pytest.fixture
def online(palate, prompts_file):
    return lambda **options: palate("train", **{**FAST, "train_prompts": prompts_file, **options})


WAYS = {
    "ddpo_is": {"window_size": 1, "held_out_rewards": "[jpeg_incompressibility]", "eval_steps": 2, "held_out_pictures": 2},
    "trust region": {"objective": "ddpo_tr", "kl_weight": 0.1, "timestep_fraction": 0.5},
    "a window of noise that moves": {
        "sample_rule": "cps",
        "sample_num_steps": 4,
        "window_size": 1,
        "window_end": 3,
        "group_size": 2,
        "advantage": "group",
    },
    "rwr": {"objective": "sft"},
    "rwr in perceptual space": {"objective": "sft", "space": "perceptual", "guidance_in_training": "false"},
    "sparse rwr": {"objective": "sft", "weighting": "percentile", "percentile": 50},
    "nft": {"objective": "nft", "weighting": "advantage", "sample_eta": 0, "time_density": "grid", "inner_epochs": 2},
    "awm": {"objective": "awm", "weighting": "advantage", "sample_eta": 0, "time_density": "grid", "old_decay": 0.3},
    "kto": {"objective": "kto", "objective.beta": 500, "weighting": "advantage"},
    "online dpo": {"objective": "dpo", "group_size": 2, "updates_per_round": 1, "train_batch_size": 2},
    "online dpo in perceptual space": {
        "objective": "dpo",
        "space": "perceptual",
        "guidance_in_training": "false",
        "group_size": 2,
        "updates_per_round": 1,
        "train_batch_size": 2,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_learning(online, tmp_path, way):
    code, _, errors = online(train_batch_size=2, **{k: v for k, v in WAYS[way].items() if k != "train_batch_size"})
    assert code == 0, errors
    assert "2 rounds" in errors
    assert "8 reward queries" in errors
    lines = log(tmp_path / "out")
    assert [line["reward_queries"] for line in lines if "reward_mean" in line] == [4, 8]
    assert any(
        float(tensor.abs().max()) > 0 for name, tensor in weights(tmp_path / "out").items() if "lora_B" in name or "up" in name
    )
    if way == "ddpo_is":
        assert [line["step"] for line in lines if "held_out/jpeg_incompressibility" in line] == [0, 2, 4]
        assert json.loads((tmp_path / "out" / "best" / "found.json").read_text())["step"] in (2, 4)
        assert weights(tmp_path / "out" / "best").keys() == weights(tmp_path / "out").keys()
        assert (
            find_model(str(tmp_path / "out" / "best")).tuned == tmp_path / "out" / "best" / "pytorch_lora_weights.safetensors"
        )


def test_held_out_rewards_have_the_time_limit_and_the_retries_of_trained_ones(online, tmp_path, monkeypatch):
    monkeypatch.setattr("palate.online.bundle.PAUSE", 0.001)
    (tmp_path / "moody.py").write_text(
        "import threading\n"
        "def reward(images, prompts, metadata, asked=[]):\n"
        "    asked.append(1)\n"
        "    if len(asked) == 1: raise ConnectionError('busy')\n"
        "    if len(asked) == 2 or prompts[0] == 'never': threading.Event().wait()\n"
        "    return [float(len(asked))] * len(images)\n"
    )
    moody = {
        "held_out_rewards": "[moody:reward]",
        "held_out_pictures": 2,
        "reward_timeout": 2,
        "reward_retries": 2,
        "rounds": 1,
    }
    code, _, errors = online(**moody)
    assert code == 0, errors
    assert [line["held_out/moody:reward"] for line in log(tmp_path / "out") if "held_out/moody:reward" in line] == [3, 4]
    (tmp_path / "never.txt").write_text("a tree\nnever\n")
    compared = {"evaluation_prompts": "never.txt", "num_evaluation_prompts": 1, "judges": "[jpeg_compressibility]"}
    code, _, errors = online(**{**moody, "reward_retries": 0}, **compared, output_dir="b")
    assert code == 2
    assert (
        "reward moody:reward gave no answer within 2 s: images 0 to 1, of which the first (prompt 'never', saved as" in errors
    )


def test_held_out_pictures_keep_off_the_prompts_of_the_comparison(prompts_file, tmp_path):
    from palate.names.prompts import find_prompts
    from palate.runs import online
    from palate.runs.assembly import assemble

    def watched(**options):
        made = recipe.load("miniature-ddpo-is", {"held_out_pictures": 8, **options})
        prompts, shared = online.watched(assemble(made))
        return [prompt.text for prompt in prompts], shared

    seen, unseen = ([p.text for p in find_prompts(f"miniature-{name}")] for name in ("seen", "unseen"))
    assert watched() == (unseen[96:104], 0)
    assert watched(evaluation_prompts=None) == (seen[:8], 0)
    assert watched(num_evaluation_prompts=None) == (seen[:8], 0)
    assert watched(num_evaluation_prompts=397) == ([*unseen[397:], *seen[:5]], 0)
    assert watched(evaluation_prompts="miniature-seen") == (seen[96:104], 0)
    (tmp_path / "shouted.txt").write_text("".join(f"{text.upper()}\n" for text in seen[:3]))
    few = {
        "train_prompts": str(tmp_path / "shouted.txt"),
        "evaluation_prompts": "miniature-seen",
        "num_evaluation_prompts": 399,
    }
    assert watched(**few) == ([seen[399], *seen[:7]], 7)


def test_best_weights_that_are_compared_on_what_they_were_chosen_by(online, palate, prompts_file, tmp_path):
    (tmp_path / "rising.py").write_text(
        "def reward(images, prompts, metadata, asked=[]):\n    asked.append(1)\n    return [float(len(asked))] * len(images)\n"
    )
    watched = {"held_out_rewards": "[rising:reward]", "held_out_pictures": 3, "rounds": 1}
    code, _, errors = online(**watched, evaluation_prompts=prompts_file, judges="[jpeg_compressibility]")
    assert code == 0, errors
    assert "3 of 3 held-out pictures have prompts of the comparison, for no others are left" in errors
    told = "Warning: these weights were chosen among those of the run on 3 prompts, of which 3 are compared on here"
    assert palate("evaluate", "out/best")[0] == 0
    assert told in (tmp_path / "out" / "best" / "README.md").read_text()
    (tmp_path / "others.txt").write_text("a tree\n")
    assert palate("evaluate", "out/best", evaluation_prompts="others.txt")[0] == 0
    assert "Warning: these weights" not in (tmp_path / "out" / "best" / "README.md").read_text()


@pytest.mark.parametrize(
    "way", [{}, {"objective": "nft", "weighting": "advantage", "advantage": "round", "time_density": "grid"}]
)
def test_resumed_equals_uninterrupted(online, tmp_path, way):
    watched = way | {
        "held_out_rewards": "[jpeg_incompressibility]",
        "eval_steps": 1,
        "held_out_pictures": 2,
        "train_batch_size": 2,
    }
    assert online(output_dir="a", **watched)[0] == 0
    assert online(output_dir="b", checkpointing_steps=1, max_train_steps=3, **watched)[0] == 0
    code, _, errors = online(output_dir="b", resume_from_checkpoint="latest", checkpointing_steps=1, **watched)
    assert code == 0, errors
    for name, tensor in weights(tmp_path / "a").items():
        assert torch.equal(tensor, weights(tmp_path / "b")[name])
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_stopped_in_its_first_round_and_resumed(online, tmp_path):
    """A reward is mended after it failed in the first round; the evaluation before it is repeated, not told twice."""
    code = "def reward(images, prompts, metadata):\n    {}\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "mended_later.py").write_text(code.format("raise ValueError('no')"))
    watched = {"held_out_rewards": "[jpeg_incompressibility]", "eval_steps": 1, "held_out_pictures": 2, "train_batch_size": 2}
    failed, _, errors = online(rewards="mended_later:reward", **watched)
    assert failed == 2
    assert "raised ValueError: no" in errors
    assert "the state after step 0 is in" in errors
    (tmp_path / "mended_later.py").write_text(code.format("pass"))
    sys.modules.pop("mended_later")
    for folder, more in (("out", {"resume_from_checkpoint": "latest"}), ("straight", {})):
        code, _, errors = online(rewards="mended_later:reward", output_dir=folder, **watched, **more)
        assert code == 0, errors
    assert log(tmp_path / "out") == log(tmp_path / "straight")


@pytest.mark.parametrize("objective", ["ddpo_is", "sft", "dpo"])
def test_sdxl(online, tmp_path, sdxl_dir, objective):
    ranked = {"group_size": 2, "updates_per_round": 1} if objective == "dpo" else {}
    code, _, errors = online(pretrained_model_name_or_path=sdxl_dir, objective=objective, train_batch_size=2, **ranked)
    assert code == 0, errors
    lines = log(tmp_path / "out")
    assert lines[-1]["reward_queries"] == 8
    if objective == "ddpo_is":
        assert lines[0]["approx_kl"] < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": "jpeg_compresibility"}, "did you mean 'jpeg_compressibility'"),
        ({"train_prompts": "anmals"}, "did you mean 'animals'"),
        ({"samples_per_round": 6, "group_size": 4}, "group_size 4 does not divide samples_per_round 6; use 3 or 6"),
        ({"window_size": 3}, "window of 3 steps"),
        ({"train_batch_size": 3}, "does not divide the effective batch"),
        ({"objective": "ddpo_sf"}, "set updates_per_round and inner_epochs to 1"),
        ({"train_prompts": None}, "name train_prompts"),
        ({"gradient_accumulation_steps": 2}, "leave it out"),
        ({"objective": "dpo"}, "set group_size to 2"),
        ({"space": "perceptual"}, "measures likelihoods"),
        ({"sample_eta": 0}, "no likelihood"),
        ({"objective": "sft", "kl_weight": 0.1}, "kl_weight does nothing with objective sft"),
        ({"sample_rule": "flow_sde"}, "flow_sde is a step of rectified flow, and this model is none"),
        ({"objective": "sft", "window_size": 1, "window_end": 2}, "window_end does nothing with objective sft"),
        ({"objective": "nft"}, "objective nft learns from good and bad pictures: set weighting advantage"),
        (
            {"objective": "nft", "train_prompts": None},
            "nft compares with the policy that drew the pictures: name train_prompts",
        ),
        ({"objective": "nft", "weighting": "advantage", "train_method": "full"}, "use train_method lora"),
        ({"objective": "nft", "weighting": "advantage", "objective.mix": 0}, "mix is 0.0; expected more than 0"),
        ({"objective": "sft", "old_decay": 0.3}, "old_decay does nothing with objective sft"),
        ({"objective": "sft", "weighting": "advantage", "adv_clip": "inf"}, "give it a number, such as 5"),
        ({"train_data": "votes.db"}, "train_data votes.db would not be read"),
        ({"train_prompts": None, "objective": "dpo"}, "these options do nothing: rounds, samples_per_round, "),
    ],
)
def test_mistakes_are_told_in_one_line(online, tmp_path, options, message):
    code, _, errors = online(**options)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_repeated_prompts_are_counted_once(online, prompts_file):
    """A round of eight of fewer prompts holds no more than there are."""
    from palate.runs import online as online_runs
    from palate.runs.assembly import assemble

    made = recipe.load(
        "miniature-ddpo-sf",
        {"train_prompts": str(prompts_file), "samples_per_round": 64, "group_size": 1, "advantage": "round"},
    )
    count = len(Path(prompts_file).read_text().splitlines())
    assert count < 64
    found = assemble(made).online
    assert found is not None
    assert f"draws 64 pictures of {count} prompts" in online_runs.told(made, found)


def test_long_prompts_and_negative_prompts_are_told(online, tmp_path):
    rows = [{"prompt": "a tree", "negative": "blur, " * 60}, {"prompt": "a red house " * 40}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, errors = online(train_prompts="long.jsonl", rounds=1)
    assert code == 0, errors
    assert "2 prompts are longer than the 40 tokens that the text encoder reads: their ends are not seen" in errors


def test_an_empty_prompt_file(online, tmp_path):
    (tmp_path / "none.txt").write_text("\n")
    code, _, errors = online(train_prompts=tmp_path / "none.txt")
    assert code == 2
    assert "has no prompts" in errors


ONLINE = [name for name in library.built_in() if recipe.load(name).online.train_prompts is not None]


@pytest.mark.parametrize("name", ONLINE)
def test_recipes_are_whole(name):
    from palate.runs import online
    from palate.runs.assembly import assemble

    made = recipe.load(name)
    if made.online.rewards == ("pickscore",):  # whose weights are not here, nor are the user's prompts
        made = recipe.load(name, {"rewards": ["jpeg_compressibility"], "train_prompts": "animals"})
    found = assemble(made).online
    assert found is not None
    assert found.rewards
    assert found.prompts
    assert "reward queries" in online.told(made, found)


def test_a_run_notes_whom_its_remote_rewards_served(online, tmp_path):
    judge = find_judges(["jpeg_compressibility"])["jpeg_compressibility"]
    server = serve_judge(judge.load(), Identity(judge.name, judge.kind, judge.fingerprint(), judge.role), port=0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        name = f"remote:http://127.0.0.1:{server.server_address[1]}"
        code, _, errors = online(rewards=f"[{name}]", held_out_rewards="[jpeg_compressibility]")
        assert (code, "jpeg_compressibility is trained on and cannot be held out" in errors) == (2, True)
        code, _, errors = online(rewards=f"[{name}]", rounds=1, updates_per_round=1)
        assert code == 0, errors
    finally:
        server.shutdown()
        server.server_close()
    assert json.loads((tmp_path / "out/run.json").read_text())["serves"] == {name: ["jpeg_compressibility"]}


def test_a_module_that_sets_the_default_dtype_is_refused(online, tmp_path):
    code = "import torch\ntorch.set_default_dtype(torch.float16)\ndef reward(images, prompts, metadata):\n    return [1.0]\n"
    (tmp_path / "halves.py").write_text(code)
    try:
        code, _, errors = online(rewards="halves:reward")
    finally:
        torch.set_default_dtype(torch.float32)
    assert (code, "torch's default dtype is float16, which a module that the recipe names" in errors) == (2, True)
    assert not (tmp_path / "out").exists()


def test_rewards_that_an_objective_would_not_read_are_refused(online):
    code, _, errors = online(objective="sft", weighting="advantage")
    assert (code, "objective sft knows no good and bad pictures" in errors) == (2, True)
