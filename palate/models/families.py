"""Families of diffusion models by the pipeline class that a folder names, and loading them."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from palate.base.errors import UserError, first_line, short
from palate.base.hub import fetch, has_form_of_id, is_hub_id
from palate.base.options import foreign
from palate.miniature import world

if TYPE_CHECKING:
    import torch

    from palate.models.denoiser import Denoiser, Drawer
    from palate.models.latent import Latent
    from palate.models.refiner import Refiner


@dataclass(frozen=True)
class Family:
    """What is known of a family before its file is read, which needs torch."""

    place: str
    """``module:class``."""
    called: str
    """Its models, as people call them."""
    mark: str = ""
    """How a name begins that is in its single files, and in those of no family before it."""

    def load(self) -> type[Latent]:
        """The family's class."""
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)


FAMILIES = {
    "StableDiffusionPipeline": Family("palate.models.sd:StableDiffusion", "Stable Diffusion 1.x and 2.x"),
    "StableDiffusionXLPipeline": Family("palate.models.sdxl:StableDiffusionXL", "SDXL", mark="conditioner."),
    "StableDiffusion3Pipeline": Family(
        "palate.models.sd3:StableDiffusion3", "Stable Diffusion 3 and 3.5", mark="model.diffusion_model.joint_blocks."
    ),
    "ZImagePipeline": Family("palate.models.zimage:ZImage", "Z-Image"),
    "Flux2KleinPipeline": Family("palate.models.flux2:Flux2Klein", "FLUX.2 klein"),
    "FluxPipeline": Family("palate.models.flux:Flux", "FLUX.1"),
}
"""Pipeline class named in ``model_index.json`` -> family."""


REFINER = "StableDiffusionXLImg2ImgPipeline"


SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".bin")


_OUTSIDE = re.compile(r"([A-Za-z_][\w.]*:\w+)@(.+)")
"""How the model of a family from outside is named: ``package.module:Class@FOLDER``."""


def family_of(kind: str) -> type[Latent]:
    """The family of what :func:`check_model` returned."""
    return FAMILIES[kind].load() if kind in FAMILIES else foreign(kind)  # type: ignore[return-value]


def _folder(name: str) -> str:
    """The folder or hub id in the name of a model."""
    outside = _OUTSIDE.fullmatch(name)
    return world.find_model(outside[2] if outside else name)


def load_denoiser(
    name: str,
    *,
    mixed_precision: str = "no",
    device: str = "cpu",
    home: str | None = None,
    quantize: str | None = None,
    outline: str | None = None,
    **source: str | None,
) -> Denoiser:
    """Load a pipeline folder or hub id.

    Args:
        name: a folder holding ``model_index.json``, a hub id, ``mini-sd`` or ``mini-sdxl``; of a family that does not come with
            Palate ``package.module:Class@FOLDER``.
        mixed_precision: ``no``, ``fp16`` or ``bf16``: precision of the frozen weights.
        home: where the network lies until it is put on the device; there unless given.
        quantize: ``int8`` or ``nf4``: number format of those of the network's blocks, instead.
        outline: read configurations alone: ``shapes`` for no weights, ``random`` for random ones.
        source: ``revision``, ``variant``.

    Raises:
        UserError: not a pipeline, an unsupported family, or not reachable.
    """
    given = {k: v for k, v in source.items() if v}
    kind = check_model(name, revision=given.get("revision"))
    family, more = family_of(kind), {k: v for k, v in {"home": home, "outline": outline}.items() if v is not None}
    try:
        return family(_folder(name), dtype=_dtype(mixed_precision), device=device, quantize=quantize, **more, **given)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded as a {kind}: {first_line(error)}") from error


def load_drawer(
    name: str, *, mixed_precision: str = "no", device: str = "cpu", quantize: str | None = None, **source: str | None
) -> Drawer:
    """As :func:`load_denoiser`, and of other families a :class:`palate.models.other.OtherPipeline`, which only draws."""
    given = {k: v for k, v in source.items() if v}
    name = world.find_model(name)
    kind = "" if _OUTSIDE.fullmatch(name) else _pipeline_class(name, given.get("revision"))
    if not kind or kind in FAMILIES or kind == REFINER:
        return load_denoiser(name, mixed_precision=mixed_precision, device=device, quantize=quantize, **source)
    if quantize is not None:
        raise UserError(f"quantize is for models that can be trained here, and {name} is a {kind}: leave it out")
    from palate.models.other import OtherPipeline

    return OtherPipeline(name, dtype=_dtype(mixed_precision), device=device, **given)


def load_refiner(
    name: str, *, start: float = 0.8, mixed_precision: str = "no", device: str = "cpu", **source: str | None
) -> Refiner:
    """Load SDXL's refiner, which takes over when ``start`` of the denoising is done; arguments as :func:`load_denoiser`.

    Raises:
        UserError: not a refiner, parts of it missing, or not reachable.
    """
    given = {k: v for k, v in source.items() if v}
    check_refiner(name, revision=given.get("revision"))
    from palate.models.refiner import Refiner

    try:
        return Refiner(name, start=start, dtype=_dtype(mixed_precision), device=device, **given)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded as a refiner: {first_line(error)}") from error


def cut_warning(denoiser: Drawer, texts: Iterable[str | None]) -> str:
    """What to tell of prompts, negative ones too, that are longer than the text encoder reads; empty if none is."""
    cut, limit = denoiser.cut_prompts([text for text in texts if text is not None])
    which, what = ("1 prompt is", "its end is") if cut == 1 else (f"{cut} prompts are", "their ends are")
    return f"{which} longer than the {limit} tokens that the text encoder reads: {what} not seen" if cut else ""


