from __future__ import annotations

import copy
import math
import signal
from pathlib import Path

import pytest
import torch
from tiny_rollouts import PROMPTS, SHAPES, Brightness, decode, rollouts, run, step_for
from tiny_training import TinyPolicy

from palate.base.errors import UserError
from palate.base.seeds import mix
from palate.data.prompts import Prompt
from palate.diffusion.sampling import sample
from palate.diffusion.schedule import RectifiedFlow
from palate.diffusion.steps import ddim
from palate.online.options import Arithmetic, OnlineOptions
from palate.online.rollouts import Replay
from palate.training import checkpoints
from palate.training.log import read_log
from palate.training.loop import Stopped

SCRIPT = Path(__file__).with_name("tiny_rollouts.py")


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def log(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(Path(folder) / "log.jsonl")]


def drawn(objective="ddpo_is", *, seed=0, number=0, **options):
    source = rollouts(TinyPolicy(), objective, seed=seed, **options)
    told = source.begin(number)
    return source, told


# Laws of a round ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "judged"), [("sft", 0), ("dpo", 0), ("ddpo_is", 2)])
def test_a_round_costs_the_passes_of_guidance_and_of_likelihoods_that_are_compared(objective, judged, monkeypatch):
    rows, policy = [], TinyPolicy()
    whole = TinyPolicy.__call__
    monkeypatch.setattr(TinyPolicy, "__call__", lambda self, xt, t, cond: rows.append(len(xt)) or whole(self, xt, t, cond))
    options = {"guidance_in_training": False, "window_start": 1, "window_size": 2, "group_size": 2}
    free = rollouts(policy, objective, kl_samples=0, **options)
    free.begin(0)
    assert sum(rows) == 8 * (4 * 2 + judged)  # pictures, steps twice for guidance
    rows.clear()
    told = rollouts(policy, objective, kl_samples=3, **options).begin(0)
    assert told["kl_steps"] == [0.0] * 4
    assert sum(rows) == 8 * (4 * 2 + judged) + 3 * (4 - judged)
    double(policy)
    assert all(kl > 0 for kl in rollouts(policy, objective, kl_samples=3, **options).begin(0)["kl_steps"])


def test_a_round_does_not_depend_on_how_it_is_cut():
    whole, told = drawn(sample_batch_size=8)
    for size in (1, 3):
        cut, told_cut = drawn(sample_batch_size=size)
        torch.testing.assert_close(cut.data["latents"], whole.data["latents"])
        assert cut.plan == whole.plan
        assert told_cut["reward_mean"] == pytest.approx(told["reward_mean"])
        assert told_cut["kl_steps"] == pytest.approx(told["kl_steps"], abs=1e-6)


def test_rounds_and_seeds_differ():
    first, _ = drawn()
    for other in (drawn(number=1)[0], drawn(seed=1)[0]):
        assert not torch.equal(other.data["latents"], first.data["latents"])


