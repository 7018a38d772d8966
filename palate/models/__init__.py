"""Families of diffusion models, and the policy that trains one of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.errors import UserError

if TYPE_CHECKING:
    from palate.models.denoiser import Denoiser

FAMILIES = {"StableDiffusionPipeline": "sd"}
"""Pipeline class named in ``model_index.json`` -> family."""


def load_denoiser(name: str, *, mixed_precision: str = "no", device: str = "cpu", **source: Any) -> Denoiser:
    """Load a pipeline folder or hub id.

    Args:
        name: a folder holding ``model_index.json``, or a hub id.
        mixed_precision: ``no``, ``fp16`` or ``bf16``: precision of the frozen weights.
        source: ``revision``, ``variant``.

    Raises:
        UserError: not a pipeline, an unsupported family, or not reachable.
    """
    from palate.models.denoiser import DTYPES

    if mixed_precision not in DTYPES:
        raise UserError(f"mixed_precision is {mixed_precision!r}; expected one of {', '.join(DTYPES)}")
    source = {k: v for k, v in source.items() if v is not None}
    kind = _pipeline_class(name, source)
    if kind not in FAMILIES:
        raise UserError(f"{name} is a {kind}; supported pipelines: {', '.join(FAMILIES)}")
    from palate.models.sd import StableDiffusion

    try:
        return StableDiffusion(name, dtype=DTYPES[mixed_precision], device=device, **source)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded as a {kind}: {_first_line(error)}") from error


def _pipeline_class(name: str, source: dict[str, Any]) -> str:
    folder = Path(name)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"{name} is not a diffusers pipeline folder: model_index.json is missing; expected the folder written by save_pretrained"
        )
    if not folder.exists() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise UserError(f"no model at {name}: expected a pipeline folder or a hub id such as owner/model")
    from diffusers import DiffusionPipeline

    try:
        config = DiffusionPipeline.load_config(name, **{k: v for k, v in source.items() if k != "variant"})
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is not on this machine and could not be fetched ({_first_line(error)}). Without a network, run "
            f"'hf download {name} --local-dir models/{name.split('/')[-1]}' where there is one, copy the folder here and name it instead"
        ) from error
    return str(config["_class_name"])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
