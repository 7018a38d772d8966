"""What a training step costs, in processor time relative to the bare passes, for networks of real proportions.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py sd15 --repeats 7
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py sdxl --repeats 7
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py sd3 --repeats 7
    OMP_NUM_THREADS=1 python benchmarks/step_cost.py sd15-full --repeats 2

Network, VAE and text encoders have the blocks of Stable Diffusion 1.5, SDXL or 3-medium (its CLIP encoders; T5 is left out) at
a fifth of the width, random weights, and smaller latents, so that attention is about as much of the whole. All cases are
interleaved in one process, so a slow moment of the machine hits all; of each the median ratio to the bare passes of the same
turn is told. "bare" is the reference's forward pass, the policy's forward and backward pass and the optimizer, without data,
draws, metrics and log; "scripts" is the order of work of diffusers' DPO scripts: pictures and prompts encoded in every step,
adapters switched off for the reference. "sd15-full" is Stable Diffusion 1.5 at its own width, at 512 pixels: minutes a case;
compiled ones and those of another memory format are left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from architectures import NETWORKS
from torch import Tensor, nn

from palate.data.cache import TensorCache
from palate.diffusion.batches import PairBatch
from palate.diffusion.denoising import Conditioning
from palate.diffusion.schedule import from_config
from palate.models.policy import Policy
from palate.models.sd import StableDiffusion
from palate.models.sd3 import T5_LENGTH, StableDiffusion3
from palate.models.sdxl import StableDiffusionXL
from palate.objectives import pairs
from palate.spaces import latent, perceptual
from palate.spaces.space import Space
from palate.training.references import References
from palate.training.steps import pair_step

FULL = "sd15-full"
FAMILIES = {FULL: StableDiffusion, "sd15": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    FULL: NETWORKS["SD 1.5"].config,
    "sd15": {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 152, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (64, 128, 256),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 152 + 256,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 256 + 6 * 256,
    },
    "sd3": {
        "num_layers": 24,
        "num_attention_heads": 5,
        "attention_head_dim": 64,
        "caption_projection_dim": 320,
        "joint_attention_dim": 816,
        "pooled_projection_dim": 152 + 256,
        "pos_embed_max_size": 96,
    },
}
SIDES = {FULL: 64, "sd15": 32, "sdxl": 40, "sd3": 40}
CHANNELS = {FULL: 4, "sd15": 4, "sdxl": 4, "sd3": 16}
BOTH = ((152, 608, 12, 8), (256, 1024, 32, 4))
ENCODERS = {FULL: ((768, 3072, 12, 12),), "sd15": BOTH[:1], "sdxl": BOTH, "sd3": BOTH}
"""Width, inner width, layers and heads of the text encoders."""
TOKENS = 77


def model(kind: str) -> Any:
    """A denoiser with nothing but a network and a schedule."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    made = object.__new__(FAMILIES[kind])
    made.name, made.device, made.schedule = kind, torch.device("cpu"), from_config(FLOW if made.flow else SCHEDULE)
    made.network = (SD3Transformer2DModel if made.flow else UNet2DConditionModel)(
        **{"sample_size": SIDES[kind], **CONFIGS[kind]}
    )
    return made


