"""LoRA files: found, checked, put into a model, written."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from logging import Handler, LogRecord
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from palate.base.errors import UserError, first_line
from palate.base.files import replacing
from palate.base.machine import tell
from palate.models.adapters import LYCORIS, LycorisLayer, is_adapter, kind_of, lycoris_layers, put_lycoris
from palate.models.denoiser import Denoiser, Drawer, one_to_one
from palate.models.files import LORA_FILE, lora_in
from palate.models.lora_file import (
    Layer,
    check_kind,
    check_names,
    find_lora,
    is_named,
    layers_of,
    names_in,
    placed,
    short_name,
    stem_of,
    told_config,
)
from palate.models.parts import read_part
from palate.models.reading import PLACE, Reading, apart, in_files


def tuned(denoiser: Drawer, path: Path) -> nn.Module:
    """The network with what :meth:`Policy.save` wrote; a LoRA is put into the denoiser's own.

    Raises:
        UserError: it does not fit the model, or is damaged.
    """
    network: Any = denoiser.network
    if path.is_dir():
        found = read_part(type(network), str(path), str(path))
        own, other = ({n: p.shape for n, p in module.named_parameters()} for module in (network, found))
        if own != other:
            raise UserError(f"{path} is not shaped like the network of {denoiser.name}: name the model it was trained from")
        return found.to(network.device).eval().requires_grad_(False)
    load_lora(denoiser, network, path, idle=True, texts=True)
    return network.eval().requires_grad_(False)


def put_loras(denoiser: Drawer, network: nn.Module, loras: Sequence[tuple[Path, float]], *, alone: bool = False) -> None:
    """Put LoRA files into ``network`` (and the text encoders), each at its scale.

    Those that the network has already, as of :func:`tuned`, stay at scale 1.

    Args:
        alone: only the network is measured: a LoRA of a text encoder is refused.

    Raises:
        UserError: a file does not fit the model, holds more than a LoRA, or is damaged.
    """
    if not loras:
        return
    pipeline: Any = denoiser.pipeline(network)
    parts = _parts(pipeline, network)
    scales = {str(name): 1.0 for name in getattr(network, "peft_config", {})}
    for number, (path, scale) in enumerate(loras):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
            file = lora_in(path)
            with apart(network):  # its text encoders are parts of their own
                layers = _layers(denoiser, parts, file, trained=alone)
                _tell_idle(file, layers)
                _put(denoiser, parts, file, layers, f"lora{number}")
        scales[f"lora{number}"] = scale
    pipeline.set_adapters(list(scales), list(scales.values()))
    network.eval().requires_grad_(False)


def load_lora(denoiser: Drawer, network: nn.Module, path: str | Path, *, idle: bool = False, texts: bool = False) -> None:
    """Put a LoRA of any layout into ``network`` (the denoiser's own or a twin), in float32 as in training.

    Args:
        texts: whether it may also be of the text encoders, which the network then has for its own.
        idle: whether one that changes nothing, and cannot learn to, will do.

    Raises:
        UserError: as :func:`palate.models.lora_file.find_lora`, or it does not fit the model, or can never learn.
    """
    _tell_idle(*check_lora(denoiser, network, path, idle=idle, texts=texts))
    for name, parameter in network.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def check_lora(
    denoiser: Drawer, network: nn.Module, path: str | Path, *, idle: bool = False, texts: bool = False
) -> tuple[Path, Sequence[Layer]]:
    """As :func:`load_lora`, of a network that is thrown away: nothing is told, and precisions stay. The file and its layers."""
    texts = texts and bool(getattr(denoiser, "text_targets", {}))
    file, parts = find_lora(path, texts=texts), {_part(denoiser, network): network}
    reading = None
    if texts and any(placed(stem_of(name))[0] for name in names_in(file)):
        reading = Reading(denoiser.texts)  # type: ignore[attr-defined]
        parts |= dict(reading.encoders.items())
    layers = _layers(denoiser, parts, file, trained=not texts)
    if not idle and all(layer.dead for layer in layers):
        raise UserError(f"{file} changes nothing and cannot learn to ({_why_idle(layers)}): leave it out, or give another")
    _put(denoiser, parts, file, layers, "default")
    if reading is not None:
        network.add_module(PLACE, reading)
    return file, layers


def _part(denoiser: Drawer, network: nn.Module) -> str:
    return str(getattr(denoiser, "part", "transformer" if "Transformer" in type(network).__name__ else "unet"))


def _parts(pipeline: Any, network: nn.Module) -> dict[str, nn.Module]:
    """What a pipeline puts LoRAs into, the network first."""
    found = {n: m for n, m in pipeline.components.items() if n in pipeline._lora_loadable_modules and m is not None}
    return dict(sorted(found.items(), key=lambda item: item[1] is not network))


def _layers(denoiser: Drawer, parts: dict[str, nn.Module], file: Path, *, trained: bool) -> list[Layer]:
    """The layers of a file; where a family's LoRAs come in layouts that diffusers alone knows, as diffusers reads them."""
    names = names_in(file)
    check_kind(file, names)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}; download it again") from error
    if one_to_one(denoiser) is None and not _known(denoiser, parts, names):
        tensors = _converted(denoiser, file, tensors)
    check_names(file, list(tensors), trained=trained)
    return layers_of(file, tensors)


