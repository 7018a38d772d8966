"""What a recipe learns from: read, encoded, split, told."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from palate.base.errors import UserError
from palate.base.jsonl import JsonObject
from palate.base.machine import is_main, processes, tell
from palate.miniature import world
from palate.models.families import cut_warning
from palate.runs.loading import shapes_of
from palate.runs.methods import Objective
from palate.runs.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from palate.data.cache import TensorCache
    from palate.data.encoded import EncodedPairs, EncodedPictures
    from palate.data.mixture import Mixture
    from palate.data.pairs import Counts, Reader
    from palate.models.denoiser import Denoiser
    from palate.models.policy import Policy
    from palate.training.references import References


def readers_of(recipe: Recipe) -> list[Reader]:
    """The sets of pairs or pictures, in order; the first row of each is read at once: most mistakes are in every row."""
    from palate.data.pairs import read

    options = recipe.data
    readers = [read(world.find_pairs(source), options) for source in (options.train_data, *options.more_train_data)]
    reader, *others = readers
    for more in others:
        if more.single != reader.single:
            kinds = ("single pictures", "pairs") if more.single else ("pairs", "single pictures")
            raise UserError(
                f"{more.source} holds {kinds[0]}, but {reader.source} {kinds[1]}: sets of one recipe are of one kind"
            )
    if reader.single and recipe.method.evidence == "pairs":
        raise UserError(
            f"objective {recipe.objective['name']} compares two pictures, but {options.train_data} holds single ones: use kto "
            "or sft, or name pairs"
        )
    for one in readers:
        next(iter(one))
    return readers


def mixed(
    encoded: EncodedPairs | EncodedPictures, recipe: Recipe, sizes: Sequence[int]
) -> EncodedPairs | EncodedPictures | Mixture:
    """What the loop goes through: the items themselves, or those of several sets as often as the recipe says.

    sizes: of each set, as it was encoded.
    """
    import numpy as np

    from palate.data.mixture import Mixture

    shares = [1.0, *recipe.data.more_train_data.values()]
    if len(shares) == 1:
        return encoded
    sets = np.searchsorted(np.cumsum(sizes), encoded.items.rows, side="right")
    found = Mixture(encoded, sets, shares)
    names = [recipe.data.train_data, *recipe.data.more_train_data]
    told = [
        f"{int((sets == i).sum())} of {name}, {share:g} times"
        for i, (name, share) in enumerate(zip(names, shares, strict=True))
    ]
    tell(f"an epoch has {len(found)}: {'; '.join(told)}")
    return found


def validation_reader(recipe: Recipe) -> Reader | None:
    """The pairs on which implicit accuracy is measured, if they are named; the first is read at once."""
    from palate.data.pairs import read_pairs

    options = recipe.data
    if options.validation_data is None:
        return None
    reader = read_pairs(
        world.find_pairs(options.validation_data),
        max_bad_rows=options.max_bad_rows,
        columns=options.columns,
        caption_prefix=options.caption_prefix,
        vote_question=options.vote_question,
    )
    next(iter(reader))
    return reader


def cache_of(recipe: Recipe) -> TensorCache:
    """Where encoded pictures and prompts are kept."""
    from palate.data.cache import TensorCache

    limit = recipe.data.cache_limit
    return TensorCache(recipe.data.cache_dir, None if limit is None else int(limit * 1e9))


def references_of(recipe: Recipe, policy: Policy, in_any: Callable[[bool], bool] = bool) -> References | None:
    """What is kept of the reference, where draws return. in_any: whether something is so in any process that takes the same
    passes as this one."""
    from palate.training.references import References

    options = recipe.training
    if options.draws_per_pair is None:
        return None
    about = {
        "version": 1,
        "frozen": policy.reference_digest(),
        "space": recipe.space,
        "snr_gamma": options.snr_gamma,
        "precision": [options.mixed_precision, recipe.model.quantize],
    }
    return References(cache_of(recipe), about, targets=options.keep_targets, together=processes() > 1, lacking=in_any)


def encoded_of(
    recipe: Recipe, denoiser: Denoiser, readers: Sequence[Reader], validation: Reader | None, part: tuple[int, int] = (0, 1)
) -> tuple[EncodedPairs | EncodedPictures, EncodedPairs | EncodedPictures | None, list[int]]:
    """What is trained on, and the held-out pairs or None, which share no prompt; and how many each set had.

    readers: as :func:`readers_of` gives them.
    part: as :func:`palate.data.encode.encode` takes it.
    """
    import torch

    from palate.data.encode import encode
    from palate.data.encoded import EncodedPairs
    from palate.data.items import Items
    from palate.training.place import meeting

    options = recipe.data
    encoders = denoiser.encoders()
    how: dict[str, Any] = {
        "cache": cache_of(recipe),
        "dtype": {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.cache_precision],
        "processes": meeting(),
        "part": part,
        "shapes": shapes_of(recipe, denoiser),
        "random_flip": options.random_flip,
        "center_crop": options.center_crop,
        "seed": recipe.training.seed,
        "progress": is_main() and sys.stderr.isatty(),
    }
    what = "pictures" if readers[0].single else "pairs"
    sets: list[EncodedPairs | EncodedPictures] = []
    for reader in readers:
        sets.append(encode(reader, encoders, **how))
        of = f"{reader.source}: " if len(sets) > 1 else ""
        _say_counts(reader.counts, what, of)
        for told in sets[-1].fitted.words():
            tell(f"{of}{told}")
    sizes, encoded = [len(one) for one in sets], sets[0]
    if len(sets) > 1:
        encoded = type(encoded)(Items.joined([one.items for one in sets]), encoded.cache)
    if told := cut_warning(denoiser, encoded.prompts):
        tell(told)
    if validation is not None:
        held_out = encode(validation, encoders, **how)
        _say_counts(validation.counts, "pairs", f"{options.validation_data}: ")
        kept = encoded.without_prompts(held_out.prompts)
        if len(kept) < len(encoded):
            tell(f"{len(encoded) - len(kept)} left out, whose prompts are in {options.validation_data}")
        return kept, held_out, sizes
    # Implicit accuracy is of pairs; single pictures are all trained on.
    if isinstance(encoded, EncodedPairs) and options.validation_fraction > 0 and len(set(encoded.prompts)) > 1:
        return *encoded.split(options.validation_fraction, recipe.training.seed), sizes
    return encoded, None, sizes


def learnable(encoded: EncodedPairs | EncodedPictures, objective: Objective) -> EncodedPairs | EncodedPictures:
    """What an objective can learn from."""
    from palate.data.encoded import EncodedPairs

    if objective.evidence == "pairs" or (objective.names("label") and not isinstance(encoded, EncodedPairs)):
        return encoded
    found = encoded.without_ties() if isinstance(encoded, EncodedPairs) else encoded.liked()
    if lost := len(encoded) - len(found):
        tell(
            f"{lost} {'ties' if isinstance(encoded, EncodedPairs) else 'disliked pictures'} left out, of which it cannot learn"
        )
    return found


LOOKED_AT = 128
"""Pairs whose latents are compared before training."""


def doubts(encoded: EncodedPairs | EncodedPictures, objective: Objective) -> list[str]:
    """What of the data cannot be learned from, in words: pictures, labels or pairs that are alike."""
    from palate.data.encoded import EncodedPairs

    found = ["there is only one to learn from: it is learned by heart"] if len(encoded) == 1 else []
    if isinstance(encoded, EncodedPairs):
        found += _alike(encoded)
        if objective.evidence == "pairs" and (encoded.items.label == 0.5).all():
            found.append("all pairs are ties, which say of no picture that it is the better one: name pairs with a winner")
    elif objective.names("label") and len(set((encoded.items.label > 0.5).tolist())) == 1:
        found.append("all pictures have the same vote: this objective learns from likes beside dislikes")
    return found


def _alike(encoded: EncodedPairs) -> list[str]:
    """Pairs of one picture, known by the cache's keys, or of two that look the same to the model."""
    from palate.training.alarms import alike

    pictures = encoded.items.pictures[:, :, 0]
    same = int((pictures[:, 0] == pictures[:, 1]).all(axis=-1).sum())
    looked = [pair for pair in encoded.items[:LOOKED_AT] if pair.winner[0] != pair.loser[0]]
    latents = [[encoded.cache.get(keys[0]) or {} for keys in (pair.winner, pair.loser)] for pair in looked]
    close = sum("latents" in one and "latents" in other and alike(one["latents"], other["latents"]) for one, other in latents)
    remedy = "they teach nothing, and only cost time: leave them out"
    told = [f"{same} of {len(encoded)} pairs show one picture twice: {remedy}"] if same else []
    return told + ([f"{close} of {len(looked)} pairs show two pictures that are alike to the model: {remedy}"] if close else [])


def counts_of(counts: Counts) -> JsonObject:
    """What a reader has met, as ``run.json`` tells it."""
    return {
        "rows": counts.rows,
        "ties_dropped": counts.ties_dropped,
        "ties_kept": counts.ties_kept,
        "unlabelled": counts.unlabelled,
        "identical": counts.identical,
        "left_out": dict(counts.left_out),
        "bad_rows": [str(b) for b in counts.bad],
    }


def _say_counts(counts: Counts, what: str, of: str = "") -> None:
    for bad in counts.bad:
        tell(f"skipped {bad}")
    parts = {
        "ties dropped": counts.ties_dropped,
        "ties kept": counts.ties_kept,
        **counts.by_reason(),
        "bad rows skipped": len(counts.bad),
    }
    told = [f"{of}{counts.rows} rows: {counts.pairs} {what}", *(f"{n} {reason}" for reason, n in parts.items() if n)]
    tell(", ".join(told))
