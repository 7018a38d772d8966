"""A place whose processes hold a part of the model each (FSDP2, ``torch.distributed.fsdp.fully_shard``)."""

# torch types distributed tensors in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from palate.base.errors import UserError
from palate.training.fits import TrainablePolicy
from palate.training.options import TrainOptions
from palate.training.place import Place


class ShardedPlace(Place):
    """Weights, gradients, what the optimizer keeps, their average and the frozen copy lie in parts on all processes.

    A block's weights are gathered while it is computed and its gradients summed as they are made, so every process must take
    the same passes. Checkpoints hold whole tensors, gathered one after the other: any number of processes goes on from them,
    and those that hold everything too.

    Args:
        policy: whole, on every process's own device; cut up here.
    """

    everywhere: ClassVar[bool] = True

    def __init__(self, policy: TrainablePolicy, options: TrainOptions):
        if options.optimizer != "adamw":
            raise UserError(f"shard_model cuts up what AdamW keeps, not {options.optimizer}: use optimizer adamw")
        if options.mixed_precision == "fp16":
            raise UserError("shard_model has no loss scaler, which fp16 needs: use mixed_precision bf16")
        super().__init__(policy, options)

    def prepare(self) -> None:
        super().align()  # while they are whole
        for module in cast("Any", self.policy).modules:
            _cut_up(module, self.accelerator.device.type)
        self.weights = list(self.policy.parameters())

    def align(self) -> None:
        """They were aligned before they were cut up, and what a checkpoint holds is the same for all."""

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self.processes.count)  # FSDP takes the mean over processes, where the loop wants the sum

    def reduce_gradients(self) -> None:
        """The backward pass has summed them."""

    def clip_grad_norm(self, limit: float | None) -> Tensor:
        return cast("Any", super().clip_grad_norm(limit)).full_tensor()

    def finite(self) -> bool:
        return not self.processes.any(not all(bool(_local(p).isfinite().all()) for p in self.weights))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        weights, state = super().state_dict()
        return {name: whole(tensor) for name, tensor in weights.items()}, _mapped(state, whole)

    def load_state_dict(self, weights: dict[str, Tensor], state: Mapping[str, Any]) -> None:
        own = self.policy.state_dict()
        cut = {name: _like(tensor, own[name]) if name in own else tensor for name, tensor in weights.items()}
        kept = state["optimizer"]["state"]
        optimizer = {i: {k: _like(v, self.weights[i]) for k, v in of.items()} for i, of in kept.items()}
        average = [_like(tensor, weight) for tensor, weight in zip(state["average"], self.weights, strict=False)]
        told = {**state, "optimizer": {**state["optimizer"], "state": optimizer}, "average": average}
        super().load_state_dict(cut, told)


def _cut_up(network: nn.Module, kind: str) -> None:
    """Block by block, and what is left as a part of its own."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for block in (*_blocks(network), network):
        fully_shard(block, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What its outermost lists hold: the blocks of a U-Net's sides, the parts of its middle, a transformer's layers."""
    for part in module.children():
        yield from part if isinstance(part, nn.ModuleList) else _blocks(part)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Any:
    """Of a part, gathered from all processes, on the CPU."""
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor


def _like(tensor: Tensor, part: Any) -> Tensor:
    """A whole tensor cut up as another; numbers, such as a count of steps, stay."""
    from torch.distributed.tensor import distribute_tensor

    if tensor.shape != part.shape or not hasattr(part, "device_mesh"):
        return tensor
    return distribute_tensor(tensor.to(part.device), part.device_mesh, part.placements)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value
