from __future__ import annotations

import functools
import math
import signal
import threading
from pathlib import Path

import pytest
import torch
from tiny_training import PAIRS, MixedPairs, TinyPairs, TinyPolicy, run
from torch.utils._python_dispatch import TorchDispatchMode

from palate.base.errors import UserError
from palate.base.seeds import mix
from palate.objectives.pairs import dpo
from palate.objectives.samples import kto
from palate.spaces import latent
from palate.training import checkpoints, loop
from palate.training.fits import Draws
from palate.training.log import read_log
from palate.training.loop import Stopped
from palate.training.measures import automatic_beta, implicit_margins
from palate.training.optimizers import lr_factor
from palate.training.options import LR_SCHEDULERS, TrainOptions
from palate.training.place import Place
from palate.training.steps import pair_step, sample_step


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def log(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(Path(folder) / "log.jsonl")]


def assert_close(a, b, tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


class Interrupting(TinyPolicy):
    """Sends a signal when it is asked for the n-th time."""

    def __init__(self, when: int, number: signal.Signals = signal.SIGINT):
        super().__init__()
        self.when, self.number, self.calls = when, number, 0

    def __call__(self, xt, t, cond):
        self.calls += 1
        if self.calls == self.when:
            signal.raise_signal(self.number)
        return super().__call__(xt, t, cond)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, number):
    hooks = {
        "on_evaluate": lambda step: {"held_out": step / 10},
        "eval_steps": 2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
    }
    straight = run(tmp_path / "a", **hooks)
    handler = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "b", policy=Interrupting(4, number), **hooks)
    assert signal.getsignal(number) is handler
    assert stopped.value.step == 4
    assert stopped.value.checkpoint == tmp_path / "b" / "checkpoint-4"
    assert "resume_from_checkpoint" in str(stopped.value)
    resumed = run(tmp_path / "b", resume_from_checkpoint="latest", **hooks)
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(resumed)[name])
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert [line["step"] for line in log(tmp_path / "a")] == [0, 2, 3, 4, 6, 8]


