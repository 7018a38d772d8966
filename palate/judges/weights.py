"""Weights from files: tensors only, and a plain word where a file is something else."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError, first_line, nearest, short
from palate.base.options import check_ranges

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Made = TypeVar("Made")
Model = TypeVar("Model", bound=torch.nn.Module)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of a judge whose weights are read from a folder."""

    dtype: str = "float32"
    """``float32`` gives the published scores; the others are faster on devices that have them, and coarser."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {short(self.dtype)}{nearest(self.dtype, DTYPES)}")
        check_ranges(self)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``.pt`` or ``.pth`` file, of which nothing else is unpickled.

    A checkpoint's weights below the key ``state_dict`` are taken from there.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; expected weights (.safetensors, .pt or .pth)")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = reading(path, lambda: load_file(path))
    else:
        state = reading(path, lambda: torch.load(path, weights_only=True, map_location="cpu"))
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights by name; download it again")
    return tensors


def reading(path: Path, read: Callable[[], Made]) -> Made:
    """``read()``, whose many ways of failing on a damaged or foreign file become one ``UserError``."""
    from safetensors import SafetensorError

    try:
        return read()
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); download it again") from error


def made_of(
    load: Callable[..., Model],
    config: PretrainedConfig,
    state: dict[str, Tensor],
    where: Path,
    dtype: torch.dtype,
    **given: bool,
) -> Model:
    """A frozen transformers model of exactly these weights; no weight is missing, none is left over.

    load: the ``from_pretrained`` of its class, as in :func:`model_in`; given: more keywords of it.
    """
    model, found = _loaded(where, load, None, config=config, state_dict=state, dtype=dtype, **given)
    _refuse_incomplete(where, found)
    if found["unexpected_keys"]:
        raise UserError(f"{where} holds weights that the model has no place for, the first is {min(found['unexpected_keys'])}")
    return model.eval().requires_grad_(False)


def model_in(load: Callable[..., Model], folder: Path, dtype: torch.dtype, *, spare: str = "", **given: bool) -> Model:
    """The model of a folder in transformers' layout; no weight is missing but those with ``spare`` in their names."""
    model, found = _loaded(folder, load, folder, dtype=dtype, local_files_only=True, **given)
    _refuse_incomplete(folder, found, spare)
    return model


def _loaded(where: Path, load: Callable[..., Model], *what: object, **how: object) -> tuple[Model, dict[str, Collection[str]]]:
    """The model, and the names of weights by what is wrong with them."""
    with quietly():
        return cast(Any, reading(where, lambda: load(*what, output_loading_info=True, **how)))


def _refuse_incomplete(where: Path, found: Mapping[str, Collection[str]], spare: str = "") -> None:
    """transformers fills what is missing with random numbers; a judge must not."""
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(n) for n in found[what] if not spare or spare not in str(n)):
            raise UserError(
                f"{where} does not fit the model: {len(names)} weights {what.removesuffix('_keys')}, the first is {names[0]}"
            )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No bars while transformers reads weights from disk."""
    import transformers.utils.logging as of_transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    shown, of_downloads = of_transformers.is_progress_bar_enabled(), not are_progress_bars_disabled()
    of_transformers.disable_progress_bar()  # which disables those of downloads too
    try:
        yield
    finally:
        if shown:
            of_transformers.enable_progress_bar()
        if of_downloads:
            enable_progress_bars()


def affine(state: dict[str, Tensor], where: Path) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """Linear layers without activations between them as one map: ``weight (d,)`` and ``bias ()``, float32.

    ``state`` has ``weight`` and ``bias`` of one layer, or ``layers.N.weight`` and ``layers.N.bias`` of several (dropout
    between them has no weights). They are multiplied out in float64.
    """
    names = ["weight"] if "weight" in state else [k for k in state if k.startswith("layers.") and k.endswith(".weight")]
    if not names:
        raise UserError(f"{where}: no head; expected keys 'weight' or 'layers.N.weight', found {', '.join(sorted(state)[:4])}")
    names.sort(key=lambda name: int(name.split(".")[1]) if "." in name else 0)
    width = state[names[0]].shape[1]
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for name in names:
        layer = state[name].double()
        if layer.shape[1] != weight.shape[0]:
            raise UserError(f"{where}: {name} reads {layer.shape[1]} numbers but the layer before it writes {weight.shape[0]}")
        weight, bias = layer @ weight, layer @ bias + state[name.removesuffix("weight") + "bias"].double()
    if weight.shape[0] != 1:
        raise UserError(f"{where}: the last layer writes {weight.shape[0]} numbers; a head writes one")
    return weight[0].float(), bias[0].float()
