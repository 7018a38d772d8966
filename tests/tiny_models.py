"""Parts of tiny models with random weights, and what they share."""

from __future__ import annotations

import numpy as np

from palate.miniature.captions import caption
from tools.miniature import scenes

LIMIT = 40  # tokens that the tiny text encoder reads
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_t5_tokenizer():
    """Of T5's kind, with words of our captions."""
    import tokenizers
    from transformers import T5TokenizerFast

    rng = np.random.default_rng(0)
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator([caption(scenes.random_scene(rng), rng) for _ in range(200)], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=made, extra_ids=0)


def tiny_vae(**options):
    """A quarter of the side of pictures, as many channels as the real ones."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        **options,
    )


def tiny_unet(**options):
    """Two blocks down and up."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **options)


def tiny_text(tokenizer, width: int, **options):
    """Configuration of a text encoder with two layers."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
