from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import TinyPairs, TinyPolicy

from palate.base.errors import UserError
from palate.base.seeds import mix
from palate.diffusion.batches import SampleBatch
from palate.diffusion.denoising import Conditioning, Fit, Pair, draw
from palate.diffusion.densities import shifted
from palate.diffusion.schedule import RectifiedFlow, VariancePreserving
from palate.objectives.pairs import cpo, dpo
from palate.objectives.samples import kto, sft
from palate.spaces import latent
from palate.training.fits import Draws
from palate.training.measures import automatic_beta, implicit_margins, pair_metrics
from palate.training.steps import pair_step, sample_step


def batch_of(indices=(3, 0, 5)):
    return TinyPairs().batch(indices, torch.tensor([mix(9, i) for i in indices]))


def moved_policy():
    policy = TinyPolicy()
    with torch.no_grad():
        policy.trainable_module.weight += 0.1
    return policy


def test_untrained_dpo_is_ln2_times_weight_and_a_tie():
    losses, metrics = pair_step(TinyPolicy(), latent(), functools.partial(dpo, beta=5000.0))(batch_of())
    # weights of pairs 3, 0, 5: 0.5 + 0.1 i = 0.8, 0.5, 1.0
    torch.testing.assert_close(losses, math.log(2) * torch.tensor([0.8, 0.5, 1.0]))
    assert metrics["implicit_accuracy"].tolist() == [0.5] * 3
    assert metrics["gradient_factor"].tolist() == [0.5] * 3
    assert metrics["logit"].tolist() == [0.0] * 3
    assert losses.requires_grad
    assert not any(values.requires_grad or values.shape != (3,) for values in metrics.values())


