"""Stable Diffusion 3 on a tiny real pipeline: what diffusers does with it, Palate does."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.diffusion.sampling import sample
from palate.diffusion.schedule import RectifiedFlow
from palate.diffusion.steps import ddim
from palate.models.denoiser import Drawing
from palate.models.families import check_model, load_denoiser
from palate.models.lora import load_lora
from palate.models.policy import Policy

PROMPTS = ["a red house on the left", "a very long prompt " * 12]


def read(folder, without_t5=False):
    """The pipeline as diffusers reads it."""
    from diffusers import StableDiffusion3Pipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None} if without_t5 else {}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=[False, True], ids=["whole", "without_t5"])
def both(request, sd3_dir, sd3_without_t5):
    """The model, and the pipeline of the same folder."""
    folder = sd3_without_t5 if request.param else sd3_dir
    return load_denoiser(str(folder)), read(folder, without_t5=request.param)


@pytest.fixture
def load(sd3_dir):
    return lambda **options: load_denoiser(str(sd3_dir), **options)


@pytest.fixture
def batch(load):
    """x (3, 4, 16, 16), times and conditioning."""
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([8.9286, 500, 1000], dtype=torch.float64), load().encode_prompts(["a red house", "a tree", ""])


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=int)


# Parity with diffusers ---------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_as_by_diffusers(both):
    denoiser, plain = both
    with torch.no_grad():
        hidden, away, pooled, away_pooled = plain.encode_prompt(PROMPTS, PROMPTS, PROMPTS)
        found, empty = denoiser.encode_prompts(PROMPTS).tensors, denoiser.unconditional().tensors
    assert found["encoder_hidden_states"].shape == (2, 40 + 256, 40)
    assert torch.equal(found["encoder_hidden_states"], hidden)
    assert torch.equal(found["pooled_projections"], pooled)
    # The pipeline encoded it twice at once, and a matrix product depends on its size to a bit.
    torch.testing.assert_close(empty["encoder_hidden_states"], away[:1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(empty["pooled_projections"], away_pooled[:1], rtol=1e-5, atol=1e-6)


def test_where_prompts_are_cut_depends_on_t5(sd3_dir, sd3_without_t5):
    long = "a red house " * 14
    assert load_denoiser(str(sd3_without_t5)).cut_prompts([long, "a tree"]) == (1, 40)
    assert load_denoiser(str(sd3_dir)).cut_prompts([long, "a tree"]) == (0, 256)


def test_what_the_transformer_says_is_what_it_says_in_the_pipeline(load, sd3_dir, batch):
    x, t, cond = batch
    denoiser, plain = load(), read(sd3_dir)
    hidden, pooled = cond.tensors["encoder_hidden_states"], cond.tensors["pooled_projections"]
    with torch.no_grad():
        found = denoiser.predict(denoiser.network, x, t, cond)
        expected = plain.transformer(x, hidden, pooled, t.float()).sample
    assert torch.equal(found, expected)
    assert found.std() > 0.1


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_drawing_step_by_step_is_that_of_the_pipeline(both, scale):
    """The grid, the guidance, the sign of the velocity and the meaning of t, all at once."""
    denoiser, plain = both
    n, latents = 5, torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    prompts = ["a red house", "a blue tower"]
    expected = plain(
        prompts, latents=latents, num_inference_steps=n, guidance_scale=scale, height=64, width=64, output_type="latent"
    ).images
    way = denoiser.schedule.path(n, shape=denoiser.latent_shape(Shape(64, 64)))
    torch.testing.assert_close(way.t.float(), plain.scheduler.timesteps, rtol=1e-5, atol=1e-4)
    cond, empty = denoiser.encode_prompts(prompts), denoiser.unconditional()
    found = latents
    with torch.no_grad():
        for k in range(n):
            t, s = way.at(k, 2, "cpu")
            output = denoiser.predict(denoiser.network, found, t, cond)
            away = denoiser.predict(denoiser.network, found, t, empty.repeat(2))
            found, _ = ddim(0.0)(denoiser.schedule, away + scale * (output - away), found, t, s)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_rollouts_without_noise_are_the_pictures_of_the_pipeline(load, sd3_dir):
    denoiser, plain = load(), read(sd3_dir)
    cond, seeds = denoiser.encode_prompts(["a red house"]), torch.tensor([3])
    way = denoiser.schedule.path(4, shape=(4, 16, 16))
    with torch.no_grad():
        drawn = sample(
            lambda xt, t, cond: denoiser.predict(denoiser.network, xt, t, cond),
            *(denoiser.schedule, way, cond, seeds, (4, 16, 16)),
            guidance_scale=1.0,
            rule=ddim(0.0),
        ).latents[0]
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 64}
    expected = plain("a red house", latents=drawn[:1], output_type="latent", **options).images
    torch.testing.assert_close(drawn[-1:], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("negative", [None, "blurred"])
def test_pictures_are_those_of_the_pipeline(both, negative):
    denoiser, plain = both
    options = {"num_inference_steps": 4, "guidance_scale": 4.0}
    expected = plain(
        PROMPTS[0], negative_prompt=negative, generator=torch.Generator().manual_seed(3), height=64, width=64, **options
    ).images[0]
    found = denoiser.generate(
        ["a tree", PROMPTS[0]], [1, 3], Drawing(shape=Shape.square(64), **options), negatives=[None, negative]
    )
    assert np.abs(pixels(found[1]) - pixels(expected)).max() <= 1
    assert np.abs(pixels(found[1]) - pixels(found[0])).max() > 1


def test_a_picture_is_edited_as_by_diffusers(load, sd3_dir):
    from diffusers import StableDiffusion3Img2ImgPipeline

    plain = StableDiffusion3Img2ImgPipeline.from_pretrained(sd3_dir)
    plain.set_progress_bar_config(disable=True)
    denoiser = load()
    init = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"num_inference_steps": 4, "guidance_scale": 3.0}
    found = denoiser.generate([PROMPTS[0]], [3], Drawing(shape=Shape.square(64), **options), init=list(init), strength=0.5)
    generator = torch.Generator().manual_seed(3)
    start = denoiser.encode_images(init)
    expected = plain(PROMPTS[0], image=start, strength=0.5, generator=generator, **options).images[0]
    assert np.abs(pixels(found[0]) - pixels(expected)).max() <= 1
    whole = denoiser.generate([PROMPTS[0]], [3], Drawing(shape=Shape.square(64), **options))
    assert np.abs(pixels(found[0]) - pixels(whole[0])).max() > 1


def test_latents_are_those_of_the_vae(load, sd3_dir):
    plain = read(sd3_dir)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = (plain.vae.encode(x).latent_dist.mean - 0.0609) * 1.5305
        back = plain.vae.decode(z / 1.5305 + 0.0609).sample
    torch.testing.assert_close(load().encode_images(x), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load().decode(z), (back / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)


# What is refused, and what a cache is told -------------------------------------------------------------------------------


def test_sides_that_cannot_be_cut_into_patches_are_refused(load):
    assert load().latent_shape(Shape(64, 32)) == (4, 16, 8)
    for refused in (lambda d: d.latent_shape(Shape(60, 64)), lambda d: d.encode_images(torch.zeros(1, 3, 64, 60))):
        with pytest.raises(UserError, match="multiples of 8"):
            refused(load())


def test_more_patches_in_a_row_than_there_are_positions_are_refused(load):
    # 32 positions of patches of 2 latents of 4 pixels
    assert load().latent_shape(Shape(256, 64)) == (4, 64, 16)
    with pytest.raises(UserError, match=r"64 x 264, but sides must be multiples of 8 up to 256 for .*: try 64x256"):
        load().latent_shape(Shape(264, 64))


def test_a_cache_tells_models_with_and_without_t5_apart(sd3_dir, sd3_without_t5):
    one, other = (load_denoiser(str(folder)).fingerprint() for folder in (sd3_dir, sd3_without_t5))
    assert one["vae"] == other["vae"]
    assert one["text"] != other["text"]
    assert one["text"].endswith(other["text"].removeprefix(" ".join(other["text"].split()[:2])))  # sd3 hidden ...


def changed(folder, to, part, change):
    folder = shutil.copytree(folder, to)
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return str(folder)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas is not supported"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.1, "beta_end": 0.2},
            "has the sampler DDIMScheduler, but a StableDiffusion3Pipeline needs a FlowMatchEuler",
        ),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderOfTomorrow"]}, "does not know; update it"),
        ("model_index.json", {"vae": [None, None]}, "comes without vae"),
        ("vae/config.json", {"block_out_channels": None}, "is a AutoencoderKL, which is not supported"),
        ("model_index.json", {"text_encoder": [None, None]}, "comes without text_encoder"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(sd3_dir, tmp_path, part, change, message):
    with pytest.raises(UserError, match=message):
        load_denoiser(changed(sd3_dir, tmp_path / "other", part, change)).encode_prompts(["a"])


def test_a_unet_with_the_sampler_of_a_flow_is_refused(model_dir, tmp_path):
    change = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    with pytest.raises(UserError, match="but a StableDiffusionPipeline needs one of the DDPM"):
        load_denoiser(changed(model_dir, tmp_path / "other", "scheduler/scheduler_config.json", change))


def test_the_shift_may_grow_with_the_picture(sd3_dir, tmp_path):
    change = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 256}
    folder = changed(sd3_dir, tmp_path / "other", "scheduler/scheduler_config.json", change)
    denoiser, plain = load_denoiser(folder), read(folder)
    assert isinstance(denoiser.schedule, RectifiedFlow)
    plain("a", num_inference_steps=4, height=32, width=64, output_type="latent")
    way = denoiser.schedule.path(4, shape=denoiser.latent_shape(Shape(32, 64)))
    torch.testing.assert_close(way.t.float(), plain.scheduler.timesteps, rtol=1e-5, atol=1e-4)


def test_float16_is_refused_where_a_family_overflows_in_it(load, monkeypatch):
    monkeypatch.setattr("palate.models.sd3.StableDiffusion3.no_fp16", True)
    with pytest.raises(UserError, match="overflows in float16: use mixed_precision bf16"):
        load(mixed_precision="fp16")
    assert load(mixed_precision="bf16").network.dtype == torch.bfloat16


def test_text_encoders_are_float32_on_the_cpu(load):
    assert {text.pair[1].dtype for text in load(mixed_precision="bf16").texts} == {torch.float32}


def test_a_large_text_encoder_is_bfloat16_on_a_gpu():
    from palate.models.parts import large

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [large(dtype, gpu) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    assert large(torch.bfloat16, cpu) == torch.float32


def test_the_digest_of_a_text_encoder_covers_what_decides_its_texts(sd3_dir):
    from palate.models.parts import Source, TextEncoder

    source = Source(str(sd3_dir), "cpu")
    options = [
        {},
        {"length": 64},
        {"dtype": torch.bfloat16},
        {"masked": True},
        {"template": lambda tokenizer, prompt: f"say {prompt}"},
        {"template": lambda tokenizer, prompt: f"tell {prompt}"},
    ]
    digests = [TextEncoder(source, "_3", **{"length": 32, **given}).digest() for given in options]
    assert len(set(digests)) == len(digests)


def test_a_template_is_read_in_the_prompts_place(sd3_dir):
    from palate.models.parts import Source, TextEncoder

    source = Source(str(sd3_dir), "cpu")
    plain, wrapped = (
        TextEncoder(source, "_3", length=16, template=t) for t in (None, lambda tokenizer, prompt: f"a red {prompt}")
    )
    with torch.no_grad():
        assert torch.equal(wrapped(["house"])[0], plain(["a red house"])[0])
    assert wrapped.longer(["house", "house " * 20])[0] == [False, True]


# Features ----------------------------------------------------------------------------------------------------------------


def features(denoiser, x, t, cond, layers, **options):
    return denoiser.features(denoiser.network, x, t, cond, layers, **options)


def test_features_are_the_normalised_picture_tokens_of_the_first_blocks(load, batch):
    x, t, cond = batch
    denoiser = load()
    network, seen = denoiser.network, []
    for block in network.transformer_blocks:
        block.register_forward_hook(lambda block, given, output: seen.append(output[1]))
    denoiser.predict(network, x, t, cond)
    assert len(seen) == 4
    expected = [h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() for h in seen]
    for layers, depths in (("quarter", [1]), ("half", [2]), ("all", [1, 2])):  # of 4: a sixth and a third are one block
        seen.clear()
        found = features(denoiser, x, t, cond, layers)
        assert len(seen) == depths[-1]  # the rest is not computed
        assert [h.shape for h in found] == [(3, 64, 32)] * len(depths)
        for tensor, depth in zip(found, depths, strict=True):
            torch.testing.assert_close(tensor, expected[depth - 1], rtol=1e-5, atol=1e-5)


def test_the_network_is_as_it_was_after_its_features(load, batch):
    x, t, cond = batch
    denoiser = load()
    with torch.no_grad():
        before = denoiser.predict(denoiser.network, x, t, cond)
        features(denoiser, x, t, cond, "half")
        assert torch.equal(denoiser.predict(denoiser.network, x, t, cond), before)


def test_features_do_not_move_with_the_length_of_a_token():
    """A channel a thousand times the others decides the length alone, and so next to nothing."""
    from palate.models.features import block_features

    block = torch.nn.Identity()
    even = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    outlier = even.clone()
    outlier[..., 0] = 1000.0

    def of(tokens):
        return block_features(block, tokens, [block], lambda output: output, "half")[0]

    torch.testing.assert_close(of(even * 7), of(even), rtol=1e-4, atol=1e-5)
    moved = outlier.clone()
    moved[..., 0] *= 1.01
    assert (of(moved) - of(outlier)).abs().max() < 1e-3


def test_features_are_float32_whatever_the_weights_are(load, batch):
    x, t, cond = batch
    half = load(mixed_precision="bf16")
    exact = load(mixed_precision="bf16")
    exact.network.float()
    cond = half.encode_prompts(["a red house", "a tree", ""])
    with torch.autocast("cpu", torch.bfloat16):
        found = features(half, x, t, cond, "all")
    for one, other in zip(found, features(exact, x, t, cond, "all"), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    rounded = features(exact, x.bfloat16().float(), t, cond, "half")[0]
    assert (rounded - found[-1]).abs().max() > 1e-4  # what a cast to half precision would have done


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_gradients_reach_the_latents_and_no_weights(load, batch, mixed_precision):
    x, t, cond = batch
    policy = Policy(load(mixed_precision=mixed_precision), rank=2, gradient_checkpointing=True)
    gradients = []
    for checkpointing in (False, True):
        x = x.detach().requires_grad_()
        out = policy.denoiser.features(policy.frozen, x, t, cond, "half", gradient_checkpointing=checkpointing)[0]
        out.square().mul(torch.linspace(0, 1, 32)).sum().backward()
        gradients.append(x.grad)
        x.grad = None
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-4
    assert all(p.grad is None for p in policy.frozen.parameters())


def test_a_step_back_in_flow_moves_latents_by_its_length():
    # c = sigma alpha' - alpha^2 sigma'^2 / (alpha' sigma), here with alpha = sigma = 1/2: alpha' / 2 - sigma'^2 / (2 alpha').
    from palate.diffusion.steps import ddim_step

    flow, one = RectifiedFlow(), torch.ones(1, 1, dtype=torch.float64)
    for back, c in ((1, 0.001996), (20, 0.038462)):
        t = torch.tensor([500.0], dtype=torch.float64)
        moved = ddim_step(flow, one, one, t, t - back)[0] - ddim_step(flow, 0 * one, one, t, t - back)[0]
        assert abs(moved.item()) == pytest.approx(c, rel=1e-3)


# LoRA --------------------------------------------------------------------------------------------------------------------


def spread(policy):
    """Weights as training leaves them: none of them zero."""
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize(("layers", "found"), [("attention", 31), ("all", 31 + 4 + 14)])
def test_a_lora_is_put_in_the_layers_that_are_named(load, layers, found):
    # Four blocks of eight projections, but one of the last: nothing follows its text. attn2 is in one block, and the last
    # block has no feed-forward for text.
    policy = Policy(load(), rank=2, lora_layers=layers)
    names = {name.split(".lora_")[0] for name, _ in policy.trainable_module.named_parameters() if ".lora_" in name}
    assert len(names) == found
    assert any("attn2" in name or "ff" in name for name in names) == (layers == "all")


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_diffusers_reads_our_lora_at_its_strength(load, sd3_dir, batch, tmp_path, alpha):
    x, t, cond = batch
    policy = Policy(load(), rank=2, lora_alpha=alpha, lora_layers="all")
    spread(policy)
    policy.save(tmp_path)
    assert all(
        n.startswith("transformer.transformer_blocks.") for n in load_file(tmp_path / "pytorch_lora_weights.safetensors")
    )
    plain = read(sd3_dir)
    plain.load_lora_weights(tmp_path)
    hidden, pooled = cond.tensors["encoder_hidden_states"], cond.tensors["pooled_projections"]
    with torch.no_grad():
        found = plain.transformer(x, hidden, pooled, t.float()).sample
        torch.testing.assert_close(found, policy(x, t, cond), rtol=1e-4, atol=1e-5)
        assert (found - policy.reference(x, t, cond)).abs().max() > 0.01


def test_a_lora_of_diffusers_is_read_at_its_strength(load, sd3_dir, batch, tmp_path):
    from diffusers import StableDiffusion3Pipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    x, t, cond = batch
    plain = read(sd3_dir)
    plain.transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["attn.to_q", "attn.add_v_proj"]))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(plain.transformer.named_parameters()):
            if ".lora_" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(i))
        expected = plain.transformer(x, *cond.tensors.values(), t.float()).sample
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(plain.transformer), **_collate_lora_metadata({"transformer": plain.transformer})
    )
    denoiser = load()
    load_lora(denoiser, denoiser.network, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(denoiser.predict(denoiser.network, x, t, cond), expected, rtol=1e-4, atol=1e-5)


def test_a_single_file_is_known_by_its_names(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "sd3.safetensors"
    save_file({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="import StableDiffusion3Pipeline as P"):
        check_model(str(path))
