"""A policy of which each process holds a part, looked at in one process that takes itself for the first of several."""

from __future__ import annotations

import weakref

import pytest
from torch import Tensor, nn
from torch.distributed import fsdp

from palate.models.policy import Policy
from palate.runs import plan, recipe
from palate.runs.loading import denoiser_of, policy_of
from palate.training.sharded import cut_up

PARTS = {
    "a LoRA": {"rank": 3},
    "a LoRA of text encoders too": {"rank": 3, "train_text_encoder": True},
    "all weights": {"train_method": "full", "ema_decay": 0.9},
    "a LoRA beside 8 bits": {"rank": 3, "quantize": "int8", "space": "perceptual"},
}


def policy(folder, **options: object) -> tuple[recipe.Recipe, Policy]:
    made = {"pretrained_model_name_or_path": str(folder), "resolution": 64, "train_batch_size": 2, "shard_model": True}
    of = recipe.load("miniature-dpo", {**made, **options})
    denoiser = denoiser_of(of)
    return of, policy_of(of, denoiser)


def local(modules: list[nn.Module], *, trained: bool | None = None) -> int:
    """Bytes that this process holds of them."""
    parts = {id(p): p for module in modules for p in module.parameters() if trained in (None, p.requires_grad)}
    return sum({x.untyped_storage().data_ptr(): x.nbytes for x in (p.to_local() for p in parts.values())}.values())


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_a_part_is_what_is_counted_of_it(request, first_of, options):
    """Of five, into which few axes can be cut evenly; of two that are there see tests/e2e/test_two_processes.py."""
    of, made = policy(request.getfixturevalue("sdxl_dir" if "space" in options else "model_dir"), **options)
    whole, counted = plan.held(made, of), plan.held(made, of, 5)
    with first_of(5):
        cut_up(made)
        weights = sum(counted[part] for part in plan.WEIGHTS)
        assert local(made.modules) == weights
        assert local(made.modules, trained=True) == counted["trained weights"] == counted["gradients"]
    assert weights < sum(whole[part] for part in plan.WEIGHTS)
    assert counted["optimizer"] == 2 * counted["trained weights"]


@pytest.mark.parametrize("name", ["a LoRA of text encoders too", "all weights"])
def test_it_is_whole_a_block_at_a_time(model_dir, first_of, monkeypatch, name):
    """A card that gets the policy from main memory holds a block of it whole, and in the end none."""
    _, made = policy(model_dir, **PARTS[name])
    made.denoiser.release()
    brought, counts = list[weakref.ref[Tensor]](), list[int]()

    def cut(block: nn.Module, **how: object) -> None:
        own = {id(p) for p in block.parameters() if not hasattr(p, "device_mesh")}
        assert {id(p) for of in brought if (p := of()) is not None} <= own  # those of a twin's same block
        brought.extend(weakref.ref(p) for p in block.parameters() if id(p) in own)
        counts.append(len(own))
        fully_shard(block, **how)

    fully_shard = fsdp.fully_shard
    monkeypatch.setattr(fsdp, "fully_shard", cut)
    with first_of(2):
        cut_up(made)
        assert all(of() is None for of in brought)
        assert max(counts) < sum(counts) / 10


def test_what_twins_share_is_one_part_before_and_after_a_pass(first_of, model_dir):
    of, made = policy(model_dir, rank=3)
    states = made.denoiser.encode_prompts(["a picture"]).tensors["encoder_hidden_states"]

    def shared() -> int:
        """Bytes of what is the very same part in both."""
        own = {id(p) for p in made.denoiser.network.parameters()}
        assert all(id(p) in own for p in made.frozen.parameters())
        return local([made.frozen])

    with first_of(2):
        cut_up(made)
        before, whole = shared(), local(made.modules)
        plan.work(of, made, made.denoiser, {"encoder_hidden_states": (states.shape[1:], states.dtype)})()
        made.frozen.reshard()  # what is left of it beside its blocks stays gathered
        assert (shared(), local(made.modules)) == (before, whole)
