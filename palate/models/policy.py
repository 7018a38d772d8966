"""The model being trained, and the frozen one it is measured against."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from palate.base.errors import UserError
from palate.base.hub import first_line
from palate.diffusion.denoising import Conditioning
from palate.models.denoiser import Denoiser

LORA = ".lora_"
"""In the names of all of a LoRA's parameters, and of no others."""
LORA_FILE = "pytorch_lora_weights.safetensors"


def twin(module: nn.Module, *, share: bool) -> nn.Module:
    """A second module tree; with ``share`` its parameters and buffers are the very tensors of the first, a LoRA's excepted.

    Adapters put into one tree later are not in the other, so a shared twin is the model as it is now at no memory but that of
    the LoRA it has.
    """
    memo: dict[int, Any] = {}
    if share:
        memo = {id(x): x for name, x in (*module.named_parameters(), *module.named_buffers()) if LORA not in name}
    return copy.deepcopy(module, memo)


class Policy:
    """A denoiser in training: LoRA on frozen weights, or all weights beside a frozen copy.

    Args:
        denoiser: the model; its U-Net is changed in place.
        kind: ``lora`` or ``full``.
        rank: of the LoRA matrices.
        lora_layers: ``attention`` (the published recipes), or ``all`` for the linear and convolution layers of all blocks.
        lora_alpha: strength; ``rank`` unless given, so that readers that ignore alpha get the trained strength.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        pretrained_lora: folder or file of a LoRA to continue: its matrices are trained on, and the reference is the model with
            the LoRA as it was. Its own rank, strength and layers stand in place of those given.

    Trainable weights are float32 whatever the precision of the frozen ones.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        kind: str = "lora",
        rank: int = 16,
        lora_alpha: float | None = None,
        lora_layers: str = "attention",
        gradient_checkpointing: bool = False,
        seed: int = 0,
        pretrained_lora: str | Path | None = None,
    ):
        if kind not in ("lora", "full"):
            raise UserError(f"policy kind is {kind!r}; expected 'lora' or 'full'")
        self.denoiser, self.kind = denoiser, kind
        self.rank, self.gradient_checkpointing = rank, gradient_checkpointing
        unet: Any = denoiser.unet
        unet.requires_grad_(False)
        if kind == "full":
            if pretrained_lora is not None:
                raise UserError("pretrained_lora continues a LoRA; with train_method full there is none: use lora")
            self.frozen = twin(unet, share=False)
            unet.float().requires_grad_(True)
        elif pretrained_lora is not None:
            load_lora(denoiser, unet, pretrained_lora)
            self.frozen = twin(unet, share=True).requires_grad_(False)
            self.rank = unet.peft_config["default"].r
            for name, parameter in unet.named_parameters():
                parameter.requires_grad_(LORA in name)
        else:
            from peft import LoraConfig

            if rank < 1:
                raise UserError(f"rank is {rank}; expected at least 1")
            self.frozen = twin(unet, share=True)
            config = LoraConfig(
                r=rank,
                lora_alpha=rank if lora_alpha is None else lora_alpha,  # type: ignore[arg-type]
                init_lora_weights="gaussian",
                target_modules=list(denoiser.lora_targets[lora_layers]),
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                unet.add_adapter(config)
            for parameter in self.parameters():
                parameter.data = parameter.data.float()
        self.frozen.eval()
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()

    @property
    def schedule(self) -> Any:
        return self.denoiser.schedule

    @property
    def trainable_module(self) -> nn.Module:
        return self.denoiser.unet

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters."""
        return (p for p in self.denoiser.unet.parameters() if p.requires_grad)

    def __call__(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.denoiser.predict(self.denoiser.unet, xt, t, cond)

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What the model said before training; never with gradients."""
        with torch.no_grad():
            return self.denoiser.predict(self.frozen, xt, t, cond)

    def features(self, x: Tensor, t: Tensor, cond: Conditioning, layers: str) -> list[Tensor]:
        """Features of the frozen model's encoder half; gradients flow to ``x``, never to weights."""
        return self.denoiser.features(self.frozen, x, t, cond, layers, gradient_checkpointing=self.gradient_checkpointing)

    def state_dict(self) -> dict[str, Tensor]:
        """The trainable tensors by name."""
        return {n: p.detach() for n, p in self.denoiser.unet.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
            raise UserError(
                f"the saved weights do not fit this policy ({self.kind}, rank {self.rank}): "
                "continue with the model, policy kind and rank they were trained with"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def save(self, folder: str | Path) -> Path:
        """Write the result: ``pytorch_lora_weights.safetensors`` in diffusers' layout with alpha in its metadata, or
        the full U-Net as ``unet/``. Returns the path written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unet: Any = self.denoiser.unet
        if self.kind == "full":
            return replacing(folder / "unet", unet.save_pretrained)
        return save_lora(self.denoiser, unet, folder)


class Finished:
    """A trained U-Net beside the one it came from, as a :class:`Policy` is called, for measuring only.

    Args:
        unet: the tuned one.
        base: the one before training: a twin made before any LoRA was put in.
    """

    def __init__(self, denoiser: Denoiser, unet: nn.Module, base: nn.Module):
        self.denoiser, self._unet, self._base = denoiser, unet.eval(), base.eval()

    @property
    def schedule(self) -> Any:
        return self.denoiser.schedule

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._unet.parameters()

    @torch.no_grad()
    def __call__(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.denoiser.predict(self._unet, xt, t, cond)

    @torch.no_grad()
    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.denoiser.predict(self._base, xt, t, cond)

    def features(self, x: Tensor, t: Tensor, cond: Conditioning, layers: str) -> list[Tensor]:
        return self.denoiser.features(self._base, x, t, cond, layers)


def tuned(denoiser: Denoiser, path: Path) -> nn.Module:
    """The U-Net with what :meth:`Policy.save` wrote; a LoRA is put into the denoiser's own U-Net.

    Raises:
        UserError: it does not fit the model, or is damaged.
    """
    unet: Any = denoiser.unet
    if path.is_dir():
        try:
            return type(unet).from_pretrained(str(path)).to(unet.device).eval().requires_grad_(False)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path} cannot be put into {denoiser.name}: {first_line(error)}") from error
    load_lora(denoiser, unet, path)
    return unet.eval().requires_grad_(False)


def put_loras(denoiser: Any, unet: nn.Module, loras: Sequence[tuple[Path, float]]) -> None:
    """Put LoRA files of any layout that diffusers reads into ``unet`` (and the text encoders), each at its scale.

    Those that the U-Net has already, as of :func:`tuned`, stay at scale 1.

    Raises:
        UserError: a file does not fit the model, or is damaged.
    """
    if not loras:
        return
    pipeline: Any = denoiser.pipeline(unet)
    scales = {str(name): 1.0 for name in getattr(unet, "peft_config", {})}
    for number, (path, scale) in enumerate(loras):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
            _load(denoiser, pipeline, path, f"lora{number}")
        scales[f"lora{number}"] = scale
    pipeline.set_adapters(list(scales), list(scales.values()))
    unet.eval().requires_grad_(False)


def find_lora(path: str | Path) -> Path:
    """The file of a LoRA named by itself or by its folder; of its weights only the names are read.

    Raises:
        UserError: it is missing, no safetensors file, holds nothing for a U-Net, or more than its matrices, or not every alpha.
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


def load_lora(denoiser: Denoiser, unet: nn.Module, path: str | Path) -> None:
    """Put a LoRA, in the layout of diffusers or kohya, into ``unet`` (the denoiser's own or a twin), in float32 as in training.

    Raises:
        UserError: as :func:`find_lora`, or it does not fit the model.
    """
    file = find_lora(path)
    _load(denoiser, denoiser.pipeline(unet), file, "default")
    with safe_open(file, "pt") as opened:
        given = sum(name.endswith(".weight") and "lora" in name for name in opened.keys())  # noqa: SIM118
    found = [parameter for name, parameter in unet.named_parameters() if LORA in name]
    if len(found) != given:
        raise UserError(
            f"{file} does not fit {denoiser.name}: {len(found)} of its {given} matrices found their layer; "
            "was it trained for another family of models?"
        )
    for parameter in found:
        parameter.data = parameter.data.float()


def _load(denoiser: Any, pipeline: Any, file: Path, adapter: str) -> None:
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


def save_lora(denoiser: Denoiser, unet: Any, folder: str | Path) -> Path:
    """Write the LoRA of ``unet`` in diffusers' layout, with alpha in its metadata; returns the file."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, metadata = get_peft_model_state_dict(unet), _collate_lora_metadata({"unet": unet})
    for told in metadata.values():
        if isinstance(told["target_modules"], list):  # of a set, in an order that is another in every process
            told["target_modules"].sort()
    return replacing(folder / LORA_FILE, lambda partial: denoiser.save_lora(partial, weights, metadata), LORA_FILE)


def replacing(final: Path, write: Callable[[str], Any], name: str = ".") -> Path:
    """Let ``write`` make and fill a temporary folder, and put all of it in the place of ``final``, or its safetensors file
    ``name``, the metadata of which are put in order: so that the same weights make the same file."""
    partial = final.with_name(f".{final.name}-saving")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(str(partial))
        if name != ".":
            _order_metadata(partial / name)
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(partial / name, final)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        raise UserError(f"{final} cannot be written ({first_line(error)}): free some space or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _order_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file in place; the library writes them in another order every time."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        opened.seek(8)
        opened.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
