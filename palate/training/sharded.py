"""A place whose processes hold a part of the model each (FSDP2, ``torch.distributed.fsdp.fully_shard``)."""

# torch types distributed tensors in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from palate.base.machine import device
from palate.training.place import Place


class ShardedPlace(Place):
    """Weights, gradients, what the optimizer keeps, their average and the frozen copy lie in parts on all processes.

    A block's weights are gathered while it is computed and its gradients summed as they are made, so every process must take
    the same passes. Checkpoints hold whole tensors, gathered one after the other: any number of processes goes on from them,
    and those that hold everything too.

    Args:
        policy: cut up by :func:`cut_up`.
    """

    everywhere: ClassVar[bool] = True

    def align(self) -> None:
        """They were aligned before they were cut up, and what a checkpoint holds is the same for all."""

    def here(self) -> list[Tensor]:
        return [_local(weight.detach()) for weight in self.weights]

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self.processes.count)  # FSDP takes the mean over processes, where the loop wants the sum

    def reduce_gradients(self) -> None:
        """The backward pass has summed them."""

    def clip_grad_norm(self, limit: float | None) -> Tensor:
        return cast("Any", super().clip_grad_norm(limit)).full_tensor()

    def finite(self) -> bool:
        return not self.processes.any(not all(bool(part.isfinite().all()) for part in self.here()))

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


@runtime_checkable
class Twins(Protocol):
    """A policy whose network has twins beside it, such as :class:`palate.models.policy.Policy`."""

    @property
    def modules(self) -> list[nn.Module]: ...
    def state_dict(self) -> dict[str, Tensor]: ...


def cut_up(policy: Twins) -> None:
    """Of a policy that lies whole in every process, each keeps a part on its own device; all are as in the first process.

    Block by block, twins together, and what is left of a network as a part of its own: so a policy in main memory comes to
    the device a block at a time, if no one else holds its tensors. What twins share they share in parts, too.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    where, modules = torch.device(device()), policy.modules
    for tensor in policy.state_dict().values():
        told = tensor.to(where)
        dist.broadcast(told, 0)
        tensor.copy_(told)
    mesh, shared = init_device_mesh(where.type, (dist.get_world_size(),)), _places(modules)
    blocks = [_blocks(module) for module in modules]
    for name in dict.fromkeys(name for of_one in blocks for name in of_one):
        for of_one in blocks:
            if name in of_one:
                fully_shard(of_one[name], mesh=mesh)
    for (module, name), *others in shared:
        for other, own in others:
            setattr(other, own, getattr(module, name))


def in_part(tensor: Tensor, count: int) -> int:
    """Numbers of a tensor that the first of so many processes holds: its first axis is cut, and the last get less."""
    first, *others = tensor.shape or (1,)
    return math.ceil(first / count) * math.prod(others)


def gathered(modules: Sequence[nn.Module]) -> float:
    """Bytes that are whole at once in a pass of a network or of a twin of it, beside the parts.

    Weights of a block and of those that it is in, and once more of the largest, for the next one is on its way; what is left of
    each network, which stays; and as much of the gradients.
    """
    first, *twins = map(_groups, modules)
    weights = [{name: size for name, (size, _) in of_one.items()} for of_one in (first, *twins)]
    gradients = {name: size for name, (_, size) in first.items()}
    left = sum(of_one.pop("") for of_one in (*weights, gradients))
    return left + max(map(_at_once, weights)) + _at_once(gradients)


def _groups(network: nn.Module) -> dict[str, tuple[float, float]]:
    """Of what is gathered at once: bytes of its weights, and of their gradients."""
    seen, found = set[nn.Parameter](), dict[str, tuple[float, float]]()
    for name, block in _blocks(network).items():
        own = set(block.parameters()) - seen
        seen |= own
        found[name] = float(sum(p.nbytes for p in own)), float(sum(p.nbytes for p in own if p.requires_grad))
    return found


def _at_once(sizes: Mapping[str, float]) -> float:
    """The most of one with those that it is in, and of the largest."""
    inside = [sum(size for outer, size in sizes.items() if f"{name}.".startswith(f"{outer}.")) for name in sizes]
    return max(inside, default=0.0) + max(sizes.values(), default=0.0)


def _places(modules: Sequence[nn.Module]) -> list[list[tuple[nn.Module, str]]]:
    """Of each parameter all layers that have it, and its name there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for layer in dict.fromkeys(layer for module in modules for layer in module.modules()):
        for name, parameter in layer.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append((layer, name))
    return list(found.values())


def _blocks(network: nn.Module) -> dict[str, nn.Module]:
    """What is gathered at once, by name, the innermost first and the network last.

    These are what its outermost lists hold: the blocks of a U-Net's sides, the parts of its middle, a transformer's layers.
    Of those that are made of such blocks themselves, as the network's class tells (``_no_split_modules``), the inner ones too.
    """
    inner: Collection[str] = getattr(network, "_no_split_modules", None) or ()
    found: dict[str, nn.Module] = {}
    for name, block in _listed(network, ""):
        parts = [(f"{name}.{n}", part) for n, part in block.named_modules() if n and type(part).__name__ in inner]
        found.update([*reversed(parts), (name, block)])
    return {**found, "": network}


def _listed(module: nn.Module, before: str) -> Iterator[tuple[str, nn.Module]]:
    """What the outermost lists of a module hold."""
    for name, part in module.named_children():
        if isinstance(part, nn.ModuleList):
            yield from ((f"{before}{name}.{number}", block) for number, block in part.named_children())
        else:
            yield from _listed(part, f"{before}{name}.")


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
