"""Recipes: YAML and command-line overrides to checked options, and options to assembled objects.

A recipe has eight sections. Every leaf name is unique, so an override may leave its section out:
``--learning_rate 1e-4`` and ``--training.learning_rate 1e-4`` are the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from palate.base.errors import UserError, nearest, short
from palate.base.files import write_atomically
from palate.base.options import BARE, changed, dumps, parse, section
from palate.online.options import Arithmetic, OnlineOptions
from palate.runs.library import find
from palate.runs.methods import (
    SPACES,
    Named,
    Objective,
    SpaceOptions,
    bind_objective,
    check_kept,
    complete_objective,
    complete_space,
)
from palate.runs.sections import DataOptions, EvaluationOptions, ModelOptions, PolicyOptions
from palate.training.options import TrainOptions


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run. Objective and space are checked and completed by their defaults."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    objective: Named = field(default_factory=lambda: {"name": "dpo"})
    space: SpaceOptions = field(default_factory=lambda: {"name": "latent"})
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    online: OnlineOptions = field(default_factory=OnlineOptions)
    training: TrainOptions = field(default_factory=TrainOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", complete_objective(self.objective))
        object.__setattr__(self, "space", complete_space(self.space))
        if self.model.quantize is not None and self.policy.train_method != "lora":
            raise UserError(f"quantize {self.model.quantize} freezes the weights: use train_method lora, or leave it out")
        self._check_online()
        self._check_draws()
        self._check_shard()

    @functools.cached_property
    def method(self) -> Objective:
        """What the objective stands for."""
        return bind_objective(self.objective)

    def _check_online(self) -> None:
        """Objective, rollouts and loop must fit together."""
        if self.training.early_stopping_patience is not None:
            if self.training.eval_steps is None:
                raise UserError(
                    "early_stopping_patience counts measurements on what is held out: say how often with eval_steps"
                )
            if self.online.train_prompts is not None or (not self.data.validation_fraction and not self.data.validation_data):
                raise UserError(
                    "early_stopping_patience needs held-out pairs, and there are none: name validation_data, or a "
                    "validation_fraction"
                )
        evidence, density = self.method.evidence, self.training.time_density
        if self.online.train_prompts is None:
            if evidence == "trajectories":
                raise UserError(f"objective {self.objective['name']} learns from the model's own pictures: name train_prompts")
            if density == "grid":
                raise UserError(
                    "time_density grid is for online training, where the model samples: use shifted, or name train_prompts"
                )
            if self.method.names("old"):
                raise UserError(
                    f"objective {self.objective['name']} compares with the policy that drew the pictures: name train_prompts"
                )
            if given := changed(self.online):
                raise UserError(
                    f"without train_prompts these options do nothing: {', '.join(given)}; name train_prompts, or leave them out"
                )
            return
        if "train_data" in changed(self.data):
            raise UserError(
                f"train_data {self.data.train_data} would not be read: with train_prompts the model draws what it learns "
                "from; leave one of the two out"
            )
        self._check_old()
        arithmetic = Arithmetic.of(self.online, evidence)
        if self.method.auto_beta:
            raise UserError("beta auto is chosen from pairs that are there before training: name a number in online training")
        if self.policy.lora_dropout:
            raise UserError("lora_dropout would make the updates see another model than the one that drew: leave it out")
        if self.policy.train_text_encoder:
            raise UserError(
                "train_text_encoder is for pictures that are there before training: leave it out in online training"
            )
        if self.training.caption_dropout:
            raise UserError("caption_dropout is for training on pictures that were not drawn from the prompt: leave it out")
        if self.objective["name"] == "ddpo_sf" and arithmetic.updates > 1:
            raise UserError(
                f"objective ddpo_sf is right for one update a round, not {arithmetic.updates}: set updates_per_round and "
                "inner_epochs to 1, or use ddpo_is"
            )
        if evidence == "samples" and self.online.weighting == "advantage" and not self.method.names("label"):
            raise UserError(
                f"objective {self.objective['name']} knows no good and bad pictures, so that weighting advantage would learn "
                "nothing of the rewards: use softmax, or an objective such as nft"
            )
        if evidence != "trajectories" and self.online.window_end is not None:
            raise UserError(
                f"window_end does nothing with objective {self.objective['name']}, which is not trained at steps of sampling: "
                "leave it out"
            )
        if evidence != "trajectories" and self.online.kl_weight:
            raise UserError(
                f"kl_weight does nothing with objective {self.objective['name']}, which has no likelihoods: leave it out"
            )
        if evidence == "trajectories" and density != "uniform":
            raise UserError(
                f"time_density {density} does nothing with objective {self.objective['name']}, which is trained at the steps "
                "of sampling: leave it out"
            )
        if evidence == "trajectories" and self.space != {"name": "latent"}:
            raise UserError(f"objective {self.objective['name']} measures likelihoods, not errors: leave out space")

    def _check_draws(self) -> None:
        if self.training.draws_per_pair is None:
            return
        if self.online.train_prompts is not None:
            raise UserError("draws_per_pair is for pairs that return in every epoch, and rollouts are drawn anew: leave it out")
        check_kept(self.method)

    def _check_shard(self) -> None:
        """Where each process holds a part of the model, all must take the same passes, and none draws alone."""
        if not self.training.shard_model:
            return
        refused = {"train_prompts": self.online.train_prompts, "compile": self.policy.compile}
        if found := [name for name, given in refused.items() if given]:
            raise UserError(f"shard_model does not go with {found[0]}: leave one of the two out (docs/scale.md)")

    def _check_old(self) -> None:
        """An objective that compares with the policy that drew, and the options of that policy."""
        name = self.objective["name"]
        if not self.method.names("old"):
            if "old_decay" in changed(self.online):
                raise UserError(f"old_decay does nothing with objective {name}, which names no old policy: leave it out")
            return
        if self.policy.train_method != "lora":
            raise UserError(f"objective {name} keeps a second LoRA beside the same weights: use train_method lora")
        if self.method.evidence == "samples" and self.method.names("label") and self.online.weighting != "advantage":
            raise UserError(f"objective {name} learns from good and bad pictures: set weighting advantage")

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists, as written to ``recipe.yaml``."""
        return _plain(dataclasses.asdict(self))


