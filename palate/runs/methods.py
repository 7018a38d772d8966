"""Objectives, draws and spaces: names and keywords in a recipe to functions."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from palate.base.errors import UserError, nearest, said, short
from palate.base.options import foreign, keywords, typed

if TYPE_CHECKING:
    from torch import Tensor

    from palate.diffusion.denoising import Conditioning
    from palate.diffusion.densities import Density
    from palate.diffusion.schedule import Path, Schedule
    from palate.models.denoiser import Denoiser
    from palate.models.policy import Finished, Policy
    from palate.spaces.perceptual import Features
    from palate.spaces.space import Space
    from palate.training.fits import Draws
    from palate.training.options import TrainOptions


AUTO = "auto"
"""As an objective's beta: chosen before training from the spread of errors."""


SPACES = ("latent", "perceptual")


Named = dict[str, Any]
"""A name and its keywords, as a recipe gives an objective or a space."""
SpaceOptions = Named | list[Named]
"""A space, or several with weights."""
Evidence = Literal["pairs", "samples", "trajectories"]
"""What an objective learns from."""


@dataclass(frozen=True)
class Objective:
    """What an objective's name and keywords stand for."""

    function: Callable[..., Tensor]
    """Its keywords are bound; an automatic beta to nan: the step that chooses it gives it with every call."""
    evidence: Evidence
    auto_beta: bool

    def names(self, argument: str) -> bool:
        """Whether it asks for this argument, such as ``label``."""
        return argument in inspect.signature(self.function).parameters


def objectives() -> dict[str, tuple[Callable[..., Tensor], Evidence]]:
    """Every objective that comes with Palate: its function, and what it learns from."""
    from palate.objectives import pairs, samples, trajectories

    return {
        **{n: (getattr(pairs, n), "pairs") for n in pairs.__all__},
        **{n: (getattr(samples, n), "samples") for n in samples.__all__},
        **{n: (getattr(trajectories, n), "trajectories") for n in trajectories.__all__},
    }


def _function(name: str) -> Callable[..., Tensor]:
    known = objectives()
    if name in known:
        return known[name][0]
    if ":" not in name:
        raise UserError(f"no objective named {short(name)}{nearest(name, known)}; or package.module:function")
    return foreign(name)


def _evidence(name: str, function: Callable[..., Tensor]) -> Evidence:
    """What an objective learns from: what it is annotated with, else what it can be called on.

    function: its keywords are bound.
    """
    if (known := objectives().get(name)) is not None:
        return known[1]
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is not None and first.name == "log_prob":
        return "trajectories"
    annotation = "" if first is None or first.annotation is first.empty else str(first.annotation)
    if "Pair" in annotation or "Fit" in annotation:
        return "pairs" if "Pair" in annotation else "samples"
    failures = []
    kinds: tuple[Evidence, ...] = ("pairs", "samples")
    for evidence in kinds:
        try:
            _try_objective(function, evidence)
            return evidence
        except Exception as error:  # of the user's own code, which may raise anything
            failures.append(f"on {evidence} {type(error).__name__}: {said(error)}")
    raise UserError(
        f"{name} raises {', '.join(failures)}; expected a function of policy and reference, where policy.w.error and "
        "policy.l.error are (b,) of better and worse pictures, or policy.error (b,) of single ones"
    )


def complete_objective(options: object) -> Named:
    """An objective as a recipe gives it, with its defaults. Raises UserError: an unknown name or keyword, or out of range."""
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise UserError(f"objective is {short(options)}; expected a name such as {{name: dpo, beta: 5000}}")
    name, given = options["name"], {k: v for k, v in options.items() if k != "name"}
    function = _function(name)
    auto = {"beta": AUTO} if given.get("beta") == AUTO else {}
    complete = keywords(function, {**given, "beta": 1.0} if auto else given, f"objective {name}")
    if ":" not in name:
        for key, value in complete.items():  # a sign that is wrong would train towards what was rejected, without a word
            if (isinstance(value, float) and not 0 <= value < math.inf) or (key, value) == ("beta", 0):
                wanted = "a positive number" if key == "beta" else "0 or more"
                raise UserError(f"objective {name}: {key} is {value}; expected {wanted}")
    bound = functools.partial(function, **complete)
    evidence = _evidence(name, bound)
    if ":" not in name:
        _try_objective(bound, evidence)
    return {"name": name, **complete, **auto}


def check_kept(objective: Objective) -> None:
    """Raise ``UserError`` if an objective reads more of the reference than the errors that ``draws_per_pair`` keeps."""
    _try_objective(objective.function, objective.evidence, kept=True)