def test_every_prompt_comes_once_before_any_comes_again():
    source = rollouts(TinyPolicy(), group_size=2)
    which = []
    for number in range(5):  # 5 x 4 groups over 5 prompts
        source.begin(number)
        which.append(source.data["prompt"].tolist())
    groups = [row for rows in which for row in rows[::2]]
    assert groups == [row for rows in which for row in rows[1::2]]
    for start in range(0, 20, 5):
        assert sorted(groups[start : start + 5]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("guided", [True, False])
def test_the_first_ratio_is_1(scale, guided):
    policy = TinyPolicy()
    source = rollouts(policy, sample_guidance_scale=scale, guidance_in_training=guided)
    source.begin(0)
    step = step_for(policy, "ddpo_is", source.options)
    _, metrics = step(source.batch(range(len(source)), torch.zeros(len(source), dtype=torch.int64)))
    assert metrics["log_ratio"].abs().max() < 1e-6
    assert metrics["clip_fraction"].sum() == 0


def test_kl_is_0_before_training_and_positive_after():
    policy = TinyPolicy()
    source = rollouts(policy)
    assert source.begin(0)["kl_path"] == 0
    with torch.no_grad():
        policy.trainable_module.weight.mul_(1.5)
    assert source.begin(1)["kl_path"] > 1e-4


def test_kl_as_penalty_pulls_towards_the_reference():
    policy = TinyPolicy()
    source = rollouts(policy, kl_weight=2.0)
    source.begin(0)
    batch = source.batch(range(4), torch.zeros(4, dtype=torch.int64))
    with torch.no_grad():
        policy.trainable_module.weight.mul_(1.5)
    losses, metrics = step_for(policy, "ddpo_is", source.options)(batch)
    plain, _ = step_for(policy, "ddpo_is", OnlineOptions())(batch)
    assert (metrics["kl"] > 0).all()
    torch.testing.assert_close(losses.detach() - plain.detach(), 2 * metrics["kl"])


def test_the_window_and_the_fraction_of_steps():
    source, _ = drawn(sample_num_steps=6, window_start=1, window_size=4, timestep_fraction=0.5)
    assert len(source) == 8 * 2
    batch = source.batch(range(16), torch.zeros(16, dtype=torch.int64))
    assert set(batch.t.tolist()) <= set(source.paths[2, 4, 4].t[1:5].tolist())
    for row in range(8):
        steps = [step for picture, step in source.plan if picture == row]
        assert len(set(steps)) == 2
    after = dict(zip(source.paths[2, 4, 4].t.tolist(), source.paths[2, 4, 4].s.tolist(), strict=True))
    assert batch.s.tolist() == [after[t] for t in batch.t.tolist()]


def test_every_inner_epoch_holds_every_step_of_every_picture():
    source, _ = drawn(inner_epochs=2)
    assert len(source) == 2 * 8 * 4
    for half in (source.plan[:32], source.plan[32:]):
        assert sorted(half) == [(row, step) for row in range(8) for step in range(4)]
    assert source.plan[:32] != source.plan[32:]


def test_pairs_are_the_best_and_the_worst_of_a_prompt():
    source, _ = drawn("dpo", group_size=4, updates_per_round=1)
    total, which = source.data["total"], source.data["prompt"]
    assert len(source.plan) == 4
    for w, l in source.plan:
        assert which[w] == which[l]
        assert total[w] > total[l]
    batch = source.batch(range(4), torch.arange(4))
    assert torch.equal(batch.latents[:4], source.data["latents"][[w for w, _ in source.plan]])
    assert batch.weight.tolist() == [1.0] * 4


def test_equals_make_pairs_that_weigh_nothing():
    source, told = drawn("dpo", group_size=2, updates_per_round=1, rewards=Brightness(lambda i, p: torch.ones(len(i))))
    assert told["ties"] == 4
    assert source.batch(range(4), torch.arange(4)).weight.sum() == 0


def test_equal_rewards_make_rwr_sft():
    source, told = drawn("sft", rewards=Brightness(lambda images, prompts: torch.full((len(images),), -3.0)))
    assert source.batch(range(8), torch.arange(8)).weight.tolist() == [1.0] * 8
    assert told["effective_samples"] == 8


@pytest.mark.parametrize("weighting", ["percentile", "streaming_percentile", "threshold"])
def test_sparse_rwr_trains_on_the_best_again_and_again(weighting):
    source, told = drawn("sft", weighting=weighting, percentile=75.0, threshold=0.0 if weighting == "threshold" else None)
    total = source.data["total"]
    kept = {row for (row,) in source.plan}
    wanted = 2 if weighting != "threshold" else 8
    assert told["kept"] == len(kept) == wanted
    assert len(source.plan) == 8
    assert kept == set(total.topk(wanted).indices.tolist())


def test_streaming_remembers_earlier_rounds():
    source = rollouts(TinyPolicy(), "sft", weighting="streaming_percentile", percentile=50.0)
    source.begin(0)
    before = list(source.seen)
    source.begin(1)
    assert len(source.seen) == 16
    assert source.seen[:8] == before


def test_diversity_is_told_where_prompts_repeat():
    # Two prompts with two pictures each, all black but one white: distances 1 and 0, 0.5 in the mean.
    pictures = torch.zeros(4, 3, 4, 4)
    pictures[1] = 1
    from palate.online.advantages import spread

    assert spread(["a", "a", "b", "b"], pictures) == pytest.approx(0.5)
    assert spread(["a", "b"], pictures[:2]) is None


def test_gradients_reach_the_weights_through_sampling_unless_the_caller_forbids_them():
    policy = TinyPolicy()
    source, _ = drawn()
    assert not source.data["latents"].requires_grad

    def brightness(seeds=(5, 6)) -> torch.Tensor:
        cond = source.conditions.rows(torch.tensor([0, 1]))
        way, seeds = source.paths[2, 4, 4], torch.tensor(seeds)
        found = sample(policy, policy.schedule, way, cond, seeds, (2, 4, 4), guidance_scale=2.0, rule=source.rule)
        return decode(found.latents[:, -1]).double().mean()

    (gradient,) = torch.autograd.grad(brightness(), [policy.trainable_module.weight])
    direction = gradient / gradient.norm()
    with torch.no_grad():
        policy.trainable_module.weight += 1e-2 * direction
        above = brightness()
        policy.trainable_module.weight -= 2e-2 * direction
        below = brightness()
    assert not above.requires_grad
    assert float(above - below) / 2e-2 == pytest.approx(float(gradient.norm()), rel=1e-2)


# In the loop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "updates"), [("ddpo_is", 2), ("ddpo_sf", 1)])
def test_the_reward_rises(tmp_path, objective, updates):
    online = {"samples_per_round": 64, "sample_batch_size": 64, "advantage": "round", "kl_samples": 0}
    online |= {"sample_guidance_scale": 1.0, "updates_per_round": updates}
    run(
        tmp_path, objective, online=online,
        max_train_steps=12 * updates, learning_rate=0.1, train_batch_size=128,
    )  # fmt: skip
    rounds = [line for line in log(tmp_path) if "reward_mean" in line]
    assert [line["reward_queries"] for line in rounds] == [64 * k for k in range(1, 13)]
    assert rounds[-1]["reward_mean"] > rounds[0]["reward_mean"] + 0.05


@pytest.mark.parametrize("objective", ["ddpo_is", "sft", "dpo"])
@pytest.mark.parametrize("when", [1, 2])
def test_killed_in_a_round_or_between_two_and_resumed_equals_uninterrupted(tmp_path, objective, when):
    online = {"tracker_min_count": 2, "group_size": 2, "weighting": "streaming_percentile", "percentile": 50.0}
    straight, _ = run(tmp_path / "a", objective, online=online)
    calls = []

    def interrupting(latents):
        calls.append(len(latents))
        if len(calls) == 3:  # in the second round, between its two batches: given up, and drawn again
            signal.raise_signal(signal.SIGINT)
        return decode(latents)

    how = {"decode": interrupting} if when == 1 else {"rewards": _Interrupting()}
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "b", objective, online=online, **how)
    assert stopped.value.step == (2 if when == 1 else 3)
    resumed, source = run(tmp_path / "b", objective, online=online, resume_from_checkpoint="latest")
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(resumed)[name])
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert source.queries == 24


