"""Families of diffusion models, the policy that trains one of them, and what is written of it."""
