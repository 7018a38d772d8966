"""Several rewards at once, evaluated in a worker while the next batch is sampled."""

from __future__ import annotations

import math
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError, short
from palate.data.images import to_pictures
from palate.data.prompts import Prompt
from palate.judges.guard import AnswerError, culprit, failure, read_answer, undisturbed
from palate.judges.reward import Reward, RewardError

PAUSE = 1.0
"""Seconds before a reward that failed is asked again; doubled every time."""


@dataclass(frozen=True)
class Rewards:
    """What the rewards say of b images, all on the CPU, float32."""

    total: Float[Tensor, " b"]
    """The weighted sum that is trained on."""
    raw: dict[str, Float[Tensor, " b"]]
    """Every reward by name as it came, without weight."""
    info: dict[str, list[object]]
    """What else functions returned: by name, one entry a batch; absent for rewards that return scores only."""


class Pending:
    """A batch that was handed in."""

    def __init__(self, bundle: RewardBundle, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]):
        self.bundle, self.images, self.prompts = bundle, images, list(prompts)
        self.done = threading.Event()
        self.answers: dict[str, tuple[Tensor, object]] = {}
        self.error: BaseException | None = None
        self.rewards: Rewards | None = None

    def result(self) -> Rewards:
        """Waits for the rewards of this batch; the same answer when asked again.

        Raises:
            RewardError: one of the rewards failed.
        """
        if self.rewards is None:
            self.rewards = self.bundle.collect([self])
        return self.rewards