def test_a_named_state_lies_where_checkpoints_have_had_the_watch(tmp_path):
    class Watch:
        seen = None

        def state_dict(self):
            return {"rounds": 3}

        def load_state_dict(self, state):
            self.seen = state["rounds"]

    watch = Watch()
    run(tmp_path, states={"watch": watch}, max_train_steps=3, checkpointing_steps=3)
    kept = checkpoints.load(tmp_path / "checkpoint-3").state["rollouts"]
    assert {"memory", "prompts", "watch", "plan"} <= kept.keys()
    run(tmp_path, states={"watch": watch}, max_train_steps=4, resume_from_checkpoint="latest")
    assert watch.seen == 3


class _Interrupting(Brightness):
    """Interrupts once the second round is complete, so that the loop stops after its first update."""

    def collect(self, pending):
        if self.asked == 16:
            signal.raise_signal(signal.SIGINT)
        return super().collect(pending)


@pytest.mark.parametrize("objective", ["ddpo_is", "dpo"])
def test_two_processes_are_one(tmp_path, quick_python, in_two_processes, objective):
    online = {"group_size": 2, "updates_per_round": 1} if objective == "dpo" else {}
    finished = in_two_processes([quick_python, SCRIPT, tmp_path / "two", objective])
    one, _ = run(tmp_path / "one", objective, online=online, checkpointing_steps=100)
    for code, errors in finished(60):
        assert code == 0, errors
    two = checkpoints.load(checkpoints.latest(tmp_path / "two"))
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, two.weights[name], rtol=0, atol=1e-4)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["reward_queries"] == b["reward_queries"]
        assert ("reward_mean" in a) == ("reward_mean" in b)
        if "reward_mean" in a:
            assert a["reward_mean"] == pytest.approx(b["reward_mean"], rel=1e-3)


