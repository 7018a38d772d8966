"""The machine at hand: which process this is, and which versions it runs."""

from __future__ import annotations

import os
import sys
from importlib import metadata


def versions() -> dict[str, str]:
    """What produced a result: Python, Palate and the libraries that decide numbers."""
    names = ("palate", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def is_main() -> bool:
    """Whether this is the process that writes and speaks, of those that ``accelerate launch`` may have started."""
    return int(os.environ.get("RANK", "0")) == 0


def device() -> str:
    """Where this process computes: its own GPU, of those that ``accelerate launch`` shares out, or the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def tell(text: str) -> None:
    if is_main():
        print(text, file=sys.stderr, flush=True)


def processes() -> int:
    """How many processes ``accelerate launch`` has started; known before accelerate is loaded."""
    return int(os.environ.get("WORLD_SIZE", "1"))
