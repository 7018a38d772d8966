"""Recipes: YAML and command-line overrides to checked options, and options to assembled objects.

A recipe has seven sections. Every leaf name is unique, so an override may leave its section out:
``--learning_rate 1e-4`` and ``--training.learning_rate 1e-4`` are the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from palate.errors import UserError, nearest
from palate.training.loop import TrainOptions

BUILT_IN = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    pretrained_model_name_or_path: str = "mini-sd"
    """A diffusers pipeline folder, a hub id, or ``mini-sd``."""
    revision: str | None = None
    variant: str | None = None


@dataclass(frozen=True)
class DataOptions:
    """Which pairs it learns from."""

    train_data: str = "miniature-pairs"
    """Parquet, JSONL, CSV or a folder of them, or ``miniature-pairs``."""
    resolution: int | None = None
    """Side of the pictures in pixels; the model's own unless given."""
    ties: str = "drop"
    """``drop`` or ``keep`` (as half)."""
    max_bad_rows: int = 0
    """So many unusable rows are listed and skipped; one more stops the run before training."""
    max_train_samples: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to those of the file, such as ``{prompt: text}``."""
    center_crop: bool = True
    random_flip: bool = False
    validation_fraction: float = 0.05
    """Share of the prompts held out to measure implicit accuracy."""
    cache_dir: str = "~/.cache/palate"
    """Encoded pictures and prompts are kept here and reused by later runs."""


@dataclass(frozen=True)
class PolicyOptions:
    """Which weights move."""

    train_method: str = "lora"
    """``lora`` or ``full``."""
    rank: int = 16
    lora_alpha: float | None = None
    """Equal to ``rank`` unless given."""
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class EvaluationOptions:
    """How base and tuned model are compared afterwards."""

    evaluation_prompts: str | None = None
    """A text or JSONL file, or ``miniature-unseen``; no comparison without it."""
    num_evaluation_prompts: int | None = None
    images_per_prompt: int = 1
    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    evaluation_seed: int = 1234
    evaluation_batch_size: int = 16
    judges: tuple[str, ...] = ()
    """``mini-heldout``, ``mini-pickscore``, ``mini-clip``, ``mini-aesthetic``, or ``kind:folder`` such as
    ``pickscore:models/PickScore_v1``. The first one gives the headline."""
    validation_prompts: tuple[str, ...] = ()
    """Shown in the sample pictures during training."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "dpo"})
    space: dict[str, Any] | list[dict[str, Any]] = field(default_factory=lambda: {"name": "latent"})
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    training: TrainOptions = field(default_factory=TrainOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, as written to ``recipe.yaml``."""
        return yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(self))))


SECTIONS = {f.name: f for f in fields(Recipe)}
OPTIONS: dict[str, str] = {
    leaf.name: section
    for section, kind in (
        ("model", ModelOptions),
        ("data", DataOptions),
        ("policy", PolicyOptions),
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
    return {path.stem: path for path in sorted(BUILT_IN.glob("*.yaml"))}


def find(name: str) -> Path:
    """A recipe by name or path."""
    known = built_in()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"no recipe file at {name}")
    raise UserError(f"no recipe named {name!r}{nearest(name, known)}; or give the path of a .yaml file")


def load(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by name or path and apply overrides such as ``{"max_train_steps": 3, "objective.beta": 2000}``."""
    path = find(name)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected sections such as {', '.join(SECTIONS)}")
    for key, value in (overrides or {}).items():
        _override(content, key, value)
    return build(content, str(path))


def _override(content: dict[str, Any], key: str, value: Any) -> None:
    head, _, tail = key.partition(".")
    if tail:
        if head not in SECTIONS:
            raise UserError(f"unknown option --{key}: no section {head!r}{nearest(head, SECTIONS)}")
        section = content.setdefault(head, {})
        if not isinstance(section, dict):
            raise UserError(f"--{key}: {head} is a list in this recipe; override it in a copy of the file")
        section[tail] = value
    elif head in ("objective", "space"):
        named = value if isinstance(value, dict | list) else {"name": value}
        before = content.get(head)
        # Keep the keywords of the recipe when its own name is repeated; another name starts from its own defaults.
        if isinstance(before, dict) and isinstance(named, dict) and before.get("name") == named.get("name"):
            named = {**before, **named}
        content[head] = named
    elif head in OPTIONS:
        content.setdefault(OPTIONS[head], {})[head] = value
    else:
        close = difflib.get_close_matches(head, OPTIONS, n=1, cutoff=0.5)
        hint = f"did you mean --{close[0]}? " if close else ""
        raise UserError(f"unknown option --{head} ({hint}'palate train --help' lists them)")


def build(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check nested dictionaries and make a :class:`Recipe`."""
    kinds = typing.get_type_hints(Recipe)
    made: dict[str, Any] = {}
    for name, value in content.items():
        if name not in SECTIONS:
            raise UserError(f"{where}: unknown section {name!r}{nearest(str(name), SECTIONS)}")
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            made[name] = _section(kind, value or {}, f"{where}: {name}")  # type: ignore[arg-type]
        else:
            made[name] = value
    recipe = Recipe(**made)
    resolve_objective(recipe.objective)
    check_space(recipe.space)
    return recipe


def _section(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} holds {value!r}; expected options such as {', '.join(f.name for f in fields(kind)[:3])}")
    hints, known = typing.get_type_hints(kind), {f.name for f in fields(kind)}
    made = {}
    for name, given in value.items():
        if name not in known:
            raise UserError(f"{where}: unknown option {name!r}{nearest(str(name), known)}")
        made[name] = _typed(hints[name], given, f"{where}.{name}")
    return kind(**made)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``; YAML reads 1e-4 as text and 5 as int where a float is meant."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    for option in options:
        origin = typing.get_origin(option) or option
        if option is type(None):
            if value is None:
                return None
        elif origin is bool:
            if isinstance(value, bool):
                return value
        elif origin is float:
            try:
                if not isinstance(value, bool):
                    return float(value)
            except (TypeError, ValueError):
                pass
        elif origin is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        elif origin is tuple:
            if isinstance(value, str):
                return (value,)
            if isinstance(value, Sequence):
                return tuple(str(v) for v in value)
        elif origin is dict:
            if isinstance(value, Mapping):
                return {str(k): str(v) for k, v in value.items()}
        elif origin is str and isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    names = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{where} is {value!r}; expected {names}")


# Names to functions ------------------------------------------------------------------------------------------------------


def _foreign(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name}: {error}; expected package.module:function, importable from here") from error
    if not callable(function):
        raise UserError(f"{name} is {type(function).__name__}; expected a function")
    return function


def _check_keywords(function: Callable[..., Any], given: Mapping[str, Any], what: str) -> None:
    known = {n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name in given:
        if name not in known:
            raise UserError(f"{what} has no option {name!r}{nearest(name, known) if known else ' (it has none)'}")
    parameters = inspect.signature(function).parameters
    missing = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in given]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}; give them beside its name")


def resolve_objective(options: Mapping[str, Any]) -> tuple[Callable[..., Any], str]:
    """The objective with its keywords bound, and the evidence it needs: ``pairs`` or ``samples``."""
    if not isinstance(options, Mapping) or "name" not in options:
        raise UserError(f"objective is {options!r}; expected a name such as {{name: dpo, beta: 5000}}")
    from palate.objectives import pairs, samples

    name, keywords = str(options["name"]), {k: v for k, v in options.items() if k != "name"}
    known = {n: (getattr(pairs, n), "pairs") for n in pairs.__all__} | {n: (getattr(samples, n), "samples") for n in samples.__all__}
    if ":" in name:
        function = _foreign(name)
        first = next(iter(inspect.signature(function).parameters.values()))
        evidence = "pairs" if "Pair" in str(first.annotation) else "samples"
    elif name in known:
        function, evidence = known[name]
    else:
        raise UserError(f"no objective named {name!r}{nearest(name, known)}; or package.module:function")
    _check_keywords(function, keywords, f"objective {name}")
    return partial(function, **{k: _number(v) for k, v in keywords.items()}), evidence


def _number(value: Any) -> Any:
    """Hyperparameters are floats; YAML reads 5000 as an integer and 1e-4 as text."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value


SPACES = ("latent", "perceptual")


def check_space(options: Any) -> None:
    """Refuse unknown spaces and keywords."""
    from palate import spaces

    parts = options if isinstance(options, list) else [options]
    for part in parts:
        if not isinstance(part, Mapping) or "name" not in part:
            raise UserError(f"space is {part!r}; expected a name such as {{name: perceptual, layers: mid}}")
        if part["name"] not in SPACES:
            raise UserError(f"no space named {part['name']!r}{nearest(str(part['name']), SPACES)}")
        rest = {k: v for k, v in part.items() if k != "name" and not (isinstance(options, list) and k == "weight")}
        _check_keywords(getattr(spaces, part["name"]), rest, f"space {part['name']}")


def resolve_space(options: dict[str, Any] | list[dict[str, Any]], policy: Any) -> Any:
    """The space, around the policy's frozen encoder where it needs one."""
    from palate import spaces

    def one(part: Mapping[str, Any]) -> Any:
        rest = {k: v for k, v in part.items() if k not in ("name", "weight")}
        if part["name"] == "latent":
            return spaces.latent(**rest)
        return spaces.perceptual(policy.features, policy.schedule, **rest)

    if isinstance(options, list):
        return spaces.weighted([(one(p), float(p.get("weight", 1.0))) for p in options])
    return one(options)


def write(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True))
    os.replace(temporary, path)
