"""What a run will need of the machine, looked for in its first seconds: packages, folders, room on disk."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

from palate.base.errors import UserError
from palate.base.files import check_folder, nearest_there
from palate.base.machine import tell
from palate.runs.loading import shape_of
from palate.runs.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    if free(folder) < LEAST_FREE:
        raise UserError(f"the disk of {name} {folder} is full: free some space, or name a folder elsewhere with --{name}")


def tell_needs(recipe: Recipe, denoiser: Denoiser, readers: Sequence[Reader]) -> None:
    """Tell what the run takes of disk where that is much, and warn where it is more than there is.

    readers: of the pairs or pictures that will be encoded.
    """
    if rows := rows_of(readers):
        text = sum(tensor.numel() for tensor in denoiser.unconditional().tensors.values())
        shape = denoiser.latent_shape(shape_of(recipe, denoiser))
        wanted = rows * bytes_a_row(recipe, math.prod(shape), text, single=readers[0].single)
        what = f"the cache of encoded pictures (about {rows} rows)"
        _tell_disk(what, wanted, recipe.data.cache_dir, "cache_dir")
        if wanted > (limit := (recipe.data.cache_limit or math.inf) * GB):
            tell(f"warning: {what} may take {wanted / GB:.1f} GB, and cache_limit is {limit / GB:g}: encoding stops there")
    if recipe.policy.train_method == "full":
        wanted = checkpoints_bytes(recipe, sum(p.numel() for p in denoiser.network.parameters()))
        _tell_disk("checkpoints of all weights", wanted, recipe.training.output_dir, "output_dir")


def rows_of(readers: Sequence[Reader]) -> int:
    """About how many rows there are, of those sets that tell it without being read."""
    return sum(reader.rows_about() or 0 for reader in readers)


def bytes_a_row(recipe: Recipe, latents: int, text: int, *, single: bool) -> int:
    """Of a row's pictures and its prompt as they are kept; many rows share them.

    latents, text: numbers in those of a picture and of a prompt.
    """
    pictures = (1 if single else 2) * (2 if recipe.data.random_flip else 1)
    return (4 if recipe.data.cache_precision == "fp32" else 2) * (pictures * latents + text)


def checkpoints_bytes(recipe: Recipe, numbers: int) -> int:
    """Of all checkpoints that lie there at once; numbers: that are trained."""
    # Weights, and the mean and mean square of their gradients; Adafactor keeps almost nothing.
    state = 4 * numbers * (1 if recipe.training.optimizer == "adafactor" else 3)
    return state * (1 + (recipe.training.checkpoints_total_limit or 1))  # one is written before another is removed


def _tell_disk(what: str, wanted: int, folder: str, option: str) -> None:
    there = free(folder)
    if wanted > there:
        tell(
            f"warning: {what} may take {wanted / GB:.1f} GB, and {there / GB:.1f} GB are free in {folder}: free some space, or "
            f"name a folder elsewhere with --{option}"
        )
    elif wanted > WORTH_TELLING:
        tell(f"{what} may take {wanted / GB:.1f} GB; {there / GB:.1f} GB are free in {folder}")


def free(folder: str) -> int:
    """Bytes, on the disk of a folder that need not be there yet."""
    return shutil.disk_usage(nearest_there(folder)).free
