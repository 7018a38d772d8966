"""All that a recipe names, found once and before any weights are loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from palate.base.errors import UserError
from palate.base.machine import processes
from palate.data.prompts import Prompt
from palate.data.selection import same_prompt
from palate.evaluation.editing import INIT
from palate.names.prompts import find_prompts
from palate.names.rewards import NamedReward, find_held_out, find_rewards
from palate.online.options import Arithmetic
from palate.runs.sections import HELD_OUT
from palate.training.options import TrainOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from palate.names.judges import NamedJudge
    from palate.runs.recipe import Recipe


SHOWN, JUDGED = 8, 64
"""Held-out prompts that are drawn to be looked at, and that are drawn for judges, unless their number is given."""


@dataclass(frozen=True)
class Online:
    """What an online recipe names beside what every recipe does, found before any weights are loaded."""

    prompts: list[Prompt]
    rewards: dict[str, NamedReward]
    held_out: dict[str, NamedReward]
    arithmetic: Arithmetic
    options: TrainOptions
    """Of the loop, with what follows from the rounds: accumulation and the number of steps."""


@dataclass(frozen=True)
class Assembled:
    """A recipe and all that it names, found once and before any weights are loaded."""

    recipe: Recipe
    prompts: list[Prompt]
    """The evaluation prompts; those beyond ``num_evaluation_prompts`` are not compared on. Those that are held out are known
    once the data is read: :meth:`showing`."""
    judges: dict[str, NamedJudge]
    validation: list[Prompt]
    """Those of the sample pictures during training."""
    online: Online | None
    """Of a recipe whose model draws what it learns from."""

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.recipe.training.output_dir)

    @property
    def compared(self) -> list[Prompt]:
        """What base and tuned model are compared on."""
        return self.prompts[: self.recipe.evaluation.num_evaluation_prompts]

    def showing(self, held_out: Sequence[Prompt]) -> Assembled:
        """The same, compared on the first of these prompts if the recipe asks for those that are held out."""
        options = self.recipe.evaluation
        if options.evaluation_prompts != HELD_OUT:
            return self
        number = options.num_evaluation_prompts or (JUDGED if self.judges else SHOWN)
        return dataclasses.replace(self, prompts=list({same_prompt(p.text): p for p in held_out}.values())[:number])


def not_edited(prompts: Sequence[Prompt]) -> str | None:
    """Told where prompts name a picture to edit: training and its comparison draw from noise alone."""
    named = {(prompt.text, str(prompt.metadata[INIT])) for prompt in prompts if prompt.metadata.get(INIT) is not None}
    if not named:
        return None
    return f"{len(named)} prompt(s) name an {INIT}, and all pictures are drawn from noise: only 'palate generate' edits"


def assemble(recipe: Recipe) -> Assembled:
    """Find all that a recipe names.

    Raises:
        UserError: an unknown prompt list, judge or reward, a refiner or a LoRA that is not there or does not fit, batches that
            do not come out even.
    """
    from palate.names.judges import find_judges
    from palate.runs.models import check_refiner_fits

    options, model = recipe.evaluation, recipe.model
    prompts = [] if options.evaluation_prompts in (None, HELD_OUT) else find_prompts(str(options.evaluation_prompts))
    judges = find_judges(options.judges)
    check_refiner_fits(options.refiner, model.pretrained_model_name_or_path, revision=model.revision)
    if recipe.policy.pretrained_lora is not None:
        from palate.models.lora_file import find_lora

        find_lora(recipe.policy.pretrained_lora, texts=recipe.policy.train_text_encoder)
    online = None if recipe.online.train_prompts is None else _online(recipe)
    file = options.validation_file
    validation = [Prompt(text) for text in options.validation_prompts] if file is None else find_prompts(file)
    return Assembled(recipe, prompts, judges, validation, online)


def _online(recipe: Recipe) -> Online:
    assert recipe.online.train_prompts is not None  # the mark of an online recipe
    arithmetic = Arithmetic.of(recipe.online, recipe.method.evidence)
    options = _training_options(recipe, arithmetic)
    rewards = find_rewards(recipe.online.rewards)
    prompts = find_prompts(recipe.online.train_prompts)
    return Online(prompts, rewards, find_held_out(recipe.online.held_out_rewards, rewards), arithmetic, options)


def _training_options(recipe: Recipe, arithmetic: Arithmetic) -> TrainOptions:
    options = recipe.training
    if options.gradient_accumulation_steps != 1:
        raise UserError(
            "gradient_accumulation_steps follows from samples_per_round, updates_per_round and train_batch_size in online "
            "training: leave it out"
        )
    accumulation = arithmetic.accumulation(options.train_batch_size, processes())
    total = arithmetic.total(recipe.online.rounds, options.max_train_steps)
    return dataclasses.replace(options, gradient_accumulation_steps=accumulation, max_train_steps=total)
