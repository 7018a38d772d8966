"""Every objective in every space on every family: two steps, finite, the weights move, and resuming equals going on."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.diffusion.batches import PairBatch
from palate.diffusion.denoising import Fit
from palate.models.families import load_denoiser
from palate.models.policy import Policy
from palate.objectives import pairs, samples
from palate.runs.methods import bind_objective, bind_space, complete_objective, complete_space
from palate.spaces import latent
from palate.training.fits import Draws
from palate.training.log import read_log
from palate.training.loop import train
from palate.training.options import TrainOptions
from palate.training.steps import pair_step, sample_step

OBJECTIVES = {
    **{name: {"beta": "auto"} for name in ("cdpo", "dpo", "dspo", "hinge", "ipo", "kto", "mapo", "sdpo")},
    "cpo": {"beta": "auto", "bc_weight": 1.0},
    "awm": {"reference_weight": 0.1},
    "nft": {"reference_weight": 0.1},
    "orpo": {},
    "sft": {},
}
SPACES = {
    "latent": {"name": "latent"},
    "perceptual": {"name": "perceptual", "layers": "mid"},
}


def test_no_objective_is_forgotten():
    assert set(OBJECTIVES) == {*pairs.__all__, *samples.__all__}


class RandomPairs:
    """Four pairs of random latents with real text encodings."""

    rounds = None

    def __init__(self, denoiser):
        generator = torch.Generator().manual_seed(3)
        self.latents = torch.randn(2, 4, *denoiser.latent_shape(Shape(64, 64)), generator=generator)
        text = denoiser.encode_prompts(["a red house", "a blue tower", "a tree", "a yellow sailboat"])
        self.text = {name: rows.detach() for name, rows in text.tensors.items()}

    def __len__(self) -> int:
        return 4

    def shape_of(self, index: int) -> None:
        return None

    def order(self, seed: int, epoch: int) -> list[int]:
        return [0, 1, 2, 3]

    def batch(self, indices, seeds: Tensor) -> PairBatch:
        cond = {name: rows[indices].repeat(2, *[1] * (rows.ndim - 1)) for name, rows in self.text.items()}
        label = torch.tensor([1.0, 0.8, 1.0, 0.5])[indices]
        return PairBatch(self.latents[:, indices].flatten(0, 1), cond, label, torch.ones(len(indices)), seeds)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request, model_dir, sdxl_dir):
    """A function that loads the tiny model of a family, its pairs, and its empty prompt."""
    folder = str(model_dir if request.param == "sd" else sdxl_dir)
    denoiser = load_denoiser(folder)
    return lambda: load_denoiser(folder), RandomPairs(denoiser), denoiser.unconditional()


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_steps(family, tmp_path, objective, space):
    load, data, nothing = family
    chosen = bind_objective(complete_objective({"name": objective, **OBJECTIVES[objective]}))
    make = pair_step if chosen.evidence == "pairs" else sample_step

    def run(folder: str, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        policy = Policy(load(), rank=2)
        if chosen.names("old"):
            policy.track_old(0.9)
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        draws = Draws(caption_dropout=0.5, no_prompt=nothing, snr_gamma=5.0)
        step = make(
            policy, bind_space(complete_space(SPACES[space]), policy), chosen.function, draws, auto_beta=chosen.auto_beta
        )
        given = {"train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1} | options
        train(step, policy, data, options=TrainOptions(output_dir=str(tmp_path / folder), **given))
        return before, policy.state_dict()

    before, straight = run("a", max_train_steps=2, checkpointing_steps=1)
    _, resumed = run("b", max_train_steps=2, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert any(not torch.equal(before[name], straight[name]) for name in before)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    lines = [line for line in read_log(tmp_path / "a" / "log.jsonl") if "loss" in line]
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


OF_FLOW = {
    "latent": {"name": "latent"},
    "perceptual": {"name": "perceptual", "layers": "all", "steps_back": 20},
}


@pytest.mark.parametrize("space", OF_FLOW)
@pytest.mark.parametrize("kind", ["sd3", "zimage", "klein", "flux"])
def test_every_objective_has_a_gradient_on_a_rectified_flow(sd3_dir, flow_dir, kind, space):
    denoiser = load_denoiser(str(sd3_dir if kind == "sd3" else flow_dir(kind)))
    data = RandomPairs(denoiser)
    nothing = denoiser.unconditional()
    policy = Policy(denoiser, rank=2)
    policy.track_old(0.9)
    with torch.no_grad():  # on the policy that drew, a picture between good and bad teaches NFT nothing
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    bound = bind_space(complete_space(OF_FLOW[space]), policy)
    for name, options in OBJECTIVES.items():
        chosen = bind_objective(complete_objective({"name": name, **options}))
        make = pair_step if chosen.evidence == "pairs" else sample_step
        draws = Draws(caption_dropout=0.5, no_prompt=nothing, snr_gamma=5.0)
        step = make(policy, bound, chosen.function, draws, auto_beta=chosen.auto_beta)
        step.begin(data)
        losses, _ = step(data.batch([0, 1], torch.tensor([5, 6])))
        gradients = torch.autograd.grad(losses.sum(), list(policy.parameters()), allow_unused=True)
        found = [gradient for gradient in gradients if gradient is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in found), name
        assert sum(bool(gradient.any()) for gradient in found) > 4, name


def test_an_objective_may_name_a_policy_that_lags_behind(family, tmp_path):
    load, data, _ = family
    errors: list[tuple[Tensor, Tensor]] = []

    def nearer_than(policy: Fit, old: Fit) -> Tensor:
        assert not old.residual.requires_grad
        errors.append((policy.error.detach(), old.error))
        return policy.error - old.error

    def run(folder: str, steps: int, *, track: bool = True, **options) -> Policy:
        errors.clear()
        policy = Policy(load(), rank=2)
        if track:
            policy.track_old(0.5)
        given = {"train_batch_size": 4, "learning_rate": 1e-2, "max_train_steps": steps, "checkpointing_steps": 1} | options
        train(
            sample_step(policy, latent(), nearer_than),
            policy,
            data,
            options=TrainOptions(output_dir=str(tmp_path / folder), **given),
        )
        return policy

    straight = run("a", 4)
    # Both begin as one; then the old one follows, half the way with each update.
    assert torch.equal(*errors[0])
    assert all(not torch.equal(now, before) for now, before in errors[1:])
    states = [load_file(tmp_path / "a" / f"checkpoint-{n}" / "weights.safetensors") for n in (1, 2)]
    for name, old in states[1].items():
        if name.startswith("old/"):
            torch.testing.assert_close(old, (states[0][name] + states[1][name.removeprefix("old/")]) / 2)
    seen = list(errors)
    resumed = run("b", 4, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert all(
        torch.equal(a, b) for pair, again in zip(seen[2:], errors, strict=True) for a, b in zip(pair, again, strict=True)
    )
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in straight.state_dict().items())
    with pytest.raises(UserError, match="do not fit this policy"):
        run("c", 4, track=False, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    with pytest.raises(ValueError, match="call track_old first"):
        run("d", 1, track=False)
