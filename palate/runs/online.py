"""Online training assembled: a recipe, a model and a policy to the rollouts and the step that the loop runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.base.errors import UserError
from palate.base.files import write_atomically
from palate.base.machine import processes
from palate.data.prompts import Prompt
from palate.data.selection import same_prompt
from palate.names.rewards import NamedReward
from palate.online.rollouts import Replay, Rollouts, SamplingPlan
from palate.runs.assembly import Assembled, Online
from palate.runs.loading import drawing_of, shape_of
from palate.runs.methods import bind_space, draws_of
from palate.runs.recipe import Recipe, write

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from palate.models.denoiser import Denoiser
    from palate.models.policy import Policy
    from palate.online.bundle import RewardBundle
    from palate.training.steps import Step

TOLERANCE = {"no": 1e-5, "fp16": 1e-3, "bf16": 5e-3}
"""How far log-probabilities of sampling and training may be apart, by precision. On a GPU a batch of another size is computed
by other kernels even in float32; there the tolerance is that of float16."""


def told(recipe: Recipe, found: Online) -> str:
    """The arithmetic of batches in words."""
    online, arithmetic, options, evidence = recipe.online, found.arithmetic, found.options, recipe.method.evidence
    passes = 2 if online.trained_scale != 1 else 1
    unit = {"trajectories": f"steps ({arithmetic.steps} of each picture)", "samples": "pictures", "pairs": "pairs"}[evidence]
    rounds = -(-(options.max_train_steps or 0) // arithmetic.updates)
    drawn = min(online.samples_per_round // online.group_size, len(found.prompts))
    return (
        f"{_many(len(found.prompts), 'prompt')}; a round draws {_many(online.samples_per_round, 'picture')} of "
        f"{_many(drawn, 'prompt')} in {_many(online.sample_num_steps, 'step')} "
        f"({online.sample_batch_size} at once) and makes {_many(arithmetic.updates, 'update')} of "
        f"{arithmetic.effective_batch} {unit}: "
        f"{options.train_batch_size} at once x {options.gradient_accumulation_steps} x {processes()} process(es), "
        f"{_many(passes * options.train_batch_size * (2 if evidence == 'pairs' else 1), 'row')} in a forward pass. "
        f"{_many(rounds, 'round')}, {_many(options.max_train_steps or 0, 'update')}, "
        f"{_many(rounds * online.samples_per_round, 'reward quer', 'y', 'ies')}"
    )


def _many(number: int, noun: str, one: str = "", more: str = "s") -> str:
    return f"{number} {noun}{one if number == 1 else more}"


def rollouts_of(
    recipe: Recipe, found: Online, denoiser: Denoiser, policy: Policy, *, progress: bool = False
) -> tuple[Step, Rollouts]:
    """The step, and the rollouts that feed it. Prompts are encoded here, once."""
    import torch

    from palate.online.conditions import encode
    from palate.online.trajectories import Guided, trajectory_step
    from palate.training import steps

    options, objective = recipe.online, recipe.method
    own = shape_of(recipe, denoiser)
    shape, shapes = denoiser.latent_shape(own), [denoiser.latent_shape(p.shape or own) for p in found.prompts]
    if objective.evidence == "trajectories":
        step = trajectory_step(
            policy,
            objective.function,
            rule=options.rule,
            guidance_scale=options.trained_scale,
            kl_weight=options.kl_weight,
        )
    else:
        make = steps.pair_step if objective.evidence == "pairs" else steps.sample_step
        acting: Any = Guided(policy, options.trained_scale) if options.trained_scale != 1 else policy
        space = bind_space(recipe.space, policy)
        path, *others = (policy.schedule.path(options.sample_num_steps, options.timestep_spacing, s) for s in set(shapes))
        if recipe.training.time_density == "grid" and any(not torch.equal(path.t, other.t) for other in others):
            raise UserError(
                "time_density grid: the prompts ask for several sizes, whose times of sampling differ with this model: "
                "use another density, or one size"
            )
        step = make(acting, space, objective.function, draws_of(recipe.training, path))
    if objective.names("old"):
        policy.track_old(1.0)
        step.after = ()  # the old policy drew the round, so it stays until the next one
    precision = recipe.training.mixed_precision if denoiser.device.type == "cpu" else _gpu(recipe.training.mixed_precision)
    with torch.no_grad(), denoiser.encoding():
        prompts = encode(denoiser.encode_prompts, denoiser.unconditional(), found.prompts)
    replay = Replay(step, recipe.training.train_batch_size, TOLERANCE[precision])
    rollouts = Rollouts(
        policy,
        found.prompts,
        prompts,
        SamplingPlan(
            shape,
            denoiser.decode,
            keep_means=objective.names("moved"),
            by_old=objective.names("old"),
            shapes=shapes,
        ),
        rewards=_bundle(recipe, found.rewards, denoiser.device),
        options=options,
        evidence=objective.evidence,
        seed=recipe.training.seed,
        replay=replay if objective.evidence == "trajectories" else None,
        progress=progress,
    )
    return step, rollouts


def watched(found: Assembled) -> tuple[list[Prompt], int]:
    """The prompts of the held-out pictures, and how many of them are in the comparison too.

    ``best/`` is chosen on these pictures, so those that the comparison draws come last: first the evaluation prompts that it
    leaves over, then the train prompts.
    """
    assert found.online is not None  # only such a run watches
    drawn = {same_prompt(prompt.text) for prompt in found.compared}
    ordered = sorted((*found.prompts, *found.online.prompts), key=lambda prompt: same_prompt(prompt.text) in drawn)  # stable
    chosen = ordered[: found.recipe.online.held_out_pictures]
    return chosen, sum(same_prompt(prompt.text) in drawn for prompt in chosen)


class Watch:
    """What the loop calls every ``eval_steps``: held-out rewards, the best weights so far in ``best/``, and the alarm.

    Its state is one of those that checkpoints keep.
    """

    def __init__(
        self,
        found: Assembled,
        denoiser: Denoiser,
        policy: Policy,
        rollouts: Rollouts,
        tell: Callable[[str], None],
    ):
        from palate.online.held_out import HeldOut

        assert found.online is not None
        recipe, options = found.recipe, found.recipe.evaluation
        prompts, shared = watched(found)
        if shared:
            tell(
                f"{shared} of {len(prompts)} held-out pictures have prompts of the comparison, for no others are left: best/ "
                "would be compared on what it is chosen by; name more evaluation_prompts than num_evaluation_prompts"
            )
        self.held_out = HeldOut(
            prompts,
            options.evaluation_seed,
            _bundle(recipe, found.online.held_out, denoiser.device),
            batch_size=options.evaluation_batch_size,
        )
        with denoiser.encoding():
            denoiser.remember([text for p in self.held_out.prompts for text in (p.text, p.negative) if text is not None])
        self.denoiser, self.policy, self.rollouts = denoiser, policy, rollouts
        self.drawing, self.tell = drawing_of(recipe, denoiser), tell
        self.best = Path(recipe.training.output_dir) / "best"
        # With a recipe beside its weights it is a run, which every verb takes.
        training = dataclasses.replace(recipe.training, output_dir=str(self.best), resume_from_checkpoint=None)
        self.recipe = dataclasses.replace(recipe, training=training)
        self.rounds = 0  # that the last evaluation knew of

    def __call__(self, step: int) -> dict[str, float]:
        if not step:  # for the second time where training was stopped in its first round
            self.held_out.forget()
        means = self.rollouts.means
        if means:
            self.held_out.first_round(means[0])
        since = means[self.rounds :] or self.held_out.trained[-1:] or [math.nan]
        measured = self.held_out.evaluate(self._generate, sum(since) / len(since))
        self.rounds = len(means)
        if step and self.held_out.best:
            self.policy.save(self.best)
            write(self.recipe, self.best / "recipe.yaml")
            texts = [prompt.text for prompt in self.held_out.prompts]
            told = {"step": step, "reward_queries": self.rollouts.queries, **measured, "prompts": texts}
            write_atomically(self.best / "found.json", (json.dumps(told, indent=1) + "\n").encode())
        if (alarm := self.held_out.alarm()) is not None:
            self.tell(f"step {step}: {alarm}")
            measured["parted"] = 1.0
        return measured

    def _generate(self, prompts: list[Prompt], seeds: list[int]) -> list[Image]:
        return self.denoiser.generate(
            [p.text for p in prompts],
            seeds,
            self.drawing,
            negatives=[p.negative for p in prompts],
            shapes=[p.shape for p in prompts],
            network=self.policy.trainable_module,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"held out": self.held_out.state_dict(), "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.held_out.load_state_dict(state["held out"])
        self.rounds = state["rounds"]


def _bundle(recipe: Recipe, rewards: Mapping[str, NamedReward], device: torch.device) -> RewardBundle:
    """Rewards, trained on or held out, loaded and ready to be asked."""
    from palate.online.bundle import RewardBundle

    return RewardBundle(
        {name: reward.load(device) for name, reward in rewards.items()},
        {name: reward.weight for name, reward in rewards.items()},
        timeout=recipe.online.reward_timeout,
        retries=recipe.online.reward_retries,
        folder=Path(recipe.training.output_dir) / "failed",
    )


def _gpu(precision: str) -> str:
    return "fp16" if precision == "no" else precision
