"""What a recipe takes, counted beforehand: against what is measured, worked by hand, and told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from palate.base.errors import UserError
from palate.models.outline import Counter, without_contents
from palate.models.policy import Policy
from palate.runs import plan, recipe
from palate.runs.loading import denoiser_of, policy_of, shape_of
from palate.runs.ready import tell_needs
from palate.training.sharded import cut_up


def made(folder: Path, **options: object) -> recipe.Recipe:
    return recipe.load(
        "miniature-dpo", {"pretrained_model_name_or_path": str(folder), "resolution": 64, "train_batch_size": 2, **options}
    )


def measured(of: recipe.Recipe, change: Callable[[Policy], object] = lambda policy: None) -> float:
    """Bytes at most that a forward and backward pass allocates, by the allocator's own record.

    change: what is done to the policy before.
    """
    denoiser = denoiser_of(of)
    policy = policy_of(of, denoiser)
    with torch.no_grad():
        encoded = denoiser.encode_prompts(["a picture"])
    shape = shape_of(of, denoiser)
    framed = denoiser.picture_conditions((shape.width, shape.height), shape, (0.5, 0.5), flip=False)
    row = {name: (x.shape[1:], x.dtype) for name, x in encoded.tensors.items()}
    change(policy)
    run = plan.work(of, policy, denoiser, row | {name: (x.shape, x.dtype) for name, x in framed.items()})
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = highest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def test_what_is_gathered_of_others_is_counted(first_of, sd3_dir):
    """At most: it is highest at another moment than activations are."""
    of = made(sd3_dir, shard_model=True, train_method="full", gradient_checkpointing=True)
    counted = plan.count(of, gpu=False, together=2)
    with first_of(2):
        highest = measured(of, cut_up)
    assert counted.passes < highest <= 1.02 * (counted.passes + counted.gathered)
    assert counted.gathered < sum(counted.whole[part] for part in plan.WEIGHTS)


PERCEPTUAL = {"name": "perceptual", "layers": "mid", "target_time": "uniform"}
CASES = {
    "half precision": ("model", {"gradient_checkpointing": True, "mixed_precision": "bf16"}),
    "perceptual": ("sdxl", {"space": PERCEPTUAL, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_what_a_pass_needs_is_what_is_counted(request, family, options):
    of = made(request.getfixturevalue(f"{family}_dir"), **options)
    assert plan.count(of, gpu=False).passes == pytest.approx(measured(of), rel=0.05)


def test_parts_by_hand(model_dir):
    """A LoRA in float32: 4 bytes a number, twice as much for AdamW's two means; of full training a frozen copy beside it."""

    def parts(**options: object) -> dict[str, float]:
        of = made(model_dir, **options)
        return plan.held(policy_of(of, denoiser_of(of, outline="shapes")), of)

    denoiser = denoiser_of(made(model_dir))
    whole = 4 * sum(p.numel() for p in denoiser.network.parameters())
    trained = 4 * sum(p.numel() for p in policy_of(made(model_dir, rank=3), denoiser).parameters())
    assert list(parts(rank=3, ema_decay=0.9).values()) == [whole, 0, trained, trained, 2 * trained, trained]
    assert list(parts(train_method="full").values()) == [0, whole, whole, whole, 2 * whole, 0]
    of_ones_own = parts(rank=3, optimizer="torch.optim:SGD", optimizer_options={"momentum": 0.9})
    assert of_ones_own["optimizer"] == trained


