"""Models by the names that recipes and commands use: folders, hub ids, finished runs, with LoRAs put in."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from palate.base.errors import UserError, short
from palate.base.hub import is_hub_id
from palate.base.jsonl import JsonObject
from palate.base.machine import device
from palate.base.options import SMALLEST
from palate.models.files import LORA_FILE, PEFT_FILE, lora_in, weights_of

if TYPE_CHECKING:
    from torch import nn

    from palate.models.denoiser import Denoiser, Drawer
    from palate.models.policy import Finished
    from palate.models.refiner import Refiner
    from palate.runs.recipe import Recipe


STRONGEST = 1000
"""Of scales: nothing is left of a picture long before."""


@dataclass(frozen=True)
class Lora:
    """A LoRA and the strength it is used at."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE``, ``FOLDER`` (of a run, or as diffusers writes it), or either with ``:scale``.

        Raises:
            UserError: nothing there, or no finite scale.
        """
        head, colon, tail = text.rpartition(":")
        name, scale = (head, tail) if colon and not Path(text).expanduser().exists() else (text, "1")
        path = lora_in(Path(name).expanduser())
        if not path.is_file():
            how = f"; one of a hub is downloaded first: hf download {name} --local-dir DIR" if is_hub_id(name) else ""
            raise UserError(
                f"lora {short(text)}: there is no {short(str(path), quoted=False)}; expected a "
                f".safetensors file or its folder, or PATH:scale{how}"
            )
        try:
            strength = float(scale)
        except ValueError:
            strength = math.nan
        if not (strength == 0 or SMALLEST <= abs(strength) <= STRONGEST):
            raise UserError(
                f"lora {short(text)}: the scale is {short(scale, 40)}; expected a number such as 0.8, of a size "
                f"up to {STRONGEST}"
            )
        return cls(path, strength)


@dataclass(frozen=True)
class NamedModel:
    """A model that is known to be there, but not loaded."""

    base: str
    """Pipeline folder or hub id."""
    revision: str | None = None
    variant: str | None = None
    tuned: Path | None = None
    """What a run trained: a LoRA file, or a folder with the whole network."""
    recipe: Recipe | None = None
    """Of the run."""
    loras: tuple[Lora, ...] = ()
    refiner: str | None = None
    refiner_start: float = 0.8
    label: str = ""

    def about(self) -> JsonObject:
        """What decides its pictures, as JSON: names, and digests of what was trained."""
        found: JsonObject = {"name": self.label, "base": self.base, "revision": self.revision, "variant": self.variant}
        if self.tuned is not None:
            found["tuned"] = _digest(self.tuned)
        if self.refiner is not None:
            found |= {"refiner": self.refiner, "refiner_start": self.refiner_start}
        return {**found, "loras": [{"file": x.path.name, "scale": x.scale, "digest": _digest(x.path)} for x in self.loras]}

    def load(self, *, mixed_precision: str = "no", quantize: str | None = None) -> tuple[Drawer, nn.Module, Refiner | None]:
        """The model; its tuned network (its own, with LoRAs in it, unless a run trained all weights); the refiner or None.

        A model of a family that is not trained is a :class:`palate.models.other.OtherPipeline`.
        """
        from palate.models.families import load_drawer, quiet_loading

        where = _device(mixed_precision)
        quiet_loading()
        source = {"revision": self.revision, "variant": self.variant}
        denoiser = load_drawer(self.base, mixed_precision=mixed_precision, device=where, quantize=quantize, **source)
        network = self._put(denoiser)
        if self.refiner is None:
            return denoiser, network, None
        from palate.models.families import load_refiner

        refiner = load_refiner(self.refiner, start=self.refiner_start, mixed_precision=mixed_precision, device=where)
        return denoiser, network, refiner

    def load_finished(self) -> Finished:
        """The model beside the one it was tuned from, in full precision."""
        from palate.models.policy import Finished, twin

        denoiser = load_base(self.base, revision=self.revision, variant=self.variant)
        base = twin(denoiser.network, share=True)
        return Finished(denoiser, self._put(denoiser, alone=True), base)

    def load_tuned(self) -> tuple[Denoiser, nn.Module]:
        """The model and its tuned network, in full precision. Raises UserError if its family is not trained."""
        denoiser = load_base(self.base, revision=self.revision, variant=self.variant)
        return denoiser, self._put(denoiser)

    def _put(self, denoiser: Drawer, *, alone: bool = False) -> nn.Module:
        """What was trained, and the LoRAs, into the model; the network to use. alone: nothing but it may change."""
        from palate.models.lora import put_loras, tuned

        network = denoiser.network if self.tuned is None else tuned(denoiser, self.tuned)
        put_loras(denoiser, network, [(lora.path, lora.scale) for lora in self.loras], alone=alone)
        return network


def find_model(
    name: str,
    *,
    loras: Sequence[str] = (),
    refiner: str | None = None,
    refiner_start: float = 0.8,
    revision: str | None = None,
    variant: str | None = None,
    label: str | None = None,
) -> NamedModel:
    """A pipeline folder, a hub id, ``mini-sd``, or the folder of a finished ``palate train``; reads no weights.

    Raises:
        UserError: none of these, an unfinished run, or a LoRA that is not there.
    """
    folder = Path(name).expanduser()
    added = tuple(map(Lora.parse, loras))
    for lora in added:
        _check_lora(lora.path)
    parts = [folder.name, *(_lora_label(lora) for lora in added), *([Path(refiner).name] if refiner else [])]
    recipe, weights = None, None
    if (folder / "recipe.yaml").is_file():
        from palate.runs import recipe as recipes

        recipe = recipes.load(str(folder / "recipe.yaml"))
        weights = weights_of(folder)
        base = recipe.model
        name, revision, variant = base.pretrained_model_name_or_path, base.revision, base.variant
    check_refiner_fits(refiner, name, revision=revision)
    return NamedModel(
        base=os.path.expanduser(name),  # an embedded model keeps its name: where it lies is nothing about it
        revision=revision,
        variant=variant,
        tuned=weights,
        recipe=recipe,
        loras=added,
        refiner=refiner,
        refiner_start=refiner_start,
        label=label or " + ".join(parts),
    )


def load_base(
    name: str,
    *,
    mixed_precision: str = "no",
    revision: str | None = None,
    variant: str | None = None,
    quantize: str | None = None,
    full: bool = False,
    home: str | None = None,
    outline: str | None = None,
) -> Denoiser:
    """A pipeline folder, a hub id or ``mini-sd`` on this process's device.

    full: in full precision whatever ``mixed_precision`` says, because all weights are trained.
    home, outline: see :func:`load_denoiser`.
    """
    from palate.models.families import check_model, load_denoiser, quiet_loading

    name = os.path.expanduser(name)
    check_model(name, revision=revision)

    where = "meta" if outline == "shapes" else _device(mixed_precision)
    quiet_loading()
    precision = "no" if full else mixed_precision
    source = {"revision": revision, "variant": variant}
    own = {"home": home, "quantize": quantize, "outline": outline}
    return load_denoiser(name, mixed_precision=precision, device=where, **own, **source)


def check_refiner_fits(refiner: str | None, base: str, *, revision: str | None = None) -> None:
    """Refuse a refiner that cannot finish the pictures of ``base``, before anything is loaded."""
    from palate.models.families import check_model, check_refiner, family_of

    if refiner is None:
        return
    check_refiner(refiner)
    if not family_of(check_model(os.path.expanduser(base), revision=revision)).refined:
        raise UserError(f"a refiner finishes pictures of an SDXL model, and {base} is none: leave out --refiner")


def _device(mixed_precision: str) -> str:
    if mixed_precision == "fp16" and device() == "cpu":
        raise UserError("mixed_precision fp16 needs a GPU, and there is none; use bf16 or no")
    return device()


def _lora_label(lora: Lora) -> str:
    name = lora.path.parent.name if lora.path.name in (LORA_FILE, PEFT_FILE) else lora.path.stem
    return name if lora.scale == 1 else f"{name} at {lora.scale:g}"


def _check_lora(path: Path) -> None:
    """What the names in a file tell, before any weights are read."""
    from palate.models.lora_file import check_kind, names_in

    check_kind(path, names_in(path))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