@pytest.mark.parametrize("objective", ["ddpo_is", "sft", "dpo"])
def test_prompts_of_several_shapes_are_drawn_as_if_all_had_theirs(objective):
    options = {"group_size": 2} if objective == "dpo" else {}
    mixed = rollouts(TinyPolicy(), objective, shapes=SHAPES, **options)
    told = mixed.begin(1)
    which = mixed.data["prompt"]
    totals, latents = mixed.data["total"], mixed.data["latents"]
    for shape in set(SHAPES):
        alike = rollouts(TinyPolicy(), objective, shapes=[shape] * 5, **options)
        assert alike.begin(1).keys() == told.keys()
        rows = [row for row in range(8) if SHAPES[which[row]] == shape]
        assert torch.equal(alike.data["prompt"], which)
        found = latents[rows][..., : math.prod(shape)].unflatten(-1, shape)
        torch.testing.assert_close(found, alike.data["latents"][rows], rtol=0, atol=1e-6)
        torch.testing.assert_close(totals[rows], alike.data["total"][rows], rtol=0, atol=1e-6)
    for index in range(len(mixed)):
        batch = mixed.batch([index], torch.tensor([0]))
        assert tuple((batch.xt if objective == "ddpo_is" else batch.latents).shape[1:]) == mixed.shape_of(index)


@pytest.mark.parametrize("objective", ["ddpo_is", "dpo"])
def test_several_shapes_in_two_processes_and_resumed_are_one(tmp_path, quick_python, in_two_processes, objective):
    ranked = {"group_size": 2, "updates_per_round": 1} if objective == "dpo" else {}
    online = ranked | {"shapes": SHAPES}
    finished = in_two_processes([quick_python, SCRIPT, tmp_path / "two", objective, "mixed"])
    one, _ = run(tmp_path / "one", objective, online=online, checkpointing_steps=1)
    again = tmp_path / "one" / "checkpoint-1"
    resumed, _ = run(tmp_path / "one", objective, online=online, checkpointing_steps=1, resume_from_checkpoint=str(again))
    for code, errors in finished(60):
        assert code == 0, errors
    two = checkpoints.load(checkpoints.latest(tmp_path / "two"))
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(resumed)[name])
        torch.testing.assert_close(tensor, two.weights[name], rtol=0, atol=1e-4)


def test_the_budget_ends_training(tmp_path):
    _, source = run(tmp_path, online={"kl_budget": 1e-6}, learning_rate=0.1)
    assert log(tmp_path)[-1]["step"] == 2
    assert "over kl_budget" in (tmp_path / "train.log").read_text()
    assert checkpoints.latest(tmp_path).name == "checkpoint-2"
    assert source.queries == 8
    assert source.rewards.asked == 8  # nor is the round kept that was drawn for nothing


@pytest.mark.parametrize("every", [None, 2])
def test_a_run_that_its_budget_ends_is_measured_at_its_end(tmp_path, every):
    measured = []

    def evaluate(step):
        measured.append(step)
        return {"held_out/fine": float(step)}

    run(tmp_path, online={"kl_budget": 1e-6}, learning_rate=0.1, evaluate=evaluate, eval_steps=every)
    assert measured == [0, 2]
    assert [line["held_out/fine"] for line in log(tmp_path) if "held_out/fine" in line] == [0, 2]
    assert sum("loss" in line for line in log(tmp_path)) == 2


