"""How pictures are drawn and edited: what is the same for all that are compared."""

from __future__ import annotations

from dataclasses import dataclass

from palate.base.errors import UserError
from palate.base.shapes import Shape


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: the same for all that are compared."""

    num_inference_steps: int
    guidance_scale: float
    shape: Shape
    """Of the pictures; a prompt may have its own."""
    batch_size: int = 8
    """Pictures drawn at once."""


def check_strength(strength: float, num_inference_steps: int) -> None:
    """Raise ``UserError`` unless editing at this strength leaves at least one of the steps (SDEdit, arXiv 2108.01073)."""
    if not 0 < strength <= 1 or int(num_inference_steps * strength) < 1:
        raise UserError(
            f"strength is {strength} of {num_inference_steps} steps; expected a number up to 1 that leaves a step: at least "
            f"{1 / num_inference_steps:.2g}"
        )
