"""Options of a recipe that have no effect on the run: told, not refused, for another objective leaves some of a recipe over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from palate.runs.sections import DataOptions

if TYPE_CHECKING:
    from palate.runs.recipe import Recipe

HERE_ONLINE = ("resolution", "train_data", "cache_dir")
"""Of the data section: the size of what is drawn; what is refused elsewhere; and a folder, which people name everywhere."""


def idle(recipe: Recipe) -> dict[str, str]:
    """Options that are not at their default and change nothing, and what each is for."""
    found: dict[str, str] = {}
    for section, names, used, purpose in _rules(recipe):
        options = getattr(recipe, section)
        plain = type(options)()
        found |= {n: purpose for n in names if not used and getattr(options, n) != getattr(plain, n)}
    return found


def idle_line(recipe: Recipe) -> str | None:
    """The same in words; None if everything counts."""
    groups: dict[str, list[str]] = {}
    for name, purpose in idle(recipe).items():
        groups.setdefault(purpose, []).append(name)
    told = ", ".join(f"{' and '.join(names)} (for {purpose})" for purpose, names in groups.items())
    return f"without effect here: {told}" if told else None


def _rules(recipe: Recipe) -> Iterator[tuple[str, tuple[str, ...], bool, str]]:
    """Section, options, whether they are used, and what for."""
    policy, training = recipe.policy, recipe.training
    lora = policy.train_method == "lora" and policy.pretrained_lora is None
    yield "policy", ("rank", "lora_alpha", "lora_layers"), lora, "a new LoRA"
    adam, kinds = training.optimizer.startswith("adamw"), "optimizer adamw and adamw_8bit"
    yield "training", ("adam_beta1", "adam_beta2", "adam_epsilon"), adam, kinds
    yield "training", ("adam_weight_decay",), ":" not in training.optimizer, "adamw, adamw_8bit and adafactor"
    yield "evaluation", ("refiner_start",), recipe.evaluation.refiner is not None, "a refiner"
    yield from (_of_pairs(recipe) if recipe.online.train_prompts is None else _of_rollouts(recipe))


def _of_pairs(recipe: Recipe) -> Iterator[tuple[str, tuple[str, ...], bool, str]]:
    yield "data", ("bucket_step", "bucket_aspect"), recipe.data.buckets, "buckets"
    yield "training", ("num_train_epochs",), recipe.training.max_train_steps is None, "runs without max_train_steps"


def _of_rollouts(recipe: Recipe) -> Iterator[tuple[str, tuple[str, ...], bool, str]]:
    online, evidence = recipe.online, recipe.method.evidence
    before = tuple(f.name for f in fields(DataOptions) if f.name not in HERE_ONLINE)
    yield "data", before, False, "what is there before training"
    yield "training", ("num_train_epochs",), False, "what is there before training"
    yield "training", ("eval_steps",), bool(online.held_out_rewards), "held_out_rewards"
    yield "online", ("held_out_pictures",), bool(online.held_out_rewards), "held_out_rewards"
    yield "online", ("guidance_in_training",), online.sample_guidance_scale != 1, "sample_guidance_scale other than 1"
    yield "online", ("kl_samples",), online.draws_noise, "sampling with noise"
    on_path = evidence == "trajectories"
    yield "training", ("t_min", "t_max", "snr_gamma"), not on_path, "objectives of errors"
    yield "online", ("window_start", "window_size", "timestep_fraction"), on_path, "objectives of steps of sampling"
    weighs = evidence == "samples"
    yield "online", ("weighting",), weighs, "objectives of single pictures"
    softmax, share = weighs and online.weighting == "softmax", weighs and online.weighting.endswith("percentile")
    yield "online", ("temperature", "standardise_rewards"), softmax, "weighting softmax of single pictures"
    yield "online", ("percentile",), share, "weighting percentile and streaming_percentile of single pictures"
    yield "online", ("per_prompt",), softmax or share, "weighting softmax and percentile of single pictures"
    yield "online", ("threshold",), weighs, "weighting threshold of single pictures"
    measured, users = (
        on_path or (weighs and online.weighting == "advantage"),
        "objectives of advantages, and weighting advantage",
    )
    yield "online", ("advantage", "adv_clip"), measured, users
    yield "online", ("global_std",), measured and online.advantage != "round", "advantage tracker and group"
    tracked = measured and online.advantage == "tracker"
    yield "online", ("tracker_buffer_size", "tracker_min_count"), tracked, "advantage tracker"
