"""Families of rectified flow on tiny real pipelines: what diffusers does with them, Palate does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.diffusion.denoising import Conditioning
from palate.diffusion.sampling import guided, join, transition
from palate.diffusion.steps import ddim
from palate.models import flux
from palate.models.denoiser import Drawing
from palate.models.families import load_denoiser
from palate.models.files import LORA_FILE
from palate.models.kohya import save_kohya
from palate.models.lora import lora_layers, tuned
from palate.models.policy import Policy

SIDE, STEPS = 64, 3
SQUARE, TALL, WIDE = Shape(64, 64), Shape(96, 64), Shape(64, 96)
PROMPTS = ["a red house on the left", "a very long prompt of many words " * 60, ""]
KINDS = ["zimage", "klein", "flux"]


@pytest.fixture
def load(flow_dir):
    return lambda kind, **options: load_denoiser(str(flow_dir(kind)), **options)


@pytest.fixture
def plain(flow_dir):
    """The pipeline as diffusers reads it."""
    from diffusers import DiffusionPipeline

    def read(kind):
        pipeline = DiffusionPipeline.from_pretrained(flow_dir(kind))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return read


def noise(denoiser, seed: int, shape: Shape = SQUARE) -> torch.Tensor:
    """What the pipeline begins with, before it packs it."""
    return torch.randn((1, *denoiser.latent_shape(shape)), generator=torch.Generator().manual_seed(seed))


def unpacked(kind: str, pipeline, latents: torch.Tensor, shape: Shape = SQUARE) -> torch.Tensor:
    """The pipeline's latents (b, tokens, c) as (b, c, h, w)."""
    if kind.startswith("klein"):
        sides = (side // pipeline.vae_scale_factor // 2 for side in (shape.height, shape.width))
        ids = pipeline._prepare_latent_ids(torch.zeros(len(latents), 1, *sides))
        return pipeline._unpack_latents_with_ids(latents, ids)
    if kind in ("flux", "schnell"):
        return pipeline._unpack_latents(latents, shape.height, shape.width, pipeline.vae_scale_factor)
    return latents


def visited(kind: str, pipeline, prompt: str, shape: Shape = SQUARE, **options) -> list[torch.Tensor]:
    """Latents (1, c, h, w) after each of the pipeline's steps."""
    seen = []

    def look(_pipeline, _step, _t, found):
        seen.append(unpacked(kind, pipeline, found["latents"], shape))
        return {}

    drawn = {"height": shape.height, "width": shape.width, "num_inference_steps": STEPS, "output_type": "latent"}
    pipeline(prompt=prompt, callback_on_step_end=look, **drawn, **options)
    return seen


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=int)


# Prompts and pictures ------------------------------------------------------------------------------------------------------


def test_prompts_of_zimage(load, plain):
    with torch.no_grad():
        expected, _ = plain("zimage").encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
        found = load("zimage").encode_prompts(PROMPTS).tensors
    lengths = [len(rows) for rows in expected]
    assert found["length"].tolist() == lengths
    assert lengths[1] == 512 > lengths[0] > lengths[2] > 0
    for rows, ours, length in zip(expected, found["encoder_hidden_states"], lengths, strict=True):
        assert torch.equal(ours[:length], rows)
        assert not ours[length:].any()


@torch.no_grad()
def test_prompts_of_klein(load, plain):
    expected, _ = plain("klein").encode_prompt(list(PROMPTS))
    found = load("klein").encode_prompts(PROMPTS).tensors
    assert expected.shape == (3, 512, 3 * 16)
    assert torch.equal(found["encoder_hidden_states"], expected)