# What is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 3, "samples_per_round": 8}, "group_size 3 does not divide samples_per_round 8; use 2 or 4"),
        ({"sample_num_steps": 5, "window_size": 6}, "window of 6 steps from step 0 on does not fit into 5 steps"),
        ({"sample_num_steps": 5, "window_start": 5}, "does not fit into 5 steps"),
        ({"advantage": "groups"}, "did you mean 'group'"),
        ({"weighting": "threshold"}, "name the least reward"),
        ({"threshold": 0.5}, "threshold does nothing under weighting softmax"),
        ({"timestep_fraction": 0.0}, "more than 0"),
        ({"kl_budget": 1.0, "kl_samples": 0}, "needs kl_samples"),
        ({"adv_clip": -1.0}, "positive"),
        ({"kl_budget": 1.0, "sample_eta": 0.0}, "needs kl_samples.* and sample_eta"),
        ({"advantage": "group"}, "advantage group measures .* raise group_size"),
        ({"per_prompt": True}, "per_prompt measures .* raise group_size"),
        ({"per_prompt": True, "group_size": 4, "weighting": "streaming_percentile"}, "per_prompt does nothing"),
        ({"sample_noise": 0.5}, "sample_noise does nothing under sample_rule ddim"),
        ({"sample_rule": "cps", "sample_eta": 0.0}, "sample_eta does nothing under sample_rule cps"),
        ({"sample_rule": "cps", "sample_noise": 1.5}, "at most 1 under sample_rule cps"),
        ({"sample_rule": "csp"}, "did you mean 'cps'"),
        ({"window_end": 4}, "name its window_size"),
        (
            {"window_size": 2, "window_start": 3, "window_end": 4},
            r"window_end is 4; expected 5 \(window_start \+ window_size\) to 50",
        ),
        ({"tracker_buffer_size": 8}, "tracker_min_count 16 is never reached"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        OnlineOptions(**options)


def test_batches_that_do_not_come_out_even():
    with pytest.raises(UserError, match="updates_per_round 3 does not divide samples_per_round 8; use 2 or 4"):
        Arithmetic.of(OnlineOptions(samples_per_round=8, updates_per_round=3), "trajectories")
    with pytest.raises(UserError, match="set group_size to 2 or more"):
        Arithmetic.of(OnlineOptions(), "pairs")
    # 256 pictures in 4 updates are 64, times 50 steps 3200: 4 at once are 800 passes, and 400 in each of two processes.
    paper = Arithmetic.of(OnlineOptions(), "trajectories")
    # A run ends after its rounds, or earlier: 10 rounds of 4 updates.
    assert [paper.total(10, most) for most in (None, 7, 40, 41)] == [40, 7, 40, 40]
    assert (paper.items, paper.effective_batch, paper.updates) == (12800, 3200, 4)
    assert (paper.accumulation(4, 1), paper.accumulation(4, 2)) == (800, 400)
    with pytest.raises(
        UserError, match=r"train_batch_size 3 on 1 process.* does not divide the effective batch of 3200; use 2 or 4"
    ):
        paper.accumulation(3, 1)


def test_no_likelihood_without_noise():
    with pytest.raises(UserError, match="sample_eta is 0"):
        rollouts(TinyPolicy(), sample_eta=0.0)


def test_pictures_that_are_not_finite_are_named(tmp_path):
    policy = TinyPolicy()
    with torch.no_grad():
        policy.trainable_module.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"picture 0 \('a \w+'\) is not finite after step 0 of 4 \(time 76\)"):
        rollouts(policy).begin(0)


class Wavering(TinyPolicy):
    """Predicts more with every call."""

    calls = 0

    def __call__(self, xt, t, cond):
        self.calls += 1
        return super().__call__(xt, t, cond) * (1 + 1e-3 * self.calls)


def test_a_policy_that_changes_its_mind_is_refused(tmp_path):
    with pytest.raises(UserError, match="more or less likely than when it drew them"):
        run(tmp_path, policy=Wavering())


