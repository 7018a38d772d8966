"""Families of diffusion models, the policy that trains one of them, and what is written of it."""

import logging

# Diffusers and peft import bitsandbytes where it is installed, which then warns of a kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
