"""Builder of the miniature Stable Diffusion XL, from the parts of the miniature Stable Diffusion and of the miniature CLIP.

Only the U-Net is trained: it begins as mini-sd's, with new inputs (the second text encoder, the pooled embedding, size and
crop) that count for nothing at first.
"""

from __future__ import annotations

import copy
import functools
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from palate.base.files import write_atomically
from tools.miniature import scenes
from tools.miniature.base_model import SEED, SHOTS, UNET_BATCH, noise_loss, picture_set, say, train

UNET_STEPS = 1200
TIME_ID_WIDTH = 32
"""Numbers into which each size or crop is embedded."""


def treat(picture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """A picture as a data set might hold it, uint8 ``(64, 64, 3)``, and its truthful size and crop.

    Half are left as they are; a quarter come from a smaller original; a quarter are cropped out of a larger resize. The six
    numbers are SDXL's (arXiv 2307.01952, section 2.2): original height and width, crop top and left, target height and width.
    """
    size, chance = scenes.SIZE, rng.uniform()
    original, top, left = size, 0, 0
    if chance < 0.25:
        original = int(rng.integers(20, size))
        image = Image.fromarray(picture).resize((original, original), Image.Resampling.BOX)
        picture = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
    elif chance < 0.5:
        side = int(rng.integers(size + 4, size + 25))
        top, left = (int(rng.integers(0, side - size + 1)) for _ in range(2))
        image = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
        picture = np.asarray(image)[top : top + size, left : left + size]
    return picture, [original, original, top, left, size, size]


def treated_latents(work: Path, vae, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled latents ``(n, 4, 16, 16)`` of treated pictures and their sizes and crops ``(n, 6)``, encoded once."""
    path = work / "latents-xl.pt"
    if not path.exists():
        say(f"treating and encoding {len(images)} pictures")
        latents, ids = [], []
        for start in range(0, len(images), 128):
            part = images[start : start + 128].permute(0, 2, 3, 1).numpy()
            done = [treat(p, np.random.default_rng([SEED + 6, start + i])) for i, p in enumerate(part)]
            x = torch.from_numpy(np.stack([p for p, _ in done])).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.no_grad():
                latents.append(vae.encode(x).latent_dist.mean * vae.config.scaling_factor)
            ids += [numbers for _, numbers in done]
        write_atomically(path, functools.partial(torch.save, {"latents": torch.cat(latents), "ids": torch.tensor(ids)}))
    record = torch.load(path, weights_only=True)
    return record["latents"], record["ids"]


def first_text_encoder(folder: Path):
    """mini-sd's text encoder with its last layer twice: SDXL reads the output of the last but one."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
    layers = encoder.encoder.layers
    layers.append(copy.deepcopy(layers[-1]))
    encoder.config.num_hidden_layers = len(layers)
    return encoder.eval().requires_grad_(False)


def second_text_encoder(folder: Path):
    """mini-clip's text tower with its projection: the pooled embedding."""
    from transformers import CLIPModel, CLIPTextModelWithProjection

    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def new_unet(folder: Path, first, second, ids: Tensor):
    """mini-sd's U-Net with SDXL's conditions; it predicts what mini-sd predicts, as nearly as a linear map allows.

    mini-sd attends to the normalised output of its last text layer and SDXL to the raw one: a least-squares map between the
    two, over the tokens ``ids (n, length)``, goes into the keys and values. All other new weights give zero.
    """
    from diffusers import UNet2DConditionModel

    source = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32)
    widths = first.config.hidden_size, second.config.hidden_size
    unet = UNet2DConditionModel.from_config(
        {
            **source.config,
            "cross_attention_dim": sum(widths),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_ID_WIDTH,
            "projection_class_embeddings_input_dim": 6 * TIME_ID_WIDTH + second.config.projection_dim,
        }
    )
    raw = first(ids, output_hidden_states=True).hidden_states[-2]
    normed = first.final_layer_norm(raw)
    to_normed = torch.linalg.lstsq(raw.flatten(0, 1), normed.flatten(0, 1)).solution
    left = (raw @ to_normed - normed).square().mean() / normed.var()
    say(f"the map of text encodings leaves {100 * float(left):.1f} % of the variance unexplained")
    state, given = unet.state_dict(), source.state_dict()
    for name, tensor in state.items():
        if name in given:
            old = given[name]
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
                tensor.zero_()
                tensor[:, : widths[0]] = old @ to_normed.T
            else:
                tensor.copy_(old.view_as(tensor))  # 1 x 1 convolutions have become linear layers
    unet.load_state_dict(state)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.weight)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.bias)
    return unet


def new_scheduler():
    """As in SDXL's base model."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        interpolation_type="linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def two_tokenizers(sd: Path):
    """mini-sd's for both text encoders; the second pads with ``!``, as in SDXL and SD3."""
    from transformers import CLIPTokenizer

    return tuple(CLIPTokenizer.from_pretrained(sd / "tokenizer", **padding) for padding in ({}, {"pad_token": "!"}))


def write_pipeline(pipeline, folder: Path, sd: Path) -> None:
    """Write a pipeline with mini-sd's tokenizer twice and two text encoders."""
    encoders = {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    pipeline.to(torch.float16).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):  # what is read instead of tokenizer.json by older libraries
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(sd / "tokenizer" / file, folder / name / file)
    # transformers loads in the stored precision, diffusers in float32: half text encoders would not fit beside the rest.
    for name, encoder in encoders.items():
        encoder.float().save_pretrained(folder / name)
    say(f"wrote {folder}")


def build_diffusion_xl(work: Path, sd: Path, clip: Path, folder: Path) -> None:
    """Train the U-Net: noise prediction with min-SNR-5 weights; for one caption in ten zeros, as SDXL's pipeline has them."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    tokenizers = two_tokenizers(sd)
    vae = AutoencoderKL.from_pretrained(sd / "vae", dtype=torch.float32).eval()
    images, captions, *_ = picture_set(work, "shots", SEED, SHOTS)
    latents, time_ids = treated_latents(work, vae, images)
    del images
    first, second = first_text_encoder(sd / "text_encoder"), second_text_encoder(clip)
    tokens = [t(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids for t in tokenizers]
    torch.manual_seed(SEED + 6)
    unet, scheduler = new_unet(sd / "unet", first, second, tokens[0][:512]), new_scheduler()

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (UNET_BATCH,), generator=generator)
        kept = (torch.rand(UNET_BATCH, generator=generator) >= 0.1).float()
        noise = torch.randn(UNET_BATCH, *latents.shape[1:], generator=generator)
        # High noise twice as often as on average: there the layout is decided, and mini-sd knows the rest.
        t = torch.randint(1000, (2, UNET_BATCH), generator=generator).amax(0)
        with torch.no_grad():
            one = first(tokens[0][rows], output_hidden_states=True).hidden_states[-2]
            two = second(tokens[1][rows], output_hidden_states=True)
        text = torch.cat([one, two.hidden_states[-2]], dim=-1) * kept.view(-1, 1, 1)
        added = {"text_embeds": two.text_embeds * kept.view(-1, 1), "time_ids": time_ids[rows]}

        def predict(xt: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return unet(xt, t, text, added_cond_kwargs=added).sample

        return noise_loss(predict, scheduler, latents[rows], noise, t)

    train(work, "unet-xl", unet, loss_of, steps=UNET_STEPS, learning_rate=3e-4, seed=SEED + 6, ema=0.998)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    write_pipeline(pipeline, folder, sd)
