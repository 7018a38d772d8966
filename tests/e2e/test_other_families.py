"""``palate generate`` with a tiny random SD3: a family that is drawn with, not trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LIMIT, tiny_text
from PIL import Image
from safetensors.torch import save_file

from palate.evaluation.manifest import read_manifest, read_settings


@pytest.fixture(scope="module")
def sd3_dir(tmp_path_factory, tokenizer_dir):
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=LIMIT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
        )
        torch.nn.init.normal_(transformer.proj_out.weight)  # it begins at zero, and nothing would depend on the prompt
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=4,
            shift_factor=0.06,
            scaling_factor=1.5,
        )
        encoders = [CLIPTextModelWithProjection(tiny_text(tokenizer, 16, projection_dim=16)) for _ in range(2)]
        third = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=tokenizer,
    ).save_pretrained(folder)
    return folder


def drawn(folder):
    return np.stack([np.asarray(Image.open(Path(folder, p.file))) for p in read_manifest(folder)]).astype(int)


def test_sd3_draws(palate, sd3_dir, prompts_file):
    quick = {"prompts": prompts_file, "num_inference_steps": 2, "guidance_scale": 3, "num_prompts": 2}
    code, said, errors = palate("generate", sd3_dir, **quick, output_dir="out")
    assert (code, said) == (0, "drew 2 of 2 pictures of tiny-sd3, 0 were there; see out\n"), errors
    assert drawn("out").shape == (2, 32, 32, 3)
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
        height=32,
        width=32,
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
