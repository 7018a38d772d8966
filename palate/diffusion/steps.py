"""How a step of sampling is taken: the Gaussian from which the latents of an earlier time are drawn.

A rule is a function of the schedule, the model's output and two times, the same for every schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from palate.diffusion.schedule import Coefficient, Schedule, Times, combine

Gaussian = tuple[Float[Tensor, " b *d"], Float[Tensor, " b *ones"]]
"""Mean (b, ...) and standard deviation (b, 1, ..., 1)."""
Rule = Callable[[Schedule, Tensor, Tensor, Times, Times], Gaussian]
"""(schedule, output (b, ...), xt (b, ...), t (b,), s (b,)) -> the step from t to the earlier time s."""

LEAST_STD = 0.01
"""Floor of the standard deviation of rules that draw. Schedules that end without noise would give the last step none: its
density would be infinite. The last step of Stable Diffusion (0.0206) lies above it."""


def ddim(eta: float) -> Rule:
    """`ddim_step`; with eta > 0 the std is at least LEAST_STD, with eta = 0 nothing is drawn."""

    def rule(schedule: Schedule, output: Tensor, xt: Tensor, t: Times, s: Times) -> Gaussian:
        mean, std = ddim_step(schedule, output, xt, t, s, eta)
        return mean, std.clamp(min=LEAST_STD) if eta > 0 else std

    return rule


def cps(a: float) -> Rule:
    """Coefficients-preserving sampling (arXiv 2509.05952): std = sigma_s sin(a pi / 2), whatever t is; at least LEAST_STD."""

    def rule(schedule: Schedule, output: Tensor, xt: Tensor, t: Times, s: Times) -> Gaussian:
        _, sigma_s = schedule.coefficients(s, xt)
        std = sigma_s * math.sin(a * math.pi / 2)
        return _mean(schedule, output, xt, t, s, std.square()), std.to(xt).clamp(min=LEAST_STD)

    return rule


def flow_sde(a: float) -> Rule:
    """The Euler-Maruyama step of Flow-GRPO (arXiv 2505.05470, eq. 9), for rectified flow.

    With d = sigma_s - sigma_t, g = a sqrt(sigma_t / (1 - sigma_t)) and the velocity v = noise - x0: std = g sqrt(-d), mean =
    xt (1 + g^2 d / (2 sigma_t)) + v (1 + g^2 (1 - sigma_t) / (2 sigma_t)) d. At sigma_t = 1, where g has no value, 1 - sigma_s
    stands in its root, as in the authors' code.
    """

    def rule(schedule: Schedule, output: Tensor, xt: Tensor, t: Times, s: Times) -> Gaussian:
        (alpha, sigma), (alpha_s, sigma_s) = schedule.coefficients(t, xt), schedule.coefficients(s, xt)
        d = sigma_s - sigma
        variance = a**2 * sigma / torch.where(alpha > 0, alpha, alpha_s)  # g^2
        of_x, of_v = 1 + variance * d / (2 * sigma), (1 + variance * alpha / (2 * sigma)) * d
        (x0_xt, x0_output), (noise_xt, noise_output) = schedule.inverse(t, xt)
        mean = combine((of_x + of_v * (noise_xt - x0_xt), of_v * (noise_output - x0_output)), xt, output)
        return mean, (variance * -d).sqrt().to(xt)

    return rule


def ddim_step(
    schedule: Schedule,
    output: Float[Tensor, " b *d"],
    xt: Float[Tensor, " b *d"],
    t: Times,
    s: Times,
    eta: float = 1.0,
) -> Gaussian:
    """The step of DDIM from time t to the earlier time s (arXiv 2010.02502, eqs. 12 and 16), for any marginals.

    std = eta sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2) and mean = alpha_s x0 + sqrt(sigma_s^2 - std^2) noise.
    eta = 1 from t to t - 1 is the posterior of DDPM (arXiv 2006.11239, eqs. 6 and 7). At eta = 0 nothing is drawn and s may
    also be later than t: the x0 and the noise that the output implies, mixed anew. x0 is never clipped: latents have no range.
    Not finite for epsilon where alpha_t = 0.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.coefficients(t, xt), schedule.coefficients(s, xt)
    # alpha_s = 0 only if s is a time of pure noise, as t is then: there the gap is 0.
    tiny = torch.finfo(torch.float64).tiny
    gap = (1 - (alpha_t * sigma_s / (alpha_s.clamp(min=tiny) * sigma_t)).square()).clamp(min=0)
    variance = eta**2 * sigma_s.square() * torch.where(alpha_s > 0, gap, 0)
    return _mean(schedule, output, xt, t, s, variance), variance.sqrt().to(xt)


def _mean(schedule: Schedule, output: Tensor, xt: Tensor, t: Times, s: Times, variance: Coefficient) -> Tensor:
    """alpha_s x0 + sqrt(sigma_s^2 - variance) noise.

    One multiply and add per tensor: x0 itself, which is large at high noise, never appears in xt's dtype.
    """
    alpha_s, sigma_s = schedule.coefficients(s, xt)
    of_noise = (sigma_s.square() - variance).clamp(min=0).sqrt()
    (x0_xt, x0_output), (noise_xt, noise_output) = schedule.inverse(t, xt)
    return combine((alpha_s * x0_xt + of_noise * noise_xt, alpha_s * x0_output + of_noise * noise_output), xt, output)
