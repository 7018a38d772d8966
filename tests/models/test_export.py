"""What was trained, read back by other programs' readers: kohya's layout, merged weights, a LoRA out of full weights."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from palate.base.errors import UserError
from palate.models import sd, sdxl
from palate.models.families import load_denoiser
from palate.models.files import KOHYA_FILE
from palate.models.kohya import save_kohya
from palate.models.layouts import extract_lora, save_diffusers, save_network, save_pipeline
from palate.models.lora import load_lora, lora_layers, put_loras
from palate.models.lora_file import find_lora, tells_alpha
from palate.models.policy import Policy


def disturb(parameters, size: float = 0.05) -> None:
    """What training does, without training."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += size * torch.randn(parameter.shape, generator=g)


@pytest.fixture(params=["sd", "sdxl"])
def folder(request, model_dir, sdxl_dir):
    return {"sd": model_dir, "sdxl": sdxl_dir}[request.param]


def change(layer) -> torch.Tensor:
    return layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)


def drawn(pipe) -> np.ndarray:
    """A picture's latents by plain diffusers."""
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return pipe("a red house", num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="latent").images.numpy()


def plain(folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder)


# Names ------------------------------------------------------------

# By the original SDXL code's numbering with two layers a block: input_blocks 0 is conv_in, 1-2 the first block, 3 its
# downsampler, 4-5 the second block, 6 its downsampler, 7-8 the third; output_blocks 0-2, 3-5, 6-8.
SDXL_NAMES = {
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.proj_out": "input_blocks_8_1_proj_out",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks_7_0_skip_connection",
    "mid_block.resnets.0.conv2": "middle_block_0_out_layers_3",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": "middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0": "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.attentions.0.proj_in": "output_blocks_3_1_proj_in",
    "up_blocks.2.resnets.2.conv1": "output_blocks_8_0_in_layers_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
}


@pytest.mark.parametrize("ours", SDXL_NAMES)
def test_names_of_sdxl_are_those_of_the_original_code(ours):
    assert sdxl.kohya_name(ours, 2) == "lora_unet_" + SDXL_NAMES[ours]


def test_names_of_sd_are_those_of_diffusers():
    name = sd.kohya_name("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0")
    assert name == "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0"


