"""The source of online training: what the policy itself draws, judged, as items for the one loop.

A round draws ``samples_per_round`` pictures, asks the rewards, and plans ``updates_per_round`` x ``inner_epochs`` effective
batches of what was found: steps of trajectories with advantages (DDPO), final latents with weights (reward-weighted
regression), or ranked pairs (online DPO). Everything random derives from seed, round and number of the picture, so that neither
the cut into batches nor the number of processes nor an interruption changes a number.
"""

# torch types tolist and a few others in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from palate.base.errors import UserError, short
from palate.base.processes import Processes
from palate.base.seeds import mix
from palate.base.shapes import one_shape_each
from palate.data.prompts import Prompt, PromptSampler
from palate.diffusion.batches import PairBatch, SampleBatch, TrajectoryBatch
from palate.diffusion.denoising import Conditioning
from palate.diffusion.sampling import Predict, Transition, guided, sample, transition
from palate.diffusion.schedule import Path, RectifiedFlow
from palate.online import advantages
from palate.online.conditions import Encoded
from palate.online.options import Arithmetic, OnlineOptions
from palate.training.fits import TrainablePolicy, lagging
from palate.training.source import Abandoned, BudgetSpent
from palate.training.steps import Step

if TYPE_CHECKING:
    from palate.online.bundle import Pending, RewardBundle

PICTURE, PLAN = 101, 102  # what a number is drawn for
HOLDING = 0.001
"""With every round the old policy holds on to so much more of itself (DiffusionNFT's code, arXiv 2509.16117)."""


Item = tuple[int, ...]
"""Rows of an item of a round: (picture, step of its way) of trajectories, (picture,) of samples, (better, worse) of pairs."""


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """How a model draws pictures, as far as options do not say.

    Args:
        shape: of the latents of a picture.
        decode: latents to pictures in [0, 1].
        keep_means: for objectives that ask how far a step has moved.
        by_old: the policy that lags behind draws, for objectives that compare with it; it follows where a round begins.
        shapes: of the latents of each prompt's pictures, where prompts ask for their own; that of ``shape`` otherwise.
    """

    shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]
    keep_means: bool = False
    by_old: bool = False
    shapes: Sequence[tuple[int, ...]] = ()


@dataclass(frozen=True, eq=False)
class Replay:
    """The step that will train on trajectories, to check once that it finds them as likely as sampling did.

    ``tolerance`` is the greatest difference of log-probabilities that is let pass.
    """

    step: Step
    batch_size: int = 8
    tolerance: float = 1e-5


@dataclass(frozen=True, eq=False)
class Drawn:
    """What all processes have drawn for a round, in order, and what it was found worth; rows are pictures."""

    data: dict[
        str, Tensor
    ]  # prompt (its number), latents; of trajectories those of the whole window, log_prob, and mean if kept
    thumbnails: Tensor
    total: Tensor  # the reward that is trained on
    raw: dict[str, Tensor]  # every reward by name
    kl: list[float]  # divergence of each step from the reference's; none where it is not measured


