"""SDXL on a tiny real pipeline: what diffusers does with it, Palate does."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.diffusion.denoising import Conditioning, draw
from palate.models.drawing import Drawing
from palate.models.families import load_denoiser, load_refiner
from palate.models.lora import tuned
from palate.models.parts import Source, Vae
from palate.models.policy import Policy
from palate.spaces import perceptual

PROMPTS = ["a red house on the left", "a very long prompt " * 30]


@pytest.fixture
def load(sdxl_dir):
    return lambda **options: load_denoiser(str(sdxl_dir), **options)


@pytest.fixture
def plain(sdxl_dir):
    """The pipeline as diffusers reads it."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_dir, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def batch(load):
    """x (3, 4, 16, 16), times, conditioning of three pictures of different sizes."""
    g = torch.Generator().manual_seed(0)
    cond = load().encode_prompts(["a red house", "a blue tower", "a tree"])
    framing = torch.tensor([[64, 64, 0, 0, 64, 64], [512, 700, 0, 12, 64, 64], [90, 60, 16, 0, 64, 64]])
    x = torch.randn(3, 4, 16, 16, generator=g)
    return x, torch.tensor([1, 500, 999]), Conditioning({**cond.tensors, "framing": framing})


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=int)


# Parity with diffusers ---------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_as_by_diffusers(load, plain):
    denoiser = load()
    with torch.no_grad():
        hidden, away, pooled, away_pooled = plain.encode_prompt(PROMPTS)
    found, empty = denoiser.encode_prompts(PROMPTS).tensors, denoiser.unconditional().tensors
    assert torch.equal(found["encoder_hidden_states"], hidden)
    assert torch.equal(found["text_embeds"], pooled)
    assert torch.equal(empty["encoder_hidden_states"], away[:1])
    assert torch.equal(empty["text_embeds"], away_pooled[:1])
    assert denoiser.latent_shape(Shape(64, 128)) == (4, 16, 32)
    assert denoiser.default_resolution == 64
    assert denoiser.cut_prompts([*PROMPTS, *PROMPTS]) == (1, 40)


def test_the_empty_prompt_is_encoded_where_the_pipeline_says_so(sdxl_dir, tmp_path):
    folder = shutil.copytree(sdxl_dir, tmp_path / "other")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    denoiser = load_denoiser(str(folder))
    empty = denoiser.unconditional().tensors["text_embeds"]
    assert empty.any()
    assert torch.equal(empty, denoiser.encode_prompts([""]).tensors["text_embeds"])


def test_a_cache_that_stable_diffusion_filled_serves_sdxl_with_the_same_vae(model_dir, sdxl_dir):
    """What is kept of a picture is what any of them needs: its size and crop too."""
    one, other = load_denoiser(str(model_dir)), load_denoiser(str(sdxl_dir))
    about = (48, 32), Shape.square(64), (0.25, 0.5)
    kept, wanted = (d.picture_conditions(*about, flip=True) for d in (one, other))
    assert kept.keys() == wanted.keys()
    assert wanted["framing"].tolist() == kept["framing"].tolist() == [32, 48, 0, 24, 64, 64]


def test_size_and_crop_reach_the_unet_as_by_diffusers(load, plain, batch):
    x, t, cond = batch
    denoiser = load()
    framings = [((64, 64), (0, 0)), ((512, 700), (0, 12)), ((90, 60), (16, 0))]
    ids = torch.cat([plain._get_add_time_ids(size, crop, (64, 64), torch.float32, 10) for size, crop in framings])
    added = {"text_embeds": cond.tensors["text_embeds"], "time_ids": ids}
    with torch.no_grad():
        expected = plain.unet(x, t, cond.tensors["encoder_hidden_states"], added_cond_kwargs=added).sample
        assert torch.equal(denoiser.predict(denoiser.network, x, t, cond), expected)
        unframed = Conditioning({n: v for n, v in cond.tensors.items() if n != "framing"})
        found = denoiser.predict(denoiser.network, x, t, unframed)
    torch.testing.assert_close(found[0], expected[0])  # the first picture is whole, and 64 x 64: what is assumed
    assert (found[1:] - expected[1:]).abs().amax() > 1e-5


