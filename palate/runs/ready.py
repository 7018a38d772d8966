"""What a run will need of the machine, looked for in its first seconds: packages, folders, room on disk, memory."""

from __future__ import annotations

import math
import os
import shutil
from typing import TYPE_CHECKING

from palate.base.errors import UserError
from palate.base.files import check_folder, nearest_there
from palate.base.machine import tell
from palate.runs.loading import shape_of
from palate.runs.recipe import Recipe

if TYPE_CHECKING:
    from palate.data.pairs import Reader
    from palate.models.denoiser import Denoiser

LEAST_FREE = 2**24
"""Bytes: with less no run comes to its end."""
WORTH_TELLING = 2**30
GB = 1e9


def check_machine(recipe: Recipe) -> None:
    """Refuse what cannot come to an end here; reads neither data nor weights.

    Raises:
        UserError: a package that is missing, or a folder that cannot be made or written to, or whose disk is full.
    """
    from palate.models.quantised import check_quantize
    from palate.training.optimizers import check_optimizer
    from palate.training.trackers import check_reporter

    check_optimizer(recipe.training)
    check_quantize(recipe.model.quantize)
    check_reporter(recipe.training.report_to)
    _check_folder(recipe.training.output_dir, "output_dir")
    if recipe.online.train_prompts is None:
        check_cache(recipe)


def check_cache(recipe: Recipe) -> None:
    """Refuse a folder of the cache that cannot be made or written to, or whose disk is full."""
    _check_folder(recipe.data.cache_dir, "cache_dir")


def _check_folder(folder: str, name: str) -> None:
    check_folder(folder, name)
    if _free(folder) < LEAST_FREE:
        raise UserError(f"the disk of {name} {folder} is full: free some space, or name a folder elsewhere with --{name}")


def tell_needs(recipe: Recipe, denoiser: Denoiser, reader: Reader | None) -> None:
    """Tell what the run takes of disk and memory where that is much, and warn where it is more than there is.

    reader: of the pairs or pictures that will be encoded, if any are.
    """
    if reader is not None and (rows := reader.rows_about()) is not None:
        wanted = rows * _bytes_a_row(recipe, denoiser, single=reader.single)
        what = f"the cache of encoded pictures (about {rows} rows)"
        _tell_disk(what, wanted, recipe.data.cache_dir, "cache_dir")
        if wanted > (limit := (recipe.data.cache_limit or math.inf) * GB):
            tell(f"warning: {what} may take {wanted / GB:.1f} GB, and cache_limit is {limit / GB:g}: encoding stops there")
    if recipe.policy.train_method == "full":
        weights = 4 * sum(p.numel() for p in denoiser.network.parameters())  # float32
        # Weights, and the mean and mean square of their gradients; Adafactor keeps almost nothing.
        state = weights * (1 if recipe.training.optimizer == "adafactor" else 3)
        kept = 1 + (recipe.training.checkpoints_total_limit or 1)  # one is written before another is removed
        _tell_disk("checkpoints of all weights", kept * state, recipe.training.output_dir, "output_dir")
        _tell_memory(state + weights, denoiser)


def _bytes_a_row(recipe: Recipe, denoiser: Denoiser, *, single: bool) -> int:
    """Of a row's pictures and its prompt as they are kept; many rows share them."""
    pictures = (1 if single else 2) * (2 if recipe.data.random_flip else 1)
    text = sum(rows.numel() for rows in denoiser.unconditional().tensors.values())
    width = 4 if recipe.data.cache_precision == "fp32" else 2
    return width * (pictures * math.prod(denoiser.latent_shape(shape_of(recipe, denoiser))) + text)


def _tell_disk(what: str, wanted: int, folder: str, option: str) -> None:
    free = _free(folder)
    if wanted > free:
        tell(
            f"warning: {what} may take {wanted / GB:.1f} GB, and {free / GB:.1f} GB are free in {folder}: free some space, or "
            f"name a folder elsewhere with --{option}"
        )
    elif wanted > WORTH_TELLING:
        tell(f"{what} may take {wanted / GB:.1f} GB; {free / GB:.1f} GB are free in {folder}")


def _tell_memory(wanted: int, denoiser: Denoiser) -> None:
    import torch

    where = denoiser.device
    if where.type == "cuda":
        total = torch.cuda.get_device_properties(where).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > total:
        tell(
            f"warning: training all weights takes {wanted / GB:.1f} GB for them, their gradients and the optimizer alone, and "
            f"{where} has {total / GB:.1f} GB: use train_method lora, or optimizer adafactor"
        )


def _free(folder: str) -> int:
    """Bytes, on the disk of a folder that need not be there yet."""
    return shutil.disk_usage(nearest_there(folder)).free
