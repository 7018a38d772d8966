"""What online training can be told, and how a round falls into effective batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from palate.base.errors import UserError
from palate.base.options import (
    GUIDANCE,
    NOT_NEGATIVE,
    POSITIVE,
    SECONDS,
    Batch,
    Count,
    OneOf,
    Range,
    Steps,
    at_least,
    check_ranges,
)
from palate.base.seeds import mix
from palate.diffusion.schedule import SPACINGS
from palate.diffusion.steps import Rule, cps, ddim, flow_sde

RULES = {"cps": 0.8, "flow_sde": 0.7}
"""Rules of sampling beside ``ddim``, and how much noise they draw unless told (arXiv 2509.05952; 2505.05470)."""
WINDOW = 103  # what a number is drawn for
ADVANTAGES = ("tracker", "group", "round")
WEIGHTINGS = ("softmax", "percentile", "streaming_percentile", "threshold", "advantage")
ABOVE_0 = Range(above=0, expected="a positive number")  # or infinity: no limit


@dataclass(frozen=True)
class OnlineOptions:
    """How the model's own pictures are drawn, judged and learned from; without ``train_prompts`` training reads pairs."""

    train_prompts: str | None = None
    """A list by name or a text or JSONL file: what to draw. Turns a recipe into online training."""
    rewards: tuple[str, ...] | dict[str, str] = ("jpeg_compressibility",)
    """What to make larger: judges by name, or ``module:function``. Several are standardised and added; ``{name: weight}``
    gives weights."""
    held_out_rewards: tuple[str, ...] = ()
    """Never trained on: measured during training, they choose the ``best/`` weights and raise the alarm."""
    held_out_pictures: Batch = 32
    """Pictures on which held-out rewards are measured, every ``eval_steps``, always from the same noise: of the evaluation
    prompts that the comparison leaves over, then of the train prompts."""
    reward_timeout: Annotated[float, SECONDS] | None = None
    """Seconds that one call of a reward may take, trained on or held out."""
    reward_retries: Annotated[int, at_least(0, 1000)] = 0
    """How often a call that failed is repeated."""
    rounds: Count = 10
    """Times that pictures are drawn and learned from; ``max_train_steps`` may end training earlier."""
    samples_per_round: Annotated[int, at_least(1, 10**6)] = 256
    """Pictures drawn in a round, by all processes together."""
    sample_batch_size: Batch = 8
    """Pictures drawn at once by a process."""
    group_size: Count = 1
    """Pictures of one prompt in a round; divides ``samples_per_round``."""
    sample_num_steps: Steps = 50
    """Steps in which a picture is drawn."""
    sample_rule: Annotated[str, OneOf("ddim", *RULES)] = "ddim"
    """How a step draws noise: ``ddim``; ``cps``, which keeps the noise level of each time exactly; ``flow_sde``, that of
    Flow-GRPO, for models of rectified flow alone."""
    sample_noise: Annotated[float, POSITIVE] | None = None
    """Of ``cps`` (0.8 unless given, at most 1) and ``flow_sde`` (0.7)."""
    sample_eta: Annotated[float, Range(at_least=0, at_most=10, expected="0 to 10, mostly 0 to 1")] = 1.0
    """Noise of each step of ``ddim``: 1 as much as DDPM, 0 none (and no likelihood)."""
    sample_guidance_scale: Annotated[float, GUIDANCE] = 5.0
    """Of classifier-free guidance; 1 for none, at half the cost."""
    guidance_in_training: bool = True
    """Whether the guided prediction is trained, as in the paper, or that of the prompt alone, at half the cost."""
    timestep_spacing: Annotated[str, OneOf(*SPACINGS)] | None = None
    """``leading``, ``trailing`` or ``linspace``; the model's own unless given."""
    updates_per_round: Count = 4
    """Updates in which everything of a round is seen once; divides it."""
    inner_epochs: Count = 1
    """Times that a round is learned from."""
    window_start: Annotated[int, at_least(0)] = 0
    """First step of sampling that is trained, counted from 0."""
    window_size: Count | None = None
    """Steps from there on that are trained; all unless given."""
    window_end: Count | None = None
    """The window moves, and noise is drawn in it alone: each round its ``window_size`` steps lie anew anywhere from
    ``window_start`` to before this step. Unless given it stays, and noise is drawn everywhere."""
    timestep_fraction: Annotated[float, Range(above=0, at_most=1, expected="more than 0 and at most 1")] = 1.0
    """Share of those steps that is trained, drawn for each picture anew."""
    advantage: Annotated[str, OneOf(*ADVANTAGES)] = "tracker"
    """``tracker``: against the prompt's latest rewards; ``group``: against the other pictures of the prompt in this round;
    ``round``: against all pictures of the round."""
    tracker_buffer_size: Annotated[int, at_least(1, 10**6)] = 32
    """Rewards that the tracker keeps of a prompt."""
    tracker_min_count: Count = 16
    """A prompt with fewer is measured against the round."""
    global_std: bool = False
    """Divide advantages by the standard deviation of the whole round."""
    adv_clip: Annotated[float, ABOVE_0] = 5.0
    """Advantages are cut off there."""
    kl_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of each step's exact KL divergence from the model before training; costs a pass of it."""
    kl_samples: Annotated[int, at_least(0)] = 8
    """Pictures of a round on whose way the KL divergence is measured; 0 for none."""
    kl_budget: Annotated[float, ABOVE_0] | None = None
    """Training ends once the KL divergence of a picture's whole way exceeds this, in nats per latent element."""
    weighting: Annotated[str, OneOf(*WEIGHTINGS)] = "softmax"
    """For objectives of single pictures: ``softmax`` of the rewards, or only the best: ``percentile`` of the round,
    ``streaming_percentile`` of all rounds so far, ``threshold``; or ``advantage``: all alike, each labelled as good, 1, or bad,
    0, by 1/2 + advantage / (2 ``adv_clip``)."""
    temperature: Annotated[float, ABOVE_0] = 5.0
    """Of the softmax, in units of the reward."""
    standardise_rewards: bool = False
    """Bring rewards to mean 0 and standard deviation 1 before the softmax."""
    per_prompt: bool = False
    """Softmax or percentile over the pictures of each prompt instead of the round."""
    percentile: Annotated[float, Range(at_least=0, below=100, expected="0 or more and below 100")] = 90.0
    """Share of the pictures, in percent, that is left out."""
    threshold: float | None = None
    """Least reward that is kept under ``weighting: threshold``."""
    old_decay: Annotated[float, Range(at_least=0, at_most=1, expected="0 to 1")] = 0.5
    """For objectives that compare with the policy that drew the pictures (nft, awm): before round n that one keeps the
    lesser of 0.001 n and this of itself, and takes the rest from the policy in training."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.weighting == "threshold" and self.threshold is None:
            raise UserError("weighting is threshold, but no threshold is given: name the least reward to keep")
        if self.weighting != "threshold" and self.threshold is not None:
            raise UserError(
                f"threshold does nothing under weighting {self.weighting}: leave it out, or set weighting threshold"
            )
        if self.samples_per_round % self.group_size:
            raise UserError(
                f"group_size {self.group_size} does not divide samples_per_round {self.samples_per_round}; "
                f"use {_divisors_near(self.samples_per_round, self.group_size)}"
            )
        self._check_rule()
        if self.window_start + (self.window_size or 1) > self.sample_num_steps:
            raise UserError(
                f"a window of {self.window_size or 1} steps from step {self.window_start} on does not fit into "
                f"{self.sample_num_steps} steps; lower window_start or window_size, or raise sample_num_steps"
            )
        if self.window_end is not None:
            if self.window_size is None:
                raise UserError("window_end bounds a window that moves: name its window_size")
            if not self.window_start + self.window_size <= self.window_end <= self.sample_num_steps:
                raise UserError(
                    f"window_end is {self.window_end}; expected {self.window_start + self.window_size} (window_start + "
                    f"window_size) to {self.sample_num_steps} (sample_num_steps)"
                )
        if self.kl_budget is not None and not (self.kl_samples and self.draws_noise):
            raise UserError(
                "kl_budget needs kl_samples, the number of pictures on which to measure it, and sample_eta: without noise no "
                "step has a likelihood"
            )
        if self.group_size == 1 and (self.advantage == "group" or self.per_prompt):
            what = "advantage group" if self.advantage == "group" else "per_prompt"
            raise UserError(
                f"{what} measures the pictures of a prompt against one another, and group_size 1 draws one of each: every "
                "picture would be its own average and nothing learned; raise group_size"
            )
        if self.weighting == "advantage" and math.isinf(self.adv_clip):
            raise UserError("weighting advantage makes labels of 0 to 1 of what adv_clip cuts off: give it a number, such as 5")
        if self.per_prompt and self.weighting in ("streaming_percentile", "threshold", "advantage"):
            raise UserError(f"per_prompt does nothing under weighting {self.weighting}: leave it out, or use percentile")
        if self.tracker_min_count > self.tracker_buffer_size:
            raise UserError(
                f"tracker_min_count {self.tracker_min_count} is never reached, as the tracker keeps {self.tracker_buffer_size} "
                "rewards of a prompt: raise tracker_buffer_size, or lower tracker_min_count"
            )

    def _check_rule(self) -> None:
        rule = self.sample_rule
        if rule == "ddim" and self.sample_noise is not None:
            raise UserError("sample_noise does nothing under sample_rule ddim, whose noise is sample_eta: leave it out")
        if rule != "ddim" and self.sample_eta != type(self).sample_eta:
            raise UserError(f"sample_eta does nothing under sample_rule {rule}, whose noise is sample_noise: leave it out")
        if rule == "cps" and self.sample_noise is not None and self.sample_noise > 1:
            raise UserError(f"sample_noise is {self.sample_noise}; expected at most 1 under sample_rule cps: all noise is new")

    @property
    def rule(self) -> Rule:
        """How a step is taken."""
        if self.sample_rule == "ddim":
            return ddim(self.sample_eta)
        return {"cps": cps, "flow_sde": flow_sde}[self.sample_rule](self.sample_noise or RULES[self.sample_rule])

    @property
    def draws_noise(self) -> bool:
        """Whether a step has a likelihood."""
        return self.sample_rule != "ddim" or self.sample_eta > 0

    @property
    def window(self) -> range:
        """The numbers of the steps that are trained, the first ones where the window moves."""
        end = self.sample_num_steps if self.window_size is None else self.window_start + self.window_size
        return range(self.window_start, end)

    def window_of(self, seed: int, number: int) -> range:
        """The steps that are trained in round `number`."""
        if self.window_end is None:
            return self.window
        by = mix(seed, WINDOW, number) % (self.window_end - self.window.stop + 1)
        return range(self.window.start + by, self.window.stop + by)

    @property
    def trained_scale(self) -> float:
        """The guidance of what is trained."""
        return self.sample_guidance_scale if self.guidance_in_training else 1.0


@dataclass(frozen=True)
class Arithmetic:
    """How a round falls into effective batches, for one objective's evidence."""

    items: int  # seen once in an inner epoch: steps, pictures or pairs
    effective_batch: int
    updates: int  # a round
    steps: int  # trained of each picture

    @classmethod
    def of(cls, options: OnlineOptions, evidence: str) -> Arithmetic:
        """Raises UserError: numbers that do not divide one another."""
        n, updates = options.samples_per_round, options.updates_per_round
        steps = max(1, math.floor(options.timestep_fraction * len(options.window))) if evidence == "trajectories" else 1
        parts = n
        if evidence == "pairs":
            if options.group_size < 2:
                raise UserError("objectives of pairs rank the pictures of a prompt: set group_size to 2 or more")
            parts = n // options.group_size * (options.group_size // 2)
        if parts % updates:
            what = "pairs" if evidence == "pairs" else "samples_per_round"
            raise UserError(f"updates_per_round {updates} does not divide {what} {parts}; use {_divisors_near(parts, updates)}")
        return cls(parts * steps, parts // updates * steps, updates * options.inner_epochs, steps)

    def total(self, rounds: int, most: int | None) -> int:
        """Updates of a run: those of its rounds, unless ``most`` ends it earlier."""
        updates = rounds * self.updates
        return updates if most is None else min(most, updates)

    def accumulation(self, train_batch_size: int, processes: int) -> int:
        """Forward and backward passes per update. Raises UserError: they do not come out even."""
        share, rest = divmod(self.effective_batch, processes)
        if rest or share % train_batch_size:
            fitting = _divisors_near(share, train_batch_size) if not rest else "another number of processes"
            raise UserError(
                f"train_batch_size {train_batch_size} on {processes} process(es) does not divide the effective batch of "
                f"{self.effective_batch}; use {fitting}, or change samples_per_round or updates_per_round"
            )
        return share // train_batch_size


def _divisors_near(n: int, wanted: int) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    below, above = [d for d in divisors if d <= wanted], [d for d in divisors if d > wanted]
    return " or ".join(str(d) for d in (below[-1:] + above[:1]))