def test_every_trained_time_is_checked(tmp_path):
    """Not only those of the first batch, which may hold a single one."""

    class WaveringLate(TinyPolicy):
        late = 0

        def __call__(self, xt, t, cond):
            self.late += bool((t == 1).any())
            return super().__call__(xt, t, cond) + 1e-3 * self.late * (t == 1).reshape(-1, 1, 1, 1)

    with pytest.raises(UserError, match="more or less likely than when it drew them"):
        run(tmp_path, policy=WaveringLate(), train_batch_size=1)


def test_a_tolerance_beyond_the_clip_range_is_none(tmp_path):
    """Where most ratios would leave the clip range at once, nothing could be learned."""

    policy = Wavering()
    source = rollouts(policy, replay=Replay(step_for(policy, "ddpo_is", OnlineOptions()), tolerance=1e6))
    with pytest.raises(UserError, match="most of the steps beyond clip_range"):
        source.begin(0)


def assert_goes_on_exactly(stopped, uninterrupted):
    """Resumed, the run in ``stopped`` ends with the weights of one that is never stopped."""
    straight, _ = run(uninterrupted)
    resumed, _ = run(stopped, resume_from_checkpoint="latest")
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(resumed)[name])


def test_a_reward_that_fails_leaves_a_checkpoint(tmp_path):
    class Failing(Brightness):
        def collect(self, pending):
            if self.asked > 8:
                raise UserError("reward brightness raised ValueError: no")
            return super().collect(pending)

    with pytest.raises(UserError, match=r"raised ValueError: no; the state after step 2 is in .*checkpoint-2"):
        run(tmp_path / "a", rewards=Failing())
    assert_goes_on_exactly(tmp_path / "a", tmp_path / "b")


def test_an_update_that_fails_leaves_a_checkpoint(tmp_path):
    class Failing(TinyPolicy):
        """Not finite in the second update, of eight batches each."""

        updates = 0

        def __call__(self, xt, t, cond):
            out = super().__call__(xt, t, cond)
            self.updates += out.requires_grad
            return out * torch.nan if self.updates == 12 else out

    with pytest.raises(UserError, match=r"log-probability .* is nan; .*; the state after step 1 is in .*checkpoint-1"):
        run(tmp_path / "a", policy=Failing())
    assert_goes_on_exactly(tmp_path / "a", tmp_path / "b")


def test_other_prompts_are_not_gone_on_with(tmp_path):
    source, _ = drawn()
    state = source.state_dict(0)
    others = rollouts(TinyPolicy(), prompts=[*PROMPTS[1:], PROMPTS[0]])
    with pytest.raises(UserError, match="trained on other prompts than these 5, or in another order"):
        others.load_state_dict(state)


@pytest.mark.parametrize(("what", "failing"), [("reward", 1), ("watch", 0)])
def test_a_failure_in_one_of_two_processes_ends_both(tmp_path, quick_python, in_two_processes, what, failing):
    finished = in_two_processes([quick_python, SCRIPT, tmp_path / "two", "ddpo_is", what])
    said = [errors for _, errors in finished(60)]
    assert f"process {failing} failed, see its message; the state after step 2 is in" in said[1 - failing]
    assert "raised ValueError: no; the state after step 2 is in" in said[failing]
    assert checkpoints.latest(tmp_path / "two").name == "checkpoint-2"


def test_a_held_out_reward_that_fails_leaves_a_checkpoint(tmp_path):
    def evaluate(step):
        if step == 4:
            raise UserError("reward heldout raised ValueError: no")
        return {"held_out/fine": 1.0}

    with pytest.raises(UserError, match=r"raised ValueError: no; the state after step 4 is in .*checkpoint-4"):
        run(tmp_path / "a", evaluate=evaluate, eval_steps=2)
    assert "loss" in log(tmp_path / "a")[-1]  # what the step itself told is not lost with the evaluation
    assert_goes_on_exactly(tmp_path / "a", tmp_path / "b")


def test_no_prompts():
    with pytest.raises(UserError, match="no prompts"):
        rollouts(TinyPolicy(), prompts=[])


