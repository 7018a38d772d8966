"""LoRA files of other programs: every tensor is applied, to the last digit, or the file is refused by what it holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from palate.base.errors import UserError
from palate.models import sd, sdxl
from palate.models.families import load_denoiser
from palate.models.lora import load_lora, lora_layers, put_loras
from palate.models.lora_file import find_lora, placed, tells_alpha

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G) * 0.3


@pytest.fixture(params=["sd", "sdxl"])
def folder(request, model_dir, sdxl_dir):
    return {"sd": model_dir, "sdxl": sdxl_dir}[request.param]


def targets(network: nn.Module, ends=("to_q", "to_out.0", "proj_in", "conv1")) -> dict[str, nn.Module]:
    return {n: m for n, m in network.named_modules() if n.endswith(ends)}


def halves(network: nn.Module, rank: int = 3, **options) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For every layer the matrices below and above."""
    found = {}
    for name, module in targets(network, **options).items():
        out, *rest = module.weight.shape
        found[name] = rand(rank, *rest), rand(out, rank, *([1, 1] if len(rest) > 1 else []))
    return found


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def merged(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights, whatever adapters change them, by merging."""
    network.fuse_lora()
    network.unload_lora()
    return {name: weight.detach().clone() for name, weight in network.named_parameters()}


def check(folder, file, expected: dict[str, torch.Tensor], *, scale: float = 1.0) -> None:
    """Drawing, and where it can be trained on training too, change just the layers expected, by just so much."""
    plain = dict(load_denoiser(str(folder)).network.named_parameters())
    drawing, training = load_denoiser(str(folder)), load_denoiser(str(folder))
    put_loras(drawing, drawing.network, [(file, scale)])
    load_lora(training, training.network, file)
    for denoiser, strength in ((drawing, scale), (training, 1.0)):
        found = merged(denoiser.network)
        assert found.keys() == plain.keys()
        for name, weight in found.items():
            change = expected.get(name.removesuffix(".weight"), torch.zeros(()))
            torch.testing.assert_close(weight, plain[name] + strength * change, rtol=1e-5, atol=1e-5)


def attention(name: str) -> str:
    """As diffusers' first attention processors had it: the layer is the processor's."""
    if ".attn1." not in name and ".attn2." not in name:
        return f"{name}.lora"
    return re.sub(r"\.(to_[a-z]+)(\.0)?$", r".processor.\1_lora", name)


LAYOUTS = {
    "diffusers": lambda n: (f"unet.{n}.lora_A.weight", f"unet.{n}.lora_B.weight"),
    "peft": lambda n: (f"base_model.model.{n}.lora_A.weight", f"base_model.model.{n}.lora_B.weight"),
    "peft in a pipeline": lambda n: (f"unet.base_model.model.{n}.lora_A.weight", f"unet.base_model.model.{n}.lora_B.weight"),
    "peft, as it runs": lambda n: (f"{n}.lora_A.default.weight", f"{n}.lora_B.default.weight"),
    "peft, of a name": lambda n: (
        f"base_model.model.{n}.lora_A.my-style.weight",
        f"base_model.model.{n}.lora_B.my-style.weight",
    ),
    "compiled": lambda n: (f"base_model.model._orig_mod.{n}.lora_A.weight", f"base_model.model._orig_mod.{n}.lora_B.weight"),
    "in parallel": lambda n: (f"module.{n}.lora_A.weight", f"module.{n}.lora_B.weight"),
    "lycoris": lambda n: (f"lycoris_{n.replace('.', '_')}.lora_down.weight", f"lycoris_{n.replace('.', '_')}.lora_up.weight"),
    "bare": lambda n: (f"{n}.lora_A.weight", f"{n}.lora_B.weight"),
    "comfyui": lambda n: (f"diffusion_model.{n}.lora_down.weight", f"diffusion_model.{n}.lora_up.weight"),
    "processors": lambda n: (f"unet.{attention(n)}.down.weight", f"unet.{attention(n)}.up.weight"),
    "bare processors": lambda n: (f"{attention(n)}.down.weight", f"{attention(n)}.up.weight"),
    "kohya": lambda n: (f"{sd.kohya_name(n)}.lora_down.weight", f"{sd.kohya_name(n)}.lora_up.weight"),
    "kohya of sdxl": lambda n: (f"{sdxl.kohya_name(n, 1)}.lora_down.weight", f"{sdxl.kohya_name(n, 1)}.lora_up.weight"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_names_of_a_layer_mean_the_same(folder, tmp_path, layout):
    if layout == "kohya of sdxl" and "sdxl" not in str(folder):
        pytest.skip("SDXL alone has names of its own")
    matrices = halves(load_denoiser(str(folder)).network)
    tensors = {n: t for name, pair in matrices.items() for n, t in zip(LAYOUTS[layout](name), pair, strict=True)}
    save_file(tensors, file := tmp_path / "lora.safetensors")
    check(folder, file, {name: product(*pair) for name, pair in matrices.items()}, scale=0.5)


def test_alphas_of_every_size(model_dir, tmp_path):
    matrices = halves(load_denoiser(str(model_dir)).network)
    tensors, expected = {}, {}
    for number, (name, (down, up)) in enumerate(matrices.items()):
        alpha, key = [1.5, -6.0, 0.0][number % 3], sd.kohya_name(name)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        expected[name] = alpha / 3 * product(down, up)
    save_file(tensors, file := tmp_path / "lora.safetensors")
    check(model_dir, file, expected)


def test_a_convolution_in_tuckers_form(model_dir, tmp_path):
    """up (o, r) of mid (r, r, 3, 3) of down (r, i), as LyCORIS multiplies them."""
    network = load_denoiser(str(model_dir)).network
    tensors, expected = {}, {}
    for name, module in targets(network, ends=("conv1",)).items():
        out, into, *kernel = module.weight.shape
        down, mid, up, key = rand(2, into, 1, 1), rand(2, 2, *kernel), rand(out, 2, 1, 1), sd.kohya_name(name)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
        expected[name] = 0.5 * torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    save_file(tensors, file := tmp_path / "lora.safetensors")
    check(model_dir, file, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_strength_that_peft_tells_beside_the_file(model_dir, tmp_path, rslora):
    matrices = halves(load_denoiser(str(model_dir)).network, rank=4)
    tensors = {n: t for name, pair in matrices.items() for n, t in zip(LAYOUTS["peft"](name), pair, strict=True)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": ["to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    assert tells_alpha(find_lora(tmp_path))
    strength = 6 / (2 if rslora else 4)
    check(model_dir, tmp_path / "adapter_model.safetensors", {n: strength * product(*pair) for n, pair in matrices.items()})
    (tmp_path / "adapter_config.json").write_text(json.dumps({**told, "r": 8}))
    with pytest.raises(UserError, match="what it tells of its ranks is not what it holds"):
        put_loras(denoiser := load_denoiser(str(model_dir)), denoiser.network, [(tmp_path, 1.0)])


TOLD_MORE = {
    "began from changed weights of its model": {"init_lora_weights": "pissa_niter_4"},
    "(init_lora_weights 'olora')": {"init_lora_weights": "olora"},
    "init_lora_weights ['x']": {"init_lora_weights": ["x"]},
    "of kind 'LOHA'": {"peft_type": "LOHA"},
    "more than a LoRA (modules_to_save": {"modules_to_save": ["conv_in"]},
    "more than a LoRA (layer_replication": {"layer_replication": [[0, 1]]},
    "tells r -1; expected a whole number above 0": {"r": -1},
    "tells r 4.0": {"r": 4.0},
    "tells lora_alpha nan; expected a number": {"lora_alpha": float("nan")},
    "tells lora_alpha None": {"lora_alpha": None},
    "tells lora_alpha '8'": {"lora_alpha": "8"},
    "tells use_rslora 'yes'; expected true or false": {"use_rslora": "yes"},
    "tells alpha_pattern {'to_q': 'x'}; expected numbers by layer": {"alpha_pattern": {"to_q": "x"}},
}


def told_by(place: str, tensors: dict, told: dict, folder) -> Path:
    """A LoRA whose configuration stands beside it, as PEFT has it, or in the file, as diffusers has it."""
    if place == "beside":
        (folder / "adapter_config.json").write_text(json.dumps(told))
        save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, file := folder / "adapter_model.safetensors")
    else:
        told = json.dumps({f"unet.{name}": value for name, value in told.items()})
        own = {f"unet.{n}": t for n, t in tensors.items()}
        save_file(own, file := folder / "lora.safetensors", metadata={"lora_adapter_metadata": told})
    return file


@pytest.mark.parametrize("place", ["beside", "in the file"])
@pytest.mark.parametrize("message", TOLD_MORE)
def test_what_a_configuration_tells_is_accounted_for(model_dir, tmp_path, place, message):
    matrices = halves(load_denoiser(str(model_dir)).network, rank=4, ends=("to_q",))
    tensors = {n: t for name, pair in matrices.items() for n, t in zip(LAYOUTS["bare"](name), pair, strict=True)}
    file = told_by(place, tensors, {"r": 4, "lora_alpha": 4, **TOLD_MORE[message]}, tmp_path)
    for put in (lambda d: put_loras(d, d.network, [(file, 1.0)]), lambda d: load_lora(d, d.network, file)):
        denoiser = load_denoiser(str(model_dir))
        before = denoiser.network.state_dict()
        with pytest.raises(UserError) as caught:
            put(denoiser)
        assert message in str(caught.value)
        assert denoiser.network.state_dict().keys() == before.keys()


TRAINING_ONLY = {
    "init_lora_weights": "gaussian",
    "exclude_modules": ["to_q"],
    "layers_to_transform": [0],
    "target_modules": ["nothing"],
    "lora_dropout": 0.5,
    "rank_pattern": {"nothing": 8},
    "an_option_of_tomorrow": 3,
}


@pytest.mark.parametrize("place", ["beside", "in the file"])
def test_what_is_of_training_alone_changes_nothing(model_dir, tmp_path, place, recwarn):
    matrices = halves(load_denoiser(str(model_dir)).network, rank=4)
    tensors = {n: t for name, pair in matrices.items() for n, t in zip(LAYOUTS["bare"](name), pair, strict=True)}
    file = told_by(place, tensors, {"r": 4, "lora_alpha": 8, **TRAINING_ONLY}, tmp_path)
    check(model_dir, file, {name: 2 * product(*pair) for name, pair in matrices.items()})
    assert not recwarn.list


def test_a_convolution_of_one_pixel_is_a_linear_layer(folder, tmp_path):
    matrices = halves(load_denoiser(str(folder)).network, ends=("to_q", "proj_in"))
    turned = {
        name: [half.flatten(1) if half.ndim == 4 else half[..., None, None] for half in pair] for name, pair in matrices.items()
    }
    tensors = {n: t for name, pair in turned.items() for n, t in zip(LAYOUTS["kohya"](name), pair, strict=True)}
    save_file(tensors, file := tmp_path / "lora.safetensors")
    check(folder, file, {name: product(*pair) for name, pair in matrices.items()})


def test_a_dora_of_peft_is_drawn_with_by_its_magnitudes(model_dir, tmp_path):
    """Rows of W + up down, each brought to its magnitude (arXiv 2402.09353, equation 5)."""
    denoiser = load_denoiser(str(model_dir))
    name, module = next((n, m) for n, m in denoiser.network.named_modules() if n.endswith("to_q"))
    before, (out, into) = module.weight.detach().clone(), module.weight.shape
    down, up, magnitude = rand(2, into), rand(out, 2), rand(out).abs() + 0.1
    tensors = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file({**tensors, f"unet.{name}.lora_magnitude_vector": magnitude}, file := tmp_path / "dora.safetensors")
    put_loras(denoiser, denoiser.network, [(file, 1.0)])
    changed = before + up @ down
    expected = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    x = rand(5, into)
    torch.testing.assert_close(denoiser.network.get_submodule(name)(x), x @ expected.T, rtol=1e-4, atol=1e-5)
    assert find_lora(file) == file  # it may be trained on


def test_biases_are_drawn_with(model_dir, tmp_path):
    denoiser = load_denoiser(str(model_dir))
    name, module = next((n, m) for n, m in denoiser.network.named_modules() if n.endswith("to_q"))
    before, (out, into) = module.weight.detach().clone(), module.weight.shape
    down, up, bias = rand(2, into), rand(out, 2), rand(out)
    tensors = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up, f"unet.{name}.lora_B.bias": bias}
    save_file(tensors, file := tmp_path / "bias.safetensors")
    put_loras(denoiser, denoiser.network, [(file, 0.5)])
    x = rand(5, into)
    expected = x @ (before + 0.5 * up @ down).T + 0.5 * bias
    torch.testing.assert_close(denoiser.network.get_submodule(name)(x), expected)
    with pytest.raises(UserError, match="has biases"):
        find_lora(file)


TEXT_NAMES = {
    "kohya": ("lora_te{}_text_model_encoder_layers_0_self_attn_q_proj", "lora_down.weight", "lora_up.weight"),
    "diffusers": ("text_encoder{}.text_model.encoder.layers.0.self_attn.q_proj", "lora_A.weight", "lora_B.weight"),
    "older diffusers": (*("text_encoder{}.text_model.encoder.layers.0.self_attn.to_q_lora", "down.weight", "up.weight"),),
    "old diffusers": (
        *("text_encoder{}.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer", "down.weight", "up.weight"),
    ),
}


@pytest.mark.parametrize("layout", TEXT_NAMES)
def test_one_layer_of_a_text_encoder(folder, tmp_path, layout):
    denoiser = load_denoiser(str(folder))
    for number, text in enumerate(denoiser.texts):
        end = {"kohya": [["", ""], ["1", "2"]][len(denoiser.texts) - 1][number]}.get(layout, ["", "_2"][number])
        stem, below, above = TEXT_NAMES[layout]
        layer = next(m for n, m in text.pair[1].named_modules() if n.endswith("encoder.layers.0.self_attn.q_proj"))
        before, width = layer.weight.detach().clone(), layer.weight.shape[0]
        down, up = rand(2, width), rand(width, 2)
        tensors = {f"{stem.format(end)}.{below}": down, f"{stem.format(end)}.{above}": up}
        save_file(tensors, file := tmp_path / "te.safetensors")
        kept = denoiser.network.state_dict()
        put_loras(denoiser, denoiser.network, [(file, 0.5)])
        assert kept.keys() == denoiser.network.state_dict().keys()
        found = next(m for n, m in text.pair[1].named_modules() if n.endswith("encoder.layers.0.self_attn.q_proj"))
        x = rand(4, width)
        torch.testing.assert_close(found(x), x @ (before + 0.5 * up @ down).T + layer.bias)
        text.release()
    for refuses in (
        lambda: find_lora(file),
        lambda: put_loras(denoiser, denoiser.network, [(file, 1.0)], alone=True),
    ):
        with pytest.raises(UserError, match="changes a text encoder"):
            refuses()


def test_several_files_add_up(model_dir, tmp_path):
    denoiser = load_denoiser(str(model_dir))
    plain = {n: p.clone() for n, p in denoiser.network.named_parameters()}
    expected = {}
    for number, (end, scale) in enumerate((("to_q", 0.5), ("to_k", -2.0), ("to_q", 1.0))):
        matrices = halves(load_denoiser(str(model_dir)).network, ends=(end,))
        tensors = {n: t for name, pair in matrices.items() for n, t in zip(LAYOUTS["bare"](name), pair, strict=True)}
        save_file(tensors, tmp_path / f"{number}.safetensors")
        for name, pair in matrices.items():
            expected[name] = expected.get(name, 0) + scale * product(*pair)
    files = [(tmp_path / f"{i}.safetensors", s) for i, s in enumerate((0.5, -2.0, 1.0))]
    put_loras(denoiser, denoiser.network, files)
    for name, weight in merged(denoiser.network).items():
        change = expected.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(weight, plain[name] + change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.bfloat16])
def test_precisions_of_a_file(model_dir, tmp_path, dtype):
    matrices = {n: [t.to(dtype) for t in pair] for n, pair in halves(load_denoiser(str(model_dir)).network).items()}
    tensors = {n: t for name, pair in matrices.items() for n, t in zip(LAYOUTS["bare"](name), pair, strict=True)}
    save_file(tensors, file := tmp_path / "lora.safetensors")
    denoiser = load_denoiser(str(model_dir))
    load_lora(denoiser, denoiser.network, file)
    for name, layer in lora_layers(denoiser.network).items():
        assert torch.equal(layer.down, matrices[name][0].float())
        assert torch.equal(layer.up, matrices[name][1].float())


# Refused ------------------------------------------------------------


@pytest.fixture
def refusals(model_dir, tmp_path):
    """How all doors refuse a file: to draw with it, and to train on it or export it."""

    def of(change) -> list[str]:
        matrices = halves(load_denoiser(str(model_dir)).network)
        tensors = {n: t for name, pair in matrices.items() for n, t in zip(LAYOUTS["kohya"](name), pair, strict=True)}
        save_file({n: t.clone() for n, t in change(tensors).items()}, file := tmp_path / "lora.safetensors")
        said = []
        for put in (lambda d: put_loras(d, d.network, [(file, 1.0)]), lambda d: load_lora(d, d.network, file)):
            denoiser = load_denoiser(str(model_dir))
            with pytest.raises(UserError) as caught:
                put(denoiser)
            said.append(str(caught.value))
        assert all("\n" not in line and len(line) < 600 for line in said)
        return said

    return of


KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
KINDS = {
    "a DoRA in kohya's layout": {f"{KEY}.dora_scale": (8, 1)},
    "whole differences": {f"{KEY}.diff": (8, 8)},
    "a file with whole differences": {"diffusion_model.conv_in.diff_b": (8,)},
    "trained norms": {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm": (8,)},
    "an OFT": {f"{KEY}.oft_blocks": (2, 4, 4)},
    "an IA3": {f"{KEY}.on_input": (1,), f"{KEY}.weight": (8,)},
    "a GLoRA": {f"{KEY}.a1.weight": (4, 8)},
    "trained words": {"bundle_emb.word.string_to_param.*": (1, 16)},
    "what is no part of a LoRA": {"unet.conv_in.bias": (8,)},
    "an AdaLoRA": {"base_model.model.conv_in.lora_E": (4, 1)},
    "no part of a LoRA": {f"{KEY}.lora_down.scale": (1,)},
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_their_names(refusals, kind, alone):
    others = {name: torch.ones(shape) for name, shape in KINDS[kind].items()}
    if alone and kind in ("what is no part of a LoRA",):
        assert all("holds no LoRA" in line for line in refusals(lambda _: others))
        return
    said = refusals(lambda tensors: others if alone else {**tensors, **others})
    assert all(kind in line and next(iter(others)) in line and "family" not in line for line in said)


def with_alpha(tensors, alpha):
    return {**tensors, **{n.replace("lora_up.weight", "alpha"): alpha.clone() for n in tensors if n.endswith("lora_up.weight")}}


WRONG = {
    "layers are not in the model, such as lora_unet_mid_block_attentions_7": lambda t: {
        **t,
        f"{KEY}.lora_down.weight".replace("_0_", "_7_", 1): torch.ones(2, 8),
        f"{KEY}.lora_up.weight".replace("_0_", "_7_", 1): torch.ones(8, 2),
    },
    "the nearest there: ": lambda t: {n.replace("attn1", "attn7"): x for n, x in t.items()},
    "layers are not in the model, such as transformer.double_blocks": lambda t: {
        f"transformer.double_blocks.0.img_attn.qkv.lora_{x}.weight": torch.ones(2, 2) for x in "AB"
    },
    "is missing, the other half of": lambda t: {n: x for n, x in t.items() if n != f"{KEY}.lora_up.weight"},
    "is missing, the other half": lambda t: {n: x for n, x in t.items() if n != f"{KEY}.lora_down.weight"},
    "ranks 2 and 3": lambda t: {**t, f"{KEY}.lora_down.weight": t[f"{KEY}.lora_down.weight"][:2]},
    "Was it trained for another family of models?": lambda t: {
        n: torch.cat([x, x], 1) if n.endswith("down.weight") and "attn2" in n else x for n, x in t.items()
    },
    "not finite": lambda t: {**t, f"{KEY}.lora_up.weight": t[f"{KEY}.lora_up.weight"] / 0},
    "twice": lambda t: {**t, **{n.replace("lora_unet_", "unet."): x for n, x in t.items()}},
    "an alpha for 1 of its": lambda t: {**t, f"{KEY}.alpha": torch.tensor(1.0)},
    "an alpha is one": lambda t: {
        **t,
        **{n.replace("lora_down.weight", "alpha"): torch.ones(3) for n in t if "down" in n[-12:]},
    },
    "stored as int8": lambda t: {**t, f"{KEY}.lora_up.weight": t[f"{KEY}.lora_up.weight"].to(torch.int8)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(refusals, message):
    for line in refusals(WRONG[message]):
        assert message in line
        assert ("family" in line) == ("family" in message)


def test_a_name_of_any_length_is_told_in_short(refusals):
    name = "lora_" + "x" * 5000 + "\nsecond line"
    assert all("second line" in line for line in refusals(lambda t: {**t, name: torch.ones(1)}))


# Told ------------------------------------------------------------


def zeroed(tensors, end):
    return {n: torch.zeros_like(t) if n.endswith(end) else t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "told", "learns"),
    [
        (lambda t: with_alpha(t, torch.tensor(0.0)), "every alpha is 0", False),
        (lambda t: zeroed(t, ".weight"), "its matrices, or their alphas, are 0", False),
        (lambda t: zeroed(t, "up.weight"), "its matrices, or their alphas, are 0", True),
    ],
)
def test_a_lora_that_changes_nothing(model_dir, tmp_path, capsys, change, told, learns):
    matrices = halves(load_denoiser(str(model_dir)).network)
    tensors = {n: t for name, pair in matrices.items() for n, t in zip(LAYOUTS["kohya"](name), pair, strict=True)}
    save_file(change(tensors), file := tmp_path / "lora.safetensors")
    denoiser = load_denoiser(str(model_dir))
    put_loras(denoiser, denoiser.network, [(file, 1.0)])
    assert f"changes nothing: {told}" in capsys.readouterr().err
    denoiser = load_denoiser(str(model_dir))
    if learns:
        load_lora(denoiser, denoiser.network, file)
        assert f"changes nothing: {told}" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="cannot learn to"):
            load_lora(denoiser, denoiser.network, file)


def test_where_layers_are():
    assert placed("base_model.model.mid_block.attentions.0.proj_in") == (None, "mid_block_attentions_0_proj_in")
    assert placed("lora_te1_text_model_encoder_layers_1_mlp_fc1") == ("text_encoder", "text_model_encoder_layers_1_mlp_fc1")
    assert placed("text_encoder_2.text_model.encoder.layers.1.self_attn.to_out") == (
        "text_encoder_2",
        "text_model_encoder_layers_1_self_attn_out_proj",
    )
