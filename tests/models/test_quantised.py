"""Frozen blocks in 8 or 4 bits: what they stand for, that twins share them, and that gradients are those of whole weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.diffusion.denoising import Conditioning
from palate.models import layouts
from palate.models.adapters import is_adapter
from palate.models.families import load_denoiser
from palate.models.policy import Policy
from palate.models.quantised import BLOCK, QuantisedLinear, check_quantize, quantise

FORMATS = ["int8", "nf4"]
KINDS = ["sd", "sdxl", "sd3", "zimage", "klein", "flux"]
CPU = torch.device("cpu")


@pytest.fixture
def load(model_dir, sdxl_dir, sd3_dir, flow_dir):
    plain = {"sd": model_dir, "sdxl": sdxl_dir, "sd3": sd3_dir}
    return lambda kind, **options: load_denoiser(str(plain.get(kind) or flow_dir(kind)), **options)


def batch(denoiser):
    """Latents (2, c, h, w), times and a conditioning."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        cond = denoiser.encode_prompts(["a red house", "a blue tower"])
    shown = denoiser.picture_conditions((64, 64), Shape.square(64), (0.0, 0.0), flip=False)
    cond = Conditioning({**cond.tensors, **{name: torch.stack([row, row]) for name, row in shown.items()}})
    t = torch.tensor([200, 700], dtype=torch.float64 if denoiser.flow else torch.long)
    return torch.randn(2, *denoiser.latent_shape(Shape(64, 64)), generator=g), t, cond


def quantised_layers(network: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantisedLinear)}