class Counting:
    """An evaluation that knows how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        return {"calls": self.calls}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_checkpoints_keep_named_states(tmp_path):
    straight, stopped, resumed, unknown = (Counting() for _ in range(4))
    run(tmp_path / "a", on_evaluate=straight, states={"counting": straight}, eval_steps=2)
    with pytest.raises(Stopped):
        run(tmp_path / "b", policy=Interrupting(4), on_evaluate=stopped, states={"counting": stopped}, eval_steps=2)
    options = {"on_evaluate": resumed, "eval_steps": 2, "resume_from_checkpoint": "latest"}
    run(tmp_path / "b", states={"counting": resumed, "unknown": unknown}, **options)
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert (straight.calls, unknown.calls) == (5, 0)


def kto_step(policy):
    return sample_step(policy, latent(), functools.partial(kto, beta=50.0))


def test_ktos_reference_point_is_the_same_however_the_batch_is_cut_and_resumed(tmp_path):
    straight = run(tmp_path / "a", make=kto_step)
    assert log(tmp_path / "a")[-1]["reference_point"] != 0
    cut = run(tmp_path / "b", make=kto_step, train_batch_size=2, gradient_accumulation_steps=4)
    assert_close(weights(straight), weights(cut), 1e-6)
    with pytest.raises(Stopped):
        run(tmp_path / "c", make=kto_step, policy=Interrupting(4))
    assert_close(weights(straight), weights(run(tmp_path / "c", make=kto_step, resume_from_checkpoint="latest")), 0)
    assert log(tmp_path / "a") == log(tmp_path / "c")


def test_an_automatic_beta_is_chosen_once_logged_and_kept(tmp_path):
    def auto(policy):
        return pair_step(policy, latent(), functools.partial(dpo, beta=math.nan), auto_beta=True)

    def refusing(policy):
        step = auto(policy)
        step.prepare = None
        return step

    straight = run(tmp_path / "a", make=auto)
    beta = log(tmp_path / "a")[-1]["beta"]
    assert_close(weights(straight), weights(run(tmp_path / "b", beta=beta)), 0)
    with pytest.raises(Stopped):
        run(tmp_path / "c", make=auto, policy=Interrupting(7))  # two batches of eight to choose, then four updates
    assert_close(weights(straight), weights(run(tmp_path / "c", make=refusing, resume_from_checkpoint="latest")), 0)


def test_lines_after_the_checkpoint_are_written_anew(tmp_path):
    run(tmp_path / "a", checkpointing_steps=5)
    expected = log(tmp_path / "a")
    run(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert log(tmp_path / "a") == expected


def test_accumulation_is_a_larger_batch(tmp_path):
    whole = weights(run(tmp_path / "a"))
    assert_close(whole, weights(run(tmp_path / "b", train_batch_size=4, gradient_accumulation_steps=2)), 1e-6)
    assert_close(whole, weights(run(tmp_path / "c", train_batch_size=1, gradient_accumulation_steps=8)), 1e-6)
    for a, b in zip(log(tmp_path / "a"), log(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("bucket", [1, 2**24])
def test_two_processes_are_one(tmp_path, quick_python, in_two_processes, bucket):
    one = run(tmp_path / "one", max_train_steps=3)
    script = Path(__file__).with_name("tiny_training.py")
    finished = in_two_processes([quick_python, script, tmp_path / "two", "4", bucket])
    for code, errors in finished(60):
        assert code == 0, errors
    two = checkpoints.load(tmp_path / "two" / "checkpoint-3")
    assert_close(weights(one), two.weights, 1e-6)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_shapes_in_a_batch_change_no_number_with_the_cut(tmp_path, quick_python, in_two_processes):
    """However the effective batch is cut, in one process or two: what is in it is the same, and so is the sum."""
    script = Path(__file__).with_name("tiny_training.py")
    finished = in_two_processes([quick_python, script, tmp_path / "two", "4", 2**24, "mixed"])
    whole = weights(run(tmp_path / "a", data=MixedPairs(), max_train_steps=3))
    cuts = [(4, 2), (2, 4), (1, 8)]
    for size, pieces in cuts:
        options = {"train_batch_size": size, "gradient_accumulation_steps": pieces, "max_train_steps": 3}
        assert_close(whole, weights(run(tmp_path / str(size), data=MixedPairs(), **options)), 1e-6)
        for a, b in zip(log(tmp_path / "a"), log(tmp_path / str(size)), strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for code, errors in finished(60):
        assert code == 0, errors
    assert_close(whole, checkpoints.load(tmp_path / "two" / "checkpoint-3").weights, 1e-6)


def test_shapes_are_met_as_squares_are_each_pair_once_an_epoch_and_in_the_same_batches(tmp_path):
    mixed, plain = MixedPairs(), TinyPairs()
    for name, data in (("mixed", mixed), ("plain", plain)):
        run(tmp_path / name, data=data, max_train_steps=None, num_train_epochs=3, train_batch_size=4)
    assert len(mixed.seen) == len(plain.seen) == 36
    for start in range(0, 36, 4):  # updates
        assert sorted(mixed.seen[start : start + 4]) == sorted(plain.seen[start : start + 4])


def test_shapes_stopped_and_resumed_equal_uninterrupted_bit_for_bit(tmp_path):
    class Stopping(MixedPairs):
        def batch(self, indices, seeds):
            if len(self.seen) == 24 and not self.told:
                self.told = True
                signal.raise_signal(signal.SIGINT)
            return super().batch(indices, seeds)

        told = False

    straight = run(tmp_path / "a", data=MixedPairs())
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "b", data=Stopping())
    assert 0 < stopped.value.step < 8
    assert_close(weights(straight), weights(run(tmp_path / "b", data=MixedPairs(), resume_from_checkpoint="latest")), 0)
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_measures_of_several_shapes_are_those_of_each_alone():
    policy, space, data = TinyPolicy(), latent(), MixedPairs()
    with torch.no_grad():
        policy.trainable_module.weight.add_(0.1)
    margins, labels = implicit_margins(policy, space, data, batch_size=4)
    assert labels.tolist() == [1.0] * PAIRS
    one_by_one, _ = implicit_margins(policy, space, data, batch_size=1)
    torch.testing.assert_close(margins, one_by_one, rtol=1e-5, atol=1e-7)
    assert automatic_beta(policy, space, data, batch_size=4) == automatic_beta(policy, space, data, batch_size=1)


def test_every_epoch_holds_every_pair_once_and_no_batch_is_short(tmp_path):
    data = TinyPairs()
    run(tmp_path, data=data, max_train_steps=None, num_train_epochs=3, train_batch_size=4)
    assert len(data.seen) == 36  # ceil(3 * 11 / 4) = 9 updates of 4
    for epoch in range(3):
        assert data.seen[epoch * PAIRS : (epoch + 1) * PAIRS] == data.order(0, epoch)
    assert log(tmp_path)[-1]["epoch"] == round(36 / 11, 4)
    assert log(tmp_path)[-1]["pairs"] == 36


def test_the_next_batch_is_drawn_while_this_one_is_measured(tmp_path):
    asked, drawn = [], threading.Event()

    class Noting(TinyPairs):
        def batch(self, indices, seeds):
            asked.append(threading.current_thread())
            if len(asked) == 2:
                drawn.set()
            return super().batch(indices, seeds)

    class Waiting(TinyPolicy):
        def __call__(self, xt, t, cond):
            assert drawn.wait(60)  # in the first update, whose batch is not the second one
            return super().__call__(xt, t, cond)

    run(tmp_path, policy=Waiting(), data=Noting(), max_train_steps=4)
    assert len(asked) == 4  # none is drawn that nobody needs
    assert threading.current_thread() not in asked
    assert not any(thread.is_alive() for thread in asked)


def test_what_fails_in_the_thread_fails_the_update_that_needs_it(tmp_path):
    class Gone(TinyPairs):
        def batch(self, indices, seeds):
            if len(self.seen) == 16:
                raise UserError("the entry has gone")
            return super().batch(indices, seeds)

    with pytest.raises(UserError, match=r"the entry has gone; the state after step 2 is in .*checkpoint-2"):
        run(tmp_path, data=Gone())


class Waits(TorchDispatchMode):
    """Notes what makes the CPU wait for a device."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [None, kto_step])
