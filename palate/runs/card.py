"""The model card of a run: README.md beside its weights, as model hubs show it."""

from __future__ import annotations

import json
import re
from inspect import signature
from pathlib import Path
from typing import Any

from safetensors import safe_open

from palate.base.files import write_atomically
from palate.base.hub import is_hub_id
from palate.base.jsonl import read_object
from palate.base.options import dumps
from palate.data.selection import same_prompt
from palate.evaluation.compare import percent
from palate.evaluation.folders import read_result, read_run
from palate.evaluation.manifest import read_manifest
from palate.models.kohya import KOHYA_FILE
from palate.models.lora import LORA_FILE
from palate.online.options import Arithmetic
from palate.runs.assembly import resolve_objective
from palate.runs.recipe import Recipe

CARD = "README.md"
PUBLIC = (CARD, LORA_FILE, KOHYA_FILE, "unet/*", "before_after.png")
"""What of a run is for others: no path of this machine stands in these."""


def write_card(out: Path, recipe: Recipe, *, family: str) -> Path:
    """Write the card from what the folder of a run holds: weights, ``run.json``, and ``metrics.json`` if models were compared.

    Args:
        family: ``sd`` or ``sdxl``.
    """
    full = recipe.policy.train_method == "full"
    base = recipe.model.pretrained_model_name_or_path
    shown = base if is_hub_id(base) else Path(base).name
    about = read_run(out)
    method = recipe.objective["name"]
    parts = recipe.space if isinstance(recipe.space, list) else [recipe.space]
    space = " + ".join(part["name"] for part in parts)
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [
            *("text-to-image", "diffusers", "stable-diffusion-xl" if family == "sdxl" else "stable-diffusion"),
            *(() if full else ("lora",)),
            *("preference-alignment", method, "palate"),
        ],
    }
    if is_hub_id(base):
        front["base_model"] = base
        front["base_model_relation"] = "finetune" if full else "adapter"
    data = recipe.data.train_data
    if recipe.online.train_prompts is None and is_hub_id(data):
        front["datasets"] = [data]
    name = out.resolve().name
    weights = "all weights of the U-Net" if full else _lora(out, recipe)
    taste = "preferences" if recipe.online.train_prompts is None else "rewards"
    lines = [
        "---",
        dumps(front).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"{shown}, aligned with {taste} by {method} in {space} space: {weights}, made with Palate.",
        "",
        *_comparison(out),
        *_usage(base, shown, family, full, recipe),
        "## Training",
        "",
        *_facts(recipe, about),
        "",
        "<details><summary>The whole recipe</summary>",
        "",
        "```yaml",
        dumps(_public(recipe)).rstrip(),
        "```",
        "",
        "</details>",
        "",
        "The licence of the base model applies to these weights too.",
    ]
    path = out / CARD
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def _lora(out: Path, recipe: Recipe) -> str:
    """What the LoRA is; a continued one has a rank of its own, whatever the recipe says."""
    if recipe.policy.pretrained_lora is None:
        return f"a LoRA of rank {recipe.policy.rank}"
    with safe_open(out / LORA_FILE, "pt") as opened:
        ranks = {opened.get_slice(name).get_shape()[0] for name in opened.keys() if "lora_A" in name}  # noqa: SIM118
    rank = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    return f"a LoRA of {rank}, continued from another"


