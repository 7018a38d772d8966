"""What training takes of a GPU's memory, counted on the published architectures: nothing is loaded or run.

    python benchmarks/memory.py

The count is that of `palate plan`. Writes `benchmarks/memory.json`, which a test holds recipes to, and prints the tables of
docs/memory.md.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from architectures import MODELS, NETWORKS, skeleton

from palate.runs import library, plan
from palate.runs import recipe as recipes
from palate.runs.loading import denoiser_of, policy_of
from palate.runs.recipe import Recipe

GB = 1e9
RESULT = Path(__file__).with_suffix(".json")
TOLD: dict[str, dict[str, Any]] = {
    "LoRA 64, attention, adamw": {"rank": 64},
    "LoRA 64, attention, adamw_8bit": {"rank": 64, "optimizer": "adamw_8bit"},
    "LoRA 32, attention, adamw_8bit": {"rank": 32, "optimizer": "adamw_8bit"},
    "LoRA 16, attention, adamw_8bit": {"rank": 16, "optimizer": "adamw_8bit"},
    "LoRA 16, all, adamw_8bit": {"rank": 16, "lora_layers": "all", "optimizer": "adamw_8bit"},
    "full, adamw": {"train_method": "full"},
    "full, adafactor": {"train_method": "full", "optimizer": "adafactor"},
}
TRAINED = {
    "SD 1.5": ("LoRA 64, attention, adamw", "LoRA 16, all, adamw_8bit", "full, adamw", "full, adafactor"),
    "SDXL": tuple(TOLD),
}
DECISIVE = {
    "model": ("quantize",),
    "data": ("resolution",),
    "policy": ("train_method", "rank", "lora_layers", "lora_kind", "gradient_checkpointing"),
    "online": ("train_prompts", "sample_batch_size", "sample_guidance_scale", "guidance_in_training", "kl_weight"),
    "training": ("optimizer", "train_batch_size", "mixed_precision", "ema_decay"),
    "evaluation": ("evaluation_batch_size", "guidance_scale"),
}
"""Of a recipe, beside objective and space, what its memory depends on."""


def sized() -> Iterator[tuple[str, str]]:
    """Recipes that are named by a card's size, and the model that each trains."""
    for name in library.built_in():
        if name.endswith("gb"):
            yield name, next(MODELS[word] for word in name.split("-") if word in MODELS)


def decisive(made: Recipe) -> dict[str, Any]:
    told = {section: {n: getattr(getattr(made, section), n) for n in names} for section, names in DECISIVE.items()}
    return json.loads(json.dumps({**told, "objective": made.objective["name"], "space": made.space}))


def on(made: Recipe, folder: Path) -> Recipe:
    """The recipe with a model that lies there."""
    return dataclasses.replace(made, model=dataclasses.replace(made.model, pretrained_model_name_or_path=str(folder)))


def counted(made: Recipe, folder: Path) -> dict[str, Any]:
    """GB of what `palate plan` counts, and what it depends on."""
    needs = plan.count(on(made, folder), gpu=True)
    held = sum(needs.held.values())
    found = {
        "weights, gradients, optimizer": held,
        "training": needs.training,
        "drawing": needs.sampling,
        "encoding": sum(needs.encoding.values()),
    }
    return {**{name: round(size / GB, 2) for name, size in found.items()}, "of": decisive(made)}


def held(folder: Path, **options: Any) -> dict[str, float]:
    """Bytes that are there all through training."""
    made = on(recipes.build({"training": {"mixed_precision": "bf16"}}), folder)
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        sections.setdefault(recipes.OPTIONS[name], {})[name] = value
    made = dataclasses.replace(made, **{s: dataclasses.replace(getattr(made, s), **v) for s, v in sections.items()})
    return plan.held(policy_of(made, denoiser_of(made, outline="shapes")), made)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folders = {name: skeleton(name, Path(place) / name.replace(" ", "-")) for name in NETWORKS}
        print("| model | trained | frozen | frozen copy | trained weights | gradients | optimizer | sum |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, kinds in TRAINED.items():
            for told in kinds:
                found = held(folders[name], **TOLD[told])
                sizes = [size for part, size in found.items() if part != "average"]
                print(f"| {name} | {told} | " + " | ".join(f"{x / GB:.2f}" for x in (*sizes, sum(sizes))) + " |", flush=True)
        print("\n| model | parameters | LoRA numbers a rank, attention | all | frozen, bf16 | int8 | nf4 | encoders and VAE |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, folder in folders.items():
            ranks = [held(folder, rank=1, lora_layers=layers)["trained weights"] / 4 for layers in ("attention", "all")]
            kinds = [held(folder, rank=1, quantize=kind)["frozen weights"] for kind in (None, "int8", "nf4")]
            model: Any = denoiser_of(on(recipes.build({"training": {"mixed_precision": "bf16"}}), folder), outline="shapes")
            before = sum(plan.bytes_of(part) for part in (model.vae.module, *(text.pair[1] for text in model.texts)))
            count = held(folder, train_method="full")["trained weights"] / 4
            numbers = " | ".join(f"{number:,.0f}" for number in (count, *ranks))
            print(f"| {name} | {numbers} | {' | '.join(f'{x / GB:.2f}' for x in (*kinds, before))} |", flush=True)
        print("\n| recipe | weights, gradients, optimizer | training | drawing | encoding before it |")
        print("| --- | ---: | ---: | ---: | ---: |")
        results = {}
        for name, model in sized():
            results[name] = found = counted(recipes.load(name), folders[model])
            print(row(name, found), flush=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def row(name: str, found: dict[str, Any]) -> str:
    """A recipe's row of the table."""
    return f"| `{name}` | " + " | ".join(f"{size:.1f}" for part, size in found.items() if part != "of") + " |"


if __name__ == "__main__":
    main()
