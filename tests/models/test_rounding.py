"""What a file's precision loses is found before it is written: numbers too large, layers that become zero, changes lost."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from palate.base.errors import UserError
from palate.models.families import load_denoiser
from palate.models.kohya import save_kohya
from palate.models.layouts import before_merging, changed_weights, merge
from palate.models.lora import LoraLayer, lora_layers
from palate.models.policy import Policy
from palate.models.rounding import check_lora, check_weights, to_dtype

HALVES = {torch.float16: 1e6, torch.bfloat16: 3.4e38}
FINE = LoraLayer(torch.full((2, 4), 0.5), torch.full((3, 2), 0.25), 1.0)


def layer(down: float, up: float, scale: float = 1.0) -> LoraLayer:
    return LoraLayer(torch.full((2, 4), down), torch.full((3, 2), up), scale)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_what_a_precision_holds_exactly_is_not_worth_a_word(dtype):
    assert check_lora({"a": FINE, "b": layer(2.0, 4.0)}, dtype) == []
    noise = torch.Generator().manual_seed(0)
    usual = LoraLayer(torch.randn(4, 8, generator=noise) / 30, torch.randn(8, 4, generator=noise) / 1000, 1.0)
    assert check_lora({"a": usual}, dtype) == []


@pytest.mark.parametrize("sides", [(0, 1), (1, 0)])
def test_numbers_above_the_end_of_a_precision(sides):
    for dtype, value in HALVES.items():
        large = layer(*(value if side else 0.25 for side in sides))
        assert check_lora({"a": FINE, "b": large}, torch.float32) == []
        with pytest.raises(UserError, match="1 of 2 layers, such as b, hold numbers above"):
            check_lora({"a": FINE, "b": large}, dtype)


@pytest.mark.parametrize(("dtype", "root"), [(torch.float32, 2e19), (torch.float16, 300.0), (torch.bfloat16, 2e19)])
def test_a_product_above_the_end_of_a_precision_of_matrices_below_it(dtype, root):
    """Rank 2: each number of the change is scale x 2 x root^2."""
    assert check_lora({"a": FINE, "b": layer(root, root, 1e-3)}, dtype) == []
    with pytest.raises(UserError, match="1 of 2 layers, such as b, hold numbers above"):
        check_lora({"a": FINE, "b": layer(root, root)}, dtype)
    signs = LoraLayer(torch.tensor([[root], [-root]]), torch.full((3, 2), root), 1.0)  # whose products cancel
    assert check_lora({"a": FINE, "b": signs}, dtype) == []


@pytest.mark.parametrize("sides", [(0, 1), (1, 0)])
def test_layers_that_become_zero(sides):
    small = layer(*(1e-9 if side else 1.0 for side in sides))
    assert check_lora({"a": FINE, "b": small}, torch.bfloat16) == []
    (told,) = check_lora({"a": FINE, "b": small}, torch.float16)
    assert told.startswith("1 of 2 layers, such as b, lose their change in fp16: use --dtype fp32")
    with pytest.raises(UserError, match="nothing of the change of all 1 layers is left in fp16"):
        check_lora({"b": small}, torch.float16)


def test_numbers_at_the_lower_end_are_coarse():
    """Below 6e-8 fp16 has steps of 6e-8: 8e-8 becomes 6e-8, a quarter less."""
    (told,) = check_lora({"a": FINE, "b": layer(1.0, 8e-8)}, torch.float16)
    assert "fp16 is coarse for 1 layers, which change by up to 25 %" in told


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_numbers_whose_squares_float32_does_not_hold_are_not_taken_for_large_ones(dtype):
    tiny = layer(1.0, 1e-30)
    if dtype == torch.float16:
        with pytest.raises(UserError, match="nothing of the change"):
            check_lora({"a": tiny}, dtype)
    else:
        assert check_lora({"a": tiny}, dtype) == []


@pytest.mark.parametrize("idle", [layer(0.0, 0.0), layer(0.0, 1.0), layer(1.0, 0.0), layer(1.0, 1.0, 0.0)])
def test_a_lora_that_changes_nothing_is_not_exported(idle):
    with pytest.raises(UserError, match="there is nothing to export"):
        check_lora({"a": idle}, torch.float32)
    assert check_lora({"a": FINE, "b": idle}, torch.float32) == []


def test_a_change_that_merged_weights_lose():
    """Beside 1, fp16 has steps of 1e-3 and bf16 of 8e-3: 2e-3 is seen by one of them, 1e-6 by neither, and by float32."""
    for dtype, change, kept in (
        (torch.float16, 2e-3, True),
        (torch.bfloat16, 2e-3, False),
        (torch.float16, 1e-6, False),
        (torch.float32, 1e-6, True),
        (torch.float32, 1e-9, False),
    ):
        network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        before = {"0.weight": torch.ones(2, 2, dtype=dtype), "1.weight": torch.ones(2, 2, dtype=dtype)}
        with torch.no_grad():
            network[0].weight.copy_(torch.ones(2, 2) + change)
            network[1].weight.copy_(torch.ones(2, 2) + 1)
        told = check_weights(before, network, dtype)
        assert bool(told) != kept
        if told and dtype != torch.float32:
            assert "1 of 2 changed weights, such as 0.weight, lose their change in" in told[0]


def test_a_change_of_which_nothing_is_left():
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.copy_(torch.ones(2, 2) + 1e-6)
    with pytest.raises(UserError, match="nothing of the change of all 1 changed weights is left in fp16"):
        check_weights({"weight": torch.ones(2, 2, dtype=torch.float16)}, network, torch.float16)


def test_the_weights_before_are_those_that_a_lora_changes(model_dir):
    policy = Policy(load_denoiser(str(model_dir)), rank=2)
    names = list(lora_layers(policy.trainable_module))
    plain = {n: p.clone() for n, p in load_denoiser(str(model_dir)).network.named_parameters()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(0.5)
        policy.trainable_module.get_submodule(names[0]).lora_B["default"].weight.zero_()
    before = before_merging(policy.trainable_module, torch.float32)
    assert set(before) == {f"{name}.weight" for name in names[1:]}
    assert all(torch.equal(weight, plain[name]) for name, weight in before.items())
    assert check_weights(before, merge(policy.trainable_module), torch.float16) == []


def test_a_network_that_nobody_trained(model_dir):
    base, same = (load_denoiser(str(model_dir)).network for _ in range(2))
    with pytest.raises(UserError, match="those of the model before training"):
        check_weights(changed_weights(base, same), same, torch.float32)
    with torch.no_grad():
        same.conv_in.bias[0] += 1
    assert list(changed_weights(base, same)) == ["conv_in.bias"]


def test_a_module_with_large_numbers_stays_out_of_half_precision():
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight[0, 0] = 7e4
    with pytest.raises(UserError, match="1 of 2 weights of the text encoder, such as weight, hold numbers above 65504"):
        to_dtype(module, torch.float16, "the text encoder")
    assert to_dtype(nn.Linear(2, 2), torch.float16, "it").weight.dtype == torch.float16


@pytest.mark.parametrize(("alpha", "dtype"), [(257.0, torch.bfloat16), (1e5, torch.float16), (6.0, torch.float16)])
def test_an_alpha_is_written_as_it_is(model_dir, tmp_path, alpha, dtype):
    denoiser = load_denoiser(str(model_dir))
    policy = Policy(denoiser, rank=2, lora_alpha=alpha)
    file = save_kohya(denoiser, policy.trainable_module, tmp_path / "k.safetensors", dtype=dtype, about={})
    found = [tensor for name, tensor in load_file(file).items() if name.endswith(".alpha")]
    assert {float(tensor) for tensor in found} == {alpha}
    assert {tensor.dtype for tensor in found} == {dtype if alpha == 6 else torch.float32}
