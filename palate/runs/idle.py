"""Options of a recipe that have no effect on the run: told, not refused, for another objective leaves some of a recipe over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from palate.base.options import changed
from palate.runs.sections import DataOptions

if TYPE_CHECKING:
    from palate.runs.recipe import Recipe

HERE_ONLINE = ("resolution", "train_data", "cache_dir")
"""Of the data section: the size of what is drawn; what is refused elsewhere; and a folder, which people name everywhere."""

Rule = tuple[str, tuple[str, ...], bool, str]
"""Section, options, whether they are used, and what for."""


def idle(recipe: Recipe) -> dict[str, str]:
    """Options that are not at their default and change nothing, and what each is for."""
    found: dict[str, str] = {}
    for section, names, used, purpose in _rules(recipe):
        if not used:
            found |= {name: purpose for name in changed(getattr(recipe, section)) if name in names}
    return found


def idle_line(recipe: Recipe, among: type | None = None) -> str | None:
    """The same in words; None if everything counts. among: only the options of this section."""
    asked = None if among is None else {field.name for field in fields(among)}
    groups: dict[str, list[str]] = {}
    for name, purpose in idle(recipe).items():
        if asked is None or name in asked:
            groups.setdefault(purpose, []).append(name)
    told = "; ".join(f"{', '.join(names)} (for {purpose})" for purpose, names in groups.items())
    return f"without effect here: {told}" if told else None


def _rules(recipe: Recipe) -> Iterator[Rule]:
    policy, training, data = recipe.policy, recipe.training, recipe.data
    lora = policy.train_method == "lora" and policy.pretrained_lora is None
    yield "policy", ("rank", "lora_alpha"), lora, "a new LoRA"
    yield "policy", ("lora_layers",), lora or policy.train_text_encoder, "a new LoRA"
    adam, given = training.optimizer in ("adamw", "adamw_8bit"), training.optimizer_options
    kinds = "optimizer adamw and adamw_8bit, without the same in optimizer_options"
    yield "training", ("adam_beta1", "adam_beta2"), adam and "betas" not in given, kinds
    yield "training", ("adam_epsilon",), adam and "eps" not in given, kinds
    named = ":" not in training.optimizer and "weight_decay" not in given
    yield "training", ("adam_weight_decay",), named, "Palate's own optimizers, without weight_decay in optimizer_options"
    kept = training.checkpointing_steps is not None
    yield "training", ("checkpoints_total_limit",), kept, "runs with checkpointing_steps"
    yield "evaluation", ("refiner_start",), recipe.evaluation.refiner is not None, "a refiner"
    if recipe.online.train_prompts is not None:
        yield from _of_rollouts(recipe)
        return
    yield "data", ("bucket_step", "bucket_aspect"), data.buckets, "buckets"
    yield "data", ("validation_fraction",), data.validation_data is None, "runs without validation_data"
    held_out = data.validation_data is not None or data.validation_fraction > 0
    yield "training", ("eval_steps",), held_out, "what is held out, and nothing is"
    yield "training", ("num_train_epochs",), training.max_train_steps is None, "runs without max_train_steps"


def _of_rollouts(recipe: Recipe) -> Iterator[Rule]:
    online, evidence = recipe.online, recipe.method.evidence
    read = tuple(f.name for f in fields(DataOptions) if f.name not in HERE_ONLINE)
    yield "data", read, False, "pairs and pictures that are read"
    yield "training", ("num_train_epochs",), False, "pairs and pictures that are read"
    watched = bool(online.held_out_rewards)
    yield "training", ("eval_steps",), watched, "held_out_rewards, of which none is named"
    yield "online", ("held_out_pictures",), watched, "held_out_rewards, of which none is named"
    yield "online", ("guidance_in_training",), online.sample_guidance_scale != 1, "sampling with guidance"
    yield "online", ("kl_samples",), online.draws_noise, "sampling with noise"
    on_path, single = evidence == "trajectories", evidence == "samples"
    yield "training", ("t_min", "t_max", "snr_gamma"), not on_path, "objectives other than ddpo"
    yield "online", ("window_start", "window_size", "timestep_fraction"), on_path, "ddpo"
    of_single = "objectives of single pictures"
    yield "online", ("weighting", "threshold"), single, of_single
    softmax, share = single and online.weighting == "softmax", single and online.weighting.endswith("percentile")
    yield "online", ("temperature", "standardise_rewards"), softmax, f"weighting softmax in {of_single}"
    yield "online", ("percentile",), share, f"weighting percentile and streaming_percentile in {of_single}"
    yield "online", ("per_prompt",), softmax or share, f"weighting softmax and percentile in {of_single}"
    measured = on_path or (single and online.weighting == "advantage")
    yield "online", ("advantage", "adv_clip"), measured, "ddpo, and weighting advantage"
    yield "online", ("global_std",), measured and online.advantage != "round", "advantage tracker and group"
    tracked = measured and online.advantage == "tracker"
    yield "online", ("tracker_buffer_size", "tracker_min_count"), tracked, "advantage tracker"
