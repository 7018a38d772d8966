"""Rollouts of the two-channel model, judged by their brightness. Run as a script, it trains on them in several processes."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass

import torch
from tiny_training import TinyPolicy
from torch import Tensor

from palate.base.errors import UserError
from palate.base.seeds import normal
from palate.data.prompts import Prompt
from palate.diffusion.denoising import Conditioning
from palate.diffusion.sampling import join
from palate.objectives.pairs import dpo
from palate.objectives.samples import kto, nft, sft
from palate.objectives.trajectories import ddpo_is, ddpo_sf
from palate.online.options import Arithmetic, OnlineOptions
from palate.online.rollouts import Replay, Rollouts, SamplingPlan
from palate.online.trajectories import Guided, trajectory_step
from palate.spaces import latent
from palate.training.loop import train
from palate.training.options import TrainOptions
from palate.training.steps import pair_step, sample_step

PROMPTS = [Prompt(text) for text in ("a dog", "a cat", "a tree", "a house", "a boat")]
SHAPES = [(2, 4, 4), (2, 4, 6), (2, 6, 4), (2, 4, 6), (2, 4, 4)]
"""Of their pictures, where they are not all alike."""
OBJECTIVES = {
    "ddpo_is": ddpo_is,
    "ddpo_sf": ddpo_sf,
    "sft": sft,
    "dpo": functools.partial(dpo, beta=50.0),
    "kto": kto,
    "nft": nft,
}
EVIDENCE = {
    "ddpo_is": "trajectories",
    "ddpo_sf": "trajectories",
    "sft": "samples",
    "dpo": "pairs",
    "kto": "samples",
    "nft": "samples",
}


@dataclass
class Judged:
    total: Tensor
    raw: dict[str, Tensor]


class Brightness:
    """A bundle of one reward that remembers how often it was asked."""

    def __init__(self, score=lambda images, prompts: images.mean((1, 2, 3))):
        self.score, self.asked, self.gather = score, 0, None

    def submit(self, images, prompts):
        self.asked += len(images)
        return self.score(images, prompts)

    def wait(self, pending):
        pass

    def collect(self, pending):
        total = torch.cat(pending)
        return Judged(total, {"brightness": total})

    def level(self, means):
        return means["brightness"]

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


def decode(latents: Tensor) -> Tensor:
    return torch.cat([latents, latents[:, :1]], 1).sigmoid()


def rollouts(policy, objective="ddpo_is", *, rewards=None, replay=None, decode=decode, seed=0, prompts=PROMPTS, **options):
    shapes = options.pop("shapes", ())
    given = {"samples_per_round": 8, "sample_batch_size": 4, "sample_num_steps": 4, "updates_per_round": 2} | options
    text = normal(torch.arange(max(1, len(prompts))), (2,), 3, "cpu", torch.float32)
    return Rollouts(
        policy,
        prompts,
        join(Conditioning({"text": text}), Conditioning({"text": torch.zeros_like(text)})),
        SamplingPlan((2, 4, 4), decode, by_old=objective == "nft", shapes=shapes),
        rewards=rewards or Brightness(),
        options=OnlineOptions(**given),
        evidence=EVIDENCE[objective],
        seed=seed,
        replay=replay,
    )


def step_for(policy, objective, online):
    if EVIDENCE[objective] == "trajectories":
        return trajectory_step(
            policy,
            OBJECTIVES[objective],
            rule=online.rule,
            guidance_scale=online.trained_scale,
            kl_weight=online.kl_weight,
        )
    make = pair_step if EVIDENCE[objective] == "pairs" else sample_step
    return make(Guided(policy, online.trained_scale), latent(), OBJECTIVES[objective])


def run(
    output_dir,
    objective="ddpo_is",
    *,
    online=None,
    policy=None,
    processes=1,
    rewards=None,
    decode=decode,
    evaluate=None,
    states=None,
    **options,
):
    """Three rounds of eight pictures unless told otherwise; returns policy and rollouts."""
    policy, given = policy or TinyPolicy(), {"updates_per_round": 1} if objective == "ddpo_sf" else {}
    source = rollouts(policy, objective, rewards=rewards, decode=decode, **given | (online or {}))
    step = step_for(policy, objective, source.options)
    source.replay = Replay(step) if EVIDENCE[objective] == "trajectories" else None
    arithmetic = Arithmetic.of(source.options, EVIDENCE[objective])
    given = {"train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "checkpointing_steps": None} | options
    given = {"max_train_steps": 3 * arithmetic.updates} | given
    given["gradient_accumulation_steps"] = arithmetic.accumulation(given["train_batch_size"], processes)
    options = TrainOptions(output_dir=str(output_dir), **given)
    train(step, policy, source, options=options, states=states, on_evaluate=evaluate)
    return policy, source


class FailingOnce(Brightness):
    """Fails in the second round, in the second of two processes."""

    def wait(self, pending):
        if self.asked > 4 and os.environ["RANK"] == "1":
            raise UserError("reward brightness raised ValueError: no")


def failing_watch(step):
    """Runs in the first process only."""
    if step == 2:
        raise UserError("reward heldout raised ValueError: no")


if __name__ == "__main__":
    ranked = {"group_size": 2, "updates_per_round": 1} if sys.argv[2] == "dpo" else {}
    rewards = FailingOnce() if "reward" in sys.argv else None
    watch = failing_watch if "watch" in sys.argv else None
    given = {"rewards": rewards, "evaluate": watch, "eval_steps": 2, "checkpointing_steps": 100}
    if "mixed" in sys.argv:
        ranked["shapes"] = SHAPES
    run(sys.argv[1], sys.argv[2], online=ranked, processes=2, **given)
    torch.distributed.destroy_process_group()