def _try_objective(objective: Callable[..., Tensor], evidence: Evidence, *, kept: bool = False) -> None:
    """Called once on nothing, so that values out of range are refused before any weights are loaded; with ``kept``, on a
    reference of which there is the error alone."""
    import torch

    from palate.diffusion.denoising import Fit, Pair

    nothing, error = Fit(torch.zeros(1, 1)), Fit(error=torch.zeros(1))
    fit, bare = (Pair(x, x) if evidence == "pairs" else x for x in (nothing, error))
    known = {
        "policy": fit,
        "reference": bare if kept else fit,
        "old": fit,
        "label": torch.ones(1),
        "reference_point": torch.zeros(()),
    }
    known |= dict.fromkeys(("gain", "sigma"), torch.ones(1))
    known |= dict.fromkeys(("log_prob", "old_log_prob", "advantage", "moved"), torch.zeros(1))
    objective(**{name: known[name] for name in inspect.signature(objective).parameters if name in known})


def bind_objective(complete: Named) -> Objective:
    """What a complete objective, as :func:`complete_objective` gives it, stands for."""
    auto = complete.get("beta") == AUTO
    keywords = {k: v for k, v in complete.items() if k != "name"} | ({"beta": math.nan} if auto else {})
    bound = functools.partial(_function(complete["name"]), **keywords)
    return Objective(bound, _evidence(complete["name"], bound), auto)


def draws_of(options: TrainOptions, path: Path | None = None, *, no_prompt: Conditioning | None = None) -> Draws:
    """What training draws for each item; path: of sampling, where there is any."""
    from palate.training.fits import Draws

    density = _density(options, path)
    return Draws(options.t_min, options.t_max, options.snr_gamma, options.caption_dropout, no_prompt, density)


def _density(options: TrainOptions, path: Path | None) -> Density:
    from palate.diffusion import densities

    if options.time_density == "logit_normal":
        return densities.logit_normal(options.time_mean, options.time_std)
    if options.time_density == "shifted":
        return densities.shifted(options.time_shift)
    if options.time_density == "grid":
        assert path is not None  # Recipe refuses it otherwise
        return densities.grid(path)
    return densities.uniform


def complete_space(options: object) -> SpaceOptions:
    """A space, or several with weights, with their defaults. Raises UserError: an unknown name or keyword, or out of range."""
    parts = options if isinstance(options, list) else [options]
    made = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
            raise UserError(f"space is {short(part)}; expected a name such as {{name: perceptual, layers: mid}}")
        name, given = part["name"], {k: v for k, v in part.items() if k != "name"}
        weight = {"weight": typed(float, given.pop("weight", 1.0), "weight of a space")} if isinstance(options, list) else {}
        made.append({"name": name, **weight, **keywords(_maker(name), given, f"space {name}")})
    complete = made if isinstance(options, list) else made[0]
    # Made once around nothing, so that values out of range are refused before any weights are loaded.
    _make_space(complete, _NO_FEATURES, _any_schedule())
    return complete


_NO_FEATURES: Features = lambda x, t, cond, layers: []  # noqa: E731


def _maker(name: str) -> Callable[..., Space]:
    """What makes a space of this name from its keywords, and from ``features`` and ``schedule`` of the policy where named."""
    from palate import spaces

    if name in SPACES:
        return getattr(spaces, name)
    if ":" not in name:
        raise UserError(f"no space named {short(name)}{nearest(name, SPACES)}; or package.module:function")
    return foreign(name)


def _any_schedule() -> Schedule:
    from palate.diffusion.schedule import from_config

    return from_config({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2})


def check_space(options: SpaceOptions, denoiser: Denoiser) -> None:
    """Raise ``UserError`` if the space needs features, or layers, that the model's family has not."""
    from palate.models.denoiser import features_of

    for part in options if isinstance(options, list) else [options]:
        if part["name"] != "perceptual":
            continue
        features_of(denoiser)
        if part["layers"] not in denoiser.feature_layers:
            raise UserError(
                f"layers {part['layers']} of the perceptual space do not exist in the {denoiser.part_name} of {denoiser.name}; "
                f"choose {', '.join(denoiser.feature_layers)}"
            )


def check_times(options: TrainOptions, space: SpaceOptions, schedule: Schedule) -> None:
    """Raise ``UserError`` unless there is a time to train on: one of the schedule's, at which the space tells outputs apart."""
    from palate.diffusion.denoising import last_time

    last = last_time(schedule, options.t_min, options.t_max)
    first = _make_space(space, _NO_FEATURES, schedule).t_min
    if first > last:
        raise UserError(
            f"the space tells outputs apart from time {first} on, and t_max is {last}: raise t_max, or lower steps_back"
        )


def bind_space(complete: SpaceOptions, policy: Policy | Finished) -> Space:
    """A complete space, as :func:`complete_space` gives it, around the policy's frozen encoder where it needs one."""
    return _make_space(complete, policy.features, policy.schedule)


def _make_space(complete: SpaceOptions, features: Features, schedule: Schedule) -> Space:
    from palate import spaces

    if isinstance(complete, list):
        return spaces.weighted([(_make_space(part, features, schedule), part["weight"]) for part in complete])
    make, rest = _maker(complete["name"]), {k: v for k, v in complete.items() if k not in ("name", "weight")}
    given = {"features": features, "schedule": schedule}
    asked = [name for name in given if name in inspect.signature(make).parameters]
    return make(**{name: given[name] for name in asked}, **rest)