def made_whole(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network of plain linear layers, in ``dtype``, that the quantised one stands for."""
    network = copy.deepcopy(network)
    for name, layer in quantised_layers(network).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(layer.whole(dtype))
        plain.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, plain)
    return network.to(dtype).requires_grad_(False)


def disturb(policy: Policy) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)


# One layer -----------------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_int8_is_as_near_as_half_a_step(outputs, inputs, seed, dtype):
    weight = (1e-3 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))).to(dtype)
    layer = nn.Linear(inputs, outputs)
    layer.weight.data = weight
    found = QuantisedLinear(layer, "int8", CPU)
    step = weight.float().abs().amax(1, keepdim=True) / 127
    assert ((found.whole(torch.float32) - weight.float()).abs() <= 0.5 * step * (1 + 1e-4)).all()
    assert found.weight.dtype == dtype
    assert found.weight.shape == weight.shape


def test_rows_of_zeros_stay_zero():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    assert not QuantisedLinear(layer, "int8", CPU).weight.any()
    assert not QuantisedLinear(layer, "nf4", CPU).weight.any()


# QLoRA (arXiv 2305.14314), appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_nf4_holds_the_sixteen_published_values_of_each_block():
    layer = nn.Linear(BLOCK, 3)
    layer.weight.data = torch.tensor(NF4).repeat(3, 4) * torch.tensor([[1.0], [0.5], [3.0]])
    torch.testing.assert_close(QuantisedLinear(layer, "nf4", CPU).weight, layer.weight.data, rtol=0, atol=1e-7)
    layer.weight.data[1, 0] = 0.29  # the nearest is 0.33791524 * 0.5 = 0.169 or 0.5626 * 0.5 = 0.281
    assert QuantisedLinear(layer, "nf4", CPU).weight[1, 0].item() == pytest.approx(0.5626170039176941 * 0.5)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_it_takes(kind):
    layer = QuantisedLinear(nn.Linear(256, 128), kind, CPU)
    taken = sum(p.numel() * p.element_size() for name, p in layer.named_parameters() if name != "bias")
    assert taken == {"int8": 256 * 128 + 4 * 128, "nf4": 256 * 128 // 2 + 4 * 256 * 128 // BLOCK}[kind]


@pytest.mark.parametrize("kind", FORMATS)
def test_autocast_decides_the_precision_of_the_product(kind):
    layer, x = QuantisedLinear(nn.Linear(8, 8), kind, CPU), torch.randn(2, 8, requires_grad=True)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert x.grad.dtype == torch.float32


# A network -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_on_it_has_the_gradients_of_whole_weights(load, kind, quantize):
    base, plain = load(kind, quantize=quantize), load(kind)
    given = batch(base)
    with torch.no_grad():  # something was rounded
        assert not torch.equal(base.predict(base.network, *given), plain.predict(plain.network, *given))
    plain.network = made_whole(base.network)
    gradients = []
    for denoiser in (base, plain):
        policy = Policy(denoiser, rank=2, lora_layers="all")
        disturb(policy)
        output = policy(*given)
        (output - policy.reference(*given)).square().mean().backward()
        gradients.append([output.detach(), *(p.grad for p in policy.parameters())])
    assert len(gradients[0]) > 5
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_second_copy(load, kind, quantize):
    denoiser = load(kind, quantize=quantize)
    own = {p.data_ptr() for p in (*denoiser.network.parameters(), *denoiser.network.buffers())}
    policy = Policy(denoiser, rank=2)
    policy.track_old(0.5)
    networks = (denoiser.network, policy.frozen, policy._old)
    for network in networks:
        tensors = (*network.named_parameters(), *network.named_buffers())
        assert {p.data_ptr() for name, p in tensors if not is_adapter(name)} == own
        layers = quantised_layers(network)
        assert len(layers) > 5
        assert all(not isinstance(x, torch.Tensor) for layer in layers.values() for x in vars(layer).values())


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_kept_for_the_backward_pass(kind):
    layer, saved = QuantisedLinear(nn.Linear(8, 6), kind, CPU), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.shape), x)[1], lambda x: x):
        layer(torch.randn(7, 8, requires_grad=True))
    assert saved == []


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_features_are_float32_whatever_the_weights(load, kind, quantize):
    denoiser = load(kind, mixed_precision="bf16", quantize=quantize)
    whole = load(kind)
    whole.network = made_whole(denoiser.network)
    given = (*batch(denoiser), denoiser.feature_layers[0])
    (found,), (expected,) = (one.features(one.network, *given) for one in (denoiser, whole))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_the_last_layer_stay_whole(load, kind, quantize):
    """So families read the network's precision where they did, and the pipeline of diffusers draws with it."""
    denoiser = load(kind, mixed_precision="bf16", quantize=quantize)
    assert denoiser.network.dtype == torch.bfloat16
    output = denoiser.predict(denoiser.network, *batch(denoiser))
    assert output.dtype == torch.bfloat16
    inside = [n for n in quantised_layers(denoiser.network) if not any(w in n for w in ("block", "layers.", "refiner."))]
    assert inside == []


# Refused -------------------------------------------------------------------------------------------------------------------


def test_a_network_in_it_is_not_merged_into(load):
    denoiser = load("sd", quantize="int8")
    Policy(denoiser, rank=2)
    with pytest.raises(ValueError, match="into whole weights"):
        layouts.merge(denoiser.network)


def test_the_package_that_nf4_needs(monkeypatch, load):
    import sys

    for name in [n for n in sys.modules if n.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_quantize("int8")
    check_quantize(None)
    for attempt in (lambda: check_quantize("nf4"), lambda: quantise(nn.Module(), "nf4", CPU)):
        with pytest.raises(UserError, match=r"nf4 needs bitsandbytes.*pip install 'palate\[4bit\]'.*int8"):
            attempt()


# Who is on the device -------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(load, monkeypatch):
    """A denoiser and the moves of its parts, in their order; the device looks like a GPU to whoever asks for its kind."""
    denoiser, moves = load("flux"), []

    def spied(name, module):
        before = module.to

        def to(*args, **kwargs):
            moves.append((name, "waits" if args == ("cpu",) else "works"))
            return before(*args, **kwargs)

        monkeypatch.setattr(module, "to", to)

    spied("network", denoiser.network)
    for text in denoiser.texts:
        spied("text", text.pair[1])
    spied("vae", denoiser.vae.module)
    moves.clear()
    return denoiser, moves


def test_encoders_and_network_are_never_on_the_device_together(watched):
    denoiser, moves = watched
    with denoiser.encoding():
        denoiser.encode_prompts(["a red house"])
        denoiser.encode_images(torch.zeros(1, 3, 64, 64))
    on = set()
    for name, what in moves:
        on = on | {name} if what == "works" else on - {name}
        assert not ("network" in on and on & {"text", "vae"})
    assert {("text", "works"), ("vae", "works")} <= set(moves)
    assert moves[0] == ("network", "waits")
    assert moves[-1] == ("network", "works")
