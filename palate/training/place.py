"""Where a run is: its device and precision, the processes that share it, and all that depends on how weights lie on them."""

# accelerate is typed in part only.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from palate.base.errors import UserError
from palate.base.machine import processes
from palate.base.processes import Processes
from palate.training.fits import TrainablePolicy
from palate.training.optimizers import Average, make_optimizer, switch
from palate.training.options import TrainOptions

if TYPE_CHECKING:
    from accelerate import Accelerator


BUCKET = 2**24
"""Numbers that processes sum at once: a LoRA has many small tensors, and a message for each would cost more than it weighs."""


class Place:
    """Plain data parallelism: each process holds the whole model, and what all must know is summed by hand.

    Its other member, which holds a part of the model in each, is :class:`palate.training.sharded.ShardedPlace`.

    Args:
        policy: on the device to train on, trainable weights in float32.

    Raises:
        UserError: a precision that the device has not, or an optimizer that is not installed.
    """

    everywhere: ClassVar[bool] = False
    """Whether every process must take every pass, also those whose result the first one alone needs."""

    def __init__(self, policy: TrainablePolicy, options: TrainOptions):
        self.policy, self.weights = policy, list(policy.parameters())
        if not self.weights or any(p.dtype != torch.float32 for p in self.weights):
            raise TypeError("trainable weights must exist and be float32: half precision loses most updates")
        found = self.weights[0].device
        self.accelerator = _accelerator(found, options.mixed_precision)
        self.processes, own = _processes(self.accelerator), self.accelerator.device
        if self.processes.count > 1 and own.type == "cuda" and own != found:
            raise ValueError(f"process {self.processes.index} trains on {own}, but the policy is on {found}")
        self.main = self.accelerator.is_main_process
        self.pins = own.type == "cuda"
        """Whether batches are copied faster from memory that is pinned."""
        self.optimizer = make_optimizer(self.weights, options)
        self.average = None if options.ema_decay is None else Average(self.weights, options.ema_decay)

    def here(self) -> list[Tensor]:
        """What of the trained weights lies in this process."""
        return [weight.detach() for weight in self.weights]

    # Together -------------------------------------------------------------------------------------------------------------

    def align(self) -> None:
        """All processes go on with the weights of the first."""
        if self.processes.count > 1:
            from accelerate.utils import broadcast

            for tensor in self.policy.state_dict().values():
                tensor.copy_(cast("Tensor", broadcast(tensor)))

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def reduce(self, totals: Tensor) -> Tensor:
        """The sum over all processes."""
        return cast("Tensor", self.accelerator.reduce(totals, reduction="sum")) if self.processes.count > 1 else totals

    # An update ------------------------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of a forward pass."""
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those that this process has."""
        self.accelerator.backward(loss)

    def reduce_gradients(self) -> None:
        """From here on every process has the gradients of all."""
        if self.processes.count > 1:
            for bucket in _buckets([p.grad for p in self.weights if p.grad is not None]):
                total = self.reduce(torch.cat([gradient.flatten() for gradient in bucket]))
                parts = cast("tuple[Tensor, ...]", total.split([g.numel() for g in bucket]))
                for gradient, sums in zip(bucket, parts, strict=True):
                    gradient.copy_(sums.view_as(gradient))

    def clip_grad_norm(self, limit: float | None) -> Tensor:
        """The norm of the gradients, which are scaled down to ``limit`` if it is larger; on the device, not waited for."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.weights, limit or math.inf)

    def lower_scale(self) -> bool:
        """After gradients that are not finite: whether float16 scaled the loss too far, and the batch is worth repeating."""
        if self.scaler is None or self.scaler.get_scale() <= 1:
            return False
        self.scaler.update()  # halves the scale
        return True

    def update(self, done: int, learning_rate: float) -> None:
        """Update number ``done`` (from 1) of the weights and of their average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.average is not None:
            self.average.update(done)

    # What is kept ---------------------------------------------------------------------------------------------------------

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Of the loss, under float16."""
        return cast("torch.amp.GradScaler | None", self.accelerator.scaler)

    def finite(self) -> bool:
        """Whether all trainable weights are."""
        return all(bool(p.isfinite().all()) for p in self.weights)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are their average, if one is kept here or by the optimizer."""
        return self._result() if self.average is None else self.average.applied()

    @contextlib.contextmanager
    def _result(self) -> Generator[None]:
        switch(self.optimizer, train=False)
        try:
            yield
        finally:
            switch(self.optimizer, train=True)

    def settle(self) -> None:
        """The average, if one is kept here or by the optimizer, is the result."""
        switch(self.optimizer, train=False)
        if self.average is not None:
            self.average.swap()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """The trainable tensors by name, whole; and what else is needed to go on."""
        return self.policy.state_dict(), {
            "optimizer": self.optimizer.state_dict(),
            "average": [] if self.average is None else self.average.state_dict(),
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, weights: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        """What ``state_dict`` told; ``state`` may hold more."""
        self.policy.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def place_of(policy: TrainablePolicy, options: TrainOptions) -> Place:
    """Raises UserError as :class:`Place`."""
    if not options.shard_model or processes() == 1:
        return Place(policy, options)
    from palate.training.sharded import ShardedPlace

    return ShardedPlace(policy, options)


@contextlib.contextmanager
def company(advice: str = "") -> Generator[None]:
    """Inside, that another process of the run has gone is told in words; ``advice`` says how to go on."""
    try:
        yield
    except RuntimeError as error:
        if processes() == 1 or not _lost(error):
            raise
        raise UserError(f"another process of this run has ended: see its message{advice}") from error


def _lost(error: RuntimeError) -> bool:
    """Whether an error of communication says that another process is gone."""
    import torch.distributed as dist

    told = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in told for word in ("gloo/transport", "closed by peer", "reset by peer", "broken pipe")
    )


def meeting() -> Processes:
    """The processes that share this run, before there is a model: they wait for each other, however long one takes.

    What they gather raises ``UserError`` where another of them has ended.
    """
    count = processes()
    if count == 1:
        return Processes()
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())  # of the world of processes
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))  # of the GPUs' own, ten minutes is the most

    def gather(rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(count)]
        try:
            dist.all_gather(parts, rows, group=group)
        except RuntimeError as error:
            raise UserError("another process of this run has ended: see its message") from error
        return torch.cat(parts)

    local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Processes(dist.get_rank(), count, gather, local)


def _accelerator(device: torch.device, mixed_precision: str) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision fp16 needs a GPU: use bf16 or no")
    # The state is global to the process; a second run may have another device or precision.
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    return Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """In order, as many together as ``BUCKET`` lets pass, and at least one."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket


def _processes(accelerator: Accelerator) -> Processes:
    if accelerator.num_processes == 1:
        return Processes()

    def gather(rows: Tensor) -> Tensor:
        return cast("Tensor", accelerator.gather(rows.to(accelerator.device))).cpu()

    return Processes(accelerator.process_index, accelerator.num_processes, gather)
