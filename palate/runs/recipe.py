"""Recipes: YAML and command-line overrides to checked options, and options to assembled objects.

A recipe has eight sections. Every leaf name is unique, so an override may leave its section out:
``--learning_rate 1e-4`` and ``--training.learning_rate 1e-4`` are the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from palate.base.errors import UserError, nearest
from palate.base.files import write_atomically
from palate.base.options import dumps, foreign, help_lines, indented, keywords, parse, section, typed
from palate.data.votes import QUESTIONS, WEIGHTS
from palate.online.options import Arithmetic, OnlineOptions
from palate.training.options import TrainOptions

BUILT_IN = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    pretrained_model_name_or_path: str = "mini-sd"
    """A diffusers pipeline folder, a hub id such as owner/model, or ``mini-sd``, ``mini-sdxl``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Ending of the weight files to read, such as ``fp16``."""


@dataclass(frozen=True)
class DataOptions:
    """Which pairs or pictures it learns from."""

    train_data: str = "miniature-pairs"
    """Parquet, JSONL, JSON, CSV or tar file, a folder of them, a data set of the hub such as owner/name, the ``votes.db`` of
    ``palate vote``, ``miniature-pairs`` or ``miniature-sdxl-pairs``."""
    resolution: int | None = None
    """Side of the pictures in pixels, a multiple of 8; the model's own unless given."""
    ties: str = "drop"
    """``drop``, or ``keep`` as a label of one half."""
    max_bad_rows: int = 0
    """So many unusable rows are listed and skipped; one more stops the run before training."""
    max_train_samples: int | None = None
    """Read no more pairs than this."""
    absolute_winners: bool = False
    """Keep the pairs whose better picture won all its comparisons under that prompt, as Noise-Conditioned Perception does."""
    deduplicate: bool = False
    """Of several pairs of the same two pictures under a prompt, keep the first."""
    max_pairs_per_prompt: int | None = None
    """Keep the first so many pairs of a prompt; all unless given."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to those of the file, such as ``{prompt: text}``."""
    vote_question: str = "overall"
    """Of ``votes.db``: the votes on ``overall``, ``appeal`` or ``following``."""
    vote_weights: str = "equal"
    """Of ``votes.db``: ``equal``, or ``agreement`` to weigh a vote by how far its rater agrees with others beyond chance."""
    center_crop: bool = True
    """Crop the middle square; false for a place drawn once per pair."""
    random_flip: bool = False
    """Mirror both pictures of a pair, every other time."""
    validation_fraction: float = 0.05
    """Share of the pairs held out, by prompt, to measure implicit accuracy; 0 for none."""
    validation_data: str | None = None
    """Pairs to measure it on instead, named as ``train_data`` is; what shares a prompt with them is not trained on."""
    cache_dir: str = "~/.cache/palate"
    """Encoded pictures and prompts are kept here and reused by later runs."""

    def __post_init__(self) -> None:
        _choose("ties", self.ties, ("drop", "keep"))
        _choose("vote_question", self.vote_question, QUESTIONS)
        _choose("vote_weights", self.vote_weights, WEIGHTS)
        _at_least(self, 0, "max_bad_rows")
        _at_least(self, 1, "max_train_samples", "max_pairs_per_prompt")
        if self.resolution is not None:
            from palate.data.images import check_resolution

            check_resolution(self.resolution)
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction is {self.validation_fraction}; expected 0 (none) or more, and below 1")


@dataclass(frozen=True)
class PolicyOptions:
    """Which weights move."""

    train_method: str = "lora"
    """``lora``, or ``full`` for all weights of the U-Net."""
    pretrained_lora: str | None = None
    """A LoRA (file, or folder of a run) to train on: the model with it is the reference, and the result holds the whole change.
    Its own rank, strength and layers stand in place of the three options below."""
    rank: int = 16
    """Of the LoRA matrices."""
    lora_alpha: float | None = None
    """Strength of the LoRA is lora_alpha / rank; equal to rank unless given."""
    lora_layers: str = "attention"
    """``attention``, or ``all``: also the feed-forward and convolution layers, nearer to full training."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: a third slower, far less memory."""

    def __post_init__(self) -> None:
        _choose("train_method", self.train_method, ("lora", "full"))
        _choose("lora_layers", self.lora_layers, ("attention", "all"))
        if self.pretrained_lora is not None and self.train_method != "lora":
            raise UserError("pretrained_lora continues a LoRA, but train_method is full; use lora, or merge the LoRA first")
        _at_least(self, 1, "rank")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise UserError(f"lora_alpha is {self.lora_alpha}; expected a positive number")