def _dtype(mixed_precision: str) -> torch.dtype:
    from palate.models.denoiser import DTYPES

    if mixed_precision not in DTYPES:
        raise UserError(f"mixed_precision is {mixed_precision!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[mixed_precision]


def check_model(name: str, *, revision: str | None = None) -> str:
    """The pipeline class of a folder or hub id, or ``package.module:Class`` of a family from outside; reads no weights.

    Raises:
        UserError: as :func:`load_denoiser`.
    """
    name = world.find_model(name)
    if outside := _OUTSIDE.fullmatch(name):
        family_of(outside[1])  # refused here if it cannot be imported
        _pipeline_class(_folder(name), revision)
        return outside[1]
    kind = _pipeline_class(name, revision)
    if kind == REFINER:
        raise UserError(f"{name} is a refiner ({kind}), which only finishes pictures: give the base model here")
    if kind not in FAMILIES:
        called = ", ".join(family.called for family in FAMILIES.values())
        raise UserError(
            f"{name} is a {kind}; supported pipelines: {', '.join(FAMILIES)} ({called}, and their Turbo kinds); others can "
            "only draw, by palate generate"
        )
    return kind


def check_refiner(name: str, *, revision: str | None = None) -> None:
    """Raise ``UserError`` unless a folder or hub id is SDXL's refiner, its weights (of a folder) sound."""
    kind = _pipeline_class(name, revision)
    if kind != REFINER:
        raise UserError(f"{name} is a {kind}, not a refiner: expected a {REFINER}, such as SDXL's refiner 1.0")
    missing = [p for p in ("unet", "text_encoder_2", "tokenizer_2") if Path(name).is_dir() and not Path(name, p).is_dir()]
    if missing:
        raise UserError(f"the refiner {name} lacks {', '.join(f'{p}/' for p in missing)}; download it again")
    from palate.models.parts import Source
    from palate.models.refiner import check_parts

    source = Source(name, "cpu", **({} if revision is None else {"revision": revision}))
    try:
        check_parts(source)
        for part in ("unet", "text_encoder_2"):
            source.check_finite(part)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded as a refiner: {first_line(error)}") from error


def _pipeline_class(name: str, revision: str | None) -> str:
    """What ``model_index.json`` names."""
    folder = Path(name)
    if folder.is_file() and folder.suffix in SINGLE_FILES:
        raise UserError(_of_single_file(name))
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"{name} is not a diffusers pipeline folder: model_index.json is missing; "
            "expected the folder that save_pretrained of a pipeline wrote"
        )
    if not folder.exists() and not is_hub_id(name):
        shown = short(name, 100, quoted=False)
        how = f" (one of the hub: hf download {name} --local-dir {name})" if has_form_of_id(name) else ""
        raise UserError(
            f"no model at {shown}: {_here(folder)}; expected a pipeline folder or a hub id such as owner/model{how}"
        )
    index = folder / "model_index.json" if folder.exists() else _fetch_index(name, revision)
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model_index.json of {name} is damaged ({first_line(error)}); download the model again") from error


def _here(missing: Path) -> str:
    """Which folder on the way there is none of, and what is there instead."""
    there = next((p for p in missing.parents if p.is_dir()), Path())
    wanted = missing.relative_to(there).parts[0] if missing.is_relative_to(there) and missing != there else missing.name
    names = [p.name for p in sorted(there.iterdir())[:1000] if p.is_dir()]
    close = difflib.get_close_matches(wanted, names, n=1)
    return f"{'here' if there == Path() else there} is no folder {short(wanted)}" + (f", but {close[0]!r}" if close else "")


def _of_single_file(name: str) -> str:
    """What to do with a file where a pipeline folder is expected; of weights only the names are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(name, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError):
        names = []  # pickled, or damaged
    if any("lora" in part for part in names):
        return f"{name} is a LoRA, no model: name the model it belongs to, and give the file by --lora or --pretrained_lora"
    marked = {kind: family for kind, family in FAMILIES.items() if family.mark}
    kind = next(iter(FAMILIES))
    for other, family in marked.items():
        kind = other if any(part.startswith(family.mark) for part in names) else kind
    others = ", ".join(f"of {family.called}: {kind}" for kind, family in marked.items())
    return (
        f"{name} is a single file, which tells neither its configuration nor how it predicts; make a pipeline folder of it: "
        f"python -c \"from diffusers import {kind} as P; P.from_single_file({name!r}).save_pretrained('FOLDER')\""
        f"{'' if names else f' ({others})'}; without a network add config=OTHER behind the file, any "
        "pipeline folder of the same kind; if it predicts v, say so in FOLDER/scheduler/scheduler_config.json: "
        "prediction_type v_prediction"
    )


def _fetch_index(name: str, revision: str | None) -> Path:
    short = name.split("/")[-1]
    how = (
        f"If you meant a folder, there is none of this name here. "
        f"Without a network, run 'hf download {name} --local-dir models/{short}' where there is one, copy the folder here and "
        f"give --pretrained_model_name_or_path models/{short}"
    )
    return fetch(name, "model_index.json", revision=revision, otherwise=how)


def quiet_loading() -> None:
    """No bars while weights are read from disk; those of downloads stay."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    wanted = not are_progress_bars_disabled()
    of_transformers.disable_progress_bar()  # which disables those of downloads too
    of_diffusers.disable_progress_bar()
    if wanted:
        enable_progress_bars()
