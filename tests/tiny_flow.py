"""Pipeline folders of rectified-flow models, each the real architecture at a tiny random size, made without a network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tiny_models import LIMIT, tiny_t5_tokenizer, tiny_text, tiny_vae

from palate.miniature.captions import caption
from tools.miniature import scenes

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3's, for a single user's turn."""


def captions() -> list[str]:
    rng = np.random.default_rng(3)
    return [caption(scenes.random_scene(rng), rng) for _ in range(200)]


def qwen_tokenizer(folder: Path):
    """Byte-level BPE of captions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        captions(), trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    folder.mkdir(parents=True)
    words.model.save(str(folder))
    return Qwen2Tokenizer.from_pretrained(
        str(folder), extra_special_tokens=special[1:], pad_token=special[0], model_max_length=1024, chat_template=CHAT
    )


def qwen_config(tokenizer, layers: int):
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def restless(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights where an architecture begins at zero, so that all depends on all."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    return module


def plain_vae():
    """Scale and shift of FLUX.1's."""
    return tiny_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def zimage(folder: Path, *, shift: float = 6.0) -> Path:
    """A ``ZImagePipeline``: 4-channel latents, two layers and a refiner of one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    tokenizer = qwen_tokenizer(folder.with_name(f"{folder.name}-words"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = restless(
            ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=16,
                axes_dims=[8, 4, 4],
                axes_lens=[1024, 32, 32],
            )
        )
        parts = {"vae": plain_vae(), "text_encoder": Qwen3Model(qwen_config(tokenizer, 3))}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ZImagePipeline(transformer=transformer, tokenizer=tokenizer, scheduler=scheduler, **parts).save_pretrained(folder)
    return folder


def klein(folder: Path, *, is_distilled: bool = False) -> Path:
    """A ``Flux2KleinPipeline``: latents of 16 channels after the 2 x 2 patches, one joint and two single blocks."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    tokenizer = qwen_tokenizer(folder.with_name(f"{folder.name}-words"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=64,
        )
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.5, 2.0)
        # Layers 9, 18 and 27 are read, as of the real encoder.
        parts = {"vae": vae, "text_encoder": Qwen3ForCausalLM(qwen_config(tokenizer, 28))}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    Flux2KleinPipeline(
        transformer=restless(transformer), tokenizer=tokenizer, scheduler=scheduler, is_distilled=is_distilled, **parts
    ).save_pretrained(folder)
    return folder


def flux(folder: Path, clip: Path, *, guidance_embeds: bool = True) -> Path:
    """A ``FluxPipeline``: one joint and two single blocks. clip: the folder of a CLIP tokenizer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    words, pieces = CLIPTokenizer.from_pretrained(clip, model_max_length=LIMIT), tiny_t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        )
        t5 = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        parts = {"vae": plain_vae(), "text_encoder": CLIPTextModel(tiny_text(words, 16)), "text_encoder_2": T5EncoderModel(t5)}
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    FluxPipeline(
        transformer=restless(transformer),
        tokenizer=words,
        tokenizer_2=pieces,
        scheduler=FlowMatchEulerDiscreteScheduler(**dynamic),
        **parts,
    ).save_pretrained(folder)
    return folder


def with_index(folder: Path, **entries: object) -> Path:
    """Entries of ``model_index.json`` changed."""
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))
    return folder