@dataclass(frozen=True)
class EvaluationOptions:
    """How base and tuned model are compared afterwards."""

    evaluation_prompts: str | None = None
    """A text or JSONL file, a list such as ``miniature-unseen``, or ``module:function``; no comparison without it."""
    num_evaluation_prompts: int | None = None
    """Only the first of them; all unless given."""
    images_per_prompt: int = 1
    """Pictures of each prompt, from different noise."""
    num_inference_steps: int = 25
    """Steps of the model's own sampler."""
    guidance_scale: float = 5.0
    """Of classifier-free guidance."""
    refiner: str | None = None
    """Folder or hub id of SDXL's refiner, which finishes the pictures of both models; none unless given."""
    refiner_start: float = 0.8
    """Share of the denoising that is done when the refiner takes over."""
    evaluation_seed: int = 1234
    """Picture i is drawn from noise of this seed + i, by both models."""
    evaluation_batch_size: int = 8
    """Pictures drawn at once."""
    judges: tuple[str, ...] = ()
    """``mini-heldout``, ``mini-pickscore``, ``mini-clip``, ``mini-aesthetic``; ``pickscore``, ``hpsv2.1``, ``imagereward`` and
    others with the published weights; ``kind:folder`` such as ``pickscore:models/PickScore_v1``; docs/judges.md lists all."""
    validation_prompts: tuple[str, ...] = ()
    """Shown in the sample pictures during training."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_evaluation_prompts", "images_per_prompt", "num_inference_steps", "evaluation_batch_size")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected 0 or more")
        if not 0 < self.refiner_start < 1:
            raise UserError(f"refiner_start is {self.refiner_start}; expected a number between 0 and 1")
        if self.evaluation_seed < 0:
            raise UserError(f"evaluation_seed is {self.evaluation_seed}; expected 0 or more")


def _choose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}{nearest(value, known)}")


def _at_least(options: Any, least: int, *names: str) -> None:
    for name in names:
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{name} is {value}; expected at least {least}")


def _given(options: Any) -> str:
    """The names of those options that are not at their default."""
    return ", ".join(f.name for f in fields(options) if getattr(options, f.name) != getattr(type(options)(), f.name))


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run. Objective and space are checked and completed by their defaults."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "dpo"})
    space: dict[str, Any] | list[dict[str, Any]] = field(default_factory=lambda: {"name": "latent"})
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    online: OnlineOptions = field(default_factory=OnlineOptions)
    training: TrainOptions = field(default_factory=TrainOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", _complete_objective(self.objective))
        object.__setattr__(self, "space", _complete_space(self.space))
        self._check_online()

    def _check_online(self) -> None:
        """Objective, rollouts and loop must fit together."""
        _, evidence = resolve_objective(self.objective)
        if self.online.train_prompts is None:
            if evidence == "trajectories":
                raise UserError(f"objective {self.objective['name']} learns from the model's own pictures: name train_prompts")
            if given := _given(self.online):
                raise UserError(
                    f"without train_prompts these options do nothing: {given}; name train_prompts, or leave them out"
                )
            return
        if "train_data" in _given(self.data).split(", "):
            raise UserError(
                f"train_data {self.data.train_data} would not be read: with train_prompts the model draws what it learns "
                "from; leave one of the two out"
            )
        arithmetic = Arithmetic.of(self.online, evidence)
        if self.objective.get("beta") == AUTO:
            raise UserError("beta auto is chosen from pairs that are there before training: name a number in online training")
        if self.training.caption_dropout:
            raise UserError("caption_dropout is for training on pictures that were not drawn from the prompt: leave it out")
        if self.objective["name"] == "ddpo_sf" and arithmetic.updates > 1:
            raise UserError(
                f"objective ddpo_sf is right for one update a round, not {arithmetic.updates}: set updates_per_round and "
                "inner_epochs to 1, or use ddpo_is"
            )
        if evidence != "trajectories" and self.online.kl_weight:
            raise UserError(
                f"kl_weight does nothing with objective {self.objective['name']}, which has no likelihoods: leave it out"
            )
        if evidence == "trajectories" and self.space != {"name": "latent"}:
            raise UserError(f"objective {self.objective['name']} measures likelihoods, not errors: leave out space")

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists, as written to ``recipe.yaml``."""
        return _plain(dataclasses.asdict(self))


SECTIONS = {f.name: f for f in fields(Recipe)}
OPTIONS: dict[str, str] = {
    leaf.name: section
    for section, kind in (
        ("model", ModelOptions),
        ("data", DataOptions),
        ("policy", PolicyOptions),
        ("online", OnlineOptions),
        ("training", TrainOptions),
        ("evaluation", EvaluationOptions),
    )
    for leaf in fields(kind)
}
"""Leaf name -> section."""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# Reading ---------------------------------------------------------------------------------------------------------------


