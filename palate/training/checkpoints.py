"""Checkpoints: ``checkpoint-{step}/`` holds all a run needs to go on as if it had never stopped.

``weights.safetensors`` (the trainable weights), ``state.pt`` (optimizer, counters; plain tensors and numbers, read without
executing code) and ``recipe.json`` (what the run was told, to refuse going on with something else).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from palate.base.errors import UserError, first_line, short
from palate.base.files import share
from palate.base.options import leaves

MAY_DIFFER = frozenset(
    {
        "output_dir",
        "push_to_hub",
        "resume_from_checkpoint",
        "max_train_steps",
        "num_train_epochs",
        "train_batch_size",
        "gradient_accumulation_steps",
        "shard_model",
        "compile",
        "logging_steps",
        "sample_steps",
        "eval_steps",
        "checkpointing_steps",
        "early_stopping_patience",
        "checkpoints_total_limit",
        "report_to",
        "cache_dir",
        "cache_limit",
        "rounds",
        "sample_batch_size",
        "held_out_rewards",
        "held_out_pictures",
        "kl_budget",
        "reward_timeout",
        "reward_retries",
        "evaluation",
    }
)
"""Options that may change on resuming. The product of batch size, accumulation and processes is checked by the loop."""


ORIGIN = "origin"
"""Key of a recipe under which stands what data and weights it was trained on, by digests of their contents."""
PATHS = frozenset(
    {"train_data", "more_train_data", "validation_data", "pretrained_model_name_or_path", "pretrained_lora", "train_prompts"}
)
"""Where data and weights lie: on another machine elsewhere, where a checkpoint tells their contents."""


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint can keep: plain numbers, texts and tensors, nested as they may be."""

    def state_dict(self) -> Mapping[str, object]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """What was read from ``path``: trainable tensors by name, the loop's state, the recipe it was trained with."""

    path: Path
    weights: dict[str, Tensor]
    state: dict[str, Any]
    recipe: dict[str, object]


def save(
    output_dir: str | Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    state: Mapping[str, object],
    recipe: Mapping[str, object],
    total_limit: int | None = None,
) -> Path:
    """Write ``checkpoint-{step}``, whole or not at all, and remove the oldest beyond ``total_limit``.

    Raises:
        UserError: it could not be written (a full disk, mostly); the earlier checkpoints are untouched.
    """
    output_dir = Path(output_dir)
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, partial / "weights.safetensors")
        torch.save(dict(state), partial / "state.pt")
        (partial / "recipe.json").write_text(json.dumps(recipe, indent=1, default=str), encoding="utf-8")
        share(partial)
        if final.exists():  # written by an earlier run that was resumed before this step
            old = output_dir / f".checkpoint-{step}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
            os.replace(partial, final)
            shutil.rmtree(old)
        else:
            os.replace(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library reports a full disk in its own way
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest(output_dir)
        raise UserError(
            f"checkpoint of step {step} cannot be written to {output_dir} ({first_line(error)}): free some space"
            + (f" and resume from {kept.name}" if kept else "")
        ) from error
    if total_limit is not None:
        for old in _all(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return final


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        UserError: missing, incomplete or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no checkpoint at {path}: expected a folder such as checkpoint-500")
    try:
        weights = load_file(path / "weights.safetensors")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        recipe = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path} is damaged ({first_line(error)}): resume from an earlier one") from error
    return Checkpoint(path, weights, state, recipe)


def latest(output_dir: str | Path) -> Path | None:
    """The checkpoint of the highest step in ``output_dir``, if there is any."""
    found = _all(Path(output_dir))
    return found[-1] if found else None


def check_recipe(
    checkpoint: Checkpoint,
    recipe: Mapping[str, object],
    may_differ: Collection[str] = MAY_DIFFER,
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Refuse to go on with another recipe than the checkpoint's.

    Args:
        may_differ: names of keys or whole sections, at any depth, in which the two may differ.
        defaults: what options stood at that the checkpoint does not name, for it was written before there were such.

    Raises:
        UserError: names the keys that differ, with both values.
    """
    now, unsaid = (dict(leaves(json.loads(json.dumps(values, default=str)))) for values in (recipe, defaults or {}))
    saved = {key: value for key, value in unsaid.items() if key in now} | dict(leaves(checkpoint.recipe))
    told = {key[1] for key in saved if key[0] == ORIGIN}
    free = {*may_differ, *(PATHS if told else (ORIGIN,))}
    differing = [key for key in {**saved, **now} if saved.get(key) != now.get(key) and not set(key) & free]
    if others := [key[1] for key in differing if key[0] == ORIGIN]:
        raise UserError(
            f"{checkpoint.path} was trained on other {' and '.join(others)} than are there now (by their contents, wherever "
            "they lie): resume with the same, or begin anew in another output_dir"
        )
    if differing:
        changes = ", ".join(f"{'.'.join(key)} was {short(saved.get(key))}, is {short(now.get(key))}" for key in differing[:3])
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise UserError(
            f"{checkpoint.path} was trained otherwise: {changes}{more}; resume with the same values, "
            "or begin anew in another output_dir"
        )


def _all(output_dir: Path) -> list[Path]:
    """Complete checkpoints, by step."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]
