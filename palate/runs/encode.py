"""A recipe's pictures and prompts encoded beforehand."""

from __future__ import annotations

from palate.base.errors import UserError
from palate.runs.evidence import encoded_of, readers_of, validation_reader
from palate.runs.loading import at_home, denoiser_of
from palate.runs.ready import check_cache, tell_needs
from palate.runs.recipe import Recipe


def encode(recipe: Recipe, part: tuple[int, int] = (0, 1)) -> str:
    """Fill the cache with what a training run of ``recipe`` reads; what is there already is kept.

    Args:
        part: index and count, where several machines encode a part each, of the same data, each into a folder of its own or
            all into one.

    Returns:
        What there is now, in words.

    Raises:
        UserError: a recipe whose model draws its own pictures, a mistake in the data, a folder that cannot be written.
    """
    recipe = at_home(recipe)
    if recipe.online.train_prompts is not None:
        raise UserError("this recipe draws its pictures while it trains (train_prompts): there is nothing to encode beforehand")
    check_cache(recipe)
    readers, validation = readers_of(recipe), validation_reader(recipe)
    denoiser = denoiser_of(recipe)
    with denoiser.encoding():
        tell_needs(recipe, denoiser, readers)
        encoded, held_out, _ = encoded_of(recipe, denoiser, readers, validation, part)
    count = len(encoded) + (0 if held_out is None else len(held_out))
    what = "pictures" if readers[0].single else "pairs"
    of = f", part {part[0] + 1} of {part[1]}," if part[1] > 1 else ""
    return f"{count} {what}{of} encoded in {recipe.data.cache_dir}, which takes {encoded.cache.size / 1e9:.3g} GB"
