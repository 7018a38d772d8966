"""The one training loop.

Nothing here depends on how a batch is cut up. An *effective batch* is ``train_batch_size`` x ``gradient_accumulation_steps`` x
processes pairs; batch k holds positions k B to (k + 1) B - 1 of the endless sequence of all epochs' orders, so the rest of one
epoch opens the next batch, and the step counter alone says where a resumed run goes on. The gradient is that of the sum of
losses over the effective batch, divided by the number of its pairs.

A source that has rounds is asked for a new one where an epoch begins; what it remembers is saved with the rest.
"""

# torch types tolist and a few others in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from palate.base.errors import UserError
from palate.base.machine import Peak
from palate.base.processes import Processes
from palate.base.seeds import mix
from palate.base.shapes import in_as_many, one_shape_each
from palate.training import checkpoints
from palate.training.ahead import Ahead
from palate.training.alarms import Alarms
from palate.training.checkpoints import Stateful
from palate.training.fits import TrainablePolicy
from palate.training.log import RunLog, Silent, Window
from palate.training.measures import REACH
from palate.training.optimizers import lr_factor
from palate.training.options import TrainOptions
from palate.training.place import company, place_of
from palate.training.source import Abandoned, BudgetSpent, Source
from palate.training.steps import Drawn, Ready, Step

T = TypeVar("T")

KEPT = "rollouts"
"""Key of a checkpoint's state under which lies what the rounds remember, and beside it each of ``states`` by its name."""


HELD_OUT = "held_out_accuracy"
"""What of the log early stopping looks at."""


class Stopped(KeyboardInterrupt):
    """Training was asked to stop (Ctrl-C or SIGTERM) and did so after a whole step.

    ``checkpoint`` is the folder to resume from, ``step`` the steps done.
    """

    def __init__(self, checkpoint: Path, step: int):
        super().__init__(f"stopped after step {step}; continue with resume_from_checkpoint={checkpoint}")
        self.checkpoint, self.step = checkpoint, step


def train(
    step: Step,
    policy: TrainablePolicy,
    data: Source,
    *,
    options: TrainOptions,
    states: Mapping[str, Stateful] | None = None,
    recipe: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
    on_sample: Callable[[int], object] | None = None,
    on_evaluate: Callable[[int], Mapping[str, float]] | None = None,
    doubts: Sequence[str] = (),
    counted: float | None = None,
) -> None:
    """Train ``policy`` in place; with ``ema_decay`` it ends with the average of its weights.

    Args:
        step: from ``pair_step`` or ``sample_step``, made with this policy.
        policy: on the device to train on, trainable weights in float32.
        data: encoded pairs, say; if it has rounds, they hold whole effective batches.
        states: by name, what else checkpoints keep: of the hooks, say.
        recipe: everything that decides the result, as plain nested values; stored in checkpoints, and resuming is refused if
            it differs (``checkpoints.check_recipe``). The options alone if not given.
        defaults: what the recipe's options stand at where an older checkpoint does not name them.
        on_sample: called with the number of steps done: 0, every ``sample_steps``, the last. In the main process only. Of the
            pictures whose path it returns the tracker is told.
        on_evaluate: likewise every ``eval_steps``; what it returns joins the log.
        counted: bytes of device memory that an update was counted to need; told beside what the first one took.
        doubts: what the caller knows that cannot be learned from; said at the beginning, beside :mod:`palate.training.alarms`.

    Raises:
        UserError: options that do not fit the data or the device, a checkpoint that cannot be used, or a loss or gradient
            that is not finite (the state before it is saved first).
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint.
    """
    run = _Run(step, policy, data, options, dict(states or {}), dict(recipe or asdict(options)), dict(defaults or {}))
    start = run.restore()
    with (
        company("; --resume_from_checkpoint latest goes on, on as many processes as make the same effective batch"),
        contextlib.closing(run.ahead),
        _Signals() as signals,
        run.open_log(start) as log,
        run.progress_bar(start) as bar,
    ):
        if start >= run.total:
            log.say(f"nothing left to do after step {start}: raise max_train_steps to train on")
        if start == 0:
            run.warn([*(f"warning: {doubt}" for doubt in doubts), *run.alarms.before(run.place.here())])
            step.begin(data)
            run.report(0, on_evaluate)
            run.sample(0, on_sample)
        for done in range(start + 1, run.total + 1):
            try:
                run.begin(done, signals)
            except Abandoned:
                raise run.stopped(done - 1) from None
            except BudgetSpent as spent:
                log.say(f"training ends after step {done - 1}: {spent}")
                run.end(done - 1, on_sample, on_evaluate)
                break
            peak = Peak() if counted is not None and done == start + 1 else None
            try:
                stop = run.update(done, signals)
            except UserError as error:
                run.give_up(done - 1, error)
            if peak is not None and counted is not None:
                log.say(f"the first update took {peak.bytes() / 1e9:.2f} GB at most; counted were {counted / 1e9:.2f} GB")
            bar.update()
            bar.set_postfix(run.postfix())
            run.report(done, on_evaluate)
            if run.enough(done) and done < run.total and not stop:
                log.say(f"training ends after step {done}: {HELD_OUT} has not risen in {run.waited} measurements")
                run.end(done, on_sample, on_evaluate)
                break
            run.sample(done, on_sample)
            every = options.checkpointing_steps
            if every and (done % every == 0 or done == run.total):
                run.save(done)
            if stop and done < run.total:
                raise run.stopped(done)
        run.place.settle()


