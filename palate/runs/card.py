"""The model card of a run: README.md beside its weights, as model hubs show it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from safetensors import safe_open

from palate.base.files import write_atomically
from palate.base.hub import is_hub_id
from palate.base.jsonl import JsonObject, read_object
from palate.base.options import dumps
from palate.data.selection import same_prompt
from palate.evaluation.compare import percent
from palate.evaluation.folders import read_result, read_run
from palate.evaluation.manifest import read_manifest
from palate.models.files import KOHYA_FILE, LORA_FILE, PARTS
from palate.online.options import Arithmetic
from palate.runs.recipe import Recipe

if TYPE_CHECKING:
    from palate.models.denoiser import Denoiser

CARD = "README.md"
PUBLIC = (CARD, LORA_FILE, KOHYA_FILE, *(f"{part}/*" for part in PARTS), "before_after.png")
"""What of a run is for others: no path of this machine stands in these."""


def write_card(out: Path, recipe: Recipe, denoiser: Denoiser) -> Path:
    """Write the card from what the folder of a run holds: weights, ``run.json``, and ``metrics.json`` if models were compared.

    denoiser: the model that was trained.
    """
    full = recipe.policy.train_method == "full"
    base = recipe.model.pretrained_model_name_or_path
    shown = base if is_hub_id(base) else Path(base).name
    parts = recipe.space if isinstance(recipe.space, list) else [recipe.space]
    prompts = recipe.evaluation.validation_prompts if recipe.evaluation.validation_file is None else ()
    text = _template().render(
        front=_front(recipe, denoiser),
        name=out.resolve().name,
        shown=shown,
        taste="preferences" if recipe.online.train_prompts is None else "rewards",
        method=recipe.objective["name"],
        space=" + ".join(part["name"] for part in parts),
        weights=f"all weights of the {denoiser.part_name}" if full else _lora(out, recipe),
        **_comparison(out),
        full=full,
        pipeline=denoiser.card.pipeline,
        network=denoiser.card.network,
        part=denoiser.part,
        base=base if is_hub_id(base) else f"path/to/{shown}",
        lora_file=LORA_FILE,
        kohya_file=KOHYA_FILE if denoiser.kohya is not None else None,
        prompt=json.dumps(prompts[0] if prompts else "a cat in the rain", ensure_ascii=False),
        sampling=recipe.evaluation,
        facts=_facts(recipe, read_run(out)),
        recipe=_public(recipe),
    )
    path = out / CARD
    write_atomically(path, text.encode())
    return path


def _template() -> Template:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    found.filters |= {"bare": _bare, "percent": percent, "yaml": lambda content: dumps(content).rstrip()}
    return found.get_template("card.md.jinja")


def _front(recipe: Recipe, denoiser: Denoiser) -> dict[str, object]:
    """What hubs read and sort by."""
    full = recipe.policy.train_method == "full"
    base, data = recipe.model.pretrained_model_name_or_path, recipe.data.train_data
    front: dict[str, object] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [
            *("text-to-image", "diffusers", denoiser.card.tag),
            *(() if full else ("lora",)),
            *("preference-alignment", recipe.objective["name"], "palate"),
        ],
    }
    if is_hub_id(base):
        front |= {"base_model": base, "base_model_relation": "finetune" if full else "adapter"}
    if recipe.online.train_prompts is None and is_hub_id(data):
        front["datasets"] = [data]
    return front


def _lora(out: Path, recipe: Recipe) -> str:
    """What the LoRA is; a continued one has a rank of its own, whatever the recipe says."""
    if recipe.policy.pretrained_lora is None:
        kind = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}[recipe.policy.lora_kind]
        return f"a {kind} of rank {recipe.policy.rank}"
    with safe_open(out / LORA_FILE, "pt") as opened:
        ranks = {opened.get_slice(name).get_shape()[0] for name in opened.keys() if "lora_A" in name}  # noqa: SIM118
    rank = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    return f"a LoRA of {rank}, continued from another"


def _comparison(out: Path) -> dict[str, object]:
    """Base beside tuned; ``compared`` is None where they have not been."""
    if not (out / "metrics.json").is_file():
        return {"compared": None}
    result, _ = read_result(out / "metrics.json")
    versus = result.versus[0]
    flags = [*versus.flags, *_chosen_on(out)]
    return {"compared": result, "versus": versus, "flags": flags, "picture": (out / "before_after.png").is_file()}


def _chosen_on(out: Path) -> list[str]:
    """Of the best weights of a run: whether they were chosen on prompts that they were then compared on."""
    if not (out / "found.json").is_file():
        return []
    chosen = {same_prompt(text) for text in read_object(out / "found.json").get("prompts", [])}
    compared = {same_prompt(picture.prompt) for picture in read_manifest(out / "evaluation" / "tuned", check_files=False)}
    if not (both := len(chosen & compared)):
        return []
    return [f"these weights were chosen among those of the run on {len(chosen)} prompts, of which {both} are compared on here"]


def _facts(recipe: Recipe, about: JsonObject) -> dict[str, object]:
    training = recipe.training
    chosen = {name: f"auto, which chose {number:g}" for name, number in about.get("chosen", {}).items()}
    hyper = ", ".join(f"{key} {chosen.get(key, value)}" for key, value in recipe.objective.items() if key != "name")
    return {
        "objective": recipe.objective["name"] + (f" ({hyper})" if hyper else ""),
        **_evidence(recipe, about),
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler}, {training.lr_warmup_steps} steps of warm-up",
        "optimizer": training.optimizer,
        "precision": training.mixed_precision,
        "frozen weights": recipe.model.quantize,
        "seeds": f"training {training.seed}, evaluation {recipe.evaluation.evaluation_seed}",
        "versions": ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items()) or None,
    }


def _evidence(recipe: Recipe, about: JsonObject) -> dict[str, object]:
    """What was learned from, and how much of it: pairs, single pictures, or pictures that the model drew itself."""
    training, online = recipe.training, recipe.online
    evidence = recipe.method.evidence
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
        singles = ", each as a liked and a disliked picture" if recipe.method.names("label") else ", their winners"
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


def _public(recipe: Recipe) -> JsonObject:
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
