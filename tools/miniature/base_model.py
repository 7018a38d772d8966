"""Builder of the miniature Stable Diffusion: tokenizer, autoencoder, text encoder and U-Net, from the renderer alone.

A training that was stopped continues at its last checkpoint with the batches it would have seen, because every batch is a
function of (seed, step).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palate.base.files import write_atomically
from palate.miniature.captions import caption
from tools.miniature import scenes

SEED = 20_240_617
VAE_STEPS, VAE_BATCH = 3200, 16
UNET_STEPS, UNET_BATCH = 5600, 32
SHOTS = 24_000
CONTEXT = 48
WIDTH = 128


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def pixels(shots: list[scenes.Shot]) -> Tensor:
    """Pictures as a uint8 tensor ``(n, 3, 64, 64)``."""
    return torch.from_numpy(np.stack([np.asarray(s.image) for s in shots])).permute(0, 3, 1, 2).contiguous()


def shots(seed: int, count: int, **shares: float) -> Iterator[scenes.Shot]:
    """``count`` pictures of random scenes; the i-th depends on (seed, i) alone."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        yield scenes.shoot(scenes.random_scene(rng), rng, **shares)


def picture_set(work: Path, name: str, seed: int, count: int, **shares: float) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Render a set once and keep it: pictures, captions, labels of what is shown ``(n, 7)``, appeal ``(n,)``."""
    path = work / f"{name}.pt"
    if not path.exists():
        say(f"rendering {count} pictures for {name}")
        taken = list(shots(seed, count, **shares))
        captions = [caption(s.asked, np.random.default_rng([seed, i, 1])) for i, s in enumerate(taken)]
        record = {
            "pixels": pixels(taken),
            "captions": captions,
            "labels": torch.tensor([s.shown.labels() for s in taken]),
            "appeal": torch.tensor([s.appeal for s in taken], dtype=torch.float32),
        }
        write_atomically(path, partial(torch.save, record))
    record = torch.load(path, weights_only=True)
    return record["pixels"], record["captions"], record["labels"], record["appeal"]


def train(
    work: Path,
    name: str,
    modules: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    ema: float = 0.0,
    warmup: int = 100,
) -> None:
    """Train ``modules`` in place with AdamW under a cosine schedule; resumes from ``work/name.pt``.

    ``loss_of`` gets a generator that depends on (seed, step) alone. With ``ema`` the averaged weights are left in place.
    """
    path = work / f"{name}.pt"
    optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    average = {k: v.detach().clone() for k, v in modules.state_dict().items()} if ema else {}
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]
        say(f"{name}: continuing at step {start}")
    modules.train()
    begun, running = time.time(), 0.0
    for step in range(start, steps):
        rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = loss_of(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            for key, value in modules.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - decay)
        running = float(loss.detach()) if step == start else 0.98 * running + 0.02 * float(loss.detach())
        done = step + 1
        if done % 100 == 0 or done == steps:
            pace = (time.time() - begun) / (done - start)
            say(f"{name}: step {done}/{steps} loss {running:.4f} {pace:.3f} s/step, {pace * (steps - done) / 60:.0f} min left")
        if done % 400 == 0 or done == steps:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": done}
            write_atomically(path, partial(torch.save, state))
    if ema:
        modules.load_state_dict(average)
    modules.eval()


# Text ------------------------------------------------------------------------------------------------------------------


def build_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer (byte-level BPE, end-of-word suffix) whose merges come from the captions of the world."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    rng = np.random.default_rng(SEED)
    corpus = [caption(scenes.random_scene(rng), rng) for _ in range(4000)]
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pre_tokenizers_regex(), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    model.train_from_iterator(corpus, trainer)
    merges = [" ".join(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    symbols = sorted(alphabet)
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *("".join(m.split(" ")) for m in merges)]
    vocabulary = [*list(dict.fromkeys(vocabulary)), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")

    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)


def pre_tokenizers_regex():
    from tokenizers import Regex

    return Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")


# Pictures to latents -----------------------------------------------------------------------------------------------------


def new_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
        scaling_factor=1.0,
    )


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def build_vae(work: Path, folder: Path) -> None:
    """Train the autoencoder on L1 of pixels and of their differences (sharp edges), with a faint KL term."""
    torch.manual_seed(SEED)
    vae = new_vae()
    images, *_ = picture_set(work, "shots", SEED, SHOTS)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (VAE_BATCH,), generator=generator)
        x = images[rows].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            y = vae.decode(z).sample
        y, mean, logvar = y.float(), posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        edge = sum(F.l1_loss(a, b) for a, b in zip(_edges(y), _edges(x), strict=True))
        return F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + 0.5 * edge + 1e-4 * kl

    train(work, "vae", vae, loss_of, steps=VAE_STEPS, learning_rate=1.5e-3, seed=SEED, ema=0.998)
    with torch.no_grad():
        x = images[:512].float() / 127.5 - 1
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
        back = torch.cat([vae.decode(part).sample for part in latents.split(64)])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    say(f"vae: mean absolute error {float((back - x).abs().mean()) * 127.5:.2f} grey levels")
    vae.half().save_pretrained(folder)


# Words and noise to latents ------------------------------------------------------------------------------------------------


def new_text_encoder(vocab_size: int):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def new_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def latents_of(work: Path, vae, images: Tensor) -> Tensor:
    """Scaled latents ``(n, 4, 16, 16)`` of pictures, encoded once."""
    path = work / "latents.pt"
    if not path.exists():
        say(f"encoding {len(images)} pictures")
        with torch.no_grad():
            parts = [vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in images.split(128)]
        write_atomically(path, partial(torch.save, torch.cat(parts) * vae.config.scaling_factor))
    return torch.load(path, weights_only=True)


def noise_loss(predict: Callable[[Tensor], Tensor], scheduler, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean error of the predicted noise with min-SNR-5 weights (arXiv 2303.09556).

    Args:
        predict: of noisy latents at the times ``t`` ``(b,)``.
        scheduler: whose ``add_noise`` makes them.
        x0: latents ``(b, c, h, w)``, as ``noise``.
    """
    snr = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod))[t]
    errors = (predict(scheduler.add_noise(x0, noise, t)).float() - noise).square().mean(dim=(1, 2, 3))
    return (errors * (snr.clamp(max=5) / snr)).mean()


def build_diffusion(work: Path, folder: Path) -> None:
    """Train U-Net and text encoder together: noise prediction with min-SNR-5 weights and one caption in ten left out."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval()
    images, captions, *_ = picture_set(work, "shots", SEED, SHOTS)
    latents = latents_of(work, vae, images)
    torch.manual_seed(SEED + 1)
    unet, text_encoder, scheduler = new_unet(), new_text_encoder(len(tokenizer)), new_scheduler()
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids[0]

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (UNET_BATCH,), generator=generator)
        x0, ids = latents[rows], tokens[rows].clone()
        ids[torch.rand(UNET_BATCH, generator=generator) < 0.1] = empty
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (UNET_BATCH,), generator=generator)
        return noise_loss(lambda xt: unet(xt, t, text_encoder(ids).last_hidden_state).sample, scheduler, x0, noise, t)

    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    train(work, "unet", both, loss_of, steps=UNET_STEPS, learning_rate=6e-4, seed=SEED + 1, ema=0.9985, warmup=200)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    # transformers loads in the stored precision, diffusers in float32: a half text encoder would not fit beside the rest.
    text_encoder.float().save_pretrained(folder / "text_encoder")
    say(f"wrote {folder}")