def built_in() -> dict[str, Path]:
    """Names of the recipes that come with Palate."""
    return {path.stem: path for path in sorted(BUILT_IN.glob("*.yaml"), key=lambda path: path.stem)}


def find(name: str) -> Path:
    """A recipe by name or path."""
    known = built_in()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"no recipe file at {name}; 'palate recipes' lists those that come with Palate")
    raise UserError(f"no recipe named {name!r}{nearest(name, known)}; or give the path of a .yaml file")


def load(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by name or path and apply overrides such as ``{"max_train_steps": 3, "objective.beta": 2000}``."""
    path = find(name)
    try:
        content = parse(path.read_text(encoding="utf-8"), str(path))
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected sections such as {', '.join(SECTIONS)}")
    # A name first: --objective.beta 9 --objective dpo means the same in either order.
    for key, value in sorted((overrides or {}).items(), key=lambda item: "." in item[0]):
        _override(content, key, value)
    return build(content, str(path))


def _override(content: dict[str, Any], key: str, value: Any) -> None:
    head, _, tail = key.partition(".")
    if head in ("objective", "space"):
        before = content.get(head)
        if isinstance(before, str):
            before = {"name": before}
        if tail:
            before = {"name": getattr(Recipe(), head)["name"]} if before is None else before
            if not isinstance(before, dict):
                raise UserError(f"--{key}: {head} is a list in this recipe; override it in a copy of the file")
            content[head] = {**before, tail: value}
            return
        named = value if isinstance(value, dict | list) else {"name": value}
        # Keep the keywords of the recipe when its own name is repeated; another name starts from its own defaults.
        if isinstance(before, dict) and isinstance(named, dict) and before.get("name") == named.get("name"):
            named = {**before, **named}
        content[head] = named
        return
    if tail and head not in SECTIONS:
        raise UserError(f"unknown option --{key}: no section {head!r}{nearest(head, SECTIONS)}")
    name = tail or head
    if OPTIONS.get(name) is None or (tail and OPTIONS[name] != head):
        close = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.5)
        hint = f"did you mean --{close[0]}? " if close else ""
        raise UserError(f"unknown option --{key} ({hint}'palate train --help' lists them)")
    section = content.get(OPTIONS[name]) or {}
    if isinstance(section, dict):  # anything else is refused by build
        content[OPTIONS[name]] = {**section, name: value}


def build(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check nested dictionaries and make a :class:`Recipe`."""
    kinds = typing.get_type_hints(Recipe)
    made: dict[str, Any] = {}
    for name, value in content.items():
        if name not in SECTIONS:
            raise UserError(f"{where}: unknown section {name!r}{nearest(str(name), SECTIONS)}")
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            made[name] = section(kind, {} if value is None else value, f"{where}: {name}")  # type: ignore[arg-type]
        elif value is not None:
            complete = _complete_objective if name == "objective" else _complete_space
            made[name] = complete({"name": value} if isinstance(value, str) else value)
    return Recipe(**made)


# Names to functions ------------------------------------------------------------------------------------------------------


def _objective(name: str) -> tuple[Callable[..., Any], str]:
    from palate.objectives import pairs, samples, trajectories

    rooms = ((pairs, "pairs"), (samples, "samples"), (trajectories, "trajectories"))
    known = {n: (getattr(m, n), evidence) for m, evidence in rooms for n in m.__all__}
    if name in known:
        return known[name]
    if ":" not in name:
        raise UserError(f"no objective named {name!r}{nearest(name, known)}; or package.module:function")
    function = foreign(name)
    first = next(iter(inspect.signature(function).parameters.values()), None)
    annotation = str(first.annotation) if first is not None else ""
    if first is not None and first.name == "log_prob":
        return function, "trajectories"
    if "Pair" not in annotation and "Fit" not in annotation:
        raise UserError(
            f"{name}: its first argument must be log_prob for trajectories, or annotated, policy: Pair[Fit] for pairs "
            "or Fit for single pictures"
        )
    return function, "pairs" if "Pair" in annotation else "samples"


def _complete_objective(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise UserError(f"objective is {options!r}; expected a name such as {{name: dpo, beta: 5000}}")
    name, given = options["name"], {k: v for k, v in options.items() if k != "name"}
    function, evidence = _objective(name)
    auto = {"beta": AUTO} if given.get("beta") == AUTO else {}
    complete = keywords(function, {**given, "beta": 1.0} if auto else given, f"objective {name}")
    if ":" not in name:
        for key, value in complete.items():  # a sign that is wrong would train towards what was rejected, without a word
            if (isinstance(value, float) and not 0 <= value < math.inf) or (key, value) == ("beta", 0):
                wanted = "a positive number" if key == "beta" else "0 or more"
                raise UserError(f"objective {name}: {key} is {value}; expected {wanted}")
        _try_objective(functools.partial(function, **complete), evidence)
    return {"name": name, **complete, **auto}


def _try_objective(objective: Callable[..., Any], evidence: str) -> None:
    """Called once on nothing, so that values out of range are refused before any weights are loaded."""
    import torch

    from palate.diffusion.denoising import Fit, Pair

    nothing = Fit(torch.zeros(1, 1))
    fit = Pair(nothing, nothing) if evidence == "pairs" else nothing
    known = {"policy": fit, "reference": fit, "label": torch.ones(1), "reference_point": torch.zeros(())}
    known |= dict.fromkeys(("log_prob", "old_log_prob", "advantage", "moved"), torch.zeros(1))
    objective(**{name: known[name] for name in inspect.signature(objective).parameters if name in known})


def resolve_objective(options: Mapping[str, Any]) -> tuple[Callable[..., Any], str]:
    """The objective with its keywords bound, and the evidence it needs: ``pairs``, ``samples`` or ``trajectories``.

    An automatic beta is bound to nan: the step that chooses it gives it with every call.
    """
    complete = _complete_objective(options)
    if complete.get("beta") == AUTO:
        complete["beta"] = math.nan
    function, evidence = _objective(complete.pop("name"))
    return functools.partial(function, **complete), evidence


AUTO = "auto"
"""As an objective's beta: chosen before training from the spread of errors."""
SPACES = ("latent", "perceptual")


def _complete_space(options: Any) -> dict[str, Any] | list[dict[str, Any]]:
    from palate import spaces

    parts = options if isinstance(options, list) else [options]
    made = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
            raise UserError(f"space is {part!r}; expected a name such as {{name: perceptual, layers: mid}}")
        name, given = part["name"], {k: v for k, v in part.items() if k != "name"}
        if name not in SPACES:
            raise UserError(f"no space named {name!r}{nearest(name, SPACES)}")
        weight = {"weight": typed(float, given.pop("weight", 1.0), "weight of a space")} if isinstance(options, list) else {}
        made.append({"name": name, **weight, **keywords(getattr(spaces, name), given, f"space {name}")})
    complete = made if isinstance(options, list) else made[0]
    # Made once around nothing, so that values out of range are refused before any weights are loaded.
    _make_space(complete, lambda x, t, cond, layers: [], _any_schedule())
    return complete


def _any_schedule() -> Any:
    from palate.diffusion.schedule import Schedule

    return Schedule.from_config({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2})


def resolve_space(options: dict[str, Any] | list[dict[str, Any]], policy: Any) -> Any:
    """The space, around the policy's frozen encoder where it needs one."""
    return _make_space(_complete_space(options), policy.features, policy.schedule)


def _make_space(complete: dict[str, Any] | list[dict[str, Any]], features: Callable[..., Any], schedule: Any) -> Any:
    from palate import spaces

    if isinstance(complete, list):
        return spaces.weighted([(_make_space(part, features, schedule), part["weight"]) for part in complete])
    rest = {k: v for k, v in complete.items() if k not in ("name", "weight")}
    return spaces.latent(**rest) if complete["name"] == "latent" else spaces.perceptual(features, schedule, **rest)


def write(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, whole or not at all."""
    write_atomically(path, dumps(recipe.as_dict()).encode())


# Help --------------------------------------------------------------------------------------------------------------------


def options_help() -> str:
    """Every option of a recipe with its default and what it means, by section."""
    from palate.objectives import pairs, samples, trajectories

    names = " | ".join((*pairs.__all__, *samples.__all__, *trajectories.__all__, "package.module:function"))
    lines = [
        "palate train RECIPE [--option value ...]",
        "",
        "RECIPE is the path of a .yaml file, or one of those that come with Palate:",
        *(f"  {name}" for name in built_in()),
        "",
        "objective",
        *textwrap.wrap(f"--objective {names}", 120, initial_indent="  ", subsequent_indent=" " * 14),
        *indented("Its keywords follow a point: --objective.beta 2000, or auto: chosen from the spread of errors, and shown."),
        "space",
        f"  --space {' | '.join(SPACES)}",
        *indented("Where errors are measured. Keywords likewise: --space.layers mid."),
    ]
    hints = typing.get_type_hints(Recipe)
    for section_name in (name for name in SECTIONS if dataclasses.is_dataclass(hints[name])):
        kind = hints[section_name]
        lines += ["", section_name, *help_lines(kind)]
    return "\n".join(lines)