def _comparison(out: Path) -> list[str]:
    lines = ["## Against the base model", ""]
    if not (out / "metrics.json").is_file():
        return [*lines, "Not compared yet.", ""]
    result, _ = read_result(out / "metrics.json")
    versus = result.versus[0]
    lines += [
        _bare(versus.headline),
        "",
        f"Same prompts and seeds for both: {result.pictures} pictures of {result.prompts} prompts. A tie counts half.",
        "",
        "| judge | part in training | win rate | 95 % interval | won / tied / lost | mean before | mean after |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for c in versus.comparisons:
        w, part = c.win_rate, "its taste was trained on" if c.contaminated else c.kind
        lines.append(
            f"| {_bare(c.judge)} | {part} | {percent(w.rate)} % | {percent(w.low)}-{percent(w.high)} % | "
            f"{w.wins} / {w.ties} / {w.losses} | {c.mean_base:.4g} | {c.mean_tuned:.4g} |"
        )
    flags = [*versus.flags, *_chosen_on(out)]
    lines += ["", *(f"Warning: {flag}" for flag in flags), *([""] if flags else [])]
    if (out / "before_after.png").is_file():
        lines += ["![the same prompts and seeds before and after](before_after.png)", ""]
    return lines


def _chosen_on(out: Path) -> list[str]:
    """Of the best weights of a run: whether they were chosen on prompts that they were then compared on."""
    if not (out / "found.json").is_file():
        return []
    chosen = {same_prompt(text) for text in read_object(out / "found.json").get("prompts", [])}
    compared = {same_prompt(picture.prompt) for picture in read_manifest(out / "evaluation" / "tuned", check_files=False)}
    if not (both := len(chosen & compared)):
        return []
    return [f"these weights were chosen among those of the run on {len(chosen)} prompts, of which {both} are compared on here"]


def _usage(base: str, shown: str, family: str, full: bool, recipe: Recipe) -> list[str]:
    pipeline = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    name = base if is_hub_id(base) else f"path/to/{shown}"
    prompts = recipe.evaluation.validation_prompts
    prompt = prompts[0] if prompts else "a cat in the rain"
    lines = ["## Use", "", "```python", "import torch", f"from diffusers import {pipeline}"]
    if full:
        lines += [
            "from diffusers import UNet2DConditionModel",
            "",
            'unet = UNet2DConditionModel.from_pretrained("path/to/this/folder", subfolder="unet", torch_dtype=torch.float16)',
            f'pipe = {pipeline}.from_pretrained("{name}", unet=unet, torch_dtype=torch.float16).to("cuda")',
        ]
    else:
        lines += [
            "",
            f'pipe = {pipeline}.from_pretrained("{name}", torch_dtype=torch.float16).to("cuda")',
            f'pipe.load_lora_weights("path/to/this/folder", weight_name="{LORA_FILE}")',
        ]
    sampling = (
        f"num_inference_steps={recipe.evaluation.num_inference_steps}, guidance_scale={recipe.evaluation.guidance_scale:g}"
    )
    lines += [f"image = pipe({json.dumps(prompt, ensure_ascii=False)}, {sampling}).images[0]", "```", ""]
    if not full:
        lines += [f"For ComfyUI and A1111: put `{KOHYA_FILE}` into their LoRA folder and use it at strength 1.", ""]
    return lines


def _facts(recipe: Recipe, about: dict[str, Any]) -> list[str]:
    training = recipe.training
    chosen = {name: f"auto, which chose {number:g}" for name, number in about.get("chosen", {}).items()}
    hyper = ", ".join(f"{key} {chosen.get(key, value)}" for key, value in recipe.objective.items() if key != "name")
    rows = {
        "objective": recipe.objective["name"] + (f" ({hyper})" if hyper else ""),
        **_evidence(recipe, about),
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler}, {training.lr_warmup_steps} steps of warm-up",
        "optimizer": training.optimizer,
        "precision": training.mixed_precision,
        "seeds": f"training {training.seed}, evaluation {recipe.evaluation.evaluation_seed}",
        "versions": ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items()) or None,
    }
    return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items() if value is not None)]


def _evidence(recipe: Recipe, about: dict[str, Any]) -> dict[str, Any]:
    """What was learned from, and how much of it: pairs, single pictures, or pictures that the model drew itself."""
    training, online = recipe.training, recipe.online
    objective, evidence = resolve_objective(recipe.objective)
    if online.train_prompts is not None:
        update = Arithmetic.of(online, evidence).effective_batch
        unit = {"trajectories": "steps of pictures", "samples": "pictures", "pairs": "pairs"}[evidence]
        weights = online.rewards if isinstance(online.rewards, dict) else {}
        return {
            "data": f"the model's own pictures of {about.get('prompts', 'the')} prompts of {_bare(online.train_prompts)}",
            "rewards": ", ".join(f"{_bare(name)} {weights.get(name, '')}".rstrip() for name in online.rewards),
            "rounds": f"{'up to ' if online.kl_budget else ''}{online.rounds} of {online.samples_per_round} pictures",
            "steps": training.max_train_steps,
            "batch": f"{update} {unit} an update, {training.train_batch_size} at once",
        }
    data, trained = recipe.data.train_data, None
    if "pictures" in about:
        trained = f"{about['pictures']} single pictures"
    elif "pairs" in about:
        singles = (
            ", each as a liked and a disliked picture" if "label" in signature(objective).parameters else ", their winners"
        )
        trained = f"{about['pairs']} pairs" + (singles if evidence == "samples" else "")
    return {
        "data": data if is_hub_id(data) else Path(data).name,
        "trained on": trained,
        "steps": training.max_train_steps or f"{training.num_train_epochs} epochs",
        "batch": f"{training.train_batch_size} x {training.gradient_accumulation_steps} accumulated, a process",
    }


def _bare(text: str) -> str:
    """Of paths of this machine, such as in ``pickscore:/home/me/PickScore_v1``, the last name.

    >>> _bare("pickscore:/home/me/PickScore_v1")
    'pickscore:PickScore_v1'
    """
    return re.sub(r"(^|[\s:])(?:~|\.\.?)?/(?=\S)(?:[^\s:/]+/)*", r"\1", text)


def _public(recipe: Recipe) -> dict[str, Any]:
    """The recipe without folders of this machine: of a path its last name stays."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: bare(x) for key, x in value.items() if key not in ("output_dir", "cache_dir", "resume_from_checkpoint")
            }
        if isinstance(value, list):
            return [bare(x) for x in value]
        if isinstance(value, str):
            return Path(value).name if value.startswith(("/", "~/", "./", "../")) else _bare(value)
        return value

    return bare(recipe.as_dict())
