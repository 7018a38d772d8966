"""Noise schedules: the algebra of times, noise levels and what a model predicts, in one place.

Letters: xt = alpha x0 + sigma noise, where alpha and sigma are the *marginals* of time t. A schedule is its marginals and its
times; all else follows from them and from one table of what a model's output means.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Num
from torch import Tensor

from palate.base.errors import UserError, nearest, short
from palate.base.seeds import integers, uniform

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MOST = 100_000
"""Of times, and of tokens a picture."""
SPACINGS = ("leading", "trailing", "linspace")

Coefficient = Float64[Tensor, " b *ones"]
"""A number of each item, shaped to broadcast over its elements."""
Linear = tuple[Coefficient, Coefficient]
"""(a, b), for a xt + b output."""
Times = Num[Tensor, " b"]
"""A time of each item, (b,): integers or float64, as the schedule has them."""


@dataclass(frozen=True)
class Prediction:
    """What a model's output means. Outputs are linear in x0 and noise, and both are linear in xt and the output."""

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(x0, noise, alpha, sigma) -> what a perfect model outputs."""
    inverse: Callable[[Coefficient, Coefficient], tuple[Linear, Linear]]
    """(alpha, sigma) -> ((a, b), (c, d)): x0 = a xt + b output and noise = c xt + d output."""


def _zero(like: Coefficient) -> Coefficient:
    return torch.zeros_like(like)


def _one(like: Coefficient) -> Coefficient:
    return torch.ones_like(like)


PREDICTIONS = {
    "epsilon": Prediction(
        lambda x0, noise, alpha, sigma: noise,
        lambda alpha, sigma: ((1 / alpha, -sigma / alpha), (_zero(alpha), _one(alpha))),
    ),
    "sample": Prediction(
        lambda x0, noise, alpha, sigma: x0,
        lambda alpha, sigma: ((_zero(alpha), _one(alpha)), (1 / sigma, -alpha / sigma)),
    ),
    # alpha^2 + sigma^2 = 1 (arXiv 2202.00512, appendix D).
    "v_prediction": Prediction(
        lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
        lambda alpha, sigma: ((alpha, -sigma), (sigma, alpha)),
    ),
    # The velocity of a straight path, alpha + sigma = 1 (arXiv 2209.03003, eq. 1).
    "flow": Prediction(
        lambda x0, noise, alpha, sigma: noise - x0,
        lambda alpha, sigma: ((_one(alpha), -sigma), (_one(alpha), alpha)),
    ),
}
"""Kind, as the configurations of diffusers name it -> what it means. ``flow`` is theirs without a name."""


@dataclass(frozen=True, eq=False)
class Path:
    """The times that sampling visits: step k goes from t[k] to s[k], and s[k] = t[k + 1]; the last s is the end."""

    t: Times
    s: Times

    def __len__(self) -> int:
        return len(self.t)

    def at(self, k: int, b: int, device: torch.device | str) -> tuple[Times, Times]:
        """Step k of b items: t and s, each (b,)."""
        return self.t[k].to(device).expand(b), self.s[k].to(device).expand(b)


class Schedule(ABC):
    """The noise schedule of a model and what the model predicts: a key of PREDICTIONS.

    Coefficients are computed in float64 and applied in the dtype and on the device of xt.
    """

    prediction_type: str

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int:
        """T: times are drawn from 0 to T - 1."""

    @abstractmethod
    def marginals(self, t: Times) -> tuple[Float64[Tensor, " b"], Float64[Tensor, " b"]]:
        """alpha and sigma of times, the end included, each (b,) float64 on the device of t."""

    @abstractmethod
    def uniform(self, seeds: Num[Tensor, " b"], low: int, high: int, stream: int, device: torch.device | str) -> Times:
        """A time of low .. high (inclusive) for each item, uniformly; row i depends on (seeds[i], stream) alone."""

    @abstractmethod
    def span(self, low: int, high: int) -> tuple[float, float]:
        """The part of the time axis, 0 (data) to 1 (noise), that the times low .. high take."""

    @abstractmethod
    def at_share(self, share: Float64[Tensor, " b"]) -> Times:
        """The times there on the axis, (b,)."""

    @abstractmethod
    def path(self, num_inference_steps: int, spacing: str | None = None, shape: Sequence[int] | None = None) -> Path:
        """The times of so many steps of sampling, for latents of a shape that ends in height and width.

        Raises UserError: too many, or a spacing that does not exist.
        """

    def alpha_sigma(self, t: Times, like: Float[Tensor, " b *d"]) -> tuple[Float[Tensor, " b *_"], Float[Tensor, " b *_"]]:
        """alpha and sigma, each (b, 1, ..., 1) with as many axes as `like`, in its dtype, on its device."""
        alpha, sigma = self.coefficients(t, like)
        return alpha.to(like), sigma.to(like)

    def coefficients(self, t: Times, like: Float[Tensor, " b *d"]) -> Linear:
        """As `alpha_sigma`, in float64; on the CPU where the device of `like` has none."""
        alpha, sigma = self.marginals(t.to("cpu" if like.device.type == "mps" else like.device))
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.view(shape), sigma.view(shape)

    def add_noise(self, x0: Float[Tensor, " b *d"], noise: Float[Tensor, " b *d"], t: Times) -> Float[Tensor, " b *d"]:
        """xt = alpha x0 + sigma noise."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Float[Tensor, " b *d"], noise: Float[Tensor, " b *d"], t: Times) -> Float[Tensor, " b *d"]:
        """What a perfect model outputs."""
        return PREDICTIONS[self.prediction_type].target(x0, noise, *self.alpha_sigma(t, x0))

    def inverse(self, t: Times, like: Float[Tensor, " b *d"]) -> tuple[Linear, Linear]:
        """x0 = a xt + b output and noise = c xt + d output: ((a, b), (c, d)) of each item."""
        return PREDICTIONS[self.prediction_type].inverse(*self.coefficients(t, like))

    def snr(self, t: Times) -> Float64[Tensor, " b"]:
        """Signal-to-noise ratio alpha^2 / sigma^2, (b,) float64, on the CPU."""
        alpha, sigma = self.marginals(t.cpu())
        return (alpha / sigma).square()

    def gain(self, t: Times) -> Float64[Tensor, " b"]:
        """|dx0 / doutput|, (b,) float64, on the CPU: sigma / alpha of the noise, 1 of x0, sigma of v and of flow."""
        (_, b), _ = PREDICTIONS[self.prediction_type].inverse(*self.marginals(t.cpu()))
        return b.abs()

    def min_snr_weight(self, t: Times, gamma: float) -> Float[Tensor, " b"]:
        """Weight of the error at a time, (b,) float32: Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556, sec. 3.4).

        min(snr, gamma) times the error of x0, whatever the model predicts: of an x0 = a xt + b output that error is b^2 times
        the output's. So min(snr, gamma) / snr for the noise (1 where snr is 0), / (snr + 1) for v, times sigma^2 for flow.
        """
        snr = self.snr(t)
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1).float()
        return (snr.clamp(max=gamma) * self.gain(t).square()).float()


