"""Where errors are measured: in the latents, or as Noise-Conditioned Perception, or in a weighted sum of both."""

from palate.spaces.latent import Latent, latent
from palate.spaces.perceptual import Perceptual, perceptual
from palate.spaces.space import Embed, Space, draws_noise
from palate.spaces.weighted import Weighted, weighted

__all__ = ["Embed", "Latent", "Perceptual", "Space", "Weighted", "draws_noise", "latent", "perceptual", "weighted"]
