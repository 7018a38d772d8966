"""How often judges, and the implicit rewards of tuned models, prefer the picture that people preferred."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from palate.base.errors import UserError
from palate.base.files import check_file, check_folder, write_atomically
from palate.base.options import Batch, Count, OneOf, Seed, Steps, at_least, check_ranges
from palate.base.shapes import Shape
from palate.evaluation.accuracy import accuracy
from palate.evaluation.statistics import WinRate
from palate.miniature import world
from palate.names.judges import find_judges
from palate.runs.label import judge_margins
from palate.runs.methods import SpaceOptions, bind_space, check_space, complete_space
from palate.runs.models import NamedModel, find_model

if TYPE_CHECKING:
    from palate.data.pairs import Reader
    from palate.models.denoiser import Denoiser

SPACES = ("latent", "perceptual")


@dataclass(frozen=True)
class AccuracyOptions:
    """Whose preferences are compared with the labels."""

    judges: tuple[str, ...] = ()
    """Names of judges."""
    model: tuple[str, ...] = ()
    """Folders of finished runs, whose implicit reward is measured against their base model."""
    lora: tuple[str, ...] = ()
    """With ``--model`` a pipeline folder or hub id: what it was tuned by, each as a file with ``:scale`` if not 1."""
    space: Annotated[tuple[str, ...], OneOf(*SPACES, "run")] = ("run",)
    """Where implicit rewards are measured: ``latent``, ``perceptual``, both as ``'[latent, perceptual]'``, or ``run``: that
    of the run's own recipe. A run in perceptual space keeps its layers; other transformers have ``half``."""
    timesteps: Steps = 10
    """Times, each with noise of its own, over which an implicit reward is averaged; 10 in the paper."""
    seed: Seed = 0
    """Of times and noise."""
    resolution: int | str | None = None
    """Of the pictures for implicit rewards, as ``1024`` or ``832x1216``; the run's, or the model's own."""
    max_bad_rows: Annotated[int, at_least(0)] = 0
    """So many unusable rows are listed and skipped."""
    max_pairs: Count | None = None
    """Read no more pairs than this."""
    batch_size: Batch = 8
    """Pairs measured at once."""
    cache_dir: str = "~/.cache/palate"
    """Encoded pictures and prompts are kept here."""
    output: str = "accuracy.json"
    """The file to write."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.lora and not self.model:
            raise UserError("lora is put into a model, and none is named: add --model BASE, or leave it out")
        if not self.space:
            raise UserError(f"space is empty; expected one or more of {', '.join((*SPACES, 'run'))}")
        if self.resolution is not None:
            Shape.of(self.resolution)


@dataclass(frozen=True)
class Accuracy:
    """Of one judge or implicit reward: ``rate`` of pairs with a winner that it orders as the labels do, its ties as half."""

    name: str
    kind: str
    accuracy: WinRate


def measure(source: str, options: AccuracyOptions, *, progress: bool = False) -> tuple[list[Accuracy], dict[str, Any]]:
    """All that ``options`` name, on one set of labelled pairs; writes ``options.output``.

    Returns:
        One :class:`Accuracy` each, and what there was: numbers of pairs, ties and prompts.

    Raises:
        UserError: nothing named, a set that cannot be read, a model without training, or all ties.
    """
    from palate.data.pairs import read_pairs

    check_file(options.output, "output")
    judges = find_judges(options.judges)
    models = [find_model(name, loras=options.lora) for name in options.model]
    if not judges and not models:
        raise UserError("name at least one judge or model, such as --judges '[pickscore]' or --model out/run")
    for model in models:
        if model.tuned is None and not model.loras:
            raise UserError(f"{model.label} is not tuned, so it prefers nothing to its base; give a run folder, or --lora FILE")
    if models:
        check_folder(options.cache_dir, "cache_dir")
    reader = read_pairs(
        world.find_pairs(source), ties="keep", max_bad_rows=options.max_bad_rows, max_train_samples=options.max_pairs
    )
    labels, prompts = [], []
    for pair in reader:
        labels.append(pair.label)
        prompts.append(pair.prompt)
    bad, left_out = [str(row) for row in reader.counts.bad], reader.counts.by_reason()
    found = [
        Accuracy(name, named.kind, accuracy(judge_margins(named, reader, 2 * options.batch_size, progress), labels, prompts))
        for name, named in judges.items()
    ]
    for model in models:
        found += _implicit(model, reader, options, progress)
    about = {
        "pairs": len(labels),
        "ties": sum(label == 0.5 for label in labels),
        "prompts": len(set(prompts)),
        "bad_rows": bad,
        "left_out": left_out,
    }
    told = {**about, "source": source, "accuracy": [asdict(one) for one in found]}
    settings = {"timesteps": options.timesteps, "seed": options.seed} if models else {}
    write_atomically(options.output, (json.dumps({**told, **settings}, indent=2, ensure_ascii=False) + "\n").encode())
    return found, about


def _space(name: str, own: SpaceOptions, denoiser: Denoiser) -> SpaceOptions:
    """A space by its name, or ``run``: the run's own where that is it, otherwise as the recipes for such models have it."""
    if name == "run" or (isinstance(own, dict) and own["name"] == name):
        return own
    on_transformer = {"layers": "half", "steps_back": 20} if "half" in denoiser.feature_layers else {}
    return complete_space({"name": name, **(on_transformer if name == "perceptual" else {})})


def _implicit(model: NamedModel, reader: Reader, options: AccuracyOptions, progress: bool) -> list[Accuracy]:
    from palate.data.cache import TensorCache
    from palate.data.encode import encode_pairs
    from palate.training.measures import implicit_margins

    policy = model.load_finished()
    own = model.recipe.space if model.recipe is not None else {"name": "latent"}
    spaces = [_space(name, own, policy.denoiser) for name in options.space]
    for space in spaces:
        check_space(space, policy.denoiser)
    of_run = model.recipe.data.resolution if model.recipe is not None else None
    shape = Shape.of(options.resolution or of_run or policy.denoiser.default_resolution)
    policy.denoiser.check_shape(shape)
    encoded = encode_pairs(
        reader,
        policy.denoiser.encoders(),
        cache=TensorCache(Path(options.cache_dir).expanduser()),
        shapes=[shape],
        progress=progress,
    )
    if (words := policy.words) is not None:
        encoded = encoded.with_words(words)
    policy.denoiser.release()
    found = []
    for name, space in zip(options.space, spaces, strict=True):
        margins, labels = implicit_margins(
            policy,
            bind_space(space, policy),
            encoded,
            seed=options.seed,
            timesteps=options.timesteps,
            batch_size=options.batch_size,
            progress=progress,
        )
        rate = accuracy(margins.tolist(), labels.tolist(), encoded.prompts)
        found.append(Accuracy(f"{model.label} ({name})", "implicit reward", rate))
    return found
