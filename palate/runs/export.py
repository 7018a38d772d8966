"""What a run trained, in the layouts of other programs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from palate.base.errors import UserError
from palate.base.files import check_file
from palate.base.hub import check_push, is_hub_id, push
from palate.base.options import OneOf, Range, Rank, check_ranges
from palate.base.shapes import Shape
from palate.models.files import KOHYA_FILE, network_of
from palate.runs.card import CARD, PUBLIC
from palate.runs.models import NamedModel, find_model
from palate.runs.recipe import Recipe

if TYPE_CHECKING:
    import torch

FORMATS = {
    "kohya": "a LoRA file for ComfyUI and A1111",
    "diffusers": "a folder for pipe.load_lora_weights",
    "merged-unet": "a folder with the whole U-Net",
    "pipeline": "a folder with the whole pipeline",
    "lora-from-full": "a folder with the LoRA nearest to a full training, in both layouts",
}
MERGED = ("merged-unet", "pipeline")
DTYPES = ("fp32", "fp16", "bf16")
ENERGY = Range(above=0, at_most=1, expected="a share above 0 and up to 1, such as 0.95")


@dataclass(frozen=True)
class ExportOptions:
    """What is written, and where."""

    format: Annotated[str, OneOf(*FORMATS)] | None = None
    """``kohya`` (a .safetensors file for ComfyUI and A1111), ``diffusers`` (a folder for ``load_lora_weights``),
    ``merged-unet``, ``pipeline`` (whole folders, a LoRA merged), or ``lora-from-full`` (of a run that trained all weights)."""
    output: str | None = None
    """The file or folder to write; it must not be there yet."""
    pretrained_model_name_or_path: str | None = None
    """Of a LoRA or U-Net by itself: the model it was trained on. A run knows its own."""
    dtype: Annotated[str, OneOf(*DTYPES)] = "fp32"
    """Of the written weights: ``fp32``, ``fp16`` or ``bf16``."""
    rank: Rank | None = None
    """Of ``lora-from-full``: of every layer; 64 unless this or energy is given."""
    energy: Annotated[float, ENERGY] | None = None
    """Of ``lora-from-full``: the least rank, layer by layer, that holds this share of the squared change, such as 0.95."""
    lora_layers: Annotated[str, OneOf("attention", "all")] = "all"
    """Of ``lora-from-full``: ``attention``, or ``all``, also the feed-forward and convolution layers."""

    push_to_hub: str | None = None
    """``owner/name``: upload what was written; without format and output, weights and model card of a run as they are. A new
    repository is private. Token: HF_TOKEN."""

    def __post_init__(self) -> None:
        if self.format is None and self.output is None and self.push_to_hub is not None:
            return
        if self.format is None or self.output is None:
            missing = "format" if self.format is None else "output"
            raise UserError(f"palate export needs --{missing}; 'palate export --help' explains it")
        check_ranges(self)
        if (self.rank is not None or self.energy is not None) and self.format != "lora-from-full":
            raise UserError(f"rank and energy are of lora-from-full; a LoRA keeps its own in {self.format}")
        if self.format == "kohya" and not self.output.endswith(".safetensors"):
            raise UserError(f"output is {self.output!r}; a kohya LoRA is one file: expected a name that ends in .safetensors")


def export(name: str, options: ExportOptions, *, progress: bool = False) -> list[str]:
    """Write ``name`` (a run, a LoRA, or a tuned U-Net or pipeline folder) as ``options`` say; returns what to tell.

    Raises:
        UserError: nothing to export there, the format does not suit it, or the output is there already.
    """
    import torch

    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    if options.output is None:
        return [_pushed_run(name, str(options.push_to_hub))]
    out = Path(options.output).expanduser()
    if out.exists():
        raise UserError(f"{out} is there already; name another output, or delete it")
    check_file(out, "output")
    found = _find(name, options.pretrained_model_name_or_path)
    assert found.tuned is not None
    is_lora, dtype = (
        found.tuned.is_file(),
        {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.dtype],
    )
    if is_lora and options.format == "lora-from-full":
        raise UserError(f"{name} is a LoRA already: use --format kohya or diffusers")
    if not is_lora and options.format in ("kohya", "diffusers"):
        raise UserError(f"{name} holds a whole U-Net, no LoRA: use --format lora-from-full, merged-unet or pipeline")
    told = []
    if is_lora:
        from palate.models.lora_file import find_lora, tells_alpha

        if not tells_alpha(find_lora(found.tuned, texts=True)):
            told.append(f"{found.tuned} tells no alpha: taken as equal to the rank (strength 1), as all readers do")
    told += _written(found, out, options, dtype, progress=progress)
    if options.push_to_hub is not None:
        folder, files = (out.parent, [out.name]) if out.is_file() else (out, ["*"])
        told.append(f"pushed to {push(folder, options.push_to_hub, files, message='Export by Palate')}")
    return told


def _pushed_run(name: str, repo: str) -> str:
    folder = Path(name).expanduser()
    if find_model(name).recipe is None or not (folder / CARD).is_file():
        raise UserError(f"{name} is not the folder of a finished run; give --format and --output to push something else")
    return f"pushed to {push(folder, repo, PUBLIC, message='Align by Palate')}"


def _written(found: NamedModel, out: Path, options: ExportOptions, dtype: torch.dtype, *, progress: bool) -> list[str]:
    import torch

    from palate.models import kohya, layouts
    from palate.models.lora import adapter_layers
    from palate.models.rounding import check_lora, check_weights

    denoiser, network = found.load_tuned()
    layers = adapter_layers(network)
    told = check_lora(layers, torch.float32 if options.format in MERGED else dtype) if layers else []
    if options.format in MERGED:
        before = layouts.before_merging(network, dtype) if layers else layouts.changed_weights(denoiser.network, network)
        told = check_weights(before, layouts.merge(network), dtype)
    about = about_training(found.recipe, out.stem) if found.recipe else {"ss_output_name": out.stem}
    if options.format == "kohya":
        return [*told, f"wrote {kohya.save_kohya(denoiser, network, out, dtype=dtype, about=about)}"]
    if options.format == "diffusers":
        return [*told, f"wrote {layouts.save_diffusers(denoiser, network, out, dtype=dtype)}"]
    if options.format == "merged-unet":
        return [*told, f"wrote {layouts.save_network(network, out, dtype=dtype)}"]
    if options.format == "pipeline":
        return [*told, f"wrote {layouts.save_pipeline(denoiser, network, out, dtype=dtype)}"]
    rank = 64 if options.rank is None and options.energy is None else options.rank
    extraction = layouts.extract_lora(
        denoiser, network, rank=rank, energy=options.energy, layers=options.lora_layers, progress=progress
    )
    told = check_lora(adapter_layers(denoiser.network), dtype)
    files = [layouts.save_diffusers(denoiser, denoiser.network, out, dtype=dtype)]
    if denoiser.kohya is not None:
        files.append(kohya.save_kohya(denoiser, denoiser.network, out / KOHYA_FILE, dtype=dtype, about=about))
    return [extraction.sentence(), *told, *(f"wrote {file}" for file in files)]


def _find(name: str, base: str | None) -> NamedModel:
    folder = Path(name).expanduser()
    if (folder / "recipe.yaml").is_file():
        found = find_model(name)
        if base is not None:
            # The same model from elsewhere, such as a folder where the run had a hub id.
            found = dataclasses.replace(found, base=find_model(base).base)
        return found
    if folder.is_dir() and (folder / "model_index.json").is_file():
        tuned = network_of(folder)
    elif folder.is_dir() and (folder / "config.json").is_file():
        tuned = folder
    else:
        from palate.models.lora_file import find_lora

        if not folder.exists() and is_hub_id(name):
            raise UserError(f"{name} is not on this machine; download it first: hf download {name} --local-dir DIR")
        tuned = find_lora(folder, texts=True)
    if base is None:
        raise UserError(f"{name} is no run: name the model it was trained on with --pretrained_model_name_or_path")
    return dataclasses.replace(find_model(base), tuned=tuned, recipe=None)


def about_training(recipe: Recipe, name: str) -> dict[str, str]:
    """What kohya's scripts tell of a training in a LoRA's metadata, by their names for it."""
    training, method = recipe.training, dict(recipe.objective)
    how = ", ".join(f"{key} {value}" for key, value in method.items() if key != "name")
    told: dict[str, Any] = {
        "ss_output_name": name,
        "ss_learning_rate": training.learning_rate,
        "ss_unet_lr": training.learning_rate,
        **({"ss_text_encoder_lr": training.learning_rate} if recipe.policy.train_text_encoder else {}),
        "ss_optimizer": training.optimizer,
        "ss_lr_scheduler": training.lr_scheduler,
        "ss_lr_warmup_steps": training.lr_warmup_steps,
        "ss_max_train_steps": training.max_train_steps,
        "ss_batch_size_per_device": training.train_batch_size,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": recipe.policy.gradient_checkpointing,
        "ss_mixed_precision": training.mixed_precision,
        "ss_max_grad_norm": training.max_grad_norm,
        "ss_min_snr_gamma": training.snr_gamma,
        "ss_caption_dropout_rate": training.caption_dropout,
        "ss_seed": training.seed,
        "ss_training_comment": f"Palate: {method['name']}" + (f" ({how})" if how else ""),
        "modelspec.title": name,
    }
    if recipe.data.resolution is not None:  # otherwise that of the model
        shape = Shape.of(recipe.data.resolution)
        told["modelspec.resolution"] = f"{shape.width}x{shape.height}"
    return {key: str(value) for key, value in told.items()}
