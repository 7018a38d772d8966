"""Models known by their configurations alone: what they take of memory and time is counted without reading or storing a weight.

The very code that trains runs on tensors that have a shape, a precision and no contents (PyTorch's fake tensors), and what is
in memory at each moment is added up. What only contents could tell is answered as if prompts were as long as they can be.
"""

# torch types fake tensors and what dispatches operations in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from palate.models.parts import Source
from palate.models.quantised import quantise

_aten = torch.ops.aten
_CPU_ATTENTION: dict[object, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}
"""Operations of what the libraries' table lacks."""
LONG = 2**20
"""Stands for a whole number that contents would tell, such as the length of a prompt: slices end where their tensor does."""
_IN_FLOAT32 = ("group_norm", "layer_norm", "softmax")
"""Of ``torch.nn.functional``: what autocast computes in float32 on a GPU, but not on a CPU."""


class Outline(Source):
    """A pipeline folder or hub id of which configurations are read, and no weights: parts have random ones on a device, and
    shapes alone on ``meta``."""

    def __init__(self, name: str, device: str | torch.device, **options: str):
        super().__init__(name, device, **options)
        self.home = self.device
        """Where parts are made."""

    def read(self, kind: Any, part: str, *, quantize: str | None = None, **options: object) -> Any:
        asked = options.get("torch_dtype", options.get("dtype"))
        before = torch.get_default_dtype()
        torch.set_default_dtype(asked if isinstance(asked, torch.dtype) else torch.float32)
        try:
            with unset_fake_temporarily(), self.home:
                module = self._made(kind, part)
                if quantize is not None:
                    quantise(module, quantize, self.home)
        finally:
            torch.set_default_dtype(before)
        if detect_fake_mode() is not None:
            empty([module])
        return module.eval().requires_grad_(False)

    def _made(self, kind: Any, part: str) -> nn.Module:
        if hasattr(kind, "load_config"):  # of diffusers
            return kind.from_config(self.config(kind, part))
        return kind(kind.config_class.from_pretrained(self.name, subfolder=part, **self.plain))

    def check_files(self, parts: Sequence[str]) -> None:
        """There need be no weights."""


def empty(modules: Sequence[nn.Module]) -> None:
    """In :func:`without_contents`: put such tensors in place of all parameters and buffers; what is shared is still shared."""
    made: dict[int, Tensor] = {}
    for module in modules:
        module.to = functools.partial(_stay, module)  # type: ignore[method-assign]  # such tensors cannot be moved in place
    for part in [part for module in modules for part in module.modules()]:
        for store in (part._parameters, part._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
                store[name] = made[id(old)]  # type: ignore[assignment]


def _stay(module: nn.Module, *_: object, **__: object) -> nn.Module:
    return module


@contextmanager
def without_contents(*, gpu: bool) -> Iterator[None]:
    """Inside, tensors have no contents, and lie on the CPU by name.

    gpu: autocast computes norms and softmax in float32, as it does on a GPU.
    """
    own = {name: getattr(F, name) for name in _IN_FLOAT32}
    try:
        if gpu:
            for name, function in own.items():
                setattr(F, name, _in_float32(function))
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        for name, function in own.items():
            setattr(F, name, function)


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
            kwargs = {k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in kwargs.items()}
        return function(*args, **kwargs)

    return run


class Counter(TorchDispatchMode):
    """Inside, adds up what tensors without contents would take, and the operations on them.

    Args:
        known: tensors that are counted elsewhere, such as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.operations = 0
        """Bytes, the highest number of bytes, and floating-point operations, a multiplication and an addition being two."""
        self._seen: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[id(storage)] = storage

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else LONG
        if func is _aten.index.Tensor and (mask := args[1][0]) is not None and mask.dtype == torch.bool:
            return args[0].flatten(0, mask.ndim - 1).clone()  # everything that may be chosen
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if (count := flop_registry.get(packet)) is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        elif (count := _CPU_ATTENTION.get(packet)) is not None:
            self.operations += count(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
