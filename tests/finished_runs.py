"""What finished runs have left, read to be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"


def drawn(folder: str) -> np.ndarray:
    """Pixels of a folder's pictures, in the order of their names, ``(n, height, width, 3)``."""
    return np.stack([np.asarray(Image.open(p)) for p in sorted(Path(folder).glob("*.png"))]).astype(int)


def equal_files(one: str, other: str) -> dict[str, Tensor]:
    """Asserts that two runs have written the very same weights, and gives them."""
    found, others = (load_file(f"{run}/{FILE}") for run in (one, other))
    assert found.keys() == others.keys()
    assert all(bool((found[name] == others[name]).all()) for name in found)
    return found