def test_negative_prompts_are_encoded_beside_the_others():
    from palate.diffusion.denoising import Conditioning
    from palate.online.conditions import encode

    asked = []

    def encode_prompts(texts):
        asked.extend(texts)
        return Conditioning({"text": torch.tensor([[float(len(t))] for t in texts])})

    nothing = Conditioning({"text": torch.zeros(1, 1)})
    encoded = encode(encode_prompts, nothing, [Prompt("dog", "blur"), Prompt("horse"), PROMPTS[0]], batch_size=2)
    assert len(encoded.texts.tensors["text"]) == 5  # each text once
    found = encoded.rows(torch.arange(3))
    assert found.tensors["text"][:, 0].tolist() == [3, 5, 5]
    assert found.tensors["negative/text"][:, 0].tolist() == [4, 0, 0]
    assert sorted(asked) == sorted({"dog", "blur", "horse", "a dog"})


# Rules and windows ----------------------------------------------------------------------------------------------------------


def in_flow():
    """The two-channel model as one of rectified flow; its output is small, so its pictures are."""
    policy = TinyPolicy()
    policy.schedule = RectifiedFlow(shift=2.0)
    return policy


RULES = [{"sample_eta": 0.7}, {"sample_rule": "cps"}, {"sample_rule": "cps", "sample_noise": 0.3}, {"sample_rule": "flow_sde"}]


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize("make", [TinyPolicy, in_flow])
@pytest.mark.parametrize("window", [{}, {"window_size": 2, "window_end": 3}])
def test_the_first_ratio_is_1_under_every_rule(options, make, window):
    if options.get("sample_rule") == "flow_sde" and make is TinyPolicy:
        with pytest.raises(UserError, match="flow_sde is a step of rectified flow, and this model is none: use cps"):
            rollouts(make(), **options)
        return
    policy = make()
    source = rollouts(policy, **options, **window)
    told = source.begin(0)
    assert told["kl_path"] == 0
    _, metrics = step_for(policy, "ddpo_is", source.options)(source.batch(range(len(source)), torch.zeros(len(source))))
    assert metrics["log_ratio"].abs().max() < 1e-5
    assert source.data["log_prob"].isfinite().all()


def test_rules_draw_what_they_say():
    assert OnlineOptions(sample_rule="cps").rule is not None
    drawn_by = {str(options): drawn(**options)[0].data["latents"] for options in ({}, *RULES[:3])}
    assert len({float(latents.sum()) for latents in drawn_by.values()}) == 4


def test_noise_is_drawn_in_the_window_alone():
    policy = TinyPolicy()
    source = rollouts(policy, window_start=1, window_size=1, window_end=2, sample_num_steps=4)
    told = source.begin(0)
    assert [kl == 0 for kl in told["kl_steps"]] == [True] * 4
    double(policy)
    told = source.begin(1)
    assert [kl > 0 for kl in told["kl_steps"]] == [False, True, False, False]
    # From the latents after the window on, and from the start to it, pictures are those of the plain ODE.
    window, way = source.data["latents"], source.paths[2, 4, 4]
    seeds = torch.tensor([mix(0, 101, 8 + row) for row in range(8)])
    plain = sample(
        policy, policy.schedule, way, source._conditions(source.data["prompt"], 5.0), seeds, (2, 4, 4),
        guidance_scale=5.0, rule=ddim(0.0),
    )  # fmt: skip
    torch.testing.assert_close(window[:, 0], plain.latents[:, 1])
    assert not torch.allclose(window[:, 1], plain.latents[:, 2])


