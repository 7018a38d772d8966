"""``palate generate`` with a pipeline of no family that is trained: a tiny SD3, where the table does not know it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from palate.evaluation.manifest import read_manifest, read_settings
from palate.models.families import FAMILIES


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    monkeypatch.delitem(FAMILIES, "StableDiffusion3Pipeline")


def drawn(folder):
    return np.stack([np.asarray(Image.open(Path(folder, p.file))) for p in read_manifest(folder)]).astype(int)


def test_sd3_draws(palate, sd3_dir, prompts_file):
    quick = {"prompts": prompts_file, "num_inference_steps": 2, "guidance_scale": 3, "num_prompts": 2}
    code, said, errors = palate("generate", sd3_dir, **quick, output_dir="out")
    assert (code, said) == (0, "drew 2 of 2 pictures of tiny-sd3, 0 were there; see out\n"), errors
    assert drawn("out").shape == (2, 64, 64, 3)
    assert read_settings("out")["sampler"] == "FlowMatchEulerDiscreteScheduler"
    assert palate("generate", sd3_dir, **quick, output_dir="single", batch_size=1)[0] == 0
    assert np.abs(drawn("single") - drawn("out")).max() <= 1
    assert palate("generate", sd3_dir, **quick, output_dir="negative", negative_prompt="a house")[0] == 0
    assert np.abs(drawn("negative") - drawn("out")).max() > 1
    # Parity with the pipeline by itself.
    from diffusers import StableDiffusion3Pipeline

    pictures = read_manifest("out")
    wanted = StableDiffusion3Pipeline.from_pretrained(sd3_dir)(
        [p.prompt for p in pictures],
        num_inference_steps=2,
        guidance_scale=3.0,
        height=64,
        width=64,
        generator=[torch.Generator().manual_seed(p.seed) for p in pictures],
    ).images
    assert np.abs(np.stack([np.asarray(image) for image in wanted]).astype(int) - drawn("out")).max() <= 1


def test_sd3_is_not_trained_nor_edited(palate, sd3_dir, prompts_file):
    code, _, errors = palate("train", pretrained_model_name_or_path=sd3_dir)
    assert (code, "is a StableDiffusion3Pipeline; supported pipelines" in errors, len(errors.splitlines())) == (2, True, 1)
    Image.new("RGB", (32, 32), "red").save("red.png")
    code, _, errors = palate("generate", sd3_dir, prompts=prompts_file, init_image="red.png", output_dir="out")
    assert (code, "others can only draw" in errors) == (2, True)
    code, _, errors = palate("generate", sd3_dir, prompts=prompts_file, lora="quick.yaml", output_dir="out")
    assert (code, "quick.yaml cannot be put into" in errors, len(errors.splitlines())) == (2, True, 1), errors
    assert not Path("out").exists()


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "pipeline"])
def test_a_lora_of_sd3_is_not_exported(palate, sd3_dir, layout):
    save_file({"transformer.proj_out.lora_A.weight": torch.zeros(1, 2)}, "lora.safetensors")
    code, _, errors = palate(
        "export", "lora.safetensors", format=layout, output="out.safetensors", pretrained_model_name_or_path=sd3_dir
    )
    assert (code, "is a StableDiffusion3Pipeline; supported pipelines" in errors) == (2, True), errors


def layer_of(folder, text="transformer"):
    from diffusers import StableDiffusion3Pipeline

    module = getattr(StableDiffusion3Pipeline.from_pretrained(folder), text)
    return next((n, m) for n, m in module.named_modules() if n.endswith(("attn.to_q", "self_attn.q_proj")))


def test_a_lora_of_sd3_is_applied_whole_or_refused(palate, sd3_dir, prompts_file):
    quick = {"prompts": prompts_file, "num_inference_steps": 2, "num_prompts": 1}

    def draws(lora, output):
        save_file(lora, "lora.safetensors")
        code, _, errors = palate("generate", sd3_dir, **quick, lora="lora.safetensors", output_dir=output)
        return code, errors

    assert palate("generate", sd3_dir, **quick, output_dir="plain")[0] == 0
    name, module = layer_of(sd3_dir)
    text, encoder = layer_of(sd3_dir, "text_encoder_2")
    for number, (stem, (out, into)) in enumerate(
        [
            (f"transformer.{name}", module.weight.shape),
            (f"base_model.model.{name}", module.weight.shape),
            (name, module.weight.shape),
            (f"text_encoder_2.{text}", encoder.weight.shape),
        ]
    ):
        noise = torch.Generator().manual_seed(number)
        halves = torch.randn(2, into, generator=noise), torch.randn(out, 2, generator=noise)
        good = {f"{stem}.lora_{half}.weight": 5 * matrix for half, matrix in zip("AB", halves, strict=True)}
        assert draws(good, f"good{number}") == (0, ""), stem
        assert np.abs(drawn(f"good{number}") - drawn("plain")).max() > 1
        for extra, message in (
            ({"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": torch.ones(2, 16)}, "is missing, the other half"),
            (
                {f"transformer.blocks.7.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"},
                "not in the model",
            ),
            ({f"{stem}.dora_scale": torch.ones(out, 1)}, "a DoRA in kohya's layout"),
            ({f"{stem}.hada_w1_a": torch.ones(2, 2)}, "has no place beside the others"),
            ({f"{stem}.bias": torch.ones(2)}, "no part of a LoRA"),
        ):
            code, errors = draws({**good, **extra}, "bad")
            assert (code, message in errors, len(errors.splitlines())) == (2, True, 1), (stem, errors)
            assert not Path("bad").exists()


def test_a_layout_that_diffusers_alone_knows(tmp_path):
    """Kohya's LoRA of Flux names the original layers, in which query, key and value are one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from palate.base.errors import UserError
    from palate.models.lora import put_loras
    from palate.models.other import OtherPipeline

    def flux():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformer = FluxTransformer2DModel(
                patch_size=1,
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=(2, 2, 4),
            )
        found = OtherPipeline.__new__(OtherPipeline)
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        found._pipeline = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)
        found.name, found.network, found.sampler, found.default_resolution = "flux", transformer, "euler", 64
        return found

    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 16, generator=g), torch.randn(48, 2, generator=g)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    save_file(tensors, file := tmp_path / "flux.safetensors")
    model = flux()
    put_loras(model, model.network, [(file, 1.0)])
    attention, before = model.network.transformer_blocks[0].attn, flux().network.transformer_blocks[0].attn
    x = torch.randn(3, 16, generator=g)
    for name, rows in (("to_q", up[:16]), ("to_k", up[16:32]), ("to_v", up[32:])):
        expected = getattr(before, name)(x) + 0.5 * x @ (rows @ down).T
        torch.testing.assert_close(getattr(attention, name)(x), expected)
    unknown = {n.replace("double_blocks_0", "triple_blocks_0"): t.clone() for n, t in tensors.items()}
    save_file({**tensors, **unknown}, file)
    model = flux()
    with pytest.raises(UserError, match=r"flux\.safetensors cannot be put into flux"):
        put_loras(model, model.network, [(file, 1.0)])
