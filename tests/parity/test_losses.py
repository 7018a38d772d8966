"""Losses against independent transcriptions of the published ones, through a real U-Net of diffusers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from palate import spaces
from palate.base.seeds import normal
from palate.diffusion.denoising import STEP_NOISE, Conditioning, Fit, Noised, Pair, draw, fit
from palate.diffusion.schedule import from_config
from palate.objectives import pairs, samples

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
schedule = from_config(SD)
P = 3


@pytest.fixture(scope="module")
def unets() -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """A policy and the reference that it left by a little."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"block_out_channels": (4, 8), "norm_num_groups": 2, "cross_attention_dim": 6, "attention_head_dim": 2}
        blocks = {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        reference = UNet2DConditionModel(sample_size=8, layers_per_block=1, **shape, **blocks).requires_grad_(False)
        policy = UNet2DConditionModel(sample_size=8, layers_per_block=1, **shape, **blocks)
        policy.load_state_dict(reference.state_dict())
        with torch.no_grad():
            for weight in policy.parameters():
                weight += 0.02 * torch.randn_like(weight)
    return policy, reference


@pytest.fixture(scope="module")
def noised() -> Noised:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(2 * P, 4, 8, 8, generator=generator)
    cond = Conditioning({"text": torch.randn(P, 5, 6, generator=generator)}).repeat(2)
    return draw(schedule, x0, cond, torch.tensor([11, 12, 13]), t_min=1, shared=2)


def features(unet: UNet2DConditionModel, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Output of the last down block."""
    emb = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    hidden = unet.conv_in(x)
    hidden, _ = unet.down_blocks[0](hidden_states=hidden, temb=emb, encoder_hidden_states=text)
    hidden, _ = unet.down_blocks[1](hidden_states=hidden, temb=emb)
    return hidden


def measured(space: spaces.Space, noised: Noised, unets: tuple[UNet2DConditionModel, ...]) -> list[Pair[Fit]]:
    embed = space(noised)
    target = embed(noised.target)
    fits = [fit(embed, unet(noised.xt, noised.t, noised.cond.tensors["text"]).sample, target) for unet in unets]
    return [Pair(Fit(one.residual[:P]), Fit(one.residual[P:])) for one in fits]


def published_dpo(policy: UNet2DConditionModel, reference: UNet2DConditionModel, noised: Noised, beta_dpo: float) -> Tensor:
    """The loss of Diffusion-DPO's training script, latents and noise given."""
    scheduler = DDPMScheduler(**SD)
    latents, noise, timesteps = noised.x0, noised.noise[:P].repeat(2, 1, 1, 1), noised.t[:P].repeat(2)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    text = noised.cond.tensors["text"]
    model_pred = policy(noisy_latents, timesteps, text).sample
    model_losses = (model_pred - noise).pow(2).mean(dim=[1, 2, 3])
    model_losses_w, model_losses_l = model_losses.chunk(2)
    model_diff = model_losses_w - model_losses_l
    ref_pred = reference(noisy_latents, timesteps, text).sample
    ref_losses_w, ref_losses_l = (ref_pred - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
    ref_diff = ref_losses_w - ref_losses_l
    return -1 * F.logsigmoid(-0.5 * beta_dpo * (model_diff - ref_diff)).mean()


def published_ncp(
    policy: UNet2DConditionModel, reference: UNet2DConditionModel, noised: Noised, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Perceptual losses of policy and reference as in the paper's equations 12 to 14, winners first."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    t, text = noised.t, noised.cond.tensors["text"]
    beta_t, abar_t, abar_s = (table.view(-1, 1, 1, 1) for table in (betas[t], abar[t], abar[t - 1]))
    z = normal(noised.seeds, noised.xt.shape[1:], STEP_NOISE, "cpu", torch.float32).double()

    def embedded(noise: Tensor) -> Tensor:
        mean = 1 / (1 - beta_t).sqrt() * (noised.xt - beta_t / (1 - abar_t).sqrt() * noise.double())
        x = mean + ((1 - abar_s) / (1 - abar_t) * beta_t).sqrt() * z
        return features(reference.to(dtype), x.to(dtype), t - 1, text.to(dtype))

    outputs = [unet.float()(noised.xt, t, text).sample for unet in (policy, reference)]
    target = embedded(noised.noise)
    losses = [(embedded(output) - target).pow(2).mean(dim=[1, 2, 3]) for output in outputs]
    reference.float()
    return losses


def test_diffusion_dpo(unets: tuple[UNet2DConditionModel, UNet2DConditionModel], noised: Noised):
    policy, reference = measured(spaces.latent(), noised, unets)
    found = pairs.dpo(policy, reference, torch.ones(P), beta=5000.0).mean()
    # The logits are thousands of times a difference of float32 errors, so the loss is compared where they are of order one too.
    torch.testing.assert_close(
        pairs.dpo(policy, reference, torch.ones(P), beta=50.0).mean(), published_dpo(*unets, noised, 50.0), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(found, published_dpo(*unets, noised, 5000.0), rtol=1e-4, atol=1e-6)


def test_gradient_of_diffusion_dpo(unets: tuple[UNet2DConditionModel, UNet2DConditionModel], noised: Noised):
    weight = unets[0].conv_in.weight
    policy, reference = measured(spaces.latent(), noised, unets)
    (found,) = torch.autograd.grad(pairs.dpo(policy, reference, torch.ones(P), beta=50.0).mean(), weight)
    (expected,) = torch.autograd.grad(published_dpo(*unets, noised, 50.0), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_noise_conditioned_perception(unets: tuple[UNet2DConditionModel, UNet2DConditionModel], noised: Noised):
    def encoder(x: Tensor, t: Tensor, cond: Conditioning, layers: str) -> list[Tensor]:
        assert x.dtype == torch.float32
        return [features(unets[1], x, t, cond.tensors["text"])]

    policy, reference = measured(spaces.perceptual(encoder, schedule), noised, unets)
    PL, PL_ref = published_ncp(*unets, noised)
    errors = torch.cat([policy.w.error, policy.l.error]), torch.cat([reference.w.error, reference.l.error])
    torch.testing.assert_close(errors[0].double(), PL, rtol=1e-4, atol=0)
    torch.testing.assert_close(errors[1].double(), PL_ref, rtol=1e-4, atol=0)

    # The authors write no half: their beta_dpo 2500 is 5000 here.
    logits = (PL_ref[:P] - PL_ref[P:]) - (PL[:P] - PL[P:])
    found = pairs.dpo(policy, reference, torch.ones(P), beta=5000.0)
    torch.testing.assert_close(found.double(), -F.logsigmoid(2500 * logits), rtol=1e-6, atol=1e-6)
    found = pairs.cpo(policy, torch.ones(P), beta=5000.0, bc_weight=0.0)
    torch.testing.assert_close(found.double(), -F.logsigmoid(-2500 * (PL[:P] - PL[P:])), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(samples.sft(policy.w).double(), PL[:P], rtol=1e-4, atol=0)


def test_same_model_twice_is_ln_2(unets: tuple[UNet2DConditionModel, UNet2DConditionModel], noised: Noised):
    policy, reference = measured(spaces.latent(), noised, (unets[1], unets[1]))
    assert torch.equal(pairs.dpo(policy, reference, torch.ones(P)), torch.full((P,), 2.0).log())