class _Run:
    """The state of a run, and the parts of the loop."""

    def __init__(
        self,
        step: Step,
        policy: TrainablePolicy,
        data: Source,
        options: TrainOptions,
        states: dict[str, Stateful],
        recipe: dict[str, object],
        defaults: dict[str, object],
    ):
        self.step, self.policy, self.data, self.options, self.states = step, policy, data, options, states
        self.recipe, self.defaults = recipe, defaults
        if len(data) == 0:
            raise UserError("there are no pairs to train on")
        self.place = place_of(policy, options)
        self.main, self.processes = self.place.main, self.place.processes
        self.share = options.train_batch_size * options.gradient_accumulation_steps
        self.batch_size = self.share * self.processes.count
        self.total = options.max_train_steps or math.ceil(options.num_train_epochs * len(data) / self.batch_size)

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> list[int]:
            return [int(i) for i in data.order(options.seed, epoch)]

        self.order = order
        self.ahead = Ahead(self._ready)
        self.logs: RunLog | Silent = Silent()
        if data.rounds is not None and len(data) % self.batch_size:
            raise ValueError(f"a round of {len(data)} items does not hold whole effective batches of {self.batch_size}")
        self.round: dict[str, object] = {}  # what a new round told, until it is logged
        self.window, self.last = Window(), dict[str, float]()
        self.highest, self.waited = -math.inf, 0  # held-out accuracy, and measurements since it rose
        self.began, self.alarms = time.monotonic(), self._alarms()

    def restore(self) -> int:
        """Steps already done: 0, or those of the checkpoint to resume from."""
        done, source = 0, self.options.resume_from_checkpoint
        folder = Path(self.options.output_dir)
        if source is None:
            if found := checkpoints.latest(folder):
                raise UserError(
                    f"{folder} already holds a run ({found.name}): continue it with resume_from_checkpoint=latest, "
                    "or choose another output_dir"
                )
        else:
            path = checkpoints.latest(folder) if source == "latest" else Path(source)
            if path is None:
                raise UserError(f"resume_from_checkpoint is latest, but {folder} holds none; leave it out to begin anew")
            done = self._load(checkpoints.load(path))
        self.place.align()
        return done

    def _load(self, checkpoint: checkpoints.Checkpoint) -> int:
        checkpoints.check_recipe(checkpoint, self.recipe, defaults=self.defaults)
        state = checkpoint.state
        for name, now, remedy in (
            (
                "effective batch",
                self.batch_size,
                "batch size x accumulation x processes must stay the same",
            ),
            ("number of pairs", len(self.data), "resume with the same data"),
        ):
            if state[name] != now:
                raise UserError(f"{checkpoint.path} was trained with {name} {state[name]}, now it is {now}: {remedy}")
        self.place.load_state_dict(checkpoint.weights, state)
        self.window = Window(state["window"])
        # Older checkpoints tell only whether the logits were spoken of.
        warned: list[str] | bool = state["warned"]
        self.alarms = self._alarms(warned if isinstance(warned, list) else ["logits"] * warned)
        self.step.state.update(state["step state"])
        self.highest, self.waited = state.get("patience", (self.highest, self.waited))
        kept = state.get(KEPT, {})
        if self.data.rounds is not None:
            self.data.rounds.load_state_dict(kept)
        for name, known in self.states.items():
            if name in kept:  # a checkpoint of a run without it has nothing to tell
                known.load_state_dict(kept[name])
        self.began -= state["seconds"]
        return state["step"]

    def _alarms(self, said: Collection[str] = ()) -> Alarms:
        gather = self.processes.gather if self.place.everywhere else Processes().gather
        return Alarms(self.options, self.total, said, gather)

    def save(self, done: int) -> Path:
        """Checkpoint of the state after ``done`` steps."""
        path = Path(self.options.output_dir) / f"checkpoint-{done}"
        weights, state = self.place.state_dict()
        if self.main:
            state |= {
                "step": done,
                "effective batch": self.batch_size,
                "number of pairs": len(self.data),
                "window": self.window.sums,
                "step state": dict(self.step.state),
                "warned": self.alarms.said,
                "patience": (self.highest, self.waited),
                "seconds": time.monotonic() - self.began,
            }
            if kept := self._kept(done * self.batch_size):
                state[KEPT] = kept
            checkpoints.save(
                self.options.output_dir,
                done,
                weights=weights,
                state=state,
                recipe=self.recipe,
                total_limit=self.options.checkpoints_total_limit,
            )
        self.place.wait()
        return path

    def _kept(self, position: int) -> dict[str, object]:
        rounds = {} if self.data.rounds is None else self.data.rounds.state_dict(position)
        return {**rounds} | {name: known.state_dict() for name, known in self.states.items()}

    def begin(self, done: int, signals: _Signals) -> None:
        """Before update number ``done`` (from 1): a new round, if its items are those of one."""
        position, rounds = (done - 1) * self.batch_size, self.data.rounds
        if rounds is None or position % len(self.data):
            return
        torch.manual_seed(mix(self.options.seed, done, self.processes.index))
        self.policy.trainable_module.train()  # as in the updates: were there dropout, the self check would tell
        try:
            with self.place.autocast():
                self.round = rounds.begin(position // len(self.data), self.processes, lambda: signals.received)
        except UserError as error:
            self.give_up(done - 1, error)

    def give_up(self, done: int, error: UserError) -> NoReturn:
        """Raise a failure again, that of a reward say, once the state after ``done`` steps is saved, if it is worth it."""
        if self.place.finite():
            kept = f"the state after step {done} is in {self.save(done)}"
        else:
            kept = f"the weights of step {done} are not finite either: go back to an earlier checkpoint"
        message = f"{error}; {kept}"
        self.logs.say(message, show=False)
        raise type(error)(message) from error

    def stopped(self, done: int) -> Stopped:
        """What to raise where training was asked to stop after ``done`` steps; saves a checkpoint."""
        stopped = Stopped(self.save(done), done)
        self.logs.say(str(stopped), show=False)
        return stopped

    def end(
        self, done: int, on_sample: Callable[[int], object] | None, on_evaluate: Callable[[int], Mapping[str, float]] | None
    ) -> None:
        """Make step ``done`` the last one."""
        evaluated = self._due(done, self.options.eval_steps)
        self.total = done
        if self.window.sums or not evaluated:
            self.report(done, None if evaluated else on_evaluate)
        self.sample(done, on_sample)
        self.save(done)

    def update(self, done: int, signals: _Signals) -> bool:
        """Update number ``done`` (from 1). Returns whether any process was asked to stop."""
        options, place = self.options, self.place
        # Only for modules that draw from the global generator (dropout): times and noise come from the items' seeds.
        torch.manual_seed(mix(options.seed, done, self.processes.index))
        self.policy.trainable_module.train()
        while True:
            sums = self._gradients(done, signals)
            norms = place.clip_grad_norm(options.max_grad_norm).reshape(1)
            # Here the device is waited for, once an update.
            *found, norm = cast("list[float]", torch.cat([torch.stack(list(sums.values())), norms]).tolist())
            totals = dict(zip(sums, found, strict=True))
            if not math.isfinite(totals["loss"]):
                raise _not_finite(done, f"the loss is {totals['loss'] / self.batch_size}")
            if math.isfinite(norm):
                break
            if not place.lower_scale():  # float16 overflows until it has found a fitting one
                raise _not_finite(done, f"the norm of the gradient is {norm}")
        factor = lr_factor(options.lr_scheduler, done - 1, warmup=options.lr_warmup_steps, total=self.total)
        place.update(done, rate := options.learning_rate * factor)
        stop = totals.pop("stop") > 0  # summed over processes with the rest, so that all stop after the same step
        self.last = {name: total / self.batch_size for name, total in totals.items()}
        self.step.observe(self.last)
        self.warn(self.alarms.after(done, norm, self.last.pop(REACH, None)))
        self.warn(self.alarms.moved(done, place.here(), rate))
        totals.pop(REACH, None)
        self.window.add({**totals, "grad_norm": norm, "pairs": self.batch_size, "steps": 1})
        return stop

    def _gradients(self, done: int, signals: _Signals) -> dict[str, Tensor]:
        """Gradients of this update, and sums of loss and metrics over its effective batch, in and over all processes."""
        self.place.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        positions = self._positions(done)
        with self.processes.together():
            for position, then in zip(positions, [*positions[1:], self._after(done)], strict=True):
                for name, values in self._backward(self.ahead.get(position, then)).items():
                    sums[name] = sums.get(name, 0.0) + values.float().sum()
        sums["stop"] = torch.full((), float(signals.received), device=sums["loss"].device)
        totals = self.place.reduce(torch.stack(list(sums.values())))
        self.place.reduce_gradients()
        return dict(zip(sums, totals, strict=True))

    def _backward(self, ready: Ready) -> dict[str, Tensor]:
        """Loss and metrics of one micro-batch, whose gradients are added to those that are there."""
        try:
            with self.place.autocast():
                losses, metrics = self.step.measure(ready, self.step.state)
            self.place.backward(losses.sum() / self.batch_size)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"no free memory to train on {self.options.train_batch_size} at once: lower train_batch_size (and raise "
                "gradient_accumulation_steps as much, which online training does by itself), or set "
                "gradient_checkpointing true"
            ) from error
        metrics = {"loss": losses.detach(), **metrics}
        if (u := metrics.get("logit")) is not None:
            metrics |= {"logit_square": u.square(), "logit_abs": u.abs()}
        return metrics

    def _positions(self, done: int) -> list[tuple[int, ...]]:
        """In the endless sequence, those of each micro-batch of this process that update number ``done`` (from 1) has.

        Pictures of several shapes are gone through shape by shape, some of the batches then being smaller than
        ``train_batch_size``. What is in the effective batch does not depend on that. Where every process must take every
        pass, those with fewer batches cut theirs into as many as the others have.
        """
        own = self._by_shape(done, self.processes.index)
        if not self.place.everywhere:
            return own
        return in_as_many(own, max(len(self._by_shape(done, process)) for process in range(self.processes.count)))

    def _by_shape(self, done: int, process: int) -> list[tuple[int, ...]]:
        first = (done - 1) * self.batch_size + process * self.share
        share = range(first, first + self.share)
        shapes = [self.data.shape_of(self._item(position)[1]) for position in share]
        return [tuple(share[i] for i in places) for places in one_shape_each(shapes, self.options.train_batch_size)]

    def _item(self, position: int) -> tuple[int, int]:
        """Epoch, and index of what lies at a position."""
        epoch, place = divmod(position, len(self.data))
        return epoch, self.order(epoch)[place]

    def _after(self, done: int) -> tuple[int, ...] | None:
        """How the next update begins for this process; None after the last one, and where a new round has yet to be drawn."""
        if done >= self.total or (self.data.rounds is not None and done * self.batch_size % len(self.data) == 0):
            return None
        return self._positions(done + 1)[0]

    def _ready(self, positions: tuple[int, ...]) -> Ready:
        """The micro-batch of these positions, drawn, on the CPU."""
        indices: list[int] = []
        seeds: list[int] = []
        for epoch, index in map(self._item, positions):
            indices.append(index)
            fixed = self.options.draws_per_pair  # so many draws, one an epoch, then the first again
            seeds.append(mix(self.options.seed, epoch if fixed is None else epoch % fixed, index))
        ready = self.step.draw(self.data.batch(indices, torch.tensor(seeds)))
        return ready.pinned() if self.place.pins and isinstance(ready, Drawn) else ready

    def open_log(self, start: int) -> RunLog | Silent:
        """The log of the main process; the others keep silent."""
        if self.main:
            folder = Path(self.options.output_dir)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.logs = RunLog(folder, step=start, report_to=self.options.report_to, settings=self.recipe)
            except OSError as error:
                raise UserError(f"output_dir {folder} cannot be written: {error.strerror}") from error
        if start:
            self.logs.say(f"resumed after step {start} of {self.total}")
        return self.logs

    def progress_bar(self, start: int) -> tqdm[NoReturn]:
        # None: no bar where standard error is not a terminal.
        return tqdm(total=self.total, initial=start, unit="step", desc="training", disable=None if self.main else True)

    def postfix(self) -> dict[str, str]:
        shown = {"loss": "loss", "acc": "implicit_accuracy"}
        return {short: f"{self.last[name]:.3f}" for short, name in shown.items() if name in self.last}

    def report(self, done: int, on_evaluate: Callable[[int], Mapping[str, float]] | None) -> None:
        """One line of the log, if any part of it is due: the means since the last, and what ``on_evaluate`` finds."""
        record, self.round = self.round, {}
        if self.window.sums and (record or self._due(done, self.options.logging_steps)):
            means = self.window.means()
            record |= {"lr": self.place.optimizer.param_groups[0]["lr"], **means, **self.step.state}
            self.window = Window()
            self.warn([*self.alarms.logits(done, means.get("logit_abs")), *self.alarms.rewards(record.get("reward_std"))])
        failed = None
        if on_evaluate is not None and self._due(done, self.options.eval_steps):
            try:
                record |= self._in_main_process(on_evaluate, done) or {}
            except UserError as error:
                failed = error
        if isinstance(held_out := record.get(HELD_OUT), float):
            rose = held_out > self.highest
            self.highest, self.waited = max(held_out, self.highest), 0 if rose else self.waited + 1
        if record:
            self.logs.record({"step": done, **self._counted(done * self.batch_size), **record})
        if failed is not None:
            self.give_up(done, failed)

    def enough(self, done: int) -> bool:
        """Whether held-out accuracy, which the main process knows, has not risen for too long; in all processes alike."""
        patience = self.options.early_stopping_patience
        if patience is None or not self._due(done, self.options.eval_steps):
            return False
        return self.processes.any(self.main and self.waited >= patience)

    def _counted(self, items: int) -> dict[str, int | float]:
        rounds, seconds = self.data.rounds, round(time.monotonic() - self.began, 2)
        epochs = {"epoch": round(items / len(self.data), 4), "pairs": items}
        return {**(epochs if rounds is None else rounds.counted(items)), "seconds": seconds}

    def sample(self, done: int, on_sample: Callable[[int], object] | None) -> None:
        if on_sample is None or not self._due(done, self.options.sample_steps):
            return
        drawn = self._in_main_process(on_sample, done)
        if isinstance(drawn, Path):
            self.logs.picture(done, drawn)

    def _due(self, done: int, every: int | None) -> bool:
        return done in (0, self.total) or (every is not None and done % every == 0)

    def _in_main_process(self, hook: Callable[[int], T], done: int) -> T | None:
        result = None
        with self.processes.together():
            if self.main or self.place.everywhere:
                self.policy.trainable_module.eval()
                with self.place.averaged():
                    result = hook(done)
        return result

    def warn(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.logs.say(line)


def _not_finite(done: int, what: str) -> UserError:
    return UserError(f"step {done}: {what}; lower learning_rate or beta, or use mixed_precision bf16 or no")


class _Signals:
    """Inside, the first SIGINT or SIGTERM is only noted; a second one interrupts at once."""

    def __init__(self) -> None:
        self.received = False
        self.before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