def test_every_layer_of_the_real_sdxl_finds_its_place():
    """The real architecture without weights, against diffusers' own map from the original names."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    config = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "architectures.py"))["NETWORKS"]["SDXL"].config
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    names = [n for n in names if n.endswith(tuple(f".{t}" for t in sd.LORA_TARGETS["all"]))]
    assert len(names) == 784  # docs/outputs.md
    for ours in names:
        key = sdxl.kohya_name(ours, 2)
        one = torch.zeros(1)
        file = {f"{key}.lora_down.weight": one, f"{key}.lora_up.weight": one, f"{key}.alpha": one}
        (found, *_), _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(file, unet.config))
        back = (
            found.removeprefix("unet.").replace(".processor", "").replace("_lora.", ".lora.").removesuffix(".lora.down.weight")
        )
        assert back == ours.replace("to_out.0", "to_out")


# Read back ------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "layers"), [(None, "attention"), (1.0, "attention"), (6.0, "all")])
def test_the_kohya_twin_draws_the_same_pictures_in_plain_diffusers(folder, tmp_path, alpha, layers):
    denoiser = load_denoiser(str(folder))
    policy = Policy(denoiser, rank=4, lora_alpha=alpha, lora_layers=layers)
    disturb(policy.parameters(), 0.2)
    policy.save(tmp_path)
    save_kohya(denoiser, policy.trainable_module, tmp_path / KOHYA_FILE, about={"ss_seed": "7"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pytorch_lora_weights.safetensors", KOHYA_FILE]
    pictures = {}
    for name in (None, "pytorch_lora_weights.safetensors", KOHYA_FILE):
        pipe = plain(folder)
        if name:
            pipe.load_lora_weights(tmp_path, weight_name=name)
        pictures[name] = drawn(pipe)
    np.testing.assert_allclose(pictures[KOHYA_FILE], pictures["pytorch_lora_weights.safetensors"], atol=1e-5)
    assert np.abs(pictures[KOHYA_FILE] - pictures[None]).max() > 1e-3
    if layers == "attention":  # the folder alone still means diffusers' file
        pipe = plain(folder)
        pipe.load_lora_weights(tmp_path)
        np.testing.assert_array_equal(drawn(pipe), pictures["pytorch_lora_weights.safetensors"])


def test_alphas_and_metadata_of_the_kohya_twin(folder, tmp_path):
    denoiser = load_denoiser(str(folder))
    policy = Policy(denoiser, rank=4, lora_alpha=6.0, lora_layers="all")
    path = save_kohya(denoiser, policy.trainable_module, tmp_path / "a" / "b.safetensors", about={"ss_seed": "7"})
    tensors = load_file(path)
    downs = [n for n in tensors if n.endswith(".lora_down.weight")]
    assert len(tensors) == 3 * len(downs) == 3 * len(lora_layers(policy.trainable_module))
    assert {float(tensors[n]) for n in tensors if n.endswith(".alpha")} == {6.0}
    with safe_open(path, "pt") as file:
        told = file.metadata()
    xl = denoiser.card.pipeline == "StableDiffusionXLPipeline"
    assert told["ss_base_model_version"] == ("sdxl_base_v1-0" if xl else "sd_v1")
    assert told["modelspec.architecture"] == f"stable-diffusion-{'xl-v1-base' if xl else 'v1'}/lora"
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_seed"]) == ("4", "6", "7")
    assert json.loads(told["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "6"}
    assert any("input_blocks" in n for n in tensors) == xl
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]
    again = save_kohya(denoiser, policy.trainable_module, tmp_path / "again.safetensors", about={"ss_seed": "7"})
    assert again.read_bytes() == path.read_bytes()


def test_a_full_disk_leaves_what_was_there(model_dir, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from palate.models import lora

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    denoiser = load_denoiser(str(model_dir))
    policy = Policy(denoiser, rank=2)
    path = save_kohya(denoiser, policy.trainable_module, tmp_path / KOHYA_FILE, about={})
    before = path.read_bytes()
    monkeypatch.setattr(lora, "save_file", full)
    with pytest.raises(UserError, match="cannot be written"):
        save_kohya(denoiser, policy.trainable_module, path, about={})
    assert [p.name for p in tmp_path.iterdir()] == [KOHYA_FILE]
    assert path.read_bytes() == before


def test_a_continued_lora_of_kohya_keeps_its_strength(model_dir, tmp_path):
    first = load_denoiser(str(model_dir))
    policy = Policy(first, rank=2, lora_alpha=5.0)
    disturb(policy.parameters())
    path = save_kohya(first, policy.trainable_module, tmp_path / "k.safetensors", about={})
    second = load_denoiser(str(model_dir))
    load_lora(second, second.network, path)
    ours, theirs = lora_layers(policy.trainable_module), lora_layers(second.network)
    assert ours.keys() == theirs.keys()
    assert {x.alpha for x in theirs.values()} == {5.0}
    assert all(torch.equal(ours[n].up, theirs[n].up) for n in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_weights_and_whole_pipelines_draw_what_the_lora_does(folder, tmp_path, dtype):
    from diffusers import UNet2DConditionModel

    denoiser = load_denoiser(str(folder))
    policy = Policy(denoiser, rank=4, lora_alpha=6.0, lora_layers="all")
    disturb(policy.parameters(), 0.2)
    policy.save(tmp_path)
    save_network(copy.deepcopy(policy.trainable_module), tmp_path / "unet", dtype=dtype)
    save_pipeline(denoiser, policy.trainable_module, tmp_path / "pipe", dtype=dtype)
    assert load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == dtype
    pipe = plain(folder)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    expected = drawn(pipe)
    pipe = plain(folder)
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float32)
    close = {"atol": 1e-4} if dtype == torch.float32 else {"atol": 0.1}
    np.testing.assert_allclose(drawn(pipe), expected, **close)
    np.testing.assert_allclose(drawn(plain(tmp_path / "pipe").to(dtype=torch.float32)), expected, **close)


def test_half_a_lora_is_as_before_afterwards(model_dir, tmp_path):
    denoiser = load_denoiser(str(model_dir))
    policy = Policy(denoiser, rank=4)
    disturb(policy.parameters())
    before = {n: p.clone() for n, p in policy.state_dict().items()}
    path = save_diffusers(denoiser, policy.trainable_module, tmp_path, dtype=torch.float16)
    assert {x.dtype for x in load_file(path).values()} == {torch.float16}
    assert all(torch.equal(before[n], p) and p.dtype == torch.float32 for n, p in policy.state_dict().items())


# A LoRA out of full weights ------------------------------------------------------------


def test_extraction_recovers_a_change_of_low_rank(folder, tmp_path):
    denoiser = load_denoiser(str(folder))
    changed = load_denoiser(str(folder))
    policy = Policy(changed, rank=2, lora_alpha=3.0, lora_layers="all")
    disturb(policy.parameters(), 0.2)
    policy.save(tmp_path)
    pipe = plain(folder)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    full = save_network(policy.trainable_module, tmp_path / "unet")
    found = extract_lora(denoiser, type(denoiser.network).from_pretrained(full), rank=2)
    assert found.ranks == (2, 2)
    assert found.of_layers == pytest.approx(1, abs=1e-4)
    assert found.of_all == pytest.approx(1, abs=1e-4)
    save_diffusers(denoiser, denoiser.network, tmp_path / "found")
    again = plain(folder)
    again.load_lora_weights(tmp_path / "found", weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(drawn(again), drawn(pipe), atol=1e-3)


def test_what_extraction_reports_is_the_error_it_makes(model_dir, tmp_path):
    """A diagonal change of one layer with squares 9, 4, 1, ...: rank 1 holds 9/14 of it, energy 0.9 needs rank 2 (13/14)."""
    denoiser, changed = load_denoiser(str(model_dir)), load_denoiser(str(model_dir))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with torch.no_grad():
        changed.network.get_submodule(name).weight.diagonal()[:3] += torch.tensor([3.0, 2.0, 1.0])
        changed.network.conv_in.bias[0] += 14**0.5  # as much again where no LoRA reaches
    found = extract_lora(copy.deepcopy(denoiser), changed.network, rank=1)
    assert (found.layers, found.ranks) == (1, (1, 1))
    assert found.of_layers == pytest.approx(9 / 14, abs=1e-5)
    assert found.of_all == pytest.approx(9 / 28, abs=1e-5)
    assert "rank 1 in 1 layers holds 64.29 %" in found.sentence()
    found = extract_lora(denoiser, changed.network, energy=0.9)
    assert found.ranks == (2, 2)
    assert list(lora_layers(denoiser.network)) == [name]
    assert lora_layers(denoiser.network)[name].scale == 1


def test_layers_of_different_rank_keep_their_strength_in_both_layouts(model_dir, tmp_path):
    denoiser, changed = load_denoiser(str(model_dir)), load_denoiser(str(model_dir))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in changed.network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight += 0.05 * torch.randn(module.weight.shape, generator=g)
    found = extract_lora(denoiser, changed.network, energy=0.7)
    assert found.ranks[0] < found.ranks[1]
    assert 0.7 <= found.of_layers < 1
    save_diffusers(denoiser, denoiser.network, tmp_path)
    path = save_kohya(denoiser, denoiser.network, tmp_path / KOHYA_FILE, about={})
    expected = lora_layers(denoiser.network)
    for file in (tmp_path / "pytorch_lora_weights.safetensors", path):
        other = load_denoiser(str(model_dir))
        load_lora(other, other.network, file)
        read = lora_layers(other.network)
        assert read.keys() == expected.keys()
        for name, layer in read.items():
            torch.testing.assert_close(change(layer), change(expected[name]))
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "Dynamic"
        assert len({float(opened.get_tensor(n)) for n in opened.keys() if n.endswith(".alpha")}) == 1  # noqa: SIM118


def test_a_kohya_file_with_different_alphas_is_read_as_it_says(kohya, model_dir):
    """Alpha 5 in all layers of rank 2, but 1 in the first ones: diffusers by itself would take 5 for all."""
    tensors = load_file(kohya)
    alphas = sorted(n for n in tensors if n.endswith(".alpha"))
    for name in alphas[:3]:
        tensors[name] = torch.tensor(1.0)
    save_file(tensors, kohya)
    denoiser = load_denoiser(str(model_dir))
    load_lora(denoiser, denoiser.network, kohya)
    read = {sd.kohya_name(n): change(x) for n, x in lora_layers(denoiser.network).items()}
    for alpha in alphas:
        name = alpha.removesuffix(".alpha")
        expected = float(tensors[alpha]) / 2 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        torch.testing.assert_close(read[name], expected)


def test_there_must_be_a_change_of_the_same_model(model_dir, sdxl_dir):
    denoiser = load_denoiser(str(model_dir))
    with pytest.raises(UserError, match="there is no change to extract"):
        extract_lora(denoiser, load_denoiser(str(model_dir)).network)
    with pytest.raises(UserError, match="not shaped like that of"):
        extract_lora(denoiser, load_denoiser(str(sdxl_dir)).network)


# Bad files ------------------------------------------------------------


@pytest.fixture
def kohya(model_dir, tmp_path):
    denoiser = load_denoiser(str(model_dir))
    policy = Policy(denoiser, rank=2, lora_alpha=5.0)
    disturb(policy.parameters())
    return save_kohya(denoiser, policy.trainable_module, tmp_path / "k.safetensors", about={})


def test_an_alpha_that_is_missing(kohya, model_dir):
    tensors = load_file(kohya)
    assert tells_alpha(kohya)
    save_file({n: x for n, x in tensors.items() if not n.endswith(".alpha")}, kohya)
    assert not tells_alpha(find_lora(kohya))
    denoiser = load_denoiser(str(model_dir))
    load_lora(denoiser, denoiser.network, kohya)
    assert {x.scale for x in lora_layers(denoiser.network).values()} == {1.0}
    tensors.pop(next(n for n in tensors if n.endswith(".alpha")))
    save_file(tensors, kohya)
    with pytest.raises(UserError, match="the strength of the others is not known"):
        find_lora(kohya)


def test_adapters_that_do_not_fit(kohya, model_dir, sdxl_dir, caplog):
    def refused(tensors, folder=model_dir) -> str:
        save_file(tensors, kohya)
        denoiser = load_denoiser(str(folder))
        with pytest.raises(UserError) as caught:
            load_lora(denoiser, denoiser.network, kohya)
        assert not caplog.text  # the message is all there is to read
        return str(caught.value)

    tensors = load_file(kohya)
    # Cross attention takes texts of another width in the other family.
    assert "size mismatch for" in (told := refused(tensors, sdxl_dir))
    assert "another family of models" in told
    down = next(n for n in tensors if n.endswith("lora_down.weight"))
    assert "size mismatch for" in refused({**tensors, down: tensors[down][:1].contiguous()})  # a rank its other half has not
    assert "lora_up.weight is missing" in refused(
        {n: x for n, x in tensors.items() if n != down.replace("lora_down", "lora_up")}
    )
    assert "does not fit" in refused({n.replace("attn1", "attn7"): x for n, x in tensors.items()})
    assert "not finite" in refused({**tensors, down: torch.full_like(tensors[down], torch.nan)})
    denoiser = load_denoiser(str(model_dir))
    with pytest.raises(UserError, match="not finite"):  # nor to draw with
        put_loras(denoiser, denoiser.network, [(kohya, 0.5)])
