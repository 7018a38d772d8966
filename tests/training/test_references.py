"""Draws that return, and what is kept of the reference: the cached run is the uncached one to the last bit."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import PAIRS, TinyPairs, TinyPolicy, run
from torch import Tensor

from palate.base.errors import UserError
from palate.data.cache import TensorCache
from palate.diffusion.batches import PairBatch
from palate.diffusion.denoising import Fit
from palate.models.families import load_denoiser
from palate.models.policy import Policy
from palate.objectives.pairs import cpo, dpo, dspo
from palate.objectives.samples import kto
from palate.spaces import latent, perceptual
from palate.training import checkpoints
from palate.training.log import read_log
from palate.training.options import TrainOptions
from palate.training.references import References
from palate.training.steps import pair_step, sample_step

DPO = functools.partial(dpo, beta=50.0)
EPOCHS = {"train_batch_size": 4, "draws_per_pair": 2, "max_train_steps": 15}  # 60 of 11 pairs: five epochs and a half


def kept(folder: Path, **about: object) -> References:
    return References(TensorCache(folder), about)


def by_dpo(policy, references: References | None, *, beta: float = 50.0):
    return pair_step(policy, latent(), functools.partial(dpo, beta=beta), references=references)


def train(folder: Path, make, references: References | None, **options: object) -> TinyPolicy:
    policy = run(folder, make=functools.partial(make, references=references), **{**EPOCHS, **options})
    if references is not None:
        references.close()
    return policy


def weights(policy: TinyPolicy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def log(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder / "log.jsonl")]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


class Noting(TinyPairs):
    """Notes which seed every pair was asked for with."""

    def __init__(self):
        super().__init__()
        self.seeds: list[tuple[int, int]] = []

    def batch(self, indices, seeds):
        self.seeds += zip(indices, seeds.tolist(), strict=True)
        return super().batch(indices, seeds)


def test_a_pair_has_k_draws_one_an_epoch_and_then_the_first_again(tmp_path):
    data, fresh = Noting(), Noting()
    epochs = {"train_batch_size": 11, "max_train_steps": 5}
    run(tmp_path / "a", data=data, draws_per_pair=2, **epochs)
    run(tmp_path / "b", data=fresh, **epochs)
    drawn, anew = ([dict(d.seeds[e * PAIRS : (e + 1) * PAIRS]) for e in range(5)] for d in (data, fresh))
    assert drawn[0] == drawn[2] == drawn[4]
    assert drawn[1] == drawn[3]
    assert not set(drawn[0].values()) & set(drawn[1].values())
    assert drawn[:2] == anew[:2]  # the first k epochs are those of a run with fresh draws
    assert len({seed for epoch in anew for seed in epoch.values()}) == 5 * PAIRS


def test_the_cached_run_is_the_uncached_one_to_the_last_bit(tmp_path):
    plain = train(tmp_path / "a", by_dpo, None)
    references = kept(tmp_path / "cache")
    cached = train(tmp_path / "b", by_dpo, references)
    assert_same(weights(plain), weights(cached))
    assert log(tmp_path / "a") == log(tmp_path / "b")
    assert (plain.reference_calls, cached.reference_calls) == (15, 6)  # 22 draws in batches of 4
    assert (references.computed, references.found) == (24, 36)
    again = train(tmp_path / "c", by_dpo, kept(tmp_path / "cache"))
    assert_same(weights(plain), weights(again))
    assert again.reference_calls == 0
    other = train(tmp_path / "d", functools.partial(by_dpo, beta=5.0), kept(tmp_path / "cache"))
    assert other.reference_calls == 0  # another beta, the same draws


def test_all_passes_are_taken_where_another_process_lacks_what_this_one_has(tmp_path):
    plain = train(tmp_path / "a", by_dpo, None)
    train(tmp_path / "b", by_dpo, kept(tmp_path / "cache"))
    asked: list[bool] = []
    references = References(TensorCache(tmp_path / "cache"), {}, lacking=lambda lacks: asked.append(lacks) is None)
    found = train(tmp_path / "c", by_dpo, references)
    assert_same(weights(plain), weights(found))
    assert (asked, found.reference_calls) == ([False] * 15, 15)
    assert (references.computed, references.found) == (0, 60)


def test_kto_finds_the_losers_own_draws_too(tmp_path):
    def by_kto(policy, references):
        return sample_step(policy, latent(), functools.partial(kto, beta=50.0), references=references)

    plain, cached = train(tmp_path / "a", by_kto, None), train(tmp_path / "b", by_kto, kept(tmp_path / "cache"))
    assert_same(weights(plain), weights(cached))
    assert (plain.reference_calls, cached.reference_calls) == (15, 6)


def test_an_objective_without_a_reference_keeps_nothing(tmp_path):
    def by_cpo(policy, references):
        return pair_step(policy, latent(), functools.partial(cpo, beta=10.0, bc_weight=1.0), references=references)

    train(tmp_path / "a", by_cpo, kept(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_resumed_with_what_was_kept_is_uninterrupted_bit_for_bit(tmp_path):
    straight = train(tmp_path / "a", by_dpo, None)
    train(tmp_path / "b", by_dpo, kept(tmp_path / "cache"), max_train_steps=4)
    resumed = train(tmp_path / "b", by_dpo, kept(tmp_path / "cache"), resume_from_checkpoint="latest")
    assert_same(weights(straight), weights(resumed))
    assert resumed.reference_calls < 6


def test_two_processes_with_what_was_kept_are_two_without_bit_for_bit(tmp_path, quick_python, in_two_processes):
    script = Path(__file__).with_name("tiny_training.py")
    finished = in_two_processes([quick_python, script, tmp_path, "4", 2**24, tmp_path / "cache"])
    for code, errors in finished(180):
        assert code == 0, errors
        filling, full = (
            [*map(int, numbers)] for numbers in re.findall(r"^(?:filling|full) (\d+) (\d+)$", errors, re.MULTILINE)
        )
        assert sum(filling) == sum(full) == full[1] == 24
        assert filling[1] >= 4  # what the other process computed is found too, once it is written
    plain, filling, full = (checkpoints.load(tmp_path / n / "checkpoint-6").weights for n in ("plain", "filling", "full"))
    assert_same(plain, filling)
    assert_same(plain, full)


def batch() -> PairBatch:
    return TinyPairs().batch([0, 1, 2], torch.tensor([5, 6, 7]))


def found(references: References, given: PairBatch, space=None) -> bool:
    """Whether the reference of these pairs is known."""
    policy = TinyPolicy()
    pair_step(policy, space or latent(), DPO, references=references)(given)
    references.flush()
    references.close()
    return policy.reference_calls == 0


def test_an_entry_is_named_by_all_that_it_depends_on(tmp_path):
    assert not found(kept(tmp_path, frozen="a", precision="no"), batch())
    assert found(kept(tmp_path, frozen="a", precision="no"), batch())
    for about in ({"frozen": "b", "precision": "no"}, {"frozen": "a", "precision": "bf16"}):
        assert not found(kept(tmp_path, **about), batch())
    given = batch()
    latents, text = given.latents.clone(), given.cond["text"].clone()
    latents[4] += 1e-6  # of one loser
    text[1, 0] += 1e-6
    for other in (
        replace(given, seeds=torch.tensor([5, 6, 8])),
        replace(given, latents=latents),
        replace(given, cond={"text": text}),
    ):
        assert not found(kept(tmp_path, frozen="a", precision="no"), other)
    assert found(kept(tmp_path, frozen="a", precision="no"), batch())


def test_the_order_of_the_batch_does_not_matter_and_a_damaged_entry_is_made_again(tmp_path):
    given = batch()
    found(kept(tmp_path), given)
    turned = TinyPairs().batch([2, 0, 1], torch.tensor([7, 5, 6]))
    step, plain = (pair_step(TinyPolicy(), latent(), DPO, references=r) for r in (kept(tmp_path), None))
    assert torch.equal(step(turned)[1]["winner_advantage"], plain(turned)[1]["winner_advantage"])
    for path in tmp_path.glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:-9])
    assert not found(kept(tmp_path), given)
    assert found(kept(tmp_path), given)


def test_an_objective_that_reads_the_references_residual_is_refused(tmp_path):
    with pytest.raises(UserError, match="draws_per_pair keeps its error alone"):
        pair_step(TinyPolicy(), latent(), dspo, references=kept(tmp_path))(batch())
    with pytest.raises(ValueError, match="either"):
        Fit()


def test_keeping_targets_needs_draws_that_return():
    with pytest.raises(UserError, match="keep_targets keeps what returns with draws_per_pair"):
        TrainOptions(keep_targets=True)


@pytest.fixture
def policy(model_dir):
    policy = Policy(load_denoiser(str(model_dir)), rank=4)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=g)
    return policy


class Latents:
    """Pairs of 16 x 16 latents."""

    rounds = None
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 2, 4, 16, 16, generator=g)
    text = torch.randn(8, 40, 16, generator=g)

    def batch(self, indices):
        indices = list(indices)
        rows = torch.cat([self.latents[indices, 0], self.latents[indices, 1]])
        ones = torch.ones(len(indices))
        return PairBatch(rows, {"encoder_hidden_states": self.text[indices].repeat(2, 1, 1)}, ones, ones, torch.tensor(indices))


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("space", ["latent", "perceptual"])
def test_on_a_real_network_in_other_company_to_the_last_bit(tmp_path, monkeypatch, policy, space, targets):
    where = latent() if space == "latent" else perceptual(policy.features, policy.schedule, layers="all")
    references = References(TensorCache(tmp_path), {}, targets=targets)
    cached = pair_step(policy, where, DPO, references=references)
    plain = pair_step(policy, where, DPO)
    data = Latents()
    for indices in ([0, 1, 2, 3], [4, 5, 6, 7]):
        cached(data.batch(indices))
    references.flush()

    def asked(*_: object) -> Tensor:
        raise AssertionError("the reference was asked")

    with monkeypatch.context() as patch:
        patch.setattr(policy, "reference", asked)
        losses, metrics = cached(data.batch([6, 0, 3, 5]))
    expected, told = plain(data.batch([6, 0, 3, 5]))
    assert torch.equal(losses, expected)
    assert all(torch.equal(metrics[name], told[name]) for name in told)
    ours, theirs = (torch.autograd.grad(x.sum(), list(policy.parameters())) for x in (losses, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert references.computed == (16 if targets else 8)


def test_the_digest_of_a_reference_is_of_its_weights_and_not_of_the_policys(model_dir, policy):
    fresh = Policy(load_denoiser(str(model_dir)), rank=4)
    assert policy.reference_digest() == fresh.reference_digest()
    assert Policy(load_denoiser(str(model_dir)), kind="full").reference_digest() == fresh.reference_digest()
    with torch.no_grad():
        next(iter(fresh.frozen.parameters())).view(-1)[0] += 1e-4
    assert policy.reference_digest() != fresh.reference_digest()