@torch.no_grad()
def test_prompts_of_flux(load, plain):
    expected, pooled, _ = plain("flux").encode_prompt(list(PROMPTS))
    denoiser = load("flux")
    found = denoiser.encode_prompts(PROMPTS).tensors
    assert expected.shape == (3, 512, 32)
    assert torch.equal(found["encoder_hidden_states"], expected)
    assert torch.equal(found["pooled"], pooled)
    assert denoiser.cut_prompts(PROMPTS) == (1, 512)  # T5 reads on where CLIP stops


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_that_the_pipeline_decodes(load, plain, kind):
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    denoiser, pipeline = load(kind), plain(kind)
    with torch.no_grad():
        found = denoiser.encode_images(x)
        z = pipeline.vae.encode(x).latent_dist.mean
        expected = pipeline._encode_vae_image(x, None) if kind == "klein" else (z - 0.1159) * 0.3611
        back = (pipeline.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(denoiser.decode(found), back, rtol=1e-4, atol=1e-5)
    assert found.shape[1:] == denoiser.latent_shape(Shape(SIDE, SIDE))


# Steps ---------------------------------------------------------------------------------------------------------------------

# The pipeline's arguments -> the guidance of ours, and a negative prompt.
WAYS = {
    "zimage alone": ("zimage", {"guidance_scale": 0.0}, 1.0, None),
    "zimage guided": ("zimage", {"guidance_scale": 3.0}, 4.0, ""),
    "zimage away": ("zimage", {"guidance_scale": 0.5, "negative_prompt": "a blue tower"}, 1.5, "a blue tower"),
    "klein alone": ("klein", {"guidance_scale": 1.0}, 1.0, None),
    "klein guided": ("klein", {"guidance_scale": 4.0}, 4.0, ""),
    "klein distilled": ("klein-distilled", {"guidance_scale": 4.0}, 1.0, None),
    "flux told 1": ("flux", {"guidance_scale": 1.0}, 1.0, None),
    "flux guided beside": (
        "flux",
        {"guidance_scale": 1.0, "true_cfg_scale": 3.0, "negative_prompt": "a blue tower"},
        3.0,
        "a blue tower",
    ),
    "schnell": ("schnell", {"guidance_scale": 0.0}, 1.0, None),
}


@torch.no_grad()
@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_step_is_that_of_the_pipeline(load, plain, way, shape):
    """Times, sign, guidance, packing: the pipeline's own latents step by step, and ours from the same noise.

    The number of tokens, their places and the shift of the times depend on the shape.
    """
    kind, options, scale, negative = WAYS[way]
    denoiser, pipeline = load(kind), plain(kind)
    expected = visited(kind, pipeline, PROMPTS[0], shape, generator=torch.Generator().manual_seed(7), **options)
    cond = denoiser.encode_prompts(PROMPTS[:1])
    cond = cond if negative is None else join(cond, denoiser.encode_prompts([negative]))
    path = denoiser.schedule.path(STEPS, shape=denoiser.latent_shape(shape))
    torch.testing.assert_close(path.t.float(), pipeline.scheduler.timesteps, rtol=1e-5, atol=1e-3)
    predict = guided(lambda x, t, cond: denoiser.predict(denoiser.network, x, t, cond), scale)
    x = noise(denoiser, 7, shape)
    for k, wanted in enumerate(expected):
        after = transition(predict, denoiser.schedule, x, *path.at(k, 1, "cpu"), cond, rule=ddim(0.0)).mean
        assert (after - x).abs().max() > 0.05
        torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)
        x = after


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_unequal_length_do_not_disturb_one_another(load, kind):
    denoiser = load(kind)
    x, t = noise(denoiser, 0).repeat(3, 1, 1, 1), torch.tensor([100.0, 500.0, 900.0], dtype=torch.float64)
    cond = denoiser.encode_prompts(PROMPTS)
    together = denoiser.predict(denoiser.network, x, t, cond)
    for i in range(3):
        alone = denoiser.predict(denoiser.network, x[i : i + 1], t[i : i + 1], cond.rows([i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 1e-3


# Pictures ------------------------------------------------------------------------------------------------------------------

DRAWN = {
    "zimage": ("zimage", {"guidance_scale": 3.0}, 4.0, None),
    "zimage away": ("zimage", {"guidance_scale": 3.0, "negative_prompt": "a blue tower"}, 4.0, "a blue tower"),
    "zimage alone": ("zimage-turbo", {"guidance_scale": 0.0}, 1.0, None),
    "klein": ("klein", {"guidance_scale": 4.0}, 4.0, None),
    "klein distilled": ("klein-distilled", {"guidance_scale": 1.0}, 1.0, None),
    "flux": ("flux", {"guidance_scale": 3.5}, 3.5, None),
    "schnell": ("schnell", {"guidance_scale": 0.0}, 0.0, None),
}


@pytest.mark.parametrize("shape", [SQUARE, TALL], ids=str)
@pytest.mark.parametrize("way", DRAWN)
def test_pictures_are_those_of_the_pipeline(load, plain, way, shape):
    """Beside one of another shape, too."""
    kind, options, scale, negative = DRAWN[way]
    drawn = {"height": shape.height, "width": shape.width, "num_inference_steps": STEPS}
    expected = plain(kind)(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(3), **drawn, **options).images[0]
    away = [None, negative] if negative else None
    found = load(kind).generate(
        ["a tree", PROMPTS[0]], [1, 3], Drawing(STEPS, scale, SQUARE), negatives=away, shapes=[None, shape]
    )
    assert [image.size for image in found] == [(64, 64), (shape.width, shape.height)]
    assert np.abs(pixels(found[1]) - pixels(expected)).max() <= 1
    assert shape != SQUARE or np.abs(pixels(found[1]) - pixels(found[0])).max() > 1


# Features ------------------------------------------------------------------------------------------------------------------


def blocks_of(kind: str, network) -> list:
    """In the order they run in."""
    return list(network.layers) if kind == "zimage" else [*network.transformer_blocks, *network.single_transformer_blocks]


def of_the_picture(kind: str, output, x: torch.Tensor) -> torch.Tensor:
    """Of all tokens that a block gives."""
    tokens = x[0, 0].numel() // (1 if kind == "klein" else 4)
    if isinstance(output, tuple):
        return output[1]
    return output[:, :tokens] if kind == "zimage" else output[:, -tokens:]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_normalised_picture_tokens_of_the_first_blocks(load, kind):
    denoiser, g = load(kind), torch.Generator().manual_seed(0)
    network, seen = denoiser.network, []
    x, t = (
        torch.randn(2, *denoiser.latent_shape(Shape(SIDE, 2 * SIDE)), generator=g),
        torch.tensor([100.0, 700.0], dtype=torch.float64),
    )
    cond = denoiser.encode_prompts(["a red house on the left", "a tree"])
    blocks = blocks_of(kind, network)
    for block in blocks:
        block.register_forward_hook(lambda block, given, output: seen.append(of_the_picture(kind, output, x)))
    before = denoiser.predict(network, x, t, cond)
    assert len(seen) == len(blocks)
    assert len({tokens.shape for tokens in seen}) == 1
    assert seen[0].shape[1] * (1 if kind == "klein" else 4) == x[0, 0].numel()
    expected = [h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() for h in seen]
    for layers, depths in {"quarter": [1], "half": [1], "all": [1]}.items():  # of two or three blocks
        seen.clear()
        found = denoiser.features(network, x, t, cond, layers)
        assert len(seen) == depths[-1]  # the rest is not computed
        for tensor, depth in zip(found, depths, strict=True):
            torch.testing.assert_close(tensor, expected[depth - 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(denoiser.predict(network, x, t, cond), before)


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_a_deeper_network_are_of_the_chosen_blocks(load, kind):
    """The last half of twice as many blocks, joint ones and single ones, begins behind those of the first network."""
    denoiser = load(kind)
    network, x = denoiser.network, noise(load(kind), 3)
    for name in ("layers",) if kind == "zimage" else ("transformer_blocks", "single_transformer_blocks"):
        setattr(
            network, name, torch.nn.ModuleList([copy.deepcopy(block) for block in getattr(network, name) for _ in range(3)])
        )
    blocks, ran = blocks_of(kind, network), []
    for block in blocks:
        block.register_forward_hook(lambda block, given, output: ran.append(of_the_picture(kind, output, x)))
    cond, t = denoiser.encode_prompts(["a red house"]), torch.tensor([500.0], dtype=torch.float64)
    count = len(blocks)
    for layers, depths in {"quarter": [count // 4], "half": [count // 2], "all": [count // 6, count // 3, count // 2]}.items():
        ran.clear()
        found = denoiser.features(network, x, t, cond, layers)
        assert len(ran) == depths[-1]
        for tensor, depth in zip(found, depths, strict=True):
            h = ran[depth - 1]
            torch.testing.assert_close(tensor, h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_float32_whatever_the_weights_are(load, kind):
    half, exact = (load(kind, mixed_precision="bf16") for _ in range(2))
    exact.network.float()
    x, t = noise(half, 5), torch.tensor([300.0], dtype=torch.float64)
    cond = exact.encode_prompts(["a red house"])
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = half.features(half.network, x, t, cond, "half")
    (expected,) = exact.features(exact.network, x, t, cond, "half")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    (rounded,) = exact.features(exact.network, x.bfloat16().float(), t, cond, "half")
    assert (rounded - found).abs().max() > 10 * (expected - found).abs().max()  # what half precision would have done


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_features_reach_the_latents_and_no_weights(load, kind):
    policy = Policy(load(kind), rank=2, gradient_checkpointing=True)
    x, t = noise(policy.denoiser, 7).requires_grad_(), torch.tensor([300.0], dtype=torch.float64)
    cond, gradients = policy.denoiser.encode_prompts(["a red house"]), []
    for checkpointing in (False, True):
        (out,) = policy.denoiser.features(policy.frozen, x, t, cond, "half", gradient_checkpointing=checkpointing)
        gradients += torch.autograd.grad((out * torch.linspace(0, 1, out.shape[-1])).square().sum(), x)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-4
    assert all(p.grad is None for p in policy.frozen.parameters())


# LoRA ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["attention", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_reloads_at_the_trained_strength_here_and_in_plain_diffusers(load, plain, tmp_path, kind, layers):
    policy = moved(load, kind, layers)
    denoiser = policy.denoiser
    with torch.no_grad():
        batch = noise(denoiser, 0), torch.tensor([600.0], dtype=torch.float64), denoiser.encode_prompts(PROMPTS[:1])
        path, expected = policy.save(tmp_path), policy(*batch)
        again, pipeline = load(kind), plain(kind)
        torch.testing.assert_close(again.predict(tuned(again, path), *batch), expected)
        pipeline.load_lora_weights(tmp_path)
        torch.testing.assert_close(again.predict(pipeline.transformer, *batch), expected)
        assert (policy.reference(*batch) - expected).abs().max() > 1e-3
    # And the other way: what the pipeline writes is read here.
    (tmp_path / "theirs").mkdir()
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    type(pipeline).save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0"),
        **_collate_lora_metadata({"transformer": policy.trainable_module}),
    )
    other = load(kind)
    with torch.no_grad():
        torch.testing.assert_close(other.predict(tuned(other, tmp_path / "theirs" / LORA_FILE), *batch), expected)


# Of Z-Image two refiners of one block and two layers, each of four in the attention and three behind it. Of klein a joint block
# of four, and four more for the prompt and as many behind, and two single blocks of two. Of FLUX.1 a joint block of eight and
# four behind, and two single ones of three.
TARGETS = {
    "zimage": {"attention": 4 * 4, "all": 4 * 4 + 4 * 3},
    "klein": {"attention": 4 + 2 * 2, "all": 4 + 2 * 2 + 4 + 4},
    "flux": {"attention": 8 + 2 * 3, "all": 8 + 2 * 3 + 4},
}


@pytest.mark.parametrize("kind", TARGETS)
def test_layers_of_a_lora(load, kind):
    for layers, count in TARGETS[kind].items():
        policy = Policy(load(kind), rank=2, lora_layers=layers)
        assert len(policy.state_dict()) == 2 * count


# As kohya's scripts name the layers, and diffusers reads them (its converters of FLUX.1 and FLUX.2).
DOUBLE = ["img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "img_mlp_0", "img_mlp_2", "txt_mlp_0", "txt_mlp_2"]
NAMES = {
    ("klein", "attention"): [f"double_blocks_0_{name}" for name in DOUBLE[:2]]
    + [f"single_blocks_{i}_linear{k}" for i in (0, 1) for k in (1, 2)],
    ("klein", "all"): [f"double_blocks_0_{name}" for name in DOUBLE]
    + [f"single_blocks_{i}_linear{k}" for i in (0, 1) for k in (1, 2)],
    ("flux", "attention"): [f"double_blocks_0_{name}" for name in DOUBLE[:4]] + [f"single_blocks_{i}_linear1" for i in (0, 1)],
    ("flux", "all"): [f"double_blocks_0_{name}" for name in DOUBLE] + [f"single_blocks_{i}_linear1" for i in (0, 1)],
}


def moved(load, kind: str, layers: str) -> Policy:
    """With a LoRA of rank 4 and strength 1/2 that changes something."""
    policy, g = Policy(load(kind), rank=4, lora_alpha=2.0, lora_layers=layers), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    return policy


def change(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    down, up, alpha = (tensors[f"lora_unet_{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    return alpha / len(down) * up @ down


@pytest.mark.parametrize(("kind", "layers"), NAMES)
def test_kohyas_twin_has_the_layers_of_the_original_code(load, tmp_path, kind, layers):
    policy = moved(load, kind, layers)
    file = save_kohya(policy.denoiser, policy.trainable_module, tmp_path / "twin.safetensors", about={})
    tensors = load_file(file)
    assert {name.partition(".")[0] for name in tensors} == {f"lora_unet_{name}" for name in NAMES[kind, layers]}
    own = {name: layer.scale * layer.up @ layer.down for name, layer in lora_layers(policy.trainable_module).items()}
    joint = [own[f"transformer_blocks.0.attn.{name}"] for name in ("to_q", "to_k", "to_v")]
    assert torch.equal(change(tensors, "double_blocks_0_img_attn_qkv"), torch.cat(joint))
    assert (
        tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 3 * tensors["lora_unet_double_blocks_0_img_attn_proj.alpha"]
    )
    if kind == "flux":  # the feed-forward half of a single block's first layer is not trained
        single = [own[f"single_transformer_blocks.1.attn.{name}"] for name in ("to_q", "to_k", "to_v")]
        found = change(tensors, "single_blocks_1_linear1")
        assert torch.equal(found[: 3 * 32], torch.cat(single))
        assert found.shape == (3 * 32 + 4 * 32, 32)
        assert not found[3 * 32 :].any()


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_kohyas_twin_of_klein_is_read_by_diffusers(load, plain, tmp_path, layers):
    policy = moved(load, "klein", layers)
    save_kohya(policy.denoiser, policy.trainable_module, tmp_path / "twin.safetensors", about={})
    pipeline, other = plain("klein"), load("klein")
    pipeline.load_lora_weights(tmp_path, weight_name="twin.safetensors")
    x, t = noise(other, 0), torch.tensor([600.0], dtype=torch.float64)
    with torch.no_grad():
        cond = other.encode_prompts(PROMPTS[:1])
        expected = policy(x, t, cond)
        torch.testing.assert_close(other.predict(pipeline.transformer, x, t, cond), expected, rtol=1e-4, atol=1e-5)
        assert (policy.reference(x, t, cond) - expected).abs().max() > 1e-3


def test_a_layer_that_kohyas_scripts_do_not_name_is_told():
    with pytest.raises(UserError, match=r"no name for the layer norm_out\.linear"):
        flux.kohya_name("norm_out.linear")


def test_z_image_has_no_twin(load):
    assert load("zimage").kohya is None  # readers know its layers by the names of diffusers


# What is refused, and what is warned of --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zimage", "flux"])
def test_float16_is_refused(load, kind):
    with pytest.raises(UserError, match="bf16"):
        load(kind, mixed_precision="fp16")
    assert load(kind, mixed_precision="bf16").network.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_predict_in_their_own_precision(load, kind):
    denoiser = load(kind, mixed_precision="bf16")
    policy = Policy(denoiser, rank=2)
    cond = denoiser.encode_prompts(PROMPTS[:1])
    x, t = noise(denoiser, 0), torch.tensor([600.0], dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = policy(
            x, t, Conditioning({name: v.bfloat16() if v.is_floating_point() else v for name, v in cond.tensors.items()})
        )
    assert found.isfinite().all()
    assert found.shape == x.shape


DISTILLED = {"zimage-turbo": "Z-Image", "klein-distilled": "FLUX.2-klein-base", "schnell": "FLUX.1-dev"}


@pytest.mark.parametrize("kind", DISTILLED)
def test_distilled_kinds_are_warned_of(load, kind):
    told = load(kind).caution
    assert "few steps" in told
    assert f"train {DISTILLED[kind]}, and put the LoRA into this one" in told


@pytest.mark.parametrize("kind", KINDS)
def test_others_are_not(load, kind):
    assert load(kind).caution == ""


@pytest.mark.parametrize("kind", ["flux", "schnell", "klein-distilled"])
def test_a_negative_prompt_without_effect_is_refused(load, kind):
    with pytest.raises(UserError, match="a negative prompt has no effect"):
        load(kind).generate(["a tree"], [0], Drawing(1, 1.0, SQUARE), negatives=["a blue tower"])


@pytest.mark.parametrize("kind", KINDS)
def test_no_pictures_are_edited(load, kind):
    with pytest.raises(UserError, match="edits no pictures"):
        load(kind).generate(["a tree"], [0], Drawing(2, 1.0, SQUARE), init=[torch.zeros(3, SIDE, SIDE)], strength=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_at_home_is_of_the_pipelines_size(load, plain, kind):
    """The real ones' VAE takes an eighth of the side, and the pipelines draw 1024 pixels; the tiny ones take a quarter."""
    assert load(kind).default_resolution == 128 * plain(kind).vae_scale_factor


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_that_does_not_divide_into_tokens_is_refused(load, kind):
    with pytest.raises(UserError, match=r"64 x 68, but sides must be multiples of 8 for .*: try 64 or 64x72"):
        load(kind).latent_shape(Shape(SIDE + 4, SIDE))