class RewardBundle:
    """Rewards by name, with weights.

    One reward is passed on as it is, times its weight. Of several each is standardised first, so that a weight of 0.2 means
    the same for kilobytes and for cosines: total = sum of weight * (score - mean) / (std + 1e-8), where mean and (population)
    standard deviation are over all images collected so far in the run, these included.

    Batches are evaluated by one worker, in the order in which they were handed in, and enter the statistics in the order in
    which they are collected: so the numbers are those of calling the rewards at once, one after the other.

    Args:
        rewards: by name, in the order of evaluation.
        weights: by name; 1 where absent. Negative ones make a reward a cost; 0 only logs it.
        timeout: seconds that one call of one reward may take; None waits for ever. A call that takes longer cannot be
            stopped, only left behind.
        retries: how often a call that raised or took too long is repeated, after a pause that doubles from one second.
        folder: where the picture is saved on which a reward failed.
        gather: a tensor ``(b,)`` of this process to those of all processes; the identity for a single one.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, int | float] | None = None,
        *,
        timeout: int | float | None = None,
        retries: int = 0,
        folder: str | Path | None = None,
        gather: Callable[[Tensor], Tensor] = lambda scores: scores,
    ):
        if not rewards:
            raise UserError("no rewards are given; expected at least one, such as jpeg_compressibility")
        if retries < 0 or (timeout is not None and timeout <= 0):
            raise UserError(f"timeout is {timeout}, retries {retries}; expected a positive number of seconds and 0 or more")
        self.rewards = dict(rewards)
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in self.rewards}
        self.timeout, self.retries, self.folder, self.gather = timeout, retries, folder, gather
        self.statistics = {name: _Statistics() for name in self.rewards}
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    def submit(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[Prompt]) -> Pending:
        """Hand in a batch: images in [0, 1] and one prompt for each. Returns at once.

        The images are kept until they are scored, and must not be changed meanwhile.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images came with {len(prompts)} prompts")
        pending = Pending(self, images.detach().float(), prompts)  # nobody waits for a gradient: what made them may go
        if self._worker is None:
            # A daemon, so that a reward that hangs does not keep the program from ending.
            self._worker = threading.Thread(target=self._work, name="rewards", daemon=True)
            self._worker.start()
        self._queue.put(pending)
        return pending

    def wait(self, pending: Sequence[Pending]) -> None:
        """Until these batches are scored; nothing enters the statistics.

        Raises:
            RewardError: one of the rewards failed; that of the first batch concerned.
        """
        for p in pending:
            p.done.wait()
            if p.error is not None:
                raise p.error

    def collect(self, pending: Sequence[Pending]) -> Rewards:
        """The rewards of several batches, in order: all of them are totalled with the same statistics.

        Ask for a whole round at once, and the result does not depend on how the round was cut into batches.

        Raises:
            RewardError: one of the rewards failed; that of the first batch concerned.
        """
        if any(p.rewards is not None for p in pending):
            raise ValueError("a batch can be collected once: it would enter the statistics twice")
        self.wait(pending)
        raw = {name: torch.cat([p.answers[name][0] for p in pending]) for name in self.rewards}
        info = {name: [p.answers[name][1] for p in pending] for name in self.rewards}
        told = {name: found for name, found in info.items() if any(i is not None for i in found)}
        total, start = self._total(raw), 0
        for p in pending:
            rows = slice(start, start := start + len(p.prompts))
            own = {name: [p.answers[name][1]] for name in told}
            p.rewards = Rewards(total[rows], {name: scores[rows] for name, scores in raw.items()}, own)
        return Rewards(total, raw, told)

    def _total(self, raw: dict[str, Tensor]) -> Float[Tensor, " b"]:
        if len(raw) == 1:
            ((name, scores),) = raw.items()
            return self.weights[name] * scores
        total = torch.zeros(len(next(iter(raw.values()))), dtype=torch.float64)
        for name, scores in raw.items():
            statistics = self.statistics[name]
            statistics.add(self.gather(scores).cpu())
            total += self.weights[name] * (scores.double() - statistics.mean) / (statistics.std + 1e-8)
        return total.float()

    def level(self, means: Mapping[str, float]) -> float:
        """What means of the rewards by name come to, on a scale that stays the same as the run goes on.

        The total of several rewards is measured against all pictures so far, so it sinks back to 0 once they no longer rise.
        This is against those collected first: sum of weight * (mean - first mean) / first std (1 where they were equal). Of one
        reward it is weight * mean.
        """
        if len(means) == 1:
            ((name, mean),) = means.items()
            return self.weights[name] * mean
        first = {name: self.statistics[name].first for name in means}
        return sum(self.weights[name] * (means[name] - first[name][0]) / first[name][1] for name in means)

    def close(self) -> None:
        """End the worker once it has done what was handed in."""
        if self._worker is not None:
            self._queue.put(None)
            self._worker.join()
            self._worker = None

    def state_dict(self) -> dict[str, list[float]]:
        """The running statistics: for every reward number of images, mean, sum of squared deviations, and `first`."""
        return {name: [float(s.count), s.mean, s.squares, *s.first] for name, s in self.statistics.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        if set(state) != set(self.rewards):
            raise UserError(f"the checkpoint was trained on rewards {', '.join(state)}, this run on {', '.join(self.rewards)}")
        self.statistics = {name: _Statistics(*state[name]) for name in self.rewards}

    # In the worker --------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (pending := self._queue.get()) is not None:
            try:
                finite = pending.images.flatten(1).isfinite().all(dim=1)
                if not finite.all():
                    self._fail("the model", "made a picture that is not finite", pending, int(finite.int().argmin()))
                for name, reward in self.rewards.items():
                    who = f"reward {name}"
                    pending.answers[name] = self._checked(who, self._tried(who, reward, pending), pending)
            except BaseException as error:
                pending.error = error
            finally:
                pending.images = torch.empty(0, 3, 1, 1)  # memory for the batches to come
                pending.done.set()

    def _tried(self, who: str, reward: Reward, pending: Pending) -> object:
        """What a reward answers, asked again and again if need be."""
        attempt = 0
        while True:
            try:
                return self._ask(reward, pending.images, pending.prompts)
            except _TooLongError as error:
                if attempt == self.retries:
                    self._fail(who, str(error), pending, None, error)
            except torch.OutOfMemoryError as error:  # another attempt would find no more
                b = len(pending.prompts)
                raise RewardError(
                    f"{who} found no free memory for {b} pictures at once: lower sample_batch_size, or evaluation_batch_size "
                    "where it is held out"
                ) from error
            except KeyboardInterrupt:
                raise
            except AnswerError as error:
                self._fail(who, str(error), pending)
            except BaseException as error:
                if attempt == self.retries:
                    self._fail(who, failure(error), pending, self._culprit(reward, pending), error)
            time.sleep(PAUSE * 2**attempt)
            attempt += 1

    def _checked(self, who: str, answer: object, pending: Pending) -> tuple[Tensor, object]:
        """Scores ``(b,)`` on the CPU, float32, and what came with them."""
        try:
            found, info = read_answer(answer, len(pending.prompts))
        except AnswerError as error:
            self._fail(who, str(error), pending)
        found = found.detach().cpu()
        bad = ~found.isfinite()
        if bad.any():
            row = int(bad.int().argmax())
            self._fail(who, f"returned {found[row].item()}", pending, row)
        return found, info

    def _ask(self, reward: Reward, images: Tensor, prompts: list[Prompt]) -> object:
        def ask() -> object:
            with torch.no_grad():  # inside: each thread has its own mode
                return undisturbed(lambda: reward(images, list(prompts)))

        return ask() if self.timeout is None else _within(self.timeout, ask)

    def _culprit(self, reward: Reward, pending: Pending) -> int | None:
        """The image on which a reward raises."""
        return culprit(lambda part: self._ask(reward, pending.images[part], pending.prompts[part]), len(pending.prompts))

    def _fail(
        self, who: str, problem: str, pending: Pending, row: int | None = None, cause: BaseException | None = None
    ) -> NoReturn:
        b, where = len(pending.prompts), row or 0
        which = f"image {where} of {b}" if row is not None or b == 1 else f"images 0 to {b - 1}, of which the first"
        saved = ""
        if self.folder is not None:
            path = Path(self.folder) / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', who)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pictures(pending.images[where : where + 1].nan_to_num())[0].save(path)
            saved = f", saved as {path}"
        text = f"{who} {problem}: {which} (prompt {short(pending.prompts[where].text)}{saved})"
        raise RewardError(" ".join(text.split())) from cause


class _Statistics:
    """Mean and population standard deviation of all that was added, by the parallel update of Chan et al. (1979).

    first: mean and standard deviation (1 where all were equal) of what was added first.
    """

    def __init__(
        self, count: float = 0, mean: float = 0.0, squares: float = 0.0, first_mean: float = 0.0, first_std: float = 1.0
    ):
        self.count, self.mean, self.squares, self.first = int(count), mean, squares, (first_mean, first_std)

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def add(self, scores: Float[Tensor, " b"]) -> None:
        x, n = scores.double(), len(scores)
        mean = float(x.mean())
        if not self.count:
            std = float(x.std(correction=0))
            self.first = mean, std if std > 1e-6 else 1.0  # equal ones differ by rounding
        apart = mean - self.mean
        self.squares += float((x - mean).square().sum()) + apart**2 * self.count * n / (self.count + n)
        self.mean += apart * n / (self.count + n)
        self.count += n


class _TooLongError(Exception):
    """Not ``TimeoutError``, which a reward's own connection may raise."""


def _within(timeout: int | float, call: Callable[[], object]) -> object:
    """What a call returns; raise :class:`_TooLongError` if it takes longer than ``timeout`` seconds."""
    answer: list[object] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise _TooLongError(f"gave no answer within {timeout:g} s")
    if errors:
        raise errors[0]
    return answer[0]
