"""LoRA's variants: each begins as the model, is read back exactly, exports, merges, continues; strange files are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_policy import disturb

from palate.base.errors import UserError
from palate.diffusion.denoising import Conditioning
from palate.models import layouts
from palate.models.adapters import Adapter, LycorisLayer, check_adapter, kind_of, lycoris_layers
from palate.models.families import load_denoiser
from palate.models.kohya import save_kohya
from palate.models.lora import put_loras, tuned
from palate.models.policy import Policy

VARIANTS = {
    "rslora": (Adapter(rslora=True), {"lora_alpha": 2.0}),
    "patterns": (Adapter(rank_pattern={"to_v": 6, "mid_block.*to_q": 2}, alpha_pattern={"to_k": 1.5}), {}),
    "patterns and alpha": (Adapter(rank_pattern={"to_v": 6}), {"lora_alpha": 2.0}),
    "dropout": (Adapter(dropout=0.3), {}),
    "dora": (Adapter("dora"), {}),
    "dora of rslora": (Adapter("dora", rslora=True), {"lora_alpha": 3.0}),
    "loha": (Adapter("loha"), {}),
    "lokr": (Adapter("lokr"), {"lora_alpha": 3.0}),
    "lokr of patterns": (Adapter("lokr", rank_pattern={"to_v": 6}), {}),
}


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 4, 16, 16, generator=g), torch.randn(3, 40, 16, generator=g)
    return x, torch.tensor([1, 500, 999]), Conditioning({"encoder_hidden_states": text})


def policy_of(model_dir, variant: str, layers: str = "all") -> Policy:
    adapter, more = VARIANTS[variant]
    rank = 1 if adapter.kind == "lokr" else 2  # layers as small as these have no second factor in two matrices of rank 2
    return Policy(load_denoiser(str(model_dir)), rank=rank, adapter=adapter, lora_layers=layers, **more)


@torch.no_grad()
def said(policy: Policy, batch):
    """What the policy says, as in sampling: with gradients some layers are computed in another order."""
    policy.trainable_module.eval()
    return policy(*batch)


def close(a, b) -> bool:
    return torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_begins_as_the_model_and_is_read_back_exactly(model_dir, batch, tmp_path, variant):
    policy = policy_of(model_dir, variant)
    assert close(said(policy, batch), policy.reference(*batch))
    disturb(policy, 0.3)
    expected = said(policy, batch)
    assert not close(expected, policy.reference(*batch))
    file = policy.save(tmp_path)
    other = load_denoiser(str(model_dir))
    assert torch.equal(other.predict(tuned(other, file), *batch), expected)
    again = policy_of(model_dir, variant)
    again.load_state_dict(policy.state_dict())
    assert torch.equal(said(again, batch), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_merged_and_continued(model_dir, batch, tmp_path, variant):
    policy = policy_of(model_dir, variant)
    disturb(policy, 0.3)
    expected = said(policy, batch)
    file = policy.save(tmp_path)
    going_on = Policy(load_denoiser(str(model_dir)), pretrained_lora=file)
    assert torch.equal(said(going_on, batch), expected)
    assert torch.equal(going_on.reference(*batch), expected)
    assert kind_of(going_on.trainable_module) == VARIANTS[variant][0].kind
    assert sum(p.numel() for p in going_on.parameters()) == sum(p.numel() for p in policy.parameters())
    disturb(going_on, 0.1)
    assert torch.equal(going_on.reference(*batch), expected)
    merged = layouts.merge(policy.trainable_module)
    assert close(policy.denoiser.predict(merged, *batch), expected)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith("dora")])
def test_in_kohyas_and_lycoris_names(model_dir, batch, tmp_path, variant):
    policy = policy_of(model_dir, variant)
    disturb(policy, 0.3)
    file = save_kohya(policy.denoiser, policy.trainable_module, tmp_path / "k.safetensors", about={})
    other = load_denoiser(str(model_dir))
    put_loras(other, other.network, [(file, 1.0)])
    assert close(other.predict(other.network, *batch), said(policy, batch))
    half = load_denoiser(str(model_dir))
    put_loras(half, half.network, [(file, 0.0)])
    assert close(half.predict(half.network, *batch), policy.reference(*batch))


def test_a_dora_has_no_kohya_layout_and_merges_instead(model_dir, tmp_path):
    policy = policy_of(model_dir, "dora")
    with pytest.raises(UserError, match=r"scale a DoRA in ways of their own.*--format pipeline"):
        save_kohya(policy.denoiser, policy.trainable_module, tmp_path / "k.safetensors", about={})
    assert not list(tmp_path.iterdir())


# LyCORIS's layout -----------------------------------------------------------------------------------------------------------


def comfyui_lokr(v: dict, name: str, shape) -> torch.Tensor:
    """As ComfyUI computes the change of a weight (comfy/weight_adapter/lokr.py, in words of its own)."""
    get, dim = (lambda part: v.get(f"{name}.lokr_{part}")), None
    w1, w2 = get("w1"), get("w2")
    if w1 is None:
        dim = get("w1_b").shape[0]
        w1 = get("w1_a") @ get("w1_b")
    if w2 is None:
        dim = get("w2_b").shape[0]
        w2 = get("w2_a") @ get("w2_b")
    if w2.ndim == 4:
        w1 = w1[..., None, None]
    strength = 1.0 if dim is None else float(v[f"{name}.alpha"]) / dim
    return strength * torch.kron(w1, w2).reshape(shape)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 3.0), (64, 32.0)])  # the second factor in two matrices, and whole
def test_lokr_is_what_comfyui_makes_of_it(model_dir, rank, alpha):
    policy = Policy(load_denoiser(str(model_dir)), rank=rank, lora_alpha=alpha, adapter=Adapter("lokr"), lora_layers="all")
    disturb(policy, 0.3)
    from palate.models.lora import lycoris_tensors
    from palate.models.sd import kohya_name

    tensors, network = lycoris_tensors(policy.denoiser, policy.trainable_module), policy.trainable_module
    assert any(layer.dim is None for layer in lycoris_layers(network).values()) == (rank == 64)
    for name in lycoris_layers(network):
        module = network.get_submodule(name)
        expected = module.get_delta_weight("default")
        assert close(comfyui_lokr(tensors, kohya_name(name), expected.shape), expected)


def test_products_by_hand():
    w1, w2 = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    assert LycorisLayer("lokr", {"w1": w1, "w2": w2}).product().tolist() == [[3, 6], [4, 8]]
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    loha = LycorisLayer("hada", {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}, strength=0.5)
    assert loha.product().tolist() == [[4.5, 8], [18, 32]]
    assert (loha.dim, loha.alpha) == (1, 0.5)
    tucker = {"w1": w1, "w2_a": torch.ones(1, 2), "w2_b": torch.ones(1, 1), "t2": torch.full((1, 1, 1, 2), 5.0)}
    assert LycorisLayer("lokr", tucker).product().tolist() == [[5, 5, 10, 10], [5, 5, 10, 10]]


def test_damaged_and_mixed_files_are_refused_by_the_name_of_what_is_wrong(model_dir, tmp_path):
    policy = policy_of(model_dir, "loha", layers="attention")
    disturb(policy)
    whole = load_file(policy.save(tmp_path))
    name = next(n for n in whole if n.endswith("w2_a"))
    stem = name.removesuffix(".hada_w2_a")

    def refused(told: str, **changes) -> None:
        tensors = {**whole, **{k.replace("__", "."): v for k, v in changes.items()}}
        save_file({k: v for k, v in tensors.items() if v is not None}, file := tmp_path / "x.safetensors")
        other = load_denoiser(str(model_dir))
        with pytest.raises(UserError, match=told):
            tuned(other, file)

    refused("hada_w2_a is missing", **{name: None})
    refused("what is no part of a LoRA", **{f"{stem}.hada_t3": torch.ones(1)})
    refused("do not fit each other", **{name: torch.ones(2, 9)})
    refused("not finite", **{name: whole[name] * torch.inf})
    refused("holds numbers that float32 does not hold", **{n: t * 0 + 1e30 for n, t in whole.items() if n.startswith(stem)})
    refused("an alpha for", **{f"{stem}.alpha": None})
    refused("lokr_w1 has no place beside the others", **{f"{stem}.lokr_w1": torch.ones(2, 2)})


def test_two_kinds_do_not_mix_and_two_of_one_do(model_dir, batch, tmp_path):
    files = {}
    for variant in ("rslora", "lokr", "loha"):
        policy = policy_of(model_dir, variant, layers="attention")
        disturb(policy, 0.2)
        files[variant] = policy.save(tmp_path / variant)
    for pair in (("rslora", "lokr"), ("lokr", "rslora"), ("loha", "lokr")):
        other = load_denoiser(str(model_dir))
        with pytest.raises(UserError, match="do not mix in one model; merge one"):
            put_loras(other, other.network, [(files[name], 1.0) for name in pair])
    other = load_denoiser(str(model_dir))
    put_loras(other, other.network, [(files["lokr"], 0.5), (files["lokr"], 0.5)])
    one = load_denoiser(str(model_dir))
    put_loras(one, one.network, [(files["lokr"], 1.0)])
    assert close(other.predict(other.network, *batch), one.predict(one.network, *batch))


def test_patterns_and_kinds_that_fit_nothing_are_refused(model_dir):
    denoiser = load_denoiser(str(model_dir))
    targets = denoiser.lora_targets["attention"]
    for adapter, said in (
        (Adapter(rank_pattern={"to_z": 3}), r"rank_pattern names 'to_z', with which no trained layer ends"),
        (Adapter(alpha_pattern={"(": 3.0}), r"alpha_pattern names '\(', which is no regular expression"),
    ):
        with pytest.raises(UserError, match=said):
            check_adapter(denoiser, adapter, targets)
    check_adapter(denoiser, Adapter("lokr", rank_pattern={"to_v": 3}), targets)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_family_whose_layers_are_fused_in_lycoris_layout_says_why(flow_dir, kind):
    denoiser = load_denoiser(str(flow_dir("flux")))
    with pytest.raises(UserError, match="of their LoRAs one is made, of such products there is none; use lora or dora"):
        check_adapter(denoiser, Adapter(kind), denoiser.lora_targets["attention"])
    check_adapter(denoiser, Adapter("dora"), denoiser.lora_targets["attention"])


def test_pefts_own_file_of_a_lokr_is_refused_for_its_strength_lies_elsewhere(model_dir, tmp_path):
    policy = policy_of(model_dir, "lokr")
    save_file(
        {f"base_model.model.{n.replace('.default', '')}": p for n, p in policy.state_dict().items()},
        file := tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOKR", "r": 1, "alpha": 3}')
    with pytest.raises(UserError, match=r"of kind 'LOKR': in PEFT's layout only LoRA and DoRA are read"):
        tuned(load_denoiser(str(model_dir)), file)
