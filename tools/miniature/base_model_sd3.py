"""Builder of the miniature Stable Diffusion 3, from the parts of the miniature Stable Diffusion and of the miniature CLIP.

Only the transformer is trained, from random weights. There is no T5 encoder: in its place the pipeline puts zeros.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from palate.models.sd3 import T5_LENGTH
from tools.miniature.base_model import SEED, SHOTS, latents_of, picture_set, train
from tools.miniature.base_model_xl import first_text_encoder, second_text_encoder, two_tokenizers, write_pipeline

STEPS, BATCH = 4400, 32
WIDTH, LAYERS, HEAD = 160, 6, 32


class MergedZeros:
    """Attention of picture and text whose last text token stands for ``count`` equal ones.

    Tokens of text have no position, so equal ones stay equal through all layers, and attention to n of them is attention to
    one whose logit is log n higher. Outputs and gradients are those of the whole sequence, at a third of its cost.
    """

    def __init__(self, count: int):
        self.extra = math.log(count)

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: object, **__: object):
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        picture, text = hidden_states, encoder_hidden_states
        q = torch.cat([attn.norm_q(heads(attn.to_q(picture))), attn.norm_added_q(heads(attn.add_q_proj(text)))], dim=2)
        k = torch.cat([attn.norm_k(heads(attn.to_k(picture))), attn.norm_added_k(heads(attn.add_k_proj(text)))], dim=2)
        v = torch.cat([heads(attn.to_v(picture)), heads(attn.add_v_proj(text))], dim=2)
        bias = q.new_zeros(k.shape[2])
        bias[-1] = self.extra
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(q.shape[0], 1, q.shape[2], -1))
        picture, text = mixed.transpose(1, 2).flatten(2).split([picture.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](picture), text if attn.context_pre_only else attn.to_add_out(text)


def first_with_projection(folder: Path):
    """mini-sd's text encoder as SDXL reads it; its pooled embedding is its end-of-text token as it is."""
    from transformers import CLIPTextModelWithProjection

    plain = first_text_encoder(folder)
    config = plain.config
    config.projection_dim = config.hidden_size
    encoder = CLIPTextModelWithProjection(config)
    # The two classes name the same tower with and without a prefix.
    state = {name.removeprefix("text_model."): tensor for name, tensor in plain.state_dict().items()}
    encoder.text_model.load_state_dict(state)
    torch.nn.init.eye_(encoder.text_projection.weight)
    return encoder.eval().requires_grad_(False)


def new_transformer(text_width: int):
    """An ``SD3Transformer2DModel`` of 3.5's kind: 64 tokens a picture, normalised queries and keys."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=WIDTH // HEAD,
        joint_attention_dim=text_width,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=text_width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


@torch.no_grad()
def encoded(encoders: tuple, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of all captions the encodings ``(n, length, d)``, without T5's, and the pooled ones ``(n, d)``."""
    texts, pools = [], []
    for ids in zip(*(t.split(256) for t in tokens), strict=True):
        found = [encoder(of, output_hidden_states=True) for encoder, of in zip(encoders, ids, strict=True)]
        texts.append(torch.cat([f.hidden_states[-2] for f in found], dim=-1))
        pools.append(torch.cat([f.text_embeds for f in found], dim=-1))
    return torch.cat(texts), torch.cat(pools)


def build_diffusion_sd3(work: Path, sd: Path, clip: Path, folder: Path) -> None:
    """Train the transformer: velocities at logit-normal times (arXiv 2403.03206), one caption in ten left out."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizers = two_tokenizers(sd)
    vae = AutoencoderKL.from_pretrained(sd / "vae", dtype=torch.float32).eval()
    images, captions, *_ = picture_set(work, "shots", SEED, SHOTS)
    latents = latents_of(work, vae, images)
    del images
    encoders = first_with_projection(sd / "text_encoder"), second_text_encoder(clip)
    tokens = [t([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids for t in tokenizers]
    texts, pools = encoded(encoders, tokens)
    torch.manual_seed(SEED + 8)
    transformer = new_transformer(sum(e.config.hidden_size for e in encoders))
    whole = transformer.attn_processors
    transformer.set_attn_processor(MergedZeros(T5_LENGTH))

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        x0, noise = latents[rows], torch.randn(BATCH, *latents.shape[1:], generator=generator)
        rows = rows.masked_fill(torch.rand(BATCH, generator=generator) < 0.1, len(captions))
        sigma = torch.sigmoid(torch.randn(BATCH, generator=generator))
        text, pooled = F.pad(texts[rows], (0, 0, 0, 1)), pools[rows]
        level = sigma.view(-1, 1, 1, 1)
        xt = (1 - level) * x0 + level * noise
        with torch.autocast("cpu", torch.bfloat16):
            output = transformer(xt, text, pooled, 1000 * sigma, return_dict=False)[0]
        return (output.float() - (noise - x0)).square().mean()

    train(work, "sd3", transformer, loss_of, steps=STEPS, learning_rate=1e-3, seed=SEED + 8, ema=0.9985, warmup=200)
    transformer.set_attn_processor(whole)
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=None,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=None,
    )
    write_pipeline(pipeline, folder, sd)
