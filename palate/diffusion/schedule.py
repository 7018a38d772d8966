"""Discrete variance-preserving noise schedules: the algebra of times, noise levels and prediction types, in one place.

Letters: abar_t is the cumulative product of alpha_s = 1 - beta_s for s <= t (DDPM, arXiv 2006.11239, eq. 4),
alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t), xt = alpha x0 + sigma noise, and v = alpha noise - sigma x0 (arXiv
2202.00512, appendix D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from palate.base.errors import UserError, nearest

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# A number of each item, shaped to broadcast over its elements.
Coefficient = Float64[Tensor, " b *ones"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise schedule of a model and what the model predicts.

    alphas_cumprod: (T,) float64 on the CPU, abar of the times 0 .. T-1.
    prediction_type: "epsilon", "v_prediction" or "sample": what the model's output means.
    final_alpha_cumprod: abar of the time -1, the end of sampling.

    Coefficients are computed in float64 and applied in the dtype and on the device of xt. Times are (b,) integers.
    """

    alphas_cumprod: Float64[Tensor, " T"]
    prediction_type: str
    final_alpha_cumprod: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"prediction_type {self.prediction_type!r} is not supported{nearest(self.prediction_type, PREDICTION_TYPES)}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read a diffusers scheduler config: any class that is defined by betas (DDPM, DDIM, PNDM, Euler, DPM-Solver, ...).

        Only the forward process is read; the sampler's own options (spacing, order, sigmas of Karras) do not concern it.
        Zero terminal SNR: arXiv 2305.08891, algorithm 1. `set_alpha_to_one: false` makes abar_0 the final abar, as in DDIM.
        Raises UserError for flow matching, sigma-based and continuous-time schedulers and for unknown beta schedules.
        """
        name = str(config.get("_class_name", "this scheduler"))
        trained = config.get("trained_betas")
        kind = config.get("beta_schedule")
        # These four change what the betas or times mean: flow matching, shifted SNR and EDM-like continuous times.
        otherwise = [key for key in ("use_flow_sigmas", "snr_shift_scale") if config.get(key)]
        otherwise += ["timestep_type=continuous"] if config.get("timestep_type") == "continuous" else []
        if otherwise or (kind is None and trained is None):
            reason = f"it sets {', '.join(otherwise)}" if otherwise else "it has no beta_schedule"
            raise UserError(
                f"{name} is not supported: {reason}; use a model whose scheduler is of the DDPM, DDIM, PNDM or Euler kind, "
                f"with trained_betas or beta_schedule {', '.join(BETA_SCHEDULES)}"
            )
        T = int(config.get("num_train_timesteps", 1000))
        if trained is not None:
            betas = torch.tensor(list(trained), dtype=torch.float64)
        elif kind == "squaredcos_cap_v2":
            betas = _cosine_betas(T)
        elif kind in ("linear", "scaled_linear"):
            if "beta_start" not in config or "beta_end" not in config:
                raise UserError(f"{name}: beta_schedule {kind} needs beta_start and beta_end in the scheduler's config")
            power = 0.5 if kind == "scaled_linear" else 1.0
            start, end = float(config["beta_start"]) ** power, float(config["beta_end"]) ** power
            betas = torch.linspace(start, end, T, dtype=torch.float64) ** (1 / power)
        else:
            raise UserError(f"{name}: beta_schedule {kind!r} is not supported{nearest(str(kind), BETA_SCHEDULES)}")
        abar = torch.cumprod(1 - betas, dim=0)
        if config.get("rescale_betas_zero_snr"):
            alpha = abar.sqrt()
            abar = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
        final = 1.0 if config.get("set_alpha_to_one", True) else abar[0].item()
        return cls(abar, str(config.get("prediction_type", "epsilon")), final)

    @property
    def num_train_timesteps(self) -> int:
        """T: times run from 0 to T - 1."""
        return self.alphas_cumprod.shape[0]

    def alpha_sigma(
        self, t: Int[Tensor, " b"], like: Float[Tensor, " b *d"]
    ) -> tuple[Float[Tensor, " b *_"], Float[Tensor, " b *_"]]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (b, 1, ..., 1) with as many axes as `like`, in its dtype, on its device."""
        abar = self._abar(t, like)
        return abar.sqrt().to(like), (1 - abar).sqrt().to(like)

    def add_noise(
        self, x0: Float[Tensor, " b *d"], noise: Float[Tensor, " b *d"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, " b *d"]:
        """xt = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (DDPM, arXiv 2006.11239, eq. 4)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Float[Tensor, " b *d"], noise: Float[Tensor, " b *d"], t: Int[Tensor, " b"]) -> Float[Tensor, " b *d"]:
        """What a perfect model outputs: the noise, v, or x0, as prediction_type says."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * noise - sigma * x0

    def to_x0(self, output: Float[Tensor, " b *d"], xt: Float[Tensor, " b *d"], t: Int[Tensor, " b"]) -> Float[Tensor, " b *d"]:
        """The x0 that a model's output implies. Not finite for epsilon where abar_t = 0: there xt says nothing about x0."""
        (a, b), _ = self._x0_noise(self._abar(t, xt))
        return _combine(a, xt, b, output)

    def to_noise(
        self, output: Float[Tensor, " b *d"], xt: Float[Tensor, " b *d"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, " b *d"]:
        """The noise that a model's output implies; defined at every time, zero terminal SNR included."""
        _, (a, b) = self._x0_noise(self._abar(t, xt))
        return _combine(a, xt, b, output)

    def to_v(self, output: Float[Tensor, " b *d"], xt: Float[Tensor, " b *d"], t: Int[Tensor, " b"]) -> Float[Tensor, " b *d"]:
        """The v = alpha noise - sigma x0 that a model's output implies. Not finite for epsilon where abar_t = 0."""
        if self.prediction_type == "v_prediction":
            return output
        abar = self._abar(t, xt)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        (x0_xt, x0_output), (noise_xt, noise_output) = self._x0_noise(abar)
        return _combine(alpha * noise_xt - sigma * x0_xt, xt, alpha * noise_output - sigma * x0_output, output)

    def step(
        self,
        output: Float[Tensor, " b *d"],
        xt: Float[Tensor, " b *d"],
        t: Int[Tensor, " b"],
        s: Int[Tensor, " b"],
        eta: float = 1.0,
    ) -> tuple[Float[Tensor, " b *d"], Float[Tensor, " b *_"]]:
        """Mean (b, ...) and standard deviation (b, 1, ..., 1) of the step from time t to the earlier time s; s = -1 is the end.

        DDIM, arXiv 2010.02502, eqs. 12 and 16: std = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s) and
        mean = sqrt(abar_s) x0 + sqrt(1 - abar_s - std^2) noise. eta = 1 from t to t - 1 is the posterior of DDPM (arXiv
        2006.11239, eqs. 6 and 7). At eta = 0 nothing is drawn and s may also be later than t: the x0 and the noise that the
        output implies, mixed anew. x0 is never clipped: latents have no range. Not finite for epsilon where abar_t = 0.
        """
        abar_t, abar_s = self._abar(t, xt), self._abar(s, xt)
        tiny = torch.finfo(torch.float64).tiny  # abar_s = 0 only if s is a last time of zero SNR, where the gap is 0 as well
        gap = (abar_s - abar_t).clamp(min=0) / abar_s.clamp(min=tiny)  # 1 - abar_t / abar_s
        variance = eta**2 * (1 - abar_s) / (1 - abar_t) * gap
        (x0_xt, x0_output), (noise_xt, noise_output) = self._x0_noise(abar_t)
        of_x0, of_noise = abar_s.sqrt(), (1 - abar_s - variance).clamp(min=0).sqrt()
        # One multiply and add per tensor: x0 itself, which is large at high noise, never appears in xt's dtype.
        mean = _combine(of_x0 * x0_xt + of_noise * noise_xt, xt, of_x0 * x0_output + of_noise * noise_output, output)
        return mean, variance.sqrt().to(xt)

    def snr(self, t: Int[Tensor, " b"]) -> Float64[Tensor, " b"]:
        """Signal-to-noise ratio abar_t / (1 - abar_t), (b,) float64, on the CPU."""
        abar = self.alphas_cumprod[t.cpu()]
        return abar / (1 - abar)

    def _abar(self, t: Tensor, like: Tensor) -> Coefficient:
        """abar of each time, -1 included, shaped to broadcast over `like`, float64; on the CPU where a device has none."""
        device = torch.device("cpu") if like.device.type == "mps" else like.device
        final = self.alphas_cumprod.new_tensor([self.final_alpha_cumprod])
        table = torch.cat([self.alphas_cumprod, final])  # the last entry, index -1
        # The table goes to the times, so that a GPU is not waited for.
        return table.to(device, non_blocking=True)[t.to(device)].view(-1, *[1] * (like.ndim - 1))

    def min_snr_weight(self, t: Int[Tensor, " b"], gamma: float) -> Float[Tensor, " b"]:
        """Weight of the error at a time, (b,) float32: Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556, sec. 3.4).

        min(snr, gamma) / snr for a model of the noise, / (snr + 1) for one of v, min(snr, gamma) for one of x0: in every case
        min(snr, gamma) times the error of x0.
        """
        snr = self.snr(t).double()
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1).float()  # 1 where snr is 0
        capped = snr.clamp(max=gamma)
        return (capped / (snr + 1) if self.prediction_type == "v_prediction" else capped).float()

    def _x0_noise(self, abar: Coefficient) -> tuple[tuple[Coefficient, Coefficient], tuple[Coefficient, Coefficient]]:
        """x0 = a xt + b output and noise = c xt + d output: ((a, b), (c, d)) for what the model predicts."""
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        zero, one = torch.zeros_like(abar), torch.ones_like(abar)
        if self.prediction_type == "epsilon":
            return (1 / alpha, -sigma / alpha), (zero, one)
        if self.prediction_type == "sample":
            return (zero, one), (1 / sigma, -alpha / sigma)
        return (alpha, -sigma), (sigma, alpha)


def _combine(a: Tensor, xt: Tensor, b: Tensor, output: Tensor) -> Tensor:
    """a xt + b output, in xt's dtype."""
    return a.to(xt) * xt + b.to(xt) * output.to(xt.dtype)


def _cosine_betas(T: int) -> Float64[Tensor, " T"]:
    """Squared-cosine schedule with betas capped at 0.999 (arXiv 2102.09672, eq. 17)."""

    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - abar((i + 1) / T) / abar(i / T), 0.999) for i in range(T)]
    return torch.tensor(betas, dtype=torch.float64)
