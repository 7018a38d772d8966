"""Pure functions from measured errors to losses, one number per item: pairs of pictures, and single ones."""