def test_a_micro_batch_asks_the_device_for_no_number(make):
    policy, data = TinyPolicy(), TinyPairs()
    step = make(policy) if make else pair_step(policy, latent(), functools.partial(dpo, beta=50.0), Draws(snr_gamma=5.0))
    ready = step.draw(data.batch([0, 1], torch.tensor([3, 4])))
    with Waits() as waits:
        losses, _ = step.measure(ready, step.state)
        losses.sum().backward()
    assert waits.calls == []
    with waits:
        float(losses.detach().sum())
    assert waits.calls  # it would have been noticed


def test_the_update_is_adamw_on_the_weighted_mean(tmp_path):
    # Worked without the loop: batch of pairs order[:2], loss = sum / 2, one AdamW step without clipping.
    trained = run(tmp_path, max_train_steps=1, train_batch_size=2, max_grad_norm=None)
    policy, data = TinyPolicy(), TinyPairs()
    indices = data.order(0, 0)[:2]
    step = pair_step(policy, latent(), functools.partial(dpo, beta=50.0))
    losses, _ = step(data.batch(indices, torch.tensor([mix(0, 0, i) for i in indices])))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    losses.mean().backward()
    optimizer.step()
    assert_close(weights(trained), weights(policy), 1e-7)


def test_training_raises_the_accuracy_it_logs(tmp_path):
    run(tmp_path, max_train_steps=60, logging_steps=20)
    lines = log(tmp_path)
    assert lines[-1]["implicit_accuracy"] > lines[0]["implicit_accuracy"] > 0.5
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["logit_std"] > 0
    assert {"lr", "grad_norm", "logit_mean", "winner_advantage", "loser_advantage", "gradient_factor"} <= lines[-1].keys()


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(tmp_path, bad):
    class Poisoned(Interrupting):
        def __call__(self, xt, t, cond):
            output = super().__call__(xt, t, cond)
            if self.calls == 3 and bad == "loss":
                return output * torch.nan
            if self.calls == 3:
                output.register_hook(lambda grad: grad * torch.inf)
            return output

    with pytest.raises(
        UserError, match=r"step 3: the .*(loss is nan|gradient is (inf|nan)); lower learning_rate.*checkpoint-2"
    ):
        run(tmp_path, policy=Poisoned(0))
    good = checkpoints.load(tmp_path / "checkpoint-2")
    assert_close(good.weights, weights(run(tmp_path / "b", max_train_steps=2)), 0)