def test_a_window_that_moves():
    options = OnlineOptions(sample_num_steps=10, window_start=1, window_size=2, window_end=5)
    starts = [options.window_of(3, number).start for number in range(60)]
    assert set(starts) == {1, 2, 3}
    assert starts == [options.window_of(3, number).start for number in range(60)]
    assert starts != [options.window_of(4, number).start for number in range(60)]
    assert all(len(options.window_of(3, number)) == 2 for number in range(60))
    assert OnlineOptions(sample_num_steps=10, window_start=1, window_size=2).window_of(3, 7) == range(1, 3)
    source = rollouts(TinyPolicy(), sample_num_steps=6, window_size=1, window_end=6)
    for number in range(4):
        source.begin(number)
        batch = source.batch(range(2), torch.zeros(2))
        assert batch.t.tolist() == [int(source.paths[2, 4, 4].t[source.options.window_of(0, number).start])] * 2
        resumed = rollouts(TinyPolicy(), sample_num_steps=6, window_size=1, window_end=6)
        resumed.load_state_dict(source.state_dict(number * len(source) + 1))
        again = resumed.batch(range(2), torch.zeros(2))
        assert torch.equal(again.t, batch.t)
        assert torch.equal(again.after, batch.after)


# The policy that lags behind -----------------------------------------------------------------------------------------------


class Lagging(TinyPolicy):
    """Also keeps how it was."""

    def __init__(self):
        super().__init__()
        self.before = copy.deepcopy(self.trainable_module).requires_grad_(False)
        self.kept = []

    def old(self, xt, t, cond):
        with torch.no_grad():
            return self.before(xt) + cond.tensors["text"][:, :, None, None]

    def advance_old(self, decay=None):
        self.kept.append(decay)
        for now, old in zip(self.parameters(), self.before.parameters(), strict=True):
            old.data.lerp_(now.data, 1 - decay)


def double(policy):
    with torch.no_grad():
        policy.trainable_module.weight.mul_(2)


def test_the_old_policy_draws():
    policy = Lagging()
    source = rollouts(policy, "nft", weighting="advantage", advantage="round")
    source.begin(0)
    double(policy)
    again = rollouts(policy, "nft", weighting="advantage", advantage="round")
    again.begin(0)
    assert torch.equal(source.data["latents"], again.data["latents"])
    by_itself = rollouts(policy, "kto", weighting="advantage", advantage="round")
    by_itself.begin(0)
    assert not torch.equal(source.data["latents"], by_itself.data["latents"])


def test_the_old_policy_follows_once_for_a_round_however_often_that_is_begun():
    policy, failing = Lagging(), Brightness()
    source = rollouts(policy, "nft", weighting="advantage", advantage="round", old_decay=0.0025, rewards=failing)
    for number in range(5):
        source.begin(number)
    assert policy.kept == [0.001, 0.002, 0.0025, 0.0025]  # the first round is drawn by the policy as it begins

    def fail(pending):
        raise UserError("no")

    failing.wait = fail
    with pytest.raises(UserError, match="no"):
        source.begin(5)
    saved = source.state_dict(5 * len(source))
    failing.wait = lambda pending: None
    resumed = rollouts(policy, "nft", weighting="advantage", advantage="round", old_decay=0.0025)
    resumed.load_state_dict(saved)
    for known in (source, resumed):
        known.begin(5)
    assert len(policy.kept) == 5
    resumed.begin(6)
    assert len(policy.kept) == 6


def test_labels_are_advantages_between_0_and_1():
    # Rewards 1, 1, 1, 9 twice: mean 3, std sqrt(12) = 3.4641; advantages -0.57735 and 1.73205, cut off at 1.5.
    scores = iter([torch.tensor([1.0, 1.0, 1.0, 9.0])] * 2)
    brightness = Brightness(lambda images, prompts: next(scores))
    source = rollouts(TinyPolicy(), "kto", weighting="advantage", advantage="round", adv_clip=1.5, rewards=brightness)
    told = source.begin(0)
    assert told["advantage_clipped"] == 0.25
    batch = source.batch(range(8), torch.arange(8))
    expected = torch.tensor([0.5 - 0.57735 / 3] * 3 + [1.0])[torch.tensor([row[0] % 4 for row in source.plan])]
    torch.testing.assert_close(batch.label, expected, atol=1e-5, rtol=0)
    assert torch.equal(batch.weight, torch.ones(8))
    # Without it every picture is a liked one, weighted by the softmax.
    plain = rollouts(TinyPolicy(), "kto")
    plain.begin(0)
    assert torch.equal(plain.batch(range(8), torch.arange(8)).label, torch.ones(8))