def encoders(kind: str) -> tuple[nn.Module, list[nn.Module]]:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512) if kind == FULL else (24, 48, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=32 if kind == FULL else 8,
        latent_channels=CHANNELS[kind],
    )
    texts = [
        CLIPTextModel(
            CLIPTextConfig(hidden_size=w, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
        )
        for w, inner, layers, heads in ENCODERS[kind]
    ]
    return vae.requires_grad_(False), [text.requires_grad_(False) for text in texts]


class Bench:
    """One policy, one batch and all the ways to take a step with them."""

    def __init__(self, kind: str, p: int, folder: str) -> None:
        torch.manual_seed(0)
        self.kind, self.p, side = kind, p, SIDES[kind]
        self.policy = Policy(model(kind), rank=16)
        self.vae, self.texts = encoders(kind)
        self.pictures = torch.rand(2 * p, 3, 8 * side, 8 * side) * 2 - 1
        self.tokens = torch.randint(0, 49408, (p, TOKENS))
        cond = self.encoded()
        self.latents = torch.randn(2 * p, CHANNELS[kind], side, side)
        ones = torch.ones(p)
        self.batch = PairBatch(self.latents, cond.tensors, ones, ones, torch.arange(p))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6)
        self.dpo = partial(pairs.dpo, beta=5000.0)
        self.ncp = perceptual(self.policy.features, self.policy.schedule, layers="half" if kind == "sd3" else "last_down")
        self.folder = folder

    def encoded(self) -> Conditioning:
        hidden = torch.cat([text(self.tokens).last_hidden_state for text in self.texts], dim=-1)
        tensors = {"encoder_hidden_states": hidden.repeat(2, 1, 1)}
        if self.kind == "sdxl":
            size = 8 * SIDES[self.kind]
            framing = torch.tensor([size, size, 0, 0, size, size]).expand(2 * self.p, 6)
            tensors |= {"text_embeds": hidden[:, 0, -256:].repeat(2, 1), "framing": framing}
        if self.kind == "sd3":
            wide = F.pad(hidden, (0, CONFIGS["sd3"]["joint_attention_dim"] - hidden.shape[-1], 0, T5_LENGTH))
            tensors = {"encoder_hidden_states": wide.repeat(2, 1, 1), "pooled_projections": hidden[:, 0].repeat(2, 1)}
        return Conditioning(tensors)

    def updated(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()

    def bare(self, *, reference: bool = True) -> None:
        t, cond = torch.full((2 * self.p,), 500), Conditioning(self.batch.cond)
        if reference:
            self.policy.reference(self.latents, t, cond)
        self.updated(self.policy(self.latents, t, cond).square().mean())

    def scripts(self) -> None:
        with torch.no_grad():
            latents = self.vae.encode(self.pictures).latent_dist.sample() * 0.18215
            cond = self.encoded()
        network: Any = self.policy.denoiser.network
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        t = torch.randint(0, 1000, (self.p,)).repeat(2)
        xt = self.policy.schedule.add_noise(latents, noise, t)
        errors = (self.policy(xt, t, cond) - noise).square().mean((1, 2, 3))
        network.disable_adapters()
        with torch.no_grad():
            fixed = (self.policy(xt, t, cond) - noise).square().mean((1, 2, 3))
        network.enable_adapters()
        (w, l), (rw, rl) = errors.chunk(2), fixed.chunk(2)
        self.updated(-F.logsigmoid(-2500 * ((w - l) - (rw - rl))).mean())

    def ours(self, space: Space, *, kept: bool = False, targets: bool = False) -> Callable[[], None]:
        references = None
        if kept:
            # The space's name stands for its settings: one folder holds what all cases keep.
            about = {"space": type(space).__name__, "targets": targets}
            references = References(TensorCache(self.folder), about, targets=targets)
        step = pair_step(self.policy, space, self.dpo, references=references)
        if references is not None:
            step(self.batch)
            references.flush()  # the first epoch

        def run() -> None:
            self.updated(step(self.batch)[0].mean())

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(CONFIGS))
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.kind, given.pairs, folder)
        cases: dict[str, Callable[[], None]] = {
            "bare": bench.bare,
            "bare without reference": partial(bench.bare, reference=False),
            "scripts": bench.scripts,
            "DPO": bench.ours(latent()),
            "DPO, reference kept": bench.ours(latent(), kept=True),
            "NCP-DPO": bench.ours(bench.ncp),
            "NCP-DPO, reference kept": bench.ours(bench.ncp, kept=True),
            "NCP-DPO, reference and targets kept": bench.ours(bench.ncp, kept=True, targets=True),
        }
        if given.kind != FULL:
            cases |= changed(given.kind, given.pairs, folder)
        seconds = measured(cases, given.repeats)
    tell(given.kind, given.pairs, seconds)


def changed(kind: str, p: int, folder: str) -> dict[str, Callable[[], None]]:
    """Cases of another memory format, and compiled ones."""
    other, compiled = (Bench(kind, p, folder) for _ in range(2))
    compiled.policy.compile_blocks()
    for network in other.policy.modules:  # which share their weights
        network.to(memory_format=torch.channels_last)
    return {
        "DPO, channels last": other.ours(latent()),
        "DPO, compiled": compiled.ours(latent()),
        "NCP-DPO, compiled": compiled.ours(compiled.ncp),
    }


def measured(cases: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each case in each turn, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            began = time.process_time()
            case()
            if turn:
                seconds[name].append(time.process_time() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def tell(kind: str, p: int, seconds: dict[str, list[float]]) -> None:
    about = SimpleNamespace(torch=torch.__version__, turns=len(seconds["bare"]))
    print(f"{kind}: {p} pairs a step, one thread, torch {about.torch}, medians of {about.turns} turns")
    print("| case | processor s | of bare |\n| --- | ---: | ---: |")
    for name, taken in seconds.items():
        print(f"| {name} | {statistics.median(taken):.2f} | {ratio(seconds, name, 'bare'):.2f} |")
    for one, other in (
        ("scripts", "DPO"),
        ("DPO, channels last", "DPO"),
        ("DPO, compiled", "DPO"),
        ("NCP-DPO, compiled", "NCP-DPO"),
        ("scripts", "DPO, reference kept"),
        ("scripts", "bare without reference"),
        ("NCP-DPO", "DPO"),
        ("NCP-DPO, reference kept", "DPO"),
        ("NCP-DPO, reference and targets kept", "DPO"),
        ("NCP-DPO, reference and targets kept", "DPO, reference kept"),
    ):
        if one in seconds:
            print(f"{one} / {other}: {ratio(seconds, one, other):.2f}")


if __name__ == "__main__":
    main()
