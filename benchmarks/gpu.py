"""What a GPU makes of training: one command on a bare machine with an NVIDIA card, in less than ten minutes, without a hub.

    python benchmarks/gpu.py                        # writes gpu.json, prints a table
    python benchmarks/gpu.py --tiny --output x.json # the same on the miniature models, on whatever device there is

Published architectures at full size (SD 1.5, SDXL, SD 3.5 medium) on random weights: seconds and memory of a micro-batch beside
what `palate plan` counts, the share of the measured rate of matrix products, pictures drawn a second, each with one thing
changed: precision, optimizer, weights in 8 or 4 bits, checkpointing, compilation, memory format, attention. And small runs of
`palate train` whose own checks refuse what is wrong on a GPU alone: log-probabilities that differ between sampling and
training, a loss scaler, an optimizer in 8 bits.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from architectures import skeleton
from memory import on

import palate
from palate.base.errors import UserError, first_line
from palate.base.machine import Peak, device, device_memory, versions
from palate.runs import plan
from palate.runs import recipe as recipes
from palate.runs.loading import denoiser_of, policy_of
from palate.runs.recipe import Recipe

FULL = {"SD 1.5": "sd15-dpo-12gb", "SDXL": "sdxl-dpo-24gb", "SD 3.5 medium": "sd35-dpo-24gb"}
TINY = {"mini-sd": "miniature-dpo", "mini-sdxl": "miniature-sdxl-dpo", "mini-sd3": "miniature-flow-dpo"}
OPTIONS: dict[str, dict[str, Any]] = {
    "as the recipe": {},
    "fp16": {"mixed_precision": "fp16"},
    "without checkpointing": {"gradient_checkpointing": False},
    "8-bit AdamW": {"optimizer": "adamw_8bit"},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "four pairs at once": {"train_batch_size": 4},
    "NCP": {"space": "perceptual"},
    "compiled blocks": {"compile": True},
}
"""One thing changed in the recipe."""
CHECKS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("miniature-dpo", {"mixed_precision": "bf16"}),
    "fp16 and its scaler": ("miniature-dpo", {"mixed_precision": "fp16"}),
    "checkpointing": ("miniature-ncp-dpo", {"gradient_checkpointing": True}),
    "8-bit AdamW": ("miniature-dpo", {"optimizer": "adamw_8bit"}),
    "int8": ("miniature-dpo", {"quantize": "int8", "mixed_precision": "bf16"}),
    "nf4": ("miniature-dpo", {"quantize": "nf4", "mixed_precision": "bf16"}),
    "compiled": ("miniature-dpo", {"compile": True}),
    "ratios of DDPO": ("miniature-ddpo-is", {"max_train_steps": 2, "samples_per_round": 16, "mixed_precision": "bf16"}),
    "ratios of GRPO, a flow": ("miniature-flow-grpo", {"max_train_steps": 2, "mixed_precision": "bf16"}),
}
"""Runs that must come to their end."""
FEW = ("as the recipe", "without checkpointing", "compiled blocks")
FEW_CHECKS = ("bf16", "ratios of DDPO")
"""Of the tiny kind."""


def channels_last(policy: Any) -> None:
    policy.trainable_module.to(memory_format=torch.channels_last)  # the others share its weights


def attention(backend: str) -> Callable[[Any], None]:
    def change(policy: Any) -> None:
        for network in policy.modules:
            network.set_attention_backend(backend)

    return change


CHANGES: dict[str, Callable[[Any], None]] = {
    "channels last": channels_last,
    "flash attention": attention("flash"),
    "cuDNN attention": attention("_native_cudnn"),
    "sage attention": attention("sage"),
}
"""One thing changed in the networks of the recipe as it is."""


def with_options(made: Recipe, given: dict[str, Any]) -> Recipe:
    content = made.as_dict()
    for name, value in given.items():
        if name == "space":
            flow = made.space.get("name") != "latent" or "medium" in str(made.model) or "sd3" in str(made.model)
            content["space"] = {"name": value, "steps_back": 20, "layers": "half"} if flow else value
        else:
            content[recipes.OPTIONS[name]][name] = value
    return recipes.build(content)


def cases(made: Recipe, names: Sequence[str]) -> Iterator[tuple[str, Recipe, Callable[[Any], None]]]:
    for name, given in OPTIONS.items():
        if name in names:
            yield name, with_options(made, given), lambda policy: None
    for name, change in CHANGES.items():
        if name in names:
            yield name, made, change


COUNTED: dict[str, plan.Needs] = {}


def counted(made: Recipe) -> plan.Needs:
    """What `palate plan` counts, once for each recipe."""
    key = json.dumps(made.as_dict(), sort_keys=True)
    COUNTED[key] = COUNTED.get(key) or plan.count(made, gpu=device() != "cpu")
    return COUNTED[key]


def measured(made: Recipe, change: Callable[[Any], None], rate: float) -> dict[str, Any]:
    """Of one case, in plain numbers; what it raises is its result."""
    try:
        needs = counted(made)
        began = time.perf_counter()
        seconds, peak = plan.tried(made, needs, change=change)
    except (UserError, RuntimeError, ValueError, ImportError, TypeError, NotImplementedError) as error:
        return {"failed": f"{type(error).__name__}: {first_line(error)}"[:300]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {
        "pairs a second": round(made.training.train_batch_size / seconds, 3),
        "share of the matrix rate": round(needs.step_operations / seconds / rate, 3),
        "peak GB": round(peak / 1e9, 2),
        "counted GB": round(needs.training / 1e9, 2),
        "seconds with the start": round(time.perf_counter() - began, 1),
    }


def drawn(made: Recipe, steps: int = 25) -> dict[str, float]:
    """Pictures a second in so many steps with guidance, from single passes of the network and of the VAE."""
    model: Any = denoiser_of(made, outline="random")
    policy = policy_of(made, model)
    needs = counted(made)
    pass_, decode = plan.drawing_of_one(made, policy, model, needs.row)
    peak = Peak()
    network = min(plan.timed(pass_) for _ in range(3))
    vae = min(plan.timed(decode) for _ in range(3))
    return {"pictures a second": round(1 / (steps * network + vae), 4), "peak GB": round(peak.bytes() / 1e9, 2)}


def checked(recipe: str, options: dict[str, Any], folder: Path) -> str:
    """``passed``, or how a run ended."""
    given = {"max_train_steps": 3, "output_dir": str(folder), "evaluation_prompts": None, "validation_prompts": [], **options}
    if recipes.load(recipe).online.train_prompts is None:
        given |= {"cache_dir": str(folder.parent / "cache"), "max_train_samples": 32}
    try:
        palate.train(recipe, logging_steps=1, **given)
    except (UserError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {first_line(error)}"[:300]
    return "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the miniature models, few cases")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins after that")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: add --tiny, which measures the miniature models on the CPU")
    end = time.monotonic() + 60 * given.minutes
    everywhere = dict.fromkeys(TINY, FEW) if given.tiny else dict.fromkeys(FULL, (*OPTIONS, *CHANGES))
    results = everything(end, everywhere, FEW_CHECKS if given.tiny else tuple(CHECKS))
    given.output.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))


def everything(end: float, wanted: dict[str, tuple[str, ...]], checks: tuple[str, ...]) -> dict[str, Any]:
    """All that is measured before the clock (of ``time.monotonic``) shows ``end``.

    wanted: of each model the cases.
    """
    rates = {precision: plan.matrix_rate(precision) for precision in ("no", "bf16", *([] if device() == "cpu" else ["fp16"]))}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results: dict[str, Any] = {
        "machine": {"device": name, "GB": round(device_memory() / 1e9, 1), **versions()},
        "matrix products, 10^12 a second": {precision: round(rate / 1e12, 2) for precision, rate in rates.items()},
        "checks": {},
        "models": {},
        "left out": [],
    }

    def due(what: str) -> bool:
        if time.monotonic() > end:
            results["left out"].append(what)
        return time.monotonic() <= end

    with tempfile.TemporaryDirectory() as place:
        for name in checks:
            if due(name):
                recipe, options = CHECKS[name]
                results["checks"][name] = checked(recipe, options, Path(place) / name.replace(" ", "-"))
        for model, names in wanted.items():
            recipe = (FULL | TINY)[model]
            folder = skeleton(model, Path(place) / model.replace(" ", "-")) if model in FULL else Path(model)
            made = on(recipes.load(recipe), folder)
            found = results["models"][model] = {"recipe": recipe, "cases": {}}
            for name, changed, change in cases(made, names):
                if due(f"{model}, {name}"):
                    rate = rates.get(changed.training.mixed_precision, rates["no"])
                    found["cases"][name] = measured(changed, change, rate)
            if due(f"{model}, drawing"):
                found["drawing"] = drawn(made)
    return results


def table(results: dict[str, Any]) -> list[str]:
    """For docs/speed.md."""
    columns = ("pairs a second", "share of the matrix rate", "peak GB", "counted GB")
    lines = [f"{results['machine']['device']}, {results['matrix products, 10^12 a second']} x 10^12 a second", ""]
    lines += [f"| model | case | {' | '.join(columns)} |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for model, found in results["models"].items():
        for name, case in found["cases"].items():
            told = case["failed"] + " | | |" if "failed" in case else " | ".join(str(case[column]) for column in columns) + " |"
            lines.append(f"| {model} | {name} | {told}")
        if "drawing" in found:
            lines.append(
                f"| {model} | drawing | {found['drawing']['pictures a second']} pictures | | {found['drawing']['peak GB']} | |"
            )
    lines += ["", *(f"{name}: {told}" for name, told in results["checks"].items())]
    return [*lines, *(f"left out for time: {what}" for what in results["left out"])]


if __name__ == "__main__":
    main()
