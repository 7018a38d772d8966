"""What a run leaves of its model, by name: known before any weights are read."""

from __future__ import annotations

from pathlib import Path

from palate.base.errors import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
"""Beside diffusers' own name, and not mistaken for it by ``load_lora_weights(folder)``."""
PEFT_FILE = "adapter_model.safetensors"
"""As PEFT itself saves a LoRA, with ``adapter_config.json`` beside it."""
PARTS = ("unet", "transformer")
"""The folders of a network, in a pipeline and in a run that trained all weights."""
WEIGHTS = (LORA_FILE, *PARTS)
"""What a finished run holds: one of these."""


def weights_of(folder: Path) -> Path:
    """The LoRA file of a finished run, or the folder with its whole network. Raises UserError if it holds neither."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} holds neither {LORA_FILE} nor {PARTS[0]}/; is the training finished?")


def lora_in(path: Path) -> Path:
    """The file of a LoRA that is named by itself or by its folder; it need not be there."""
    if not path.is_dir():
        return path
    return path / (PEFT_FILE if (path / PEFT_FILE).is_file() and not (path / LORA_FILE).is_file() else LORA_FILE)


def network_of(folder: Path) -> Path:
    """The network's folder in a pipeline folder."""
    return next((folder / part for part in PARTS if (folder / part).is_dir()), folder / PARTS[0])
