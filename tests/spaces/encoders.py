"""Small encoders that stand for the encoder half of a U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from palate.diffusion.denoising import Conditioning, Noised, draw
from palate.diffusion.schedule import Schedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


class Encoder(nn.Module):
    """Three layers of falling resolution, conditioned on time and on a vector; smooth; frozen."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(4, 6, 3, padding=1)
            self.second = nn.Conv2d(6, 8, 3, padding=1, stride=2)
            self.third = nn.Conv2d(8, 10, 3, padding=1, stride=2)
        self.to(dtype).requires_grad_(False)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, layers: str) -> list[Tensor]:
        self.seen.append((x, t))
        shift = cond.tensors["shift"].to(x.dtype) + t.to(x.dtype)[:, None] / 1000
        a = self.first(x)
        b = self.second(torch.tanh(a) + shift[:, :, None, None])
        c = self.third(torch.tanh(b))
        return {"last_down": [b], "mid": [c], "all": [a, b, c]}[layers]


def batch(
    schedule: Schedule, b: int = 4, *, size: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0, **times: int
) -> Noised:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(b, 4, size, size, generator=generator, dtype=dtype)
    cond = Conditioning({"shift": torch.randn(b // 2, 1, generator=generator)}).repeat(2)
    return draw(schedule, x0, cond, torch.arange(seed, seed + b // 2), shared=2, **({"t_min": 1} | times))


def output_near(noised: Noised, rms: float, seed: int = 5) -> Tensor:
    """The target with Gaussian error of the given size."""
    error = torch.randn(noised.target.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noised.target + (rms * error).to(noised.target.dtype)