def combine(of: Linear, xt: Float[Tensor, " b *d"], output: Float[Tensor, " b *d"]) -> Float[Tensor, " b *d"]:
    """a xt + b output, in xt's dtype."""
    a, b = of
    return a.to(xt) * xt + b.to(xt) * output.to(xt.dtype)


@dataclass(frozen=True, eq=False)
class VariancePreserving(Schedule):
    """The discrete schedule of DDPM (arXiv 2006.11239, eq. 4): alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t).

    alphas_cumprod: (T,) float64 on the CPU, abar of the times 0 .. T-1: the product of 1 - beta up to there.
    final_alpha_cumprod: abar of the time -1, the end of sampling.
    timestep_spacing, steps_offset: of the model's own sampler.

    Times are (b,) integers.
    """

    alphas_cumprod: Float64[Tensor, " T"]
    prediction_type: str
    final_alpha_cumprod: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        known = [kind for kind in PREDICTIONS if kind != "flow"]
        if self.prediction_type not in known:
            raise UserError(f"prediction_type {self.prediction_type!r} is not supported{nearest(self.prediction_type, known)}")
        if self.timestep_spacing not in SPACINGS:
            raise UserError(f"timestep_spacing is {self.timestep_spacing!r}{nearest(self.timestep_spacing, SPACINGS)}")

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    def marginals(self, t: Times) -> tuple[Float64[Tensor, " b"], Float64[Tensor, " b"]]:
        final = self.alphas_cumprod.new_tensor([self.final_alpha_cumprod])
        table = torch.cat([self.alphas_cumprod, final])  # the last entry, index -1
        # The table goes to the times, so that a GPU is not waited for.
        abar = table.to(t.device, non_blocking=True)[t]
        return abar.sqrt(), (1 - abar).sqrt()

    def uniform(self, seeds: Num[Tensor, " b"], low: int, high: int, stream: int, device: torch.device | str) -> Times:
        return integers(seeds, low, high, stream, device)

    def span(self, low: int, high: int) -> tuple[float, float]:
        """Each integer stands for the part of the axis from it to the next one."""
        return low / self.num_train_timesteps, (high + 1) / self.num_train_timesteps

    def at_share(self, share: Float64[Tensor, " b"]) -> Times:
        return (share * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def path(self, num_inference_steps: int, spacing: str | None = None, shape: Sequence[int] | None = None) -> Path:
        """Spaced as by the schedulers of diffusers (arXiv 2305.08891, table 2).

        A step ends where the next one begins; diffusers' DDIM subtracts T // steps instead, which is the same for leading
        spacing, and for trailing spacing where the number of steps divides T.
        """
        T, n, spacing = self.num_train_timesteps, num_inference_steps, spacing or self.timestep_spacing
        if spacing not in SPACINGS:
            raise UserError(f"timestep_spacing is {spacing!r}{nearest(spacing, SPACINGS)}")
        if not 1 <= n <= T:
            raise UserError(f"num_inference_steps is {n}; expected 1 to {T}, the times of this model")
        if spacing == "leading":
            t = [k * (T // n) + self.steps_offset for k in reversed(range(n))]
        elif spacing == "trailing":
            t = [round(T - k * T / n) - 1 for k in range(n)]
        else:
            t = [round(k * (T - 1) / max(1, n - 1)) for k in reversed(range(n))]
        if t[0] >= T:
            raise UserError(
                f"{n} steps with steps_offset {self.steps_offset} begin after the last time {T - 1}; use fewer steps"
            )
        return Path(torch.tensor(t), torch.tensor([*t[1:], -1]))


@dataclass(frozen=True)
class DynamicShift:
    """A shift that grows with the picture: mu is linear in the number of image tokens, as FLUX.1 has it.

    exponential: the shift is e^mu (arXiv 2403.03206, eq. 23, with mu its logarithm); else mu itself.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    exponential: bool = True

    def __call__(self, tokens: int, num_inference_steps: int) -> float:
        """The shift of a picture of so many tokens, however many steps are taken."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True, eq=False)
class RectifiedFlow(Schedule):
    """The straight path of rectified flow (arXiv 2209.03003; 2403.03206, sec. 2): alpha = 1 - sigma.

    shift: of the times of sampling, sigma' = shift sigma / (1 + (shift - 1) sigma) (arXiv 2403.03206, sec. 5.3.2); or a
    function of the number of image tokens and of steps that gives it.
    last: sigma at which the last step begins, before the shift; None: 1 / n of n steps.
    terminal: sigma at which the last step begins, after the shift: all are stretched to reach it.
    patch: side of an image token, in latents.

    Times are (b,) float64, t = 1000 sigma; the end is 0. Drawn times stop short of pure noise, where pictures that share their
    noise cannot be told apart.
    """

    shift: float | Callable[[int, int], float] = 1.0
    prediction_type: str = "flow"
    last: float | None = None
    terminal: float | None = None
    patch: int = 2

    @property
    def num_train_timesteps(self) -> int:
        return 1000

    def marginals(self, t: Times) -> tuple[Float64[Tensor, " b"], Float64[Tensor, " b"]]:
        sigma = t.double() / self.num_train_timesteps
        return 1 - sigma, sigma

    def uniform(self, seeds: Num[Tensor, " b"], low: int, high: int, stream: int, device: torch.device | str) -> Times:
        return low + (high - low) * uniform(seeds, stream, device)

    def span(self, low: int, high: int) -> tuple[float, float]:
        return low / self.num_train_timesteps, high / self.num_train_timesteps

    def at_share(self, share: Float64[Tensor, " b"]) -> Times:
        return share * self.num_train_timesteps

    def path(self, num_inference_steps: int, spacing: str | None = None, shape: Sequence[int] | None = None) -> Path:
        """Evenly spaced in sigma from 1 on, then shifted. Raises ValueError without a shape where the shift depends on it."""
        n, least = num_inference_steps, 1 if self.terminal is None else 2
        if n < least or spacing is not None:
            told = f"num_inference_steps is {n}" if spacing is None else f"timestep_spacing is {spacing!r}"
            steps = "one step" if least == 1 else "two steps"
            raise UserError(f"{told}; a model of rectified flow takes {steps} or more, and spaces them by its own shift")
        sigma = torch.linspace(1, 1 / n if self.last is None else self.last, n, dtype=torch.float64)
        sigma = shifted(sigma, self._shift(n, shape))
        if self.terminal is not None:
            sigma = 1 - (1 - sigma) * (1 - self.terminal) / (1 - sigma[-1])
        times = self.num_train_timesteps * sigma
        return Path(times, torch.cat([times[1:], times.new_zeros(1)]))

    def _shift(self, n: int, shape: Sequence[int] | None) -> float:
        if not callable(self.shift):
            return self.shift
        if shape is None:
            raise ValueError("the shift depends on the size of the picture: give the shape of its latents")
        height, width = (side // self.patch for side in shape[-2:])
        return self.shift(height * width, n)


def shifted(sigma: Float64[Tensor, " *n"], shift: float) -> Float64[Tensor, " *n"]:
    """Noise levels moved towards noise by a shift above 1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


FLOW = "FlowMatchEulerDiscreteScheduler"
"""Class in diffusers of the sampler of rectified flows."""


def from_config(config: Mapping[str, Any]) -> Schedule:
    """Read a diffusers scheduler config: any class that is defined by betas (DDPM, DDIM, Euler, ...), or FLOW.

    Only the forward process and the spacing of times are read; the sampler's other options (order, sigmas of Karras) do not
    concern it. Zero terminal SNR: arXiv 2305.08891, algorithm 1. `set_alpha_to_one: false` makes abar_0 the final abar, as in
    DDIM. Of FLOW the spacing is the one that it has by itself: a family whose pipeline gives it noise levels changes that.
    Raises UserError for other schedulers of flow matching, for sigma-based and continuous-time ones, unknown beta schedules,
    and options of FLOW that change its times.
    """
    name = str(config.get("_class_name", "this scheduler"))
    if name == FLOW:
        return _flow(config)
    trained = config.get("trained_betas")
    kind = config.get("beta_schedule")
    # These change what the betas or times mean: flow matching, shifted SNR and EDM-like continuous times.
    otherwise = [key for key in ("use_flow_sigmas", "snr_shift_scale") if config.get(key)]
    otherwise += ["timestep_type=continuous"] if config.get("timestep_type") == "continuous" else []
    if otherwise or (kind is None and trained is None):
        reason = f"it sets {', '.join(otherwise)}" if otherwise else "it has no beta_schedule"
        raise UserError(
            f"{name} is not supported: {reason}; use a model whose scheduler is of the DDPM, DDIM, PNDM or Euler kind, "
            f"with trained_betas or beta_schedule {', '.join(BETA_SCHEDULES)}, or a {FLOW}"
        )
    betas, prediction = _betas(name, config), str(config.get("prediction_type", "epsilon"))
    if not (betas.isfinite().all() and betas.min() > 0 and betas.max() < 1):
        raise UserError(
            f"{name}: its betas go from {betas.min():g} to {betas.max():g}; expected numbers between 0 and 1, such as 0.00085 "
            "to 0.012: mend scheduler/scheduler_config.json"
        )
    abar = torch.cumprod(1 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        if prediction == "epsilon":
            raise UserError(
                f"{name}: rescale_betas_zero_snr leaves nothing of the picture at the last time, where prediction_type epsilon "
                "tells nothing of it: set one of the two as the model was trained, such as v_prediction"
            )
        alpha = abar.sqrt()
        abar = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
    return VariancePreserving(
        abar,
        prediction,
        1.0 if config.get("set_alpha_to_one", True) else abar[0].item(),
        str(config.get("timestep_spacing", "leading")),
        int(_number(name, config, "steps_offset", 0, (0, len(abar) - 1), whole=True)),
    )


def _number(
    name: str,
    config: Mapping[str, Any],
    key: str,
    default: int | float,
    between: tuple[int | float, int | float],
    *,
    whole: bool = False,
) -> int | float:
    """A number of a scheduler's configuration. Raises UserError if it is none, or not ``between``, ends included."""
    value, (low, high) = config.get(key, default), between
    fine = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fine or (whole and value != int(value)):
        raise UserError(
            f"{name}: {key} is {short(value, 40)}; expected a {'whole ' if whole else ''}number from {low:g} to {high:g}: mend "
            "scheduler/scheduler_config.json"
        )
    return value


def _flow(config: Mapping[str, Any]) -> RectifiedFlow:
    """As `set_timesteps(n)` of FLOW spaces them: from 1 down to the least sigma of its table of T times."""
    otherwise = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
    told = [key for key in otherwise if config.get(key)]
    if (T := _times(FLOW, config)) != 1000:
        told.append(f"num_train_timesteps {T}")
    if (kind := config.get("time_shift_type", "exponential")) not in ("exponential", "linear"):
        told.append(f"time_shift_type {kind}")
    if told:
        raise UserError(f"{FLOW} with {', '.join(told)} is not supported: its times would be others; use one without")
    terminal = config.get("shift_terminal") or None
    if config.get("use_dynamic_shifting"):
        shift = DynamicShift(
            float(_number(FLOW, config, "base_shift", 0.5, (-10, 10))),
            float(_number(FLOW, config, "max_shift", 1.15, (-10, 10))),
            int(_number(FLOW, config, "base_image_seq_len", 256, (1, MOST), whole=True)),
            int(_number(FLOW, config, "max_image_seq_len", 4096, (1, MOST), whole=True)),
            kind == "exponential",
        )
        return RectifiedFlow(shift, last=1 / T, terminal=terminal)
    static = float(_number(FLOW, config, "shift", 1.0, (1e-3, 1e3)))
    # The table is shifted, and its end then begins a grid that is shifted again.
    least = shifted(torch.tensor(1 / T, dtype=torch.float64), static).item()
    return RectifiedFlow(static, last=least, terminal=terminal)


def _betas(name: str, config: Mapping[str, Any]) -> Float64[Tensor, " T"]:
    kind, T = config.get("beta_schedule"), _times(name, config)
    if (trained := config.get("trained_betas")) is not None:
        try:
            found = torch.tensor(list(trained), dtype=torch.float64)
        except (TypeError, ValueError):
            found = torch.zeros(0)
        if found.shape != (T,):
            raise UserError(f"{name}: trained_betas is {short(trained, 40)}; expected {T} numbers, as num_train_timesteps says")
        return found
    if kind == "squaredcos_cap_v2":
        return _cosine_betas(T)
    if kind not in ("linear", "scaled_linear"):
        raise UserError(f"{name}: beta_schedule {kind!r} is not supported{nearest(str(kind), BETA_SCHEDULES)}")
    if "beta_start" not in config or "beta_end" not in config:
        raise UserError(f"{name}: beta_schedule {kind} needs beta_start and beta_end in the scheduler's config")
    power = 0.5 if kind == "scaled_linear" else 1.0
    start, end = (float(_number(name, config, key, 0, (0, 1))) ** power for key in ("beta_start", "beta_end"))
    return torch.linspace(start, end, T, dtype=torch.float64) ** (1 / power)


def _times(name: str, config: Mapping[str, Any]) -> int:
    return int(_number(name, config, "num_train_timesteps", 1000, (2, MOST), whole=True))


def _cosine_betas(T: int) -> Float64[Tensor, " T"]:
    """Squared-cosine schedule with betas capped at 0.999 (arXiv 2102.09672, eq. 17)."""

    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - abar((i + 1) / T) / abar(i / T), 0.999) for i in range(T)]
    return torch.tensor(betas, dtype=torch.float64)
