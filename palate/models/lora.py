"""LoRA files: found, checked, put into a model, written."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from palate.base.errors import UserError, first_line
from palate.base.files import replacing
from palate.models.denoiser import Denoiser, Drawer
from palate.models.files import LORA_FILE
from palate.models.parts import LORA


def tuned(denoiser: Drawer, path: Path) -> nn.Module:
    """The network with what :meth:`Policy.save` wrote; a LoRA is put into the denoiser's own.

    Raises:
        UserError: it does not fit the model, or is damaged.
    """
    network: Any = denoiser.network
    if path.is_dir():
        try:
            return type(network).from_pretrained(str(path)).to(network.device).eval().requires_grad_(False)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path} cannot be put into {denoiser.name}: {first_line(error)}") from error
    load_lora(denoiser, network, path)
    return network.eval().requires_grad_(False)


def put_loras(denoiser: Drawer, network: nn.Module, loras: Sequence[tuple[Path, float]]) -> None:
    """Put LoRA files of any layout that diffusers reads into ``network`` (and the text encoders), each at its scale.

    Those that the network has already, as of :func:`tuned`, stay at scale 1.

    Raises:
        UserError: a file does not fit the model, or is damaged.
    """
    if not loras:
        return
    pipeline: Any = denoiser.pipeline(network)
    scales = {str(name): 1.0 for name in getattr(network, "peft_config", {})}
    for number, (path, scale) in enumerate(loras):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
            _load(denoiser, pipeline, path, f"lora{number}")
        scales[f"lora{number}"] = scale
    pipeline.set_adapters(list(scales), list(scales.values()))
    network.eval().requires_grad_(False)


def find_lora(path: str | Path) -> Path:
    """The file of a LoRA named by itself or by its folder; of its weights only the names are read.

    Raises:
        UserError: it is missing, no safetensors file, holds no LoRA, or more than its matrices, or not every alpha.
    """
    path = Path(path)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no LoRA at {path}: expected a .safetensors file, or a folder with {LORA_FILE}")
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no readable safetensors file ({first_line(error)}); a LoRA is expected") from error
    if not any("lora" in name for name in names):
        raise UserError(f"{file} holds no LoRA: none of its {len(names)} weights is named as one")
    alphas, layers = (sum(name.endswith(end) for name in names) for end in (".alpha", ".lora_down.weight"))
    if 0 < alphas < layers:
        raise UserError(f"{file} has an alpha for {alphas} of its {layers} layers: the strength of the others is not known")
    if others := [name for name in names if name.startswith(("text_encoder", "lora_te")) or "dora" in name]:
        raise UserError(
            f"{file} also changes what is not trained here ({len(others)} weights, such as {others[0]}): "
            "give a plain LoRA of the U-Net alone"
        )
    return file


def tells_alpha(file: Path) -> bool:
    """Whether a LoRA file tells its strength: diffusers' in the metadata, kohya's in a number for every layer."""
    with safe_open(file, "pt") as opened:
        return "lora_adapter_metadata" in (opened.metadata() or {}) or any(n.endswith(".alpha") for n in opened.keys())  # noqa: SIM118


def load_lora(denoiser: Drawer, network: nn.Module, path: str | Path) -> None:
    """Put a LoRA in diffusers' or kohya's layout into ``network`` (the denoiser's own or a twin), in float32 as in training.

    Raises:
        UserError: as :func:`find_lora`, or it does not fit the model.
    """
    file = find_lora(path)
    _load(denoiser, denoiser.pipeline(network), file, "default")
    with safe_open(file, "pt") as opened:
        given = sum(name.endswith(".weight") and "lora" in name for name in opened.keys())  # noqa: SIM118
    found = [parameter for name, parameter in network.named_parameters() if LORA in name]
    if len(found) != given:
        raise UserError(
            f"{file} does not fit {denoiser.name}: {len(found)} of its {given} matrices found their layer; "
            "was it trained for another family of models?"
        )
    for parameter in found:
        parameter.data = parameter.data.float()


def _load(denoiser: Drawer, pipeline: Any, file: Path, adapter: str) -> None:
    from diffusers.utils import logging

    kept = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # of a file that does not fit, diffusers logs a line for every layer
    try:
        _put(pipeline, file, adapter)
    except KeyError as error:
        raise UserError(f"{file} cannot be put into {denoiser.name}: {error.args[0]} is missing") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        mismatch = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        why = f"{mismatch} Was it trained for another family of models?" if mismatch else first_line(error)
        raise UserError(f"{file} cannot be put into {denoiser.name}: {why}") from error
    finally:
        logging.set_verbosity(kept)


def _put(pipeline: Any, file: Path, adapter: str) -> None:
    tensors = load_file(file)
    if not all(tensor.float().isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{file} holds numbers that are not finite; it cannot be used")
    alphas = {name: float(x) for name, x in tensors.items() if name.endswith(".alpha")}
    if len(set(alphas.values())) < 2:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter)
        return
    # diffusers gives attention layers the commonest alpha of a kohya file, not their own: so all get one.
    one = max(alphas.values())
    for name, alpha in alphas.items():
        up = f"{name.removesuffix('.alpha')}.lora_up.weight"
        tensors[name] = torch.tensor(one)
        if up in tensors:
            tensors[up] = tensors[up].float() * (alpha / one)
    pipeline.load_lora_weights(tensors, adapter_name=adapter)


def save_lora(denoiser: Denoiser, network: nn.Module, folder: str | Path) -> Path:
    """Write the LoRA of ``network`` in diffusers' layout, with alpha in its metadata; returns the file."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, metadata = get_peft_model_state_dict(network), _collate_lora_metadata({denoiser.part: network})
    for told in metadata.values():
        told["target_modules"] = sorted(told["target_modules"])  # of a set, whose order is another in every process
    return replacing(folder / LORA_FILE, lambda partial: denoiser.save_lora(partial, weights, metadata), LORA_FILE)


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


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The trained LoRA of a network, as it is applied, by the name of the layer."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    found = {}
    for name, module in network.named_modules():
        if isinstance(module, PeftLayer) and "default" in module.lora_A:
            down, up = (part["default"].weight.detach() for part in (module.lora_A, module.lora_B))  # type: ignore[union-attr]
            found[name] = LoraLayer(down, up, float(module.scaling["default"]))
    return found
