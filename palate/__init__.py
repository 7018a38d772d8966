"""Align text-to-image diffusion models with taste."""