def test_overflow_under_loss_scaling_repeats_the_batch(tmp_path, monkeypatch):
    expected = weights(run(tmp_path / "a", beta=5000.0))
    scalers = []

    class Scaled(Place):
        def __init__(self, *args):
            super().__init__(*args)
            # Gradients here are a few units or more, so this scale overflows float32 as 65536 may overflow float16.
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
            scalers.append(self.scaler)

    monkeypatch.setattr(loop, "place_of", Scaled)
    assert_close(expected, weights(run(tmp_path / "b", beta=5000.0)), 1e-5)
    assert scalers[0].get_scale() < 2.0**127


def test_bf16_keeps_weights_and_errors_in_float32(tmp_path):
    policy = run(tmp_path, mixed_precision="bf16")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert math.isfinite(log(tmp_path)[-1]["loss"])
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        run(tmp_path / "b", mixed_precision="fp16")


def test_hooks_are_called_before_between_and_after(tmp_path):
    sampled, evaluated = [], []

    def evaluate(step):
        evaluated.append(step)
        return {"held_out": 0.5}

    run(tmp_path, max_train_steps=5, on_sample=sampled.append, sample_steps=2, on_evaluate=evaluate, eval_steps=3)
    assert sampled == [0, 2, 4, 5]
    assert evaluated == [0, 3, 5]
    assert [line["step"] for line in log(tmp_path) if "held_out" in line] == evaluated


def test_logits_too_small_or_too_large_are_said_once(tmp_path):
    for beta, word in ((1e-6, "all but zero"), (1e6, "saturated")):
        folder = tmp_path / word
        run(folder, beta=beta, max_train_steps=40, logging_steps=10, train_batch_size=2)
        assert (folder / "train.log").read_text().count(word) == 1
    run(tmp_path / "fine", max_train_steps=20)
    assert "warning" not in (tmp_path / "fine" / "train.log").read_text()


def test_resuming_is_refused_with_other_settings_or_data(tmp_path):
    run(tmp_path, max_train_steps=2)
    with pytest.raises(UserError, match="already holds a run"):
        run(tmp_path)
    with pytest.raises(UserError, match=r"learning_rate was 0.01, is 0.02"):
        run(tmp_path, resume_from_checkpoint="latest", learning_rate=0.02)
    with pytest.raises(UserError, match="effective batch 8, now it is 4"):
        run(tmp_path, resume_from_checkpoint="latest", train_batch_size=4)
    with pytest.raises(UserError, match="number of pairs 11, now it is 5"):
        run(tmp_path, resume_from_checkpoint="latest", data=TinyPairs(5))
    with pytest.raises(UserError, match="holds none"):
        run(tmp_path / "empty", resume_from_checkpoint="latest")
    run(tmp_path, resume_from_checkpoint="latest", train_batch_size=4, gradient_accumulation_steps=2)
    assert checkpoints.latest(tmp_path).name == "checkpoint-8"
    expected = log(tmp_path)
    run(tmp_path, resume_from_checkpoint="latest")
    assert log(tmp_path) == expected
    assert "nothing left to do after step 8" in (tmp_path / "train.log").read_text()


def test_checkpoints_as_often_and_as_many_as_asked(tmp_path):
    run(tmp_path, checkpointing_steps=3, checkpoints_total_limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    run(tmp_path / "none", checkpointing_steps=None)
    assert checkpoints.latest(tmp_path / "none") is None


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, max_train_steps=6, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6]


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rates_match_diffusers(name):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = 0 if name == "constant" else 5
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        assert lr_factor(name, step, warmup=warmup, total=20) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr_scheduler": "cosin"}, "did you mean 'cosine'"),
        ({"train_batch_size": 0}, "train_batch_size is 0; expected 1 to 65536"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "no warm-up"),
        ({"optimizer": "adam_8bit"}, "did you mean 'adamw_8bit'"),
        ({"ema_decay": 1.0}, r"ema_decay is 1\.0"),
        ({"snr_gamma": 0.0}, r"snr_gamma is 0\.0"),
        ({"caption_dropout": 1.5}, r"caption_dropout is 1\.5"),
        ({"report_to": "mlflow"}, "report_to is 'mlflow'"),
    ],
)
def test_options_are_checked(wrong, message):
    with pytest.raises(UserError, match=message):
        TrainOptions(output_dir="out", **wrong)


def test_times_out_of_order_are_refused():
    with pytest.raises(UserError, match="t_min is 5 and t_max 3; expected 0 <= t_min <= t_max"):
        TrainOptions(t_min=5, t_max=3)