class Rollouts:
    """A source of items for the loop that draws them itself, round by round.

    Args:
        policy: draws the pictures and is trained on them.
        prompts: what to draw; every prompt once before any is drawn again.
        conditions: what the policy is conditioned on, one row for each prompt, joined with that of its negative prompt
            (`palate.diffusion.sampling.join`).
        sampling: how pictures are drawn.
        rewards: judges of pictures.
        evidence: what the objective learns from: ``trajectories``, ``samples`` or ``pairs``.
        seed: decides prompts, noise and order.
        replay: a check of trajectories.
        progress: show a bar.
    """

    def __init__(
        self,
        policy: TrainablePolicy,
        prompts: Sequence[Prompt],
        conditions: Conditioning | Encoded,
        sampling: SamplingPlan,
        *,
        rewards: RewardBundle,
        options: OnlineOptions,
        evidence: str,
        seed: int = 0,
        replay: Replay | None = None,
        progress: bool = False,
    ):
        if evidence == "trajectories" and not options.draws_noise:
            raise UserError("sample_eta is 0: nothing is drawn on the way, so there is no likelihood to train; use 1")
        if options.sample_rule == "flow_sde" and not isinstance(policy.schedule, RectifiedFlow):
            raise UserError(
                "sample_rule flow_sde is a step of rectified flow, and this model is none: use cps, or ddim with sample_eta"
            )
        self.policy, self.prompts, self.conditions, self.sampling = policy, list(prompts), conditions, sampling
        self.rewards, self.options, self.evidence, self.seed = rewards, options, evidence, seed
        self.sampler = PromptSampler(self.prompts, seed)
        self.places = {id(prompt): place for place, prompt in enumerate(self.prompts)}
        self.arithmetic = Arithmetic.of(options, evidence)
        self.shapes = list(sampling.shapes) or [sampling.shape] * len(self.prompts)
        self.paths = {
            shape: policy.schedule.path(options.sample_num_steps, options.timestep_spacing, shape) for shape in set(self.shapes)
        }
        self.rule = options.rule
        self.replay, self.progress = replay, progress
        self.tracker = advantages.PromptTracker(options.tracker_buffer_size, options.tracker_min_count)
        self.seen: list[float] = []  # every reward so far, for the streaming percentile
        self.means: list[float] = []  # the mean reward of every round, all on one scale
        self.queries = 0
        self.round = -1
        self.followed = 0  # the round for which the old policy was last brought up to date; at the start it is the policy
        self.before = self._memory()  # as it was before the round at hand
        self.data: dict[str, Tensor] = {}  # the round at hand; rows are pictures
        self.plan: list[Item] = []
        self.checked = False

    # What the loop asks ---------------------------------------------------------------------------------------------------

    @property
    def rounds(self) -> Rollouts:
        """It draws a new round for every epoch."""
        return self

    def __len__(self) -> int:
        """Items of a round, all inner epochs together."""
        return self.arithmetic.items * self.options.inner_epochs

    def order(self, seed: int, epoch: int) -> list[int]:
        """The plan of a round is already in order."""
        return list(range(len(self)))

    def shape_of(self, index: int) -> tuple[int, ...]:
        """Of an item's latents."""
        return self.shapes[int(self.data["prompt"][self.plan[index][0]])]

    def begin(
        self, number: int, processes: Processes | None = None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, object]:
        """Draw and judge the pictures of round ``number``, and plan what is learned from them.

        Returns what the log should tell: rewards, KL divergence, diversity and what belongs to the objective.

        Raises:
            UserError: latents that are not finite, a reward that failed, or a likelihood that training finds different from
                sampling.
            Abandoned: ``stop()`` became true between two batches (of a single process).
            BudgetSpent: the policy is farther from the reference than ``kl_budget``.
        """
        processes = processes or Processes()
        self._follow(number)
        n, self.before = self.options.samples_per_round, self._memory()
        share, rest = divmod(n, processes.count)
        if rest:
            raise UserError(f"samples_per_round {n} does not divide among {processes.count} processes; use a multiple")
        drawn = self._draw(number, range(processes.index * share, (processes.index + 1) * share), processes, stop)
        if self.options.kl_budget is not None and sum(drawn.kl) > self.options.kl_budget:
            self.rewards.load_state_dict(self.before["rewards"])  # this round counts for nothing
            raise BudgetSpent(f"KL divergence {sum(drawn.kl):.3g} is over kl_budget {self.options.kl_budget}")
        self.queries += n
        self.round, self.data = number, drawn.data
        prompts = self._texts(drawn.data["prompt"])
        told = self._told(prompts, drawn)
        told |= self._plan(number, prompts, drawn.total)
        with processes.together():
            self._check()
        return told

    def batch(self, indices: Sequence[int], seeds: Tensor) -> TrajectoryBatch | PairBatch | SampleBatch:
        """The items at these places of the plan."""
        rows = [self.plan[i] for i in indices]
        first = torch.tensor([row[0] for row in rows])
        which = self.data["prompt"][first]
        shape, path = self.shapes[int(which[0])], self.paths[self.shapes[int(which[0])]]
        cond = self._conditions(which, self.options.trained_scale)
        if self.evidence == "trajectories":
            step = torch.tensor([row[1] for row in rows])
            times = step + self._window(self.round).start
            latents = self.data["latents"]
            return TrajectoryBatch(
                xt=self._unpacked(latents[first, step], shape),
                after=self._unpacked(latents[first, step + 1], shape),
                t=path.t[times],
                s=path.s[times],
                cond=cond.tensors,
                old_log_prob=self.data["log_prob"][first, step],
                advantage=self.data["advantage"][first],
                prompts=self._texts(which),
                old_mean=self._unpacked(self.data["mean"][first, step], shape) if self.sampling.keep_means else None,
            )
        latents, label = self.data["latents"], torch.ones(len(rows))
        if self.evidence == "samples":
            label = self.data["label"][first] if "label" in self.data else label
            chosen = self._unpacked(latents[first], shape)
            return SampleBatch(chosen, cond.tensors, label, self.data["weight"][first], seeds)
        second, total = torch.tensor([row[1] for row in rows]), self.data["total"]
        weight = (total[first] != total[second]).float()  # equals teach nothing
        both = self._unpacked(torch.cat([latents[first], latents[second]]), shape)
        return PairBatch(both, cond.repeat(2).tensors, label, weight, seeds)

    def counted(self, position: int) -> dict[str, int | float]:
        """Rounds and reward queries."""
        return {"round": round(position / len(self), 4), "reward_queries": self.queries}

    def state_dict(self, position: int) -> dict[str, Any]:
        """All that is needed to go on from item ``position`` of the endless sequence of rounds."""
        number, within = divmod(position, len(self))
        also = {"prompts": self._listed(), "followed": self.followed}
        if within:
            return {"memory": self._memory(), "round": self.round, "data": self.data, "plan": self.plan, **also}
        # At the border of two rounds only what they remember counts; the one at hand may have been drawn for nothing.
        return {"memory": self._memory() if number > self.round else self.before, **also}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("prompts", self._listed()) != self._listed():
            raise UserError(
                f"the checkpoint was trained on other prompts than these {len(self.prompts)}, or in another order; resume with "
                "the list as it was"
            )
        memory, self.followed = state["memory"], state.get("followed", 0)
        self.tracker.load_state_dict(memory["tracker"])
        self.rewards.load_state_dict(memory["rewards"])
        self.seen, self.means, self.queries = list(memory["seen"]), list(memory["means"]), memory["queries"]
        if "plan" in state:
            self.round, self.data = state["round"], dict(state["data"])
            self.plan = [tuple(rows) for rows in state["plan"]]

    # Parts ----------------------------------------------------------------------------------------------------------------

    def _window(self, number: int) -> range:
        return self.options.window_of(self.seed, number)

    def _follow(self, number: int) -> None:
        """The old policy comes nearer to the one in training: once for a round, also where it is begun again."""
        if self.sampling.by_old and number > self.followed:
            lagging(self.policy).advance_old(min(HOLDING * number, self.options.old_decay))
            self.followed = number

    def _listed(self) -> str:
        """A digest of all that is drawn."""
        own = [[] if prompt.shape is None else [prompt.shape.told] for prompt in self.prompts]
        listed = json.dumps([[prompt.text, prompt.negative, *shape] for prompt, shape in zip(self.prompts, own, strict=True)])
        return hashlib.sha256(listed.encode()).hexdigest()

    def _texts(self, which: Tensor) -> list[str]:
        numbers: list[int] = which.tolist()
        return [self.prompts[i].text for i in numbers]

    def _memory(self) -> dict[str, Any]:
        """What outlives a round, copied."""
        return {
            "tracker": self.tracker.state_dict(),
            "rewards": self.rewards.state_dict(),
            "seen": list(self.seen),
            "means": list(self.means),
            "queries": self.queries,
        }

    def _conditions(self, which: Tensor, scale: float) -> Conditioning:
        rows = self.conditions.rows(which)
        return rows if scale != 1 else Conditioning({k: v for k, v in rows.tensors.items() if "/" not in k})

    @torch.no_grad()
    def _draw(self, number: int, share: range, processes: Processes, stop: Callable[[], bool]) -> Drawn:
        """The pictures of all processes, in order, and what is found of them."""
        options, n = self.options, self.options.samples_per_round
        self.rewards.gather = processes.gather
        with processes.together():
            try:
                parts, pending, kl = self._draw_share(number, share, processes, stop)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"no free memory to draw {options.sample_batch_size} pictures at once: lower sample_batch_size"
                ) from error
            self.rewards.wait(pending)
        judged = self.rewards.collect(pending)
        data = {name: processes.gather(torch.cat(tensors)) for name, tensors in parts.items()}
        order = data.pop("row").argsort()  # in which they were asked for, not drawn

        def sorted_rows(rows: Tensor) -> Tensor:
            return rows if len(self.paths) == 1 else rows[order]

        data = {name: sorted_rows(rows) for name, rows in data.items()}
        if self.evidence != "trajectories":
            data["latents"] = data["latents"][:, 0]
        measured_in_all = min(n, options.kl_samples)
        kl_of_all = processes.gather(kl.float()[None]).sum(0).double() / max(1, measured_in_all)
        steps: list[float] = kl_of_all.tolist()
        return Drawn(
            data,
            thumbnails=data.pop("thumbnail"),
            total=sorted_rows(processes.gather(judged.total)),
            raw={name: sorted_rows(processes.gather(rows)) for name, rows in judged.raw.items()},
            kl=steps if measured_in_all and options.draws_noise else [],
        )

    def _draw_share(
        self, number: int, share: range, processes: Processes, stop: Callable[[], bool]
    ) -> tuple[dict[str, list[Tensor]], list[Pending], Tensor]:
        """The pictures of this process in batches of one shape each, and handed in; sums of the KL divergence of each step."""
        options, n = self.options, self.options.samples_per_round
        device = next(iter(self.policy.parameters())).device
        asked = self.sampler.draw(number, n // options.group_size, options.group_size)
        which = [self.places[id(asked[row])] for row in share]
        seeds = torch.tensor([mix(self.seed, PICTURE, number * n + row) for row in share])
        window = self._window(number)
        noisy = None if options.window_end is None else window
        # What is not trained has no likelihood to compare with.
        trained = window if self.evidence == "trajectories" else range(0)
        keep = slice(window.start, window.stop + 1) if trained else slice(-1, None)
        parts: dict[str, list[Tensor]] = {name: [] for name in ("latents", "thumbnail", "prompt", "row")}
        pending: list[Pending] = []
        kl = torch.zeros(options.sample_num_steps, dtype=torch.float64)
        bar = tqdm(
            total=len(share),
            desc=f"round {number}: drawing",
            unit="picture",
            leave=False,
            disable=None if self.progress else True,
        )
        for places in one_shape_each([self.shapes[i] for i in which], options.sample_batch_size):
            if processes.count == 1 and stop():
                bar.close()
                raise Abandoned
            part, rows = [which[i] for i in places], [share[i] for i in places]
            shape, path = self.shapes[part[0]], self.paths[self.shapes[part[0]]]
            cond = self._conditions(torch.tensor(part), options.sample_guidance_scale).to(device)
            measured = sum(row < options.kl_samples for row in rows)  # the first of a round are
            drawn = sample(
                self._drawn_by,
                self.policy.schedule,
                path,
                cond,
                seeds[places],
                shape,
                guidance_scale=options.sample_guidance_scale,
                rule=self.rule,
                noisy=noisy,
                judged=trained,
                judged_scale=options.trained_scale,
                keep_means=self.sampling.keep_means,
                device=device,
                on_step=self._measuring(kl, measured, cond, path, noisy) if options.draws_noise else None,
            )
            self._all_finite(drawn.latents, [number * n + row for row in rows], part, path)
            with torch.autocast(device.type, enabled=False):
                pictures = self.sampling.decode(drawn.latents[:, -1]).cpu()
            pending.append(self.rewards.submit(pictures, [self.prompts[i] for i in part]))
            parts["thumbnail"].append(F.adaptive_avg_pool2d(pictures.float(), 16))
            parts["prompt"].append(torch.tensor(part))
            parts["row"].append(torch.tensor(rows))
            parts["latents"].append(self._packed(drawn.latents[:, keep].cpu()))
            if trained:
                parts.setdefault("log_prob", []).append(drawn.log_prob.cpu())
            if drawn.mean is not None:
                parts.setdefault("mean", []).append(self._packed(drawn.mean.cpu()))
            bar.update(len(part))
        bar.close()
        return parts, pending, kl

    @property
    def _drawn_by(self) -> Predict:
        """The model that draws."""
        return lagging(self.policy).old if self.sampling.by_old else self.policy

    def _measuring(
        self, kl: Tensor, measured: int, cond: Conditioning, path: Path, noisy: range | None
    ) -> Callable[[int, Tensor, Transition | None], None]:
        """What :func:`sample` calls after each step: adds to kl (steps,) how far its first pictures are from the reference.

        measured: so many pictures. noisy: as in :func:`sample`.
        """
        judge, refer = (guided(model, self.options.trained_scale) for model in (self._drawn_by, self.policy.reference))

        def measure(k: int, x: Tensor, step: Transition | None) -> None:
            if not measured or (noisy is not None and k not in noisy):
                return
            times, there = path.at(k, measured, x.device), cond.rows(slice(measured))

            def taken(model: Predict) -> Transition:
                return transition(model, self.policy.schedule, x[:measured], *times, there, rule=self.rule)

            own = taken(judge) if step is None else Transition(step.mean[:measured], step.std[:measured])
            kl[k] += own.kl(taken(refer)).double().sum().cpu()

        return measure

    def _packed(self, latents: Tensor) -> Tensor:
        """Latents (b, steps, ...), where prompts have several shapes, in one row each of the longest one's length."""
        if len(self.paths) == 1:
            return latents
        flat = latents.flatten(2)
        return F.pad(flat, (0, max(map(math.prod, self.paths)) - flat.shape[-1]))

    def _unpacked(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Latents (b, ...) of what :meth:`_packed` gave."""
        return latents if len(self.paths) == 1 else latents[:, : math.prod(shape)].unflatten(1, shape)

    def _all_finite(self, latents: Tensor, numbers: Sequence[int], which: Sequence[int], path: Path) -> None:
        finite = latents.flatten(2).isfinite().all(2)
        if bool(finite.all()):
            return
        row, after = (int(x) for x in (~finite).nonzero()[0])
        raise UserError(
            f"picture {numbers[row]} ({short(self.prompts[which[row]].text)}) is not finite after step {after - 1} of "
            f"{len(path)} (time {path.t[max(0, after - 1)]:g}); "
            "lower learning_rate, or use mixed_precision bf16 or no"
        )

    def _told(self, prompts: list[str], drawn: Drawn) -> dict[str, object]:
        """Rewards, diversity and KL divergence of a round; its mean reward is remembered."""
        means = {name: float(raw.double().mean()) for name, raw in drawn.raw.items()}
        self.means.append(self.rewards.level(means))
        told: dict[str, object] = {"reward_mean": self.means[-1], "reward_std": float(drawn.total.std(correction=0))}
        told |= {f"reward/{name}": mean for name, mean in means.items()}
        if (apart := advantages.spread(prompts, drawn.thumbnails)) is not None:
            told["diversity"] = apart
        return told | ({"kl_path": sum(drawn.kl), "kl_steps": [round(x, 8) for x in drawn.kl]} if drawn.kl else {})

    def _plan(self, number: int, prompts: list[str], total: Tensor) -> dict[str, int | float]:
        """What is learned from the round, item by item, and what the log should tell of it."""
        options, seed = self.options, mix(self.seed, PLAN, number)
        self.data["total"] = total
        told: dict[str, int | float] = {}
        if self.evidence == "trajectories":
            self.data["advantage"] = self._clipped_advantages(prompts, total, told)
            self.plan = []
            for epoch in range(options.inner_epochs):
                for row in _shuffled(len(prompts), mix(seed, epoch)):
                    steps = _shuffled(len(options.window), mix(seed, epoch, row))[: self.arithmetic.steps]
                    self.plan += [(row, step) for step in steps]
            return told
        self.data["weight"] = torch.ones(len(prompts))
        rows: list[Item]
        if self.evidence == "pairs":
            rows = [*advantages.ranked_pairs(prompts, total)]
            told["ties"] = sum(float(total[w]) == float(total[l]) for w, l in rows)
        elif options.weighting == "advantage":
            self.data["label"] = 0.5 + self._clipped_advantages(prompts, total, told) / (2 * options.adv_clip)
            rows = [(row,) for row in range(len(prompts))]
        elif options.weighting == "softmax":
            weights = advantages.softmax_weights(
                prompts,
                total,
                temperature=options.temperature,
                per_prompt=options.per_prompt,
                standardise=options.standardise_rewards,
            )
            self.data["weight"], rows = weights, [(row,) for row in range(len(prompts))]
            told["effective_samples"] = advantages.effective_sample_size(weights)
        else:
            kept: list[int] = self._kept(prompts, total).nonzero()[:, 0].tolist()
            rows = [(row,) for row in kept]
            told["kept"] = len(rows)
        # As many items whatever was kept: what there is, shuffled, again and again.
        self.plan, epoch = [], 0
        while len(self.plan) < len(self):
            self.plan += [rows[i] for i in _shuffled(len(rows), mix(seed, epoch))]
            epoch += 1
        self.plan = self.plan[: len(self)]
        return told

    def _clipped_advantages(self, prompts: list[str], total: Tensor, told: dict[str, int | float]) -> Tensor:
        """Advantages as they are learned from; tells how many were cut off."""
        found, limit = self._advantages(prompts, total), self.options.adv_clip
        told["advantage_clipped"] = float((found.abs() > limit).float().mean())
        return found.clamp(-limit, limit)

    def _advantages(self, prompts: list[str], total: Tensor) -> Tensor:
        options = self.options
        if options.advantage == "group":
            return advantages.group_advantages(prompts, total, global_std=options.global_std)
        if options.advantage == "round":
            return advantages.group_advantages([""] * len(prompts), total)
        return self.tracker.advantages(prompts, total, global_std=options.global_std)

    def _kept(self, prompts: list[str], total: Tensor) -> Tensor:
        options = self.options
        if options.weighting == "threshold":
            assert options.threshold is not None  # OnlineOptions refuses it otherwise
            return advantages.best(total, options.threshold)
        if options.weighting == "streaming_percentile":
            self.seen += total.tolist()
            return advantages.best(total, advantages.percentile(torch.tensor(self.seen), options.percentile))
        kept, keys = torch.zeros(len(prompts), dtype=torch.bool), prompts if options.per_prompt else [""] * len(prompts)
        for key in dict.fromkeys(keys):
            own = torch.tensor([k == key for k in keys])
            kept[own] = advantages.best(total[own], advantages.percentile(total[own], options.percentile))
        return kept

    def _check(self) -> None:
        """Once: training must find what was just sampled exactly as likely as sampling did."""
        if self.replay is None or self.checked:
            return
        size, tolerance = self.replay.batch_size, self.replay.tolerance
        # One item of each trained time, and the first ones of all, which may be of one picture.
        first = {row[1]: place for place, row in reversed(list(enumerate(self.plan)))}
        places = sorted({*first.values(), *range(min(size, len(self)))})
        found: list[dict[str, Tensor]] = []
        for cut in one_shape_each([self.shape_of(place) for place in places], size):
            part = [places[i] for i in cut]
            with torch.no_grad():
                found.append(self.replay.step(self.batch(part, torch.zeros(len(part), dtype=torch.int64)))[1])
        worst = max(float(metrics["log_ratio"].abs().max()) for metrics in found)
        clipped = torch.cat([metrics.get("clip_fraction", torch.zeros(1)) for metrics in found]).mean()
        if worst > tolerance or clipped > 0.5:
            limit = f"tolerance {tolerance:g}" if worst > tolerance else "most of the steps beyond clip_range"
            raise UserError(
                f"the policy finds its own fresh samples {worst:.2g} more or less likely than when it drew them "
                f"({limit}): the ratio of importance sampling would be wrong from the start. A model with "
                "dropout, or mixed_precision bf16 with batches of different size, does this: use mixed_precision no or fp16, "
                "and train_batch_size equal to sample_batch_size"
            )
        self.checked = True


def _shuffled(n: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
