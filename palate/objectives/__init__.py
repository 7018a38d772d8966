"""Pure functions from measured errors to losses, one number per item: pairs of pictures, and single ones."""

from palate.objectives.pairs import margin

__all__ = ["margin"]