@pytest.mark.parametrize("negative", [None, "blurred"])
def test_pictures_of_ddim_are_those_of_the_pipeline(sdxl_dir, plain, tmp_path, negative):
    from diffusers import DDIMScheduler

    folder = shutil.copytree(sdxl_dir, tmp_path / "ddim")
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    plain.scheduler.save_pretrained(folder / "scheduler")
    options = {"num_inference_steps": 4, "guidance_scale": 4.0}
    expected = plain(PROMPTS[0], negative_prompt=negative, generator=torch.Generator().manual_seed(3), **options).images[0]
    denoiser = load_denoiser(str(folder))
    found = denoiser.generate(
        ["a tree", PROMPTS[0]], [1, 3], Drawing(shape=Shape.square(64), **options), negatives=[None, negative]
    )
    assert np.abs(pixels(found[1]) - pixels(expected)).max() <= 1
    assert np.abs(pixels(found[1]) - pixels(found[0])).max() > 1


def test_latents_are_those_of_the_vae(load, plain):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = plain.vae.encode(x).latent_dist.mean * 0.13025
        back = plain.vae.decode(z / 0.13025).sample
    torch.testing.assert_close(load().encode_images(x), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(load().decode(z), (back / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)


# Training ----------------------------------------------------------------------------------------------------------------


def test_features_are_the_activations_of_a_forward_pass(load, batch):
    policy = Policy(load(), rank=2)
    seen: list[torch.Tensor] = []
    unet = policy.frozen
    for block in (unet.conv_in, *unet.down_blocks, unet.mid_block):
        block.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    policy.reference(*batch)
    expected, seen[:] = list(seen), []
    for layers, wanted in (("all", expected), ("last_down", expected[-2:-1]), ("mid", expected[-1:])):
        found = policy.features(*batch, layers)
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_perceptual_gradients_do_not_depend_on_checkpointing(load, batch):
    x, _, cond = batch
    found = []
    for checkpointing in (False, True):
        policy = Policy(load(), rank=2, gradient_checkpointing=checkpointing)
        space = perceptual(policy.features, policy.schedule, layers="mid")
        noised = draw(policy.schedule, x, cond, torch.arange(3), t_min=1)
        embed = space(noised)
        residual = embed(policy(noised.xt, noised.t, noised.cond)) - embed(noised.target)
        (1e6 * residual.square().mean()).backward()
        found.append({n: p.grad for n, p in policy.trainable_module.named_parameters() if p.requires_grad})
    assert any(g.abs().max() > 0 for g in found[0].values())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_lora_reloads_at_the_trained_strength_here_and_in_plain_diffusers(load, plain, batch, tmp_path, layers):
    policy = Policy(load(), rank=4, lora_alpha=2.0, lora_layers=layers)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    path, expected = policy.save(tmp_path), policy(*batch)
    again = load()
    torch.testing.assert_close(again.predict(tuned(again, path), *batch), expected)
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(again.predict(plain.unet, *batch), expected)
    assert not torch.equal(policy.reference(*batch), expected)


def test_half_precision_weights_predict_in_their_own_precision(load, batch):
    policy = Policy(load(mixed_precision="bf16"), rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert policy(*batch).isfinite().all()
    assert {f.dtype for f in policy.features(*batch, "all")} == {torch.float32}


# Memory, precision, mistakes -----------------------------------------------------------------------------------------------


def test_encoders_leave_memory_and_known_prompts_need_none(load):
    denoiser = load()
    denoiser.remember(["a red house"])
    gone = [weakref.ref(denoiser.vae.module), *(weakref.ref(text.pair[1]) for text in denoiser.texts)]
    denoiser.release()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    denoiser.generate(["a red house"], [0], Drawing(2, 2.0, Shape.square(64)))
    assert [text.loaded for text in denoiser.texts] == [False, False]


def test_either_text_encoder_changes_the_fingerprint(load, sdxl_dir, tmp_path):
    from transformers import CLIPTextModelWithProjection

    first = load().fingerprint()
    assert load().fingerprint() == first
    folder = shutil.copytree(sdxl_dir, tmp_path / "other")
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    with torch.no_grad():
        encoder.text_projection.weight[0, 0] += 1e-3
    encoder.save_pretrained(folder / "text_encoder_2")
    other = load_denoiser(str(folder)).fingerprint()
    assert other["vae"] == first["vae"]
    assert other["text"] != first["text"]


def changed_vae(sdxl_dir, folder, **config):
    shutil.copytree(sdxl_dir, folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_the_vae_is_float32_unless_it_says_that_it_need_not_be(sdxl_dir, tmp_path):
    fixed = changed_vae(sdxl_dir, tmp_path / "fixed", force_upcast=False)
    for folder, dtype, expected in (
        (sdxl_dir, torch.float16, torch.float32),
        (fixed, torch.float16, torch.float16),
        (fixed, torch.bfloat16, torch.float32),
        (fixed, torch.float32, torch.float32),
    ):
        vae = Vae(Source(str(folder), "cpu"), dtype, "U-Net")
        assert vae.module.dtype == expected
        latents = vae.encode(torch.zeros(1, 3, 64, 64))
        assert latents.dtype == vae.decode(latents).dtype == torch.float32


def test_latents_are_normalised_by_mean_and_deviation_where_the_vae_has_them(sdxl_dir, tmp_path):
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    folder = changed_vae(sdxl_dir, tmp_path / "other", latents_mean=mean, latents_std=std)
    vae, plain = (Vae(Source(str(f), "cpu"), torch.float32, "U-Net") for f in (folder, sdxl_dir))
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = plain.encode(x) / 0.13025
    expected = torch.stack([(raw[:, i] - mean[i]) / std[i] * 0.13025 for i in range(4)], 1)
    torch.testing.assert_close(vae.encode(x), expected)
    torch.testing.assert_close(vae.decode(expected), plain.decode(raw * 0.13025), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("value", "message"), [(torch.nan, r"the VAE of .* gave NaN"), (-9.0, "all black")])
def test_a_vae_that_overflows_is_an_error_and_never_a_black_picture(load, value, message):
    denoiser = load()
    last = denoiser.vae.module.decoder.conv_out
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(value)
    with pytest.raises(UserError, match=message):
        denoiser.generate(["a red house"], [0], Drawing(1, 1.0, Shape.square(64)))


# The refiner ---------------------------------------------------------------------------------------------------------------


def test_the_refiner_finishes_pictures_as_by_diffusers(load, plain, refiner_dir):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    options = {"num_inference_steps": 5, "guidance_scale": 3.0}
    second = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner_dir, add_watermarker=False)
    second.set_progress_bar_config(disable=True)
    half = plain(
        PROMPTS[0], denoising_end=0.6, output_type="latent", generator=torch.Generator().manual_seed(3), **options
    ).images
    expected = second(PROMPTS[0], image=half, denoising_start=0.6, **options).images[0]
    refiner = load_refiner(str(refiner_dir), start=0.6)
    prompts = [PROMPTS[0], "a tree"]
    found = load().generate(prompts, [3, 4], Drawing(shape=Shape.square(64), **options), refiner=refiner)
    assert np.abs(pixels(found[0]) - pixels(expected)).max() <= 1
    without = load().generate(prompts, [3, 4], Drawing(shape=Shape.square(64), **options))
    assert np.abs(pixels(found[0]) - pixels(without[0])).max() > 1


def test_a_refiner_that_is_none_or_not_whole(refiner_dir, sdxl_dir, model_dir, tmp_path):
    folder = shutil.copytree(refiner_dir, tmp_path / "half")
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match="lacks unet/"):
        load_refiner(str(folder))
    with pytest.raises(UserError, match="not a refiner"):
        load_refiner(str(sdxl_dir))
    with pytest.raises(UserError, match="is a refiner"):
        load_denoiser(str(refiner_dir))
    with pytest.raises(UserError, match="an SDXL model"):
        load_denoiser(str(model_dir)).generate(
            ["a tree"], [0], Drawing(1, 1.0, Shape.square(64)), refiner=load_refiner(str(refiner_dir))
        )