def test_a_gpu_computes_norms_in_full_precision():
    """2 x 4 x 8 numbers of two bytes: on a GPU their copy in four bytes, and the result in four."""
    for gpu, wanted in ((False, 2), (True, 4 + 4)):
        with without_contents(gpu=gpu):
            x = torch.empty(2, 4, 8, dtype=torch.bfloat16)
            with Counter([x]) as counter, torch.autocast("cpu", torch.bfloat16):
                F.layer_norm(x, (8,))
        statistics = 2 * 2 * 4 * 4  # mean and deviation of each row
        assert counter.peak - 64 * wanted in (statistics, statistics // 2)


def test_what_is_freed_is_not_counted():
    with without_contents(gpu=False), Counter() as counter:
        one = torch.empty(1000)
        del one
        torch.empty(500, 2, dtype=torch.float64).view(1000)
        kept = torch.empty(3, 3) @ torch.empty(3, 3)
    assert counter.peak == 8000
    assert counter.now == 4 * kept.numel()
    assert counter.operations == 2 * 27


def test_what_is_told(palate_plan):
    lines = palate_plan(max_train_samples=16, measure="true")
    assert lines[0] == "memory of one process, GB"
    assert [line.split()[0] for line in lines[1:4]] == ["training", "drawing", "encoding"]
    assert any("it fits: at most" in line for line in lines)
    assert any(line.startswith("measured on cpu: ") and " s a micro-batch, " in line for line in lines)
    assert any(line.startswith("  encoding about 16 rows, once: ") and line.endswith(" or more") for line in lines)
    assert any(line.startswith("  training, 3 updates of 1 x 4: ") and line.endswith("as measured") for line in lines)
    assert not Path("out").exists()


def test_rewards_on_the_card_are_told():
    """Those that have weights, which are not counted; a function of one's own may have some."""
    rewards = ["pickscore", "jpeg_compressibility", "hpsv2.1:models/hps", "remote:http://127.0.0.1:1", "mine:judge"]
    rewards.append("vqascore:http://127.0.0.1:1/v1")
    online = {"train_prompts": "miniature-seen", "rewards": rewards, "held_out_rewards": ["mini-heldout"]}
    said = ["  rewards on the same card come on top: pickscore (3.9 GB), hpsv2.1:models/hps, mine:judge, mini-heldout"]
    assert plan._judge_lines(recipe.load("miniature-ddpo-is", online)) == said
    jpeg = {"rewards": ["jpeg_compressibility"], "held_out_rewards": []}
    assert plan._judge_lines(recipe.load("miniature-ddpo-is", jpeg)) == []
    assert plan._judge_lines(recipe.load("miniature-dpo")) == []


def test_what_would_make_it_fit(palate_plan, monkeypatch):
    """Each on top of those before it, and none that does nothing."""
    needs = plan.Needs({"trained weights": 0.0}, 0.0, 0.0, 0.0, {}, 0.0, 0.0, 0.0, {}, 1)

    def count(of: recipe.Recipe, **_: object) -> plan.Needs:
        return dataclasses.replace(needs, passes=1e9 * of.training.train_batch_size, drawing=1e9)

    monkeypatch.setattr(plan, "count", count)
    lines = palate_plan(memory=2, train_batch_size=8, evaluation_batch_size=8)
    found = [line for line in lines if "--" in line]
    assert found == [
        "     8.0   --evaluation_batch_size 1",
        "     1.0   --evaluation_batch_size 1 --train_batch_size 1 --gradient_accumulation_steps 8",
    ]
    lines = palate_plan(memory=0.5, train_batch_size=1, evaluation_batch_size=1)
    assert any("no option here makes it fit" in line for line in lines)


def test_several_processes_may_hold_a_part_each(palate_plan, monkeypatch):
    """Where that is allowed, with the optimizer that goes with it; one of 8 bits is then none of the remedies."""
    needs = plan.Needs({"trained weights": 0.0}, 0.0, 0.0, 0.0, {}, 0.0, 0.0, 0.0, {}, 1)
    monkeypatch.setattr(
        plan, "count", lambda of, **_: dataclasses.replace(needs, passes=1e9 if of.training.shard_model else 3e9)
    )
    small = {"memory": 2, "train_batch_size": 1, "evaluation_batch_size": 1, "gradient_checkpointing": "true"}

    def remedies(**options: object) -> list[str]:
        return [line.split(maxsplit=1)[1] for line in palate_plan(**small, **options) if "   --" in line]

    assert remedies(processes=4) == ["--shard_model true"]
    assert remedies(processes=4, optimizer="adafactor") == ["--shard_model true --optimizer adamw"]
    assert remedies() == ["--optimizer adamw_8bit"]
    assert remedies(processes=4, compile="true") == ["--optimizer adamw_8bit"]
    assert remedies(processes=4, shard_model="true") == []


PLANNED = plan.Needs({"trained weights": 4e9}, 0.0, 0.0, 1e9, {}, 5e12, 2e9, 0.0, {}, 1)


def test_processes_share_the_work(palate_plan, monkeypatch):
    monkeypatch.setattr(plan, "count", lambda *_, **__: PLANNED)
    lines = palate_plan(max_train_samples=16, max_train_steps="null", num_train_epochs=3, processes=2, memory=24)
    assert "  training, 6 updates of 1 x 4 in each of 2 processes: 3e+13 operations" in lines  # 48 pairs, 8 an update
    assert "  encoding about 16 rows, once in each of 2 processes: 3.2e+10 operations" in lines  # two pictures a pair
    monkeypatch.setenv("WORLD_SIZE", "2")  # as accelerate launch tells it to each
    same = {"max_train_samples": 16, "max_train_steps": "null", "num_train_epochs": 3, "memory": 24}
    assert palate_plan(**same) == lines
    monkeypatch.setenv("RANK", "1")
    assert palate_plan(**same) == []


def test_parts_are_told(palate_plan, monkeypatch):
    """Of 8 processes, of which the first draws with the whole model at the end, and all read it before it is cut up."""
    whole = dict.fromkeys((*plan.WEIGHTS, "gradients", "optimizer"), 8e9)
    parts = {name: size / 8 for name, size in whole.items()}
    monkeypatch.setattr(plan, "count", lambda *_, **__: dataclasses.replace(PLANNED, held=parts, whole=whole, gathered=3e9))
    lines = palate_plan(shard_model="true", processes=8, memory=24)
    weights = "frozen weights 1.00, frozen copy, old policy 1.00, trained weights 1.00, gradients 1.00, optimizer 1.00"
    assert f"  training    8.00   {weights}, gathered of others 3.00" in lines
    assert "  drawing    29.00   the same parts 4.00, the whole model 24.00, VAE, activations 1.00" in lines
    assert "  before it is cut up, the model lies in main memory: 24.00 in each process" in lines
    assert "  gathering parts of other processes comes on top: not counted" in lines
    assert any("tell by --processes" in line for line in palate_plan(shard_model="true", memory=24))
    (written,) = [line for line in lines if line.startswith("  checkpoints and the result ")]
    assert float(written.split()[4]) >= 8  # whole


def test_data_need_not_be_there_yet_nor_the_card(palate_plan, monkeypatch):
    needs = plan.Needs({"trained weights": 1e9}, 0.0, 0.0, 0.0, {}, 5e12, 0.0, 0.0, {}, 1)
    monkeypatch.setattr(plan, "count", lambda *_, **__: needs)
    monkeypatch.setattr(plan, "matrix_rate", lambda precision: pytest.fail("a card that is not here was timed"))
    lines = palate_plan(train_data="absent", memory=24)
    assert "  training, 3 updates of 1 x 4: 1.5e+13 operations" in lines
    assert lines[-1].startswith("data, of which the size is left out: ")
    assert "  it fits: at most 1.0 GB, of 24.0 GB" in lines


def test_a_remedy_that_cannot_be_counted_is_told(palate_plan, monkeypatch):
    needs = plan.Needs({"trained weights": 9e9}, 0.0, 0.0, 0.0, {}, 0.0, 0.0, 0.0, {}, 1)

    def count(of: recipe.Recipe, **_: object) -> plan.Needs:
        if of.policy.gradient_checkpointing:
            raise UserError("it has none")
        return needs

    monkeypatch.setattr(plan, "count", count)
    lines = palate_plan(memory=2, train_batch_size=1, evaluation_batch_size=1)
    assert "       ?   --gradient_checkpointing true: it has none" in lines


@pytest.fixture
def palate_plan(palate):
    """Runs ``palate plan`` of a small recipe; returns its lines."""

    def run(**options: object) -> list[str]:
        code, said, errors = palate("plan", **options)
        assert code == 0, errors
        return said.splitlines()

    return run


def test_a_mistake_is_one_line(palate):
    measured = {"measure": "true", "shard_model": "true", "processes": 2}
    for options in (
        {"memory": -1},
        {"memroy": 3},
        {"processes": 0},
        measured,
        {"shard_model": "true", "optimizer": "adafactor"},
    ):
        code, said, errors = palate("plan", **options)
        assert (code, said, len(errors.splitlines())) == (2, "", 1)


def test_a_run_tells_what_it_counted_and_what_it_took(palate, monkeypatch):
    needs = plan.Needs({"trained weights": 1e9}, 2e9, 0.0, 0.0, {"VAE": 1e9}, 0.0, 0.0, 0.0, {}, 1)
    monkeypatch.setattr(plan, "WORTH_COUNTING", 1)
    monkeypatch.setattr(plan, "count", lambda *_, **__: needs)
    code, _, errors = palate("train", max_train_steps=2)
    assert code == 0, errors
    assert "memory of one process, GB\n  training" in errors
    told = [line for line in Path("out/train.log").read_text().splitlines() if "the first update took " in line]
    assert len(told) == 1
    assert told[0].endswith(" GB at most; counted were 3.00 GB")


def test_what_cannot_be_counted_stops_no_run(palate, monkeypatch, model_dir):
    told: list[str] = []
    monkeypatch.setattr(plan, "tell", told.append)
    monkeypatch.setattr(plan, "count", lambda *_, **__: 1 / 0)
    assert plan.foretell(made(model_dir), denoiser_of(made(model_dir))) is None
    assert told == []  # too small to be worth it
    monkeypatch.setattr(plan, "WORTH_COUNTING", 1)
    assert plan.foretell(made(model_dir), denoiser_of(made(model_dir))) is None
    assert told == ["memory was not counted beforehand: ZeroDivisionError: division by zero"]


def test_rows_of_all_sets_count(monkeypatch, model_dir):
    class Set:
        single = False

        def rows_about(self):
            return 150_000

    told: list[str] = []
    monkeypatch.setattr("palate.runs.ready.tell", told.append)
    tell_needs(made(model_dir), denoiser_of(made(model_dir)), [Set(), Set()])
    assert "about 300000 rows" in told[0]