def _known(denoiser: Drawer, parts: dict[str, nn.Module], names: Sequence[str]) -> bool:
    """Whether all names are those of layers of the model."""
    first = next(iter(parts))
    tables = {part: _table(denoiser, module, network=part == first) for part, module in parts.items()}
    return all(is_named(name) and _find(tables, first, stem_of(name)) is not None for name in names)


def _converted(denoiser: Drawer, file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers makes of a layout that it knows for this family alone; refused if it warns, which is of what it drops."""
    from diffusers.utils import logging

    said = _Said()
    logger, kept = logging.get_logger("diffusers"), logging.get_verbosity()
    logger.addHandler(said)
    logging.disable_default_handler()
    logging.set_verbosity(logging.WARNING)
    try:
        found = _pipeline_class(denoiser).lora_state_dict(dict(tensors))
    except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{file} cannot be put into {denoiser.name}: {first_line(error)}") from error
    finally:
        logger.removeHandler(said)
        logging.enable_default_handler()
        logging.set_verbosity(kept)
    if said.messages:
        raise UserError(f"{file} cannot be put into {denoiser.name} whole: {short_name(said.messages[0])}")
    layers, alphas = found if isinstance(found, tuple) else (found, None)
    return {**layers, **{name: torch.tensor(float(x)) for name, x in (alphas or {}).items()}}


def _pipeline_class(denoiser: Drawer) -> Any:
    import diffusers

    card = getattr(denoiser, "card", None)
    return type(denoiser.pipeline()) if card is None else getattr(diffusers, card.pipeline)


class _Said(Handler):
    """Keeps what a library warns of."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: LogRecord) -> None:
        self.messages.append(record.getMessage())


def _why_idle(layers: Sequence[Layer]) -> str:
    return "every alpha is 0" if all(layer.alpha == 0 for layer in layers) else "its matrices, or their alphas, are 0"


def _tell_idle(file: Path, layers: Sequence[Layer]) -> None:
    idle = [layer for layer in layers if layer.idle]
    if len(idle) == len(layers):
        tell(f"{file} changes nothing: {_why_idle(layers)}")
    elif without := [layer for layer in idle if layer.alpha == 0]:
        tell(f"{len(without)} of the {len(layers)} layers of {file} have an alpha of 0 and change nothing")


# Into a model --------------------------------------------------------------------------------------------------------------


def _put(denoiser: Drawer, parts: dict[str, nn.Module], file: Path, layers: Sequence[Layer], adapter: str) -> None:
    """Every layer of a file into the part that has it; refused unless each finds its place and arrives as it was."""
    first = next(iter(parts))
    by_part: dict[str, dict[str, Layer]] = {}
    lost = []
    tables = {part: _table(denoiser, module, network=part == first) for part, module in parts.items()}
    for layer in layers:
        part, name = placed(layer.named)
        module = _find(tables, first, layer.named)
        if module is None:
            lost.append((layer.named, name, list(tables.get(part or first, {}).values())))
        elif module in by_part.setdefault(part or first, {}):
            raise UserError(f"{file} holds the layer {module} twice, by different names; it is damaged")
        else:
            by_part[part or first][module] = layer
    for part, of_part in by_part.items():
        for module, layer in of_part.items():
            weight = _base(parts[part].get_submodule(module)).weight.shape
            if layer.lycoris is not None:
                _check_product(denoiser, file, module, layer.lycoris, weight)
                continue
            _as_there(layer.tensors, len(weight))
            _check_shape(denoiser, file, module, layer, weight)
    if lost:
        named, name, there = lost[0]
        close = ", ".join(get_close_matches(name, [module.replace(".", "_") for module in there], n=3))
        raise UserError(
            f"{file} cannot be put into {denoiser.name}: it does not fit, {len(lost)} of its {len(layers)} layers are not in "
            f"the model, such as {short_name(named)}{f' (the nearest there: {close})' if close else ''}"
        )
    for part, of_part in by_part.items():
        _inject(denoiser, parts[part], part, file, of_part, adapter)


def _find(tables: Mapping[str, dict[str, str]], first: str, named: str) -> str | None:
    """The layer that a file calls so."""
    part, name = placed(named)
    where = tables.get(part or first, {})
    # Of an attention's output some files name the list that it is in, and of a CLIP encoder the model around it.
    return next((where[n] for n in (name, f"{name}_0", name.removeprefix("text_model_")) if n in where), None)


def _base(module: nn.Module) -> Any:
    return getattr(module, "base_layer", module)


def _table(denoiser: Drawer, module: nn.Module, *, network: bool) -> dict[str, str]:
    """The layers that can have a LoRA, by all names with underscores that programs have for them."""
    wanted = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = ((n, m) for n, m in module.named_modules() if ".base_layer" not in n and not is_adapter(n))
    names = [n for n, m in layers if isinstance(_base(m), wanted)]
    found = {name.replace(".", "_"): name for name in names}
    kohya = one_to_one(denoiser) if network else None
    if kohya is None:
        return found
    for name in names:
        try:
            found.setdefault(placed(kohya.name(name))[1], name)
        except (KeyError, ValueError, IndexError):  # a layer for which kohya's scripts have no name
            continue
    return found


def _as_there(tensors: dict[str, Tensor], dims: int) -> None:
    """A linear layer and a convolution of 1 x 1 are the same: either half takes the form of the layer that it is for."""
    for role in ("down", "up"):
        if tensors[role].ndim >= 2 and all(side == 1 for side in tensors[role].shape[2:]):
            tensors[role] = tensors[role].reshape(*tensors[role].shape[:2], *[1] * (dims - 2))


def _check_shape(denoiser: Drawer, file: Path, module: str, layer: Layer, weight: torch.Size) -> None:
    down, up = layer.tensors["down"].shape, layer.tensors["up"].shape
    where = f"{file} cannot be put into {denoiser.name}: size mismatch for {module}"
    if down[:1] != up[1:2] or not layer.rank:
        raise UserError(
            f"{where}: its two matrices have ranks {down[0]} and {up[1] if len(up) > 1 else 0}; the file is damaged"
        )
    if len(down) != len(weight) or (up[0], *down[1:]) != tuple(weight) or any(side != 1 for side in up[2:]):
        raise UserError(
            f"{where}: its LoRA changes weights of {_shape((up[0], *down[1:]))}, the model has {_shape(weight)} there. "
            "Was it trained for another family of models?"
        )
    for role in ("bias", "magnitude"):
        if role in layer.tensors and layer.tensors[role].numel() != weight[0]:
            raise UserError(f"{where}: its {role} holds {layer.tensors[role].numel()} numbers; expected {weight[0]}")


def _check_product(denoiser: Drawer, file: Path, module: str, layer: LycorisLayer, weight: torch.Size) -> None:
    where = f"{file} cannot be put into {denoiser.name}: size mismatch for {module}"
    try:
        found = tuple(layer.product().shape)
    except RuntimeError as error:
        raise UserError(f"{where}: its matrices do not fit each other ({first_line(error)}); the file is damaged") from None
    _check_size(file, module, layer)
    if found != (weight[0], weight[1:].numel()):
        raise UserError(
            f"{where}: it changes weights of {_shape(found)}, the model has {_shape(weight)} there. "
            "Was it trained for another family of models?"
        )


def _check_size(file: Path, module: str, layer: LoraLayer | LycorisLayer) -> None:
    """Matrices of finite numbers may have a product that is none."""
    if layer.exceeds(torch.finfo(torch.float32).max):
        raise UserError(
            f"{file} cannot be used: its change of {module} holds numbers that float32 does not hold, so only NaN could be "
            "drawn; it is damaged, or was trained at too high a rate"
        )


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _inject(denoiser: Drawer, model: nn.Module, part: str, file: Path, layers: Mapping[str, Layer], adapter: str) -> None:
    """By PEFT; what arrives is compared with what the file holds, for PEFT skips what it has no place for."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import set_peft_model_state_dict

    kinds = {layer.kind for layer in layers.values()} | {kind_of(model, name) for name in getattr(model, "peft_config", {})}
    if kinds & {*LYCORIS} and len(kinds) > 1:
        raise UserError(
            f"{file} cannot be put beside what is there: {' and '.join(sorted(map(str, kinds)))} do not mix in one model; "
            "merge one of them first (palate export --format pipeline)"
        )
    lycoris = {module: layer.lycoris for module, layer in layers.items() if layer.lycoris is not None}
    if lycoris:
        told_config(file, part)  # which refuses PEFT's own files: they keep the strength elsewhere
        put_lycoris(model, lycoris, adapter)
        return
    state = _state(layers, one := _one_alpha(layers.values()))
    try:
        config = LoraConfig(**_config(layers, one, told_config(file, part)))
        with _quiet():
            inject_adapter_in_model(config, model, adapter_name=adapter, state_dict=state, low_cpu_mem_usage=True)
            set_peft_model_state_dict(model, state, adapter, low_cpu_mem_usage=True)
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        mismatch = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        why = f"what it tells of its ranks is not what it holds ({short_name(mismatch)})" if mismatch else first_line(error)
        raise UserError(f"{file} cannot be put into {denoiser.name}: {why}") from error
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    _check_arrived(denoiser, model, file, state, adapter)
    for module in layers:
        strength = float(model.get_submodule(module).scaling[adapter])  # type: ignore[index, operator, union-attr]
        _check_size(file, module, LoraLayer(state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"], strength))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of names and patterns without a layer: what arrived is looked at
        yield


def _one_alpha(layers: Iterable[Layer]) -> float | None:
    """The alpha of all layers; of several the greatest, which :func:`_state` then makes that of all."""
    alphas = [layer.alpha for layer in layers if layer.alpha is not None]
    return max(alphas, key=abs, default=None)


def _state(layers: Mapping[str, Layer], one: float | None) -> dict[str, Tensor]:
    """The tensors by PEFT's names. Different alphas become one, at the same change: other readers mix up several."""
    state = {}
    for module, layer in layers.items():
        up, alpha = layer.tensors["up"], layer.alpha
        if one is not None and alpha is not None and alpha != one:
            up = up.float() * (alpha / one)
        found = {"lora_A.weight": layer.tensors["down"], "lora_B.weight": up}
        found |= {"lora_B.bias": layer.tensors["bias"]} if "bias" in layer.tensors else {}
        if "magnitude" in layer.tensors:
            found["lora_magnitude_vector"] = layer.tensors["magnitude"]
        state |= {f"{module}.{end}": tensor for end, tensor in found.items()}
    return state


def _config(layers: Mapping[str, Layer], one: float | None, told: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of PEFT's ``LoraConfig``: as told, or by the shapes; without an alpha the strength of every layer is 1."""
    modules = list(layers)
    if told is not None and one is None:
        return {**told, "target_modules": modules}
    ranks = {module: layer.rank for module, layer in layers.items()}
    rank = Counter(ranks.values()).most_common()[0][0]
    others = {f"^{module}": r for module, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank if one is None else one,
        "rank_pattern": others,
        "alpha_pattern": dict(others) if one is None else {},
        "target_modules": modules,
        "use_dora": any("magnitude" in layer.tensors for layer in layers.values()),
        "lora_bias": any("bias" in layer.tensors for layer in layers.values()),
    }


def _check_arrived(denoiser: Drawer, model: nn.Module, file: Path, state: Mapping[str, Tensor], adapter: str) -> None:
    found = {
        name.replace(f".{adapter}", ""): p for name, p in model.named_parameters() if is_adapter(name) and f".{adapter}" in name
    }
    found = {name.removesuffix(".weight") if "magnitude" in name else name: p for name, p in found.items()}
    wrong = [n for n in state if n not in found or not _same(found[n], state[n])] + [n for n in found if n not in state]
    if wrong:
        raise UserError(
            f"{file} cannot be put into {denoiser.name}: {len(wrong)} of its {len(state)} matrices did not arrive, such as "
            f"{short_name(wrong[0])}"
        )


def _same(ours: Tensor, given: Tensor) -> bool:
    return torch.equal(ours.detach().cpu().flatten(), given.to(ours.dtype).flatten())


def save_lora(denoiser: Denoiser, network: nn.Module, folder: str | Path) -> Path:
    """Write the LoRA of ``network`` in diffusers' layout, with alpha in its metadata; returns the file.

    A LoHa or LoKr, for which diffusers has no layout, is written in LyCORIS's.
    """
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if lycoris_layers(network):
        return write_tensors(folder / LORA_FILE, lycoris_tensors(denoiser, network), {})
    with apart(network) as texts:
        parts = {denoiser.part: network, **texts}
        weights: dict[str, dict[str, Tensor]] = {name: get_peft_model_state_dict(part) for name, part in parts.items()}
        metadata = _collate_lora_metadata(parts)
    for name in texts:
        weights[name] = {in_files(layer): matrix for layer, matrix in weights[name].items()}
    for told in metadata.values():
        told["target_modules"] = sorted(told["target_modules"])  # of a set, whose order is another in every process
    return replacing(folder / LORA_FILE, lambda partial: denoiser.save_lora(partial, weights, metadata), LORA_FILE)


def lycoris_tensors(denoiser: Denoiser, network: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The LoHa or LoKr of a network by the names of LyCORIS, which ComfyUI and A1111 read."""
    kohya = one_to_one(denoiser)
    if kohya is None:
        raise ValueError(f"the layers of {denoiser.card.pipeline} have no names of their own there: see check_adapter")
    tensors: dict[str, Tensor] = {}
    for module, layer in lycoris_layers(network).items():
        name = kohya.name(module)
        for part, matrix in layer.matrices.items():
            tensors[f"{name}.{layer.mark}_{part}"] = matrix.to("cpu", dtype).contiguous()
        tensors[f"{name}.alpha"] = held_exactly(layer.alpha, dtype)
    return tensors


def held_exactly(number: float, dtype: torch.dtype) -> Tensor:
    """A number in ``dtype`` where that holds it, otherwise in float32."""
    exact = torch.tensor(float(number))
    return exact.to(dtype) if exact.to(dtype) == exact else exact


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """One safetensors file, whole or not at all; returns it."""

    def write(partial: str) -> None:
        Path(partial).mkdir()
        save_file(dict(tensors), Path(partial) / path.name, metadata={"format": "pt", **metadata})

    path.parent.mkdir(parents=True, exist_ok=True)
    return replacing(path, write, path.name)


@dataclass(frozen=True)
class LoraLayer:
    """The matrices of one layer: its change is ``scale * up @ down``."""

    down: Tensor  # (rank, in), or (rank, in, k, k) of a convolution
    up: Tensor  # (out, rank), or (out, rank, 1, 1)
    scale: float

    @property
    def alpha(self) -> float:
        """What a reader divides by the rank to get the scale."""
        return self.scale * self.down.shape[0]

    @property
    def held(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return not (self.scale and self.down.any() and self.up.any())

    def exceeds(self, limit: float) -> bool:
        """Whether the change holds a number above ``limit``, or one that is not finite."""
        down, up = self.down.flatten(1).double(), self.up.flatten(1).double() * self.scale
        if float(down.abs().max() * up.abs().max()) * len(down) <= limit:  # of nearly all layers: nothing is multiplied
            return False
        return not float((up @ down).abs().max()) <= limit


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The trained LoRA of a network, as it is applied, by the name of the layer."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    found = {}
    for name, module in network.named_modules():
        if isinstance(module, PeftLayer) and "default" in module.lora_A:
            down, up = (part["default"].weight.detach() for part in (module.lora_A, module.lora_B))  # type: ignore[union-attr]
            found[name] = LoraLayer(down, up, float(module.scaling["default"]))
    return found


def adapter_layers(network: nn.Module) -> dict[str, LoraLayer] | dict[str, LycorisLayer]:
    """The trained matrices of a network, of whichever kind, by the name of the layer."""
    return lycoris_layers(network) or lora_layers(network)
