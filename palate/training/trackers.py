"""Where numbers and sample pictures of a run go beside its own files: TensorBoard, Weights & Biases, trackio."""

# The three have no types, or only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingImports=false, reportUnknownParameterType=false

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from palate.base.errors import UserError
from palate.base.options import leaves

NEEDS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Name -> the module that it needs."""


@runtime_checkable
class Tracker(Protocol):
    """What a run tells while it goes on."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, path: Path) -> None: ...
    def close(self) -> None: ...


def check_reporter(name: str) -> None:
    """Raise ``UserError`` if the package that a reporter needs is missing."""
    if name != "none":
        _module(name)


def open_tracker(name: str, folder: Path, step: int, settings: Mapping[str, object]) -> Tracker | None:
    """The tracker of this name, or None for ``none``.

    folder: of the run, whose name is that of its curves. step: that it goes on from; what was told of later steps is void.
    settings: of the run, shown beside the curves.
    """
    if name == "none":
        return None
    made = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}[name]
    return made(_module(name), folder, step, settings)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(NEEDS[name])
    except ImportError as error:
        raise UserError(f"report_to is {name}, which is not installed: pip install 'palate[{name}]'") from error


class _TensorBoard:
    """Events below the folder of the run."""

    def __init__(self, module: ModuleType, folder: Path, step: int, settings: Mapping[str, object]):
        self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            rows = "\n".join(f"| {name} | {value} |" for name, value in flat(settings).items())
            self.writer.add_text("settings", f"| option | value |\n| --- | --- |\n{rows}", 0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A run of the project ``palate``, or of ``WANDB_PROJECT``; ``WANDB_MODE=offline`` keeps it on this machine."""

    def __init__(self, module: ModuleType, folder: Path, step: int, settings: Mapping[str, object]):
        self.module = module
        place = folder.resolve()
        self.run = module.init(
            project=os.environ.get("WANDB_PROJECT", "palate"),
            name=place.name,
            # Of the folder and when it was made, so that a resumed run goes on in the same curves and another does not.
            id=hashlib.sha256(f"{place} {place.stat().st_ino}".encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=flat(settings),
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        self.run.log({"samples": self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """A run of the project ``palate``, kept on this machine; ``trackio show`` opens it."""

    def __init__(self, module: ModuleType, folder: Path, step: int, settings: Mapping[str, object]):
        self.module = module
        module.init(project="palate", name=folder.resolve().name, config=flat(settings), resume="allow" if step else "never")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        self.module.log({"samples": self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        self.module.finish()


def flat(settings: Mapping[str, object]) -> dict[str, Any]:
    """Nested settings as ``objective.beta`` and its value."""
    return {".".join(names): value for names, value in leaves(settings) if value != {}}