def defaults() -> dict[str, Any]:
    """What every option stands at that a recipe does not name; objective and space, whose options have no list, left out."""
    return {name: values for name, values in Recipe().as_dict().items() if name not in ("objective", "space")}


SECTIONS = {f.name: f for f in fields(Recipe)}
RECORDS: dict[str, type] = {n: kind for n, kind in typing.get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)}
"""The sections that are a record of options, and that record."""
OPTIONS: dict[str, str] = {leaf.name: section for section, kind in RECORDS.items() for leaf in fields(kind)}
"""Leaf name -> section."""


ELSEWHERE = {
    **dict.fromkeys(("beta", "beta_dpo"), "objective.beta"),
    **dict.fromkeys(("dataset_name", "dataset", "train_data_dir", "instance_data_dir"), "train_data"),
    **dict.fromkeys(("dataset_split_name", "split"), "the split follows the name of the data: --train_data owner/name:split"),
    **dict.fromkeys(("lr", "train_learning_rate", "unet_lr"), "learning_rate"),
    **dict.fromkeys(("config", "config_file", "recipe"), "the recipe stands first, without a name: palate train RECIPE.yaml"),
    **dict.fromkeys(("use_8bit_adam", "train_use_8bit_adam"), "write --optimizer adamw_8bit"),
    "use_adafactor": "write --optimizer adafactor",
    **dict.fromkeys(("model", "model_name_or_path", "pretrained_model"), "pretrained_model_name_or_path"),
    **dict.fromkeys(("network_dim", "lora_rank", "lora_r"), "rank"),
    "network_alpha": "lora_alpha",
    **dict.fromkeys(("patience", "early_stopping", "early_stop_patience"), "early_stopping_patience"),
    "network_dropout": "lora_dropout",
    "use_dora": "write --lora_kind dora",
    **dict.fromkeys(("algo", "network_module", "network_algo"), "lora_kind"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size"), "train_batch_size"),
    **dict.fromkeys(("max_steps", "num_train_steps", "max_training_steps"), "max_train_steps"),
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps"), "lr_warmup_steps"),
    **dict.fromkeys(("loss_type", "method"), "objective"),
    **dict.fromkeys(("proportion_empty_prompts", "caption_dropout_rate"), "caption_dropout"),
    "random_crop": "write --center_crop false",
    **dict.fromkeys(("enable_bucket", "aspect_ratio_bucketing"), "buckets"),
    "bucket_reso_steps": "bucket_step",
    **dict.fromkeys(("width", "height"), "both in one: --resolution WIDTHxHEIGHT, such as 832x1216"),
    "no_hflip": "pictures are mirrored only with --random_flip true",
    "hub_model_id": "push_to_hub",
    **dict.fromkeys(("validation_steps", "sample_every_n_steps"), "sample_steps"),
    **dict.fromkeys(("save_steps", "save_freq", "save_every_n_steps"), "checkpointing_steps"),
    "scale_lr": "there is none: give the product, as docs/moving-from-diffusers-dpo.md has it",
    **dict.fromkeys(("wandb", "log_with"), "report_to"),
    **dict.fromkeys(("dry_run", "plan"), "'palate plan RECIPE' tells what a run will take"),
    **dict.fromkeys(("num_processes", "processes"), "it is told to 'accelerate launch'; 'palate plan' calls it processes"),
}
"""What other programs call an option -> its name here, or words with a blank that say how it is done here."""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# Reading ---------------------------------------------------------------------------------------------------------------


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
    if value is BARE and head in ("objective", "space") and not tail:
        raise UserError(
            f"--{head} lacks a value; expected its name, such as --{head} {'dpo' if head == 'objective' else SPACES[0]}"
        )
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
        raise UserError(f"unknown option --{key}: no section {short(head)}{nearest(head, SECTIONS)}")
    name = tail or head
    if OPTIONS.get(name) is None or (tail and OPTIONS[name] != head):
        known = ELSEWHERE.get(key) or next(iter(difflib.get_close_matches(name[:100], OPTIONS, n=1, cutoff=0.5)), "")
        hint = "" if not known else f"{known}; " if " " in known else f"did you mean --{known}? "
        raise UserError(f"unknown option --{short(key, quoted=False)} ({hint}'palate train --help' lists them)")
    section = content.get(OPTIONS[name]) or {}
    if isinstance(section, dict):  # anything else is refused by build
        content[OPTIONS[name]] = {**section, name: value}


def build(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check nested dictionaries and make a :class:`Recipe`."""
    made: dict[str, Any] = {}
    for name, value in content.items():
        if name not in SECTIONS:
            raise UserError(f"{where}: unknown section {short(name)}{nearest(str(name), SECTIONS)}")
        if name in RECORDS:
            made[name] = section(RECORDS[name], {} if value is None else value, f"{where}: {name}")
        elif value is not None:
            made[name] = {"name": value} if isinstance(value, str) else value
            if name == "objective" and not isinstance(made[name], dict):
                complete_objective(made[name])  # which refuses it
            elif not all(isinstance(part, dict) for part in (made[name] if isinstance(made[name], list) else [made[name]])):
                complete_space(made[name])
    return Recipe(**made)


# Names to functions ------------------------------------------------------------------------------------------------------


def write(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, whole or not at all."""
    write_atomically(path, dumps(recipe.as_dict()).encode())