def test_losses_and_gradients_do_not_depend_on_the_batch_an_item_is_in():
    policy = moved_policy()
    step = pair_step(policy, latent(), functools.partial(dpo, beta=50.0))
    together, _ = step(batch_of((3, 0, 5)))
    alone = torch.cat([step(batch_of((i,)))[0] for i in (3, 0, 5)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)


def test_swapping_winner_and_loser_negates_the_margin():
    step = pair_step(moved_policy(), latent(), functools.partial(dpo, beta=50.0))
    batch = batch_of()
    margin = step(batch)[1]["margin"]
    w, l = batch.latents.chunk(2)
    swapped = type(batch)(torch.cat([l, w]), batch.cond, batch.label, batch.weight, batch.seeds)
    torch.testing.assert_close(step(swapped)[1]["margin"], -margin)


def test_a_reference_pass_is_made_only_for_objectives_that_name_it():
    policy = TinyPolicy()
    _, metrics = pair_step(policy, latent(), functools.partial(cpo, beta=10.0, bc_weight=1.0))(batch_of())
    assert policy.reference_calls == 0
    assert "winner_advantage" not in metrics
    torch.testing.assert_close(metrics["margin"], metrics["loser_error"] - metrics["winner_error"])
    pair_step(policy, latent(), dpo)(batch_of())
    assert policy.reference_calls == 1


def test_an_objective_that_names_what_it_cannot_get_is_refused():
    def strange(policy, lable, *, beta=1.0):
        return policy.error

    with pytest.raises(UserError, match="the objective names lable; it may name policy, reference, old, label, and"):
        pair_step(TinyPolicy(), latent(), strange)
    with pytest.raises(ValueError, match="TinyPolicy keeps no old policy"):
        pair_step(TinyPolicy(), latent(), lambda policy, old: policy.w.error - old.w.error)


def test_golden_metrics():
    def fit(*errors):
        return Fit(torch.tensor(errors)[:, None].sqrt())

    # Lw 1, Ll 4, Rw 2, Rl 3: m = -((1 - 4) - (2 - 3)) = 2; u = (0.5 / 2) 2 = 0.5; Rw - Lw = 1; Rl - Ll = -1
    metrics = pair_metrics(Pair(fit(1.0), fit(4.0)), Pair(fit(2.0), fit(3.0)), 0.5)
    golden = {"margin": 2, "logit": 0.5, "winner_advantage": 1, "loser_advantage": -1, "implicit_accuracy": 1}
    for name, value in golden.items():
        assert float(metrics[name]) == pytest.approx(value, abs=1e-6), name
    assert float(metrics["gradient_factor"]) == pytest.approx(1 / (1 + math.exp(0.5)))
    # A hyperparameter is also found where it is the function's default.
    _, metrics = pair_step(moved_policy(), latent(), dpo)(batch_of())
    torch.testing.assert_close(metrics["logit"], 2500 * metrics["margin"])


def test_sample_step_is_the_winners_half_of_a_pair_step():
    policy = moved_policy()
    losses, metrics = sample_step(policy, latent(), sft)(batch_of())
    _, pair_metrics = pair_step(policy, latent(), functools.partial(dpo, beta=1.0))(batch_of())
    torch.testing.assert_close(metrics["winner_error"], pair_metrics["winner_error"])
    torch.testing.assert_close(losses, metrics["winner_error"] * batch_of().weight)


def singles(batch, label):
    """The winners of a batch as single pictures."""
    p = len(batch.label)
    cond = {name: tensor[:p] for name, tensor in batch.cond.items()}
    return SampleBatch(batch.latents[:p], cond, torch.tensor(label), batch.weight, batch.seeds)


def test_kto_takes_the_winner_as_liked_and_the_loser_as_disliked():
    policy, batch = moved_policy(), batch_of((3, 0))
    step = sample_step(policy, latent(), functools.partial(kto, beta=40.0))
    losses, metrics = step(batch)
    # The same four pictures as single votes: winners with the pairs' seeds, losers with seeds of their own.
    w, l = batch.latents.chunk(2)
    cond = {name: tensor[:2] for name, tensor in batch.cond.items()}
    liked = SampleBatch(w, cond, torch.ones(2), batch.weight, batch.seeds)
    cond = {name: tensor[2:] for name, tensor in batch.cond.items()}
    own = torch.tensor([mix(int(seed), 1) for seed in batch.seeds])
    disliked = SampleBatch(l, cond, torch.zeros(2), batch.weight, own)
    (a, one), (b, other) = step(liked), step(disliked)
    torch.testing.assert_close(losses, (a + b) / 2)
    torch.testing.assert_close(metrics["winner_advantage"], one["advantage"])
    torch.testing.assert_close(metrics["loser_advantage"], other["advantage"])
    torch.testing.assert_close(metrics["margin"], one["advantage"] - other["advantage"])
    torch.testing.assert_close(metrics["advantage"], (one["advantage"] + other["advantage"]) / 2)
    torch.testing.assert_close(
        one["agreement"] + other["agreement"], ((one["advantage"] > 0).float() + (other["advantage"] < 0))
    )


def test_ktos_reference_point_is_the_mean_of_earlier_updates():
    policy, batch = moved_policy(), batch_of()
    step = sample_step(policy, latent(), functools.partial(kto, beta=40.0))
    assert step.state == {}
    first, metrics = step(batch)
    assert torch.equal(step(batch)[0], first)  # measuring alone changes nothing
    # 0.9 * 0 + 0.1 * 0.5 = 0.05; then 0.9 * 0.05 + 0.1 * 0.1 = 0.055.
    step.observe({"advantage": 0.5, "loss": 1.0})
    step.observe({"advantage": 0.1})
    assert step.state == {"reference_point": pytest.approx(0.055)}
    later, _ = step(singles(batch, [1.0, 1.0, 1.0]))
    before, metrics = sample_step(policy, latent(), functools.partial(kto, beta=40.0))(singles(batch, [1.0, 1.0, 1.0]))
    u = 20 * metrics["advantage"]
    torch.testing.assert_close(before, torch.sigmoid(-u) * batch.weight)
    torch.testing.assert_close(later, torch.sigmoid(-(u - 20 * 0.055)) * batch.weight)


def test_sft_learns_from_liked_single_pictures_alone():
    losses, metrics = sample_step(moved_policy(), latent(), sft)(singles(batch_of(), [1.0, 0.0, 0.5]))
    torch.testing.assert_close(losses, metrics["error"] * batch_of().weight * torch.tensor([1.0, 0.0, 0.5]))


def test_objectives_of_pairs_refuse_single_pictures():
    with pytest.raises(UserError, match="compares two pictures"):
        pair_step(TinyPolicy(), latent(), dpo)(singles(batch_of(), [1.0, 0.0, 1.0]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_snr_gamma_weighs_the_errors_themselves(prediction_type):
    policy, batch = moved_policy(), batch_of()
    policy.schedule = VariancePreserving(policy.schedule.alphas_cumprod, prediction_type)
    times = draw(policy.schedule, batch.latents[:3], Conditioning({"x": torch.zeros(3, 1)}), batch.seeds).t
    weight = policy.schedule.min_snr_weight(times, 2.0)
    assert len(set(weight.tolist())) == 3
    plain, weighted = (pair_step(policy, latent(), dpo, Draws(snr_gamma=g))(batch)[1] for g in (None, 2.0))
    for name in ("winner_error", "loser_advantage", "margin"):
        torch.testing.assert_close(weighted[name], plain[name] * weight)
    losses, _ = sample_step(policy, latent(), sft, Draws(snr_gamma=2.0))(batch)
    torch.testing.assert_close(losses, plain["winner_error"] * weight * batch.weight)


def test_snr_gamma_weighs_the_errors_of_a_flow_too():
    policy, batch = moved_policy(), batch_of()
    policy.schedule = RectifiedFlow()
    sigma = draw(policy.schedule, batch.latents[:3], Conditioning({"x": torch.zeros(3, 1)}), batch.seeds).t / 1000
    # The velocity's error times sigma^2 is that of x0, which weighs min(snr, gamma).
    weight = (((1 - sigma) / sigma).square().clamp(max=2.0) * sigma.square()).float()
    plain, weighted = (pair_step(policy, latent(), dpo, Draws(snr_gamma=g))(batch)[1] for g in (None, 2.0))
    for name in ("winner_error", "loser_advantage", "margin"):
        torch.testing.assert_close(weighted[name], plain[name] * weight)
    beta = [automatic_beta(policy, latent(), TinyPairs(), Draws(snr_gamma=g)) for g in (None, 2.0)]
    assert beta[1] > beta[0]  # errors are smaller, so the unit is


def test_automatic_beta_is_measured_at_the_times_that_training_draws():
    policy = moved_policy()
    plain, late, last = (
        automatic_beta(policy, latent(), TinyPairs(), draws)
        for draws in (Draws(), Draws(density=shifted(1e4)), Draws(t_min=99))
    )
    assert late == last != plain  # a shift of 10,000 leaves but the last time


def test_dropped_captions_are_decided_by_the_items_own_seed():
    draws = Draws(caption_dropout=0.25, no_prompt=Conditioning({"text": torch.full((1, 2), 7.0)}))
    seeds = torch.tensor([mix(3, i) for i in range(400)])
    cond = {"text": torch.zeros(800, 2), "framing": torch.ones(800, 6)}
    found = draws.captions(cond, seeds).tensors
    assert torch.equal(found["framing"], cond["framing"])
    winners, losers = found["text"].chunk(2)
    assert torch.equal(winners, losers)
    dropped = winners[:, 0] == 7
    assert torch.equal(winners, 7.0 * dropped[:, None].expand(-1, 2))
    assert 70 <= int(dropped.sum()) <= 130  # 100 expected, standard deviation 9
    some = [5, 0, 17]
    alone = draws.captions({"text": torch.zeros(3, 2)}, seeds[some]).tensors["text"]
    assert torch.equal(alone, winners[some])
    assert (cond["text"] == 0).all()


def test_without_its_prompt_an_item_is_measured_as_if_it_had_none():
    policy, batch = moved_policy(), batch_of()
    nothing = torch.full((1, 2), 0.3)
    bare = replace(batch, cond={"text": nothing.repeat(6, 1)})
    draws = Draws(caption_dropout=1.0, no_prompt=Conditioning({"text": nothing}))
    assert torch.equal(pair_step(policy, latent(), dpo, draws)(batch)[0], pair_step(policy, latent(), dpo)(bare)[0])


def test_automatic_beta_is_the_reciprocal_of_the_spread_of_errors():
    policy, data = TinyPolicy(), TinyPairs()
    _, metrics = pair_step(policy, latent(), dpo)(data.batch(range(11), torch.tensor([mix(128, i) for i in range(11)])))
    spread = float((metrics["loser_error"] - metrics["winner_error"]).std())
    assert automatic_beta(policy, latent(), data) == pytest.approx(6 / spread, rel=5e-3)  # three digits

    class Scaled:
        """The latent space in another unit: errors are 1e-6 of what they were."""

        t_min = 0

        def __call__(self, noised):
            return lambda output: 1e-3 * output

    assert automatic_beta(policy, Scaled(), data) == pytest.approx(1e6 * automatic_beta(policy, latent(), data), rel=1e-2)
    step = pair_step(policy, latent(), functools.partial(dpo, beta=math.nan), auto_beta=True)
    step.begin(data)
    step.begin(TinyPairs(1))  # what is known is not sought again: one pair would be too few
    beta = step.state["beta"]
    moved = pair_step(moved_policy(), latent(), functools.partial(dpo, beta=math.nan), auto_beta=True)
    moved.state.update(step.state)
    losses, metrics = moved(batch_of())
    torch.testing.assert_close(losses, pair_step(moved_policy(), latent(), functools.partial(dpo, beta=beta))(batch_of())[0])
    torch.testing.assert_close(metrics["logit"], beta / 2 * metrics["margin"])
    with pytest.raises(UserError, match="two pairs or more"):
        automatic_beta(policy, latent(), TinyPairs(1))


def test_automatic_beta_of_single_pictures_takes_them_two_by_two():
    data = TinyPairs()

    class Singles(TinyPairs):
        """The winners in the first half of every batch, their losers in the second."""

        def order(self, seed, epoch):
            return list(range(22))

        def __len__(self):
            return 22

        def batch(self, indices, seeds):
            pair = data.batch([i % 11 for i in indices], seeds)
            p = len(indices)
            latents = torch.stack([pair.latents[k if i < 11 else p + k] for k, i in enumerate(indices)])
            return SampleBatch(latents, {"text": pair.cond["text"][:p]}, torch.ones(p), torch.ones(p), seeds)

    assert automatic_beta(TinyPolicy(), latent(), Singles(), batch_size=22) == automatic_beta(TinyPolicy(), latent(), Pairs11())


class Pairs11(TinyPairs):
    def order(self, seed, epoch):
        return list(range(11))


def test_the_space_bounds_the_times_from_below():
    class Late:
        t_min = 97
        times = torch.empty(0)

        def __call__(self, noised):
            Late.times = noised.t
            return lambda output: output

    pair_step(TinyPolicy(), Late(), dpo, Draws(t_max=98))(batch_of(tuple(range(11))))
    assert set(Late.times.tolist()) == {97, 98}


def test_the_target_has_no_error_and_autocast_does_not_reach_the_measurement():
    class Seen:
        t_min = 0
        dtypes: list[torch.dtype] = []  # noqa: RUF012

        def __call__(self, noised):
            def embed(output):
                product = output.flatten(1) @ output.flatten(1).T
                Seen.dtypes.append(product.dtype)
                return output

            return embed

    class Oracle(TinyPolicy):
        def __call__(self, xt, t, cond):
            return super().__call__(xt, t, cond) * 0 + self.target

    policy, batch = Oracle(), batch_of()

    class Exact(Seen):
        def __call__(self, noised):
            policy.target = noised.target
            return super().__call__(noised)

    step = pair_step(policy, Exact(), functools.partial(cpo, beta=1.0, bc_weight=1.0))
    policy.target = torch.zeros(())
    step(batch)  # the same batch has the same noise, so the target is known the second time
    with torch.autocast("cpu", torch.bfloat16):
        _, metrics = step(batch)
    assert metrics["winner_error"].tolist() == [0.0] * 3
    assert set(Seen.dtypes) == {torch.float32}


def test_held_out_margins():
    policy, data = TinyPolicy(), TinyPairs()
    margins, labels = implicit_margins(policy, latent(), data, seed=1)
    assert margins.tolist() == [0.0] * 11
    assert labels.tolist() == data.label.tolist()
    moved = moved_policy()
    first, _ = implicit_margins(moved, latent(), data, seed=1, batch_size=4)
    again, _ = implicit_margins(moved, latent(), data, seed=1, batch_size=11)
    assert torch.equal(first, again)
    assert (first != 0).all()
    w, l = data.latents.unbind(1)
    data.latents = torch.stack([l, w], dim=1)
    assert implicit_margins(moved, latent(), data, seed=1)[0].tolist() == pytest.approx((-first).tolist())


@given(st.lists(st.integers(-(2**63), 2**63), min_size=1, max_size=4))
def test_mixed_seeds_fit_int64_and_depend_on_every_number(numbers):
    seed = mix(*numbers)
    assert 0 <= seed < 2**63
    assert all(mix(*numbers[:i], numbers[i] + 1, *numbers[i + 1 :]) != seed for i in range(len(numbers)))
