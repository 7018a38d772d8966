"""Align text-to-image diffusion models with taste.

In Python as on the command line::

    import palate

    run = palate.train("sdxl-dpo-24gb", train_data="my_pairs/", output_dir="out/mine")
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["train"]


def train(recipe: str | Path, **options: object) -> Path:
    """``palate train RECIPE --option value ...``, with the same checks, messages and files.

    Args:
        recipe: the name of one that comes with Palate, or the path of a file.
        options: of any section, by name, as plain values: ``learning_rate=1e-4``, ``judges=["pickscore"]``,
            ``objective={"name": "dpo", "beta": 2000}``. A path may be a :class:`pathlib.Path`.

    Returns:
        The output folder, with the weights, ``report.html`` and all else that docs/outputs.md tells.

    Raises:
        palate.base.errors.UserError: a mistake in recipe, options or data, in one line.
        palate.training.loop.Stopped: interrupted, after saving a checkpoint.
    """
    from palate.runs.recipe import load
    from palate.runs.train import train

    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    given = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    return train(load(str(recipe), plain), command=f"palate.train({str(recipe)!r}{', ' if given else ''}{given})")
