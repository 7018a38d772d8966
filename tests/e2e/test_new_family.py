"""A family with a transformer, which the house does not know: one class and one line of the table are all that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import LIMIT, tiny_text
from safetensors.torch import load_file
from torch import Tensor, nn

from palate.diffusion.denoising import Conditioning
from palate.evaluation.manifest import read_manifest
from palate.models.denoiser import Card
from palate.models.families import FAMILIES, Family
from palate.models.latent import Latent
from palate.models.parts import Source, TextEncoder


class Transformer(Latent):
    """Two text encoders and the network of Stable Diffusion 3, on the schedule of Stable Diffusion 1."""

    part, part_name = "transformer", "transformer"
    card: ClassVar[Card] = Card("StableDiffusion3Pipeline", "SD3Transformer2DModel", "stable-diffusion-3")
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {"attention": ("to_q", "to_k", "to_v"), "all": ("to_q", "ff.net.2")}
    prompt_arguments: ClassVar[dict[str, str]] = {"hidden": "prompt_embeds", "pooled": "pooled_prompt_embeds"}

    def _text_encoders(self, source: Source, dtype: torch.dtype) -> tuple[TextEncoder, ...]:
        return TextEncoder(source), TextEncoder(source, "_2")

    def _pipeline_options(self) -> dict[str, object]:
        return {"text_encoder_3": None, "tokenizer_3": None}

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        found = [text(prompts, hidden_states=True) for text in self.texts]
        hidden = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
        return Conditioning({"hidden": hidden, "pooled": torch.cat([one.text_embeds for one in found], dim=-1)})

    def predict(self, network: nn.Module, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        hidden, pooled = (cond.tensors[name] for name in ("hidden", "pooled"))
        return network(xt, encoder_hidden_states=hidden, pooled_projections=pooled, timestep=t, return_dict=False)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_dir):
    from diffusers import AutoencoderKL, DDIMScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-new"
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=LIMIT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
        )
        nn.init.normal_(transformer.proj_out.weight)  # it begins at zero, and nothing would depend on the prompt
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=4,
            shift_factor=0.06,
            scaling_factor=1.5,
        )
        encoders = [CLIPTextModelWithProjection(tiny_text(tokenizer, 16, projection_dim=16)) for _ in range(2)]
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(FAMILIES, "StableDiffusion3Pipeline", Family(f"{__name__}:Transformer", "Stable Diffusion 3"))


def test_a_lora_is_trained_compared_continued_and_exported(palate, folder, prompts_file):
    compared = {"evaluation_prompts": prompts_file, "judges": "[jpeg_compressibility]", "num_inference_steps": 2}
    model = {"pretrained_model_name_or_path": folder, "train_method": "lora"}
    code, _, errors = palate("train", **model, **compared, sample_steps=1, validation_prompts="[a red house]")
    assert code == 0, errors
    trained = load_file("out/pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.transformer_blocks.") for name in trained)
    assert any(bool(x.any()) for name, x in trained.items() if "lora_B" in name)
    card = Path("out/README.md").read_text()
    assert "from diffusers import StableDiffusion3Pipeline" in card
    assert "stable-diffusion-3" in card
    assert palate("train", **model, output_dir="more", pretrained_lora="out")[0] == 0
    assert palate("evaluate", "out")[0] == 0
    assert palate("generate", "out", prompts=prompts_file, output_dir="drawn", num_inference_steps=2)[0] == 0
    assert len(read_manifest("drawn")) == 4
    assert palate("export", "out", format="diffusers", output="lora")[0] == 0
    assert palate("export", "out", format="pipeline", output="whole")[0] == 0
    assert "transformer.transformer_blocks" in next(iter(load_file("lora/pytorch_lora_weights.safetensors")))
    assert "proj_out.weight" in load_file("whole/transformer/diffusion_pytorch_model.safetensors")


def test_all_weights_are_trained_and_a_lora_made_of_them(palate, folder):
    model = {"pretrained_model_name_or_path": folder, "train_method": "full", "objective.name": "sft"}
    assert palate("train", **model)[0] == 0
    assert Path("out/transformer/config.json").is_file()
    assert not Path("out/unet").exists()
    card = Path("out/README.md").read_text()
    assert "all weights of the transformer" in card
    assert 'transformer = SD3Transformer2DModel.from_pretrained("path/to/this/folder", subfolder="transformer"' in card
    code, _, errors = palate("export", "out", format="merged-unet", output="merged")
    assert code == 0, errors
    assert Path("merged/diffusion_pytorch_model.safetensors").is_file()
    assert palate("export", "out", format="lora-from-full", output="lora", rank=2)[0] == 0
    assert [path.name for path in Path("lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    code, _, errors = palate("train", **model)
    assert (code, "already holds a run" in errors) == (2, True)


def test_its_own_pictures_are_learned_from(palate, folder):
    code, _, errors = palate(
        "train",
        pretrained_model_name_or_path=folder,
        train_data=None,
        train_prompts="animals",
        rewards="jpeg_compressibility",
        **{"objective.name": "ddpo_is"},
        samples_per_round=4,
        sample_batch_size=4,
        train_batch_size=2,
        sample_num_steps=2,
        max_train_steps=1,
    )
    assert code == 0, errors
    assert Path("out/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "{name: perceptual}"}, "a family without a perceptual space"),
        ({"refiner": "{refiner}"}, "a refiner finishes pictures of an SDXL model"),
    ],
)
def test_what_it_has_not_is_told(palate, folder, refiner_dir, options, message):
    given = {name: value.replace("{refiner}", str(refiner_dir)) for name, value in options.items()}
    code, _, errors = palate("train", pretrained_model_name_or_path=folder, **given)
    assert (code, message in errors, errors.count("\n")) == (2, True, 1), errors
    assert not Path("out").exists()
