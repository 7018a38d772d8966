"""A recipe carried out: encode, train, save, compare, report."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
import typing
from importlib import metadata
from pathlib import Path
from typing import Any

from palate import recipe as recipes
from palate.errors import UserError
from palate.miniature import world
from palate.recipe import Recipe


def train(recipe: Recipe, *, command: str = "") -> Path:
    """Train as ``recipe`` says and, if it names evaluation prompts, compare with the base model.

    Returns:
        The output folder: ``pytorch_lora_weights.safetensors`` (or ``unet/``), ``recipe.yaml``, ``log.jsonl``, ``train.log``,
        ``samples/``, checkpoints, and from the comparison ``report.html``, ``before_after.png``, ``metrics.json``.

    Raises:
        UserError: a mistake in the recipe or the data; before any weights are loaded where that is possible.
        palate.training.loop.Stopped: interrupted, after saving a checkpoint.
    """
    out = Path(recipe.training.output_dir)
    resuming = recipe.training.resume_from_checkpoint is not None
    _check_output(out, resuming)
    _evaluation_prompts(recipe)
    _judges(recipe)
    source = world.pairs() if recipe.data.train_data == "miniature-pairs" else Path(recipe.data.train_data)
    from palate.data import pairs as pair_files

    reader = pair_files.read_pairs(
        source,
        ties=recipe.data.ties,
        max_bad_rows=recipe.data.max_bad_rows,
        max_train_samples=recipe.data.max_train_samples,
        columns=recipe.data.columns or None,
    )

    import torch

    from palate.data.cache import TensorCache
    from palate.data.encode import encode_pairs
    from palate.models.policy import Policy
    from palate.models.sd import check_resolution
    from palate.training import loop, steps

    denoiser = _denoiser(recipe)
    resolution = check_resolution(denoiser, recipe.data.resolution or denoiser.default_resolution)
    fingerprint = denoiser.fingerprint()
    encoded = encode_pairs(
        reader,
        encode_images=denoiser.encode_images,
        encode_text=lambda prompts: denoiser.encode_prompts(prompts).tensors,
        image_fingerprint=fingerprint["vae"],
        text_fingerprint=fingerprint["text"],
        cache=TensorCache(Path(recipe.data.cache_dir).expanduser()),
        resolution=resolution,
        random_flip=recipe.data.random_flip,
        center_crop=recipe.data.center_crop,
        seed=recipe.training.seed,
    )
    _say_counts(reader.counts)
    held_out = None
    if recipe.data.validation_fraction > 0 and len(set(encoded.prompts)) > 1:
        encoded, held_out = encoded.split(recipe.data.validation_fraction, recipe.training.seed)
    objective, evidence = recipes.resolve_objective(recipe.objective)
    if evidence == "samples":
        encoded = encoded.without_ties()
    policy = Policy(
        denoiser,
        kind=recipe.policy.train_method,
        rank=recipe.policy.rank,
        lora_alpha=recipe.policy.lora_alpha,
        gradient_checkpointing=recipe.policy.gradient_checkpointing,
        seed=recipe.training.seed,
    )
    space = recipes.resolve_space(recipe.space, policy)
    make = steps.pair_step if evidence == "pairs" else steps.sample_step
    samples = _Samples(recipe, denoiser, policy, resolution)
    denoiser.release()

    def on_evaluate(step: int) -> dict[str, float]:
        if held_out is None or all(p.label == 0.5 for p in held_out.pairs):
            return {}
        return {"held_out_accuracy": steps.implicit_accuracy(policy, space, held_out, batch_size=32)}

    out.mkdir(parents=True, exist_ok=True)
    recipes.write(recipe, out / "recipe.yaml")
    _write_json(out / "run.json", {"command": command, "versions": versions(), "pairs": len(encoded), **_counts(reader.counts)})
    loop.train(
        make(policy, space, objective),
        policy,
        encoded,
        options=recipe.training,
        recipe=recipe.as_dict(),
        on_sample=samples.draw if recipe.evaluation.validation_prompts else None,
        on_evaluate=on_evaluate,
    )
    if int(os.environ.get("RANK", "0")) > 0:
        return out
    saved = policy.save(out)
    _tell(f"wrote {saved}")
    if recipe.evaluation.evaluation_prompts is not None:
        with torch.no_grad():
            _compare(recipe, denoiser, policy.frozen, policy.trainable_module, resolution, out, command)
    return out


def evaluate(recipe: Recipe, *, command: str = "") -> None:
    """Compare base and tuned model of a finished run again, in its folder."""
    out = Path(recipe.training.output_dir)
    _evaluation_prompts(recipe)
    _judges(recipe)
    if recipe.evaluation.evaluation_prompts is None:
        raise UserError(f"{out}/recipe.yaml names no prompts; add --evaluation_prompts FILE")
    lora, full = out / "pytorch_lora_weights.safetensors", out / "unet"
    if not lora.is_file() and not full.is_dir():
        raise UserError(f"{out} holds neither {lora.name} nor unet/; is the training finished?")
    from palate.models.policy import twin
    from palate.models.sd import check_resolution

    denoiser = _denoiser(recipe)
    resolution = check_resolution(denoiser, recipe.data.resolution or denoiser.default_resolution)
    base = twin(denoiser.unet, share=True).eval()
    if lora.is_file():
        denoiser.pipeline().load_lora_weights(str(out))
        tuned = denoiser.unet
    else:
        tuned = type(denoiser.unet).from_pretrained(str(full)).to(denoiser.device).eval()  # type: ignore[attr-defined]
    _compare(recipe, denoiser, base, tuned, resolution, out, command)


def versions() -> dict[str, str]:
    """What produced a result: Python, Palate and the libraries that decide numbers."""
    names = ("palate", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# Parts ---------------------------------------------------------------------------------------------------------------------


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_output(out: Path, resuming: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"output_dir {out} is a file; name a folder")
    if not resuming and any((out / name).exists() for name in ("recipe.yaml", "log.jsonl")):
        raise UserError(
            f"{out} already holds a run; name another --output_dir, or continue it with --resume_from_checkpoint latest"
        )
    if not resuming and out.is_dir() and next(out.glob("checkpoint-*"), None):
        raise UserError(f"{out} already holds checkpoints; name another --output_dir")


def _denoiser(recipe: Recipe) -> Any:
    import torch

    from palate.models import load_denoiser

    name = recipe.model.pretrained_model_name_or_path
    if name in world.MODELS:
        name = str(world.checkpoint(name))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return load_denoiser(
        name,
        mixed_precision=recipe.training.mixed_precision,
        device=device,
        revision=recipe.model.revision,
        variant=recipe.model.variant,
    )


def _counts(counts: Any) -> dict[str, Any]:
    return {
        "rows": counts.rows,
        "ties_dropped": counts.ties_dropped,
        "ties_kept": counts.ties_kept,
        "bad_rows": [str(b) for b in counts.bad],
    }


def _say_counts(counts: Any) -> None:
    for bad in counts.bad:
        _tell(f"skipped {bad}")
    _tell(
        f"{counts.rows} rows: {counts.pairs} pairs, {counts.ties_dropped} ties dropped, {counts.ties_kept} ties kept, "
        f"{len(counts.bad)} bad rows skipped"
    )


def _evaluation_prompts(recipe: Recipe) -> list[str]:
    from palate.data.prompts import read_prompts

    wanted = recipe.evaluation.evaluation_prompts
    if wanted is None:
        return []
    prompts = read_prompts(world.unseen_prompts() if wanted == "miniature-unseen" else wanted)
    return prompts[: recipe.evaluation.num_evaluation_prompts]


def _judges(recipe: Recipe) -> dict[str, tuple[str, Path | None, str]]:
    """Name -> kind, folder, what it tells. Refuses unknown ones before any weights are loaded."""
    from palate.errors import nearest
    from palate.judges import KINDS

    found: dict[str, tuple[str, Path | None, str]] = {}
    for name in recipe.evaluation.judges:
        kind, colon, folder = name.partition(":")
        if name in world.JUDGES:
            found[name] = (world.JUDGES[name][0], world.checkpoint(name), world.JUDGES[name][1])
        elif kind in KINDS and (colon or kind.startswith("jpeg")):
            found[name] = (kind, Path(folder) if colon else None, "held out")
        else:
            raise UserError(f"no judge {name!r}{nearest(name, [*world.JUDGES, *(f'{k}:FOLDER' for k in KINDS)])}")
    if recipe.evaluation.evaluation_prompts is not None and not found:
        raise UserError("evaluation_prompts are given but no judges; add --judges '[mini-heldout]' or kind:folder")
    return found


class _Samples:
    """Pictures of the validation prompts during training: the same seeds every time, base beside tuned."""

    def __init__(self, recipe: Recipe, denoiser: Any, policy: Any, resolution: int):
        self.options, self.denoiser, self.policy, self.resolution = recipe.evaluation, denoiser, policy, resolution
        self.folder = Path(recipe.training.output_dir) / "samples"
        self.base: list[Any] = []
        prompts = list(self.options.validation_prompts)
        if prompts:
            denoiser.remember(prompts)

    def _generate(self, unet: Any) -> list[Any]:
        prompts = list(self.options.validation_prompts)
        return self.denoiser.generate(
            prompts,
            [self.options.evaluation_seed + i for i in range(len(prompts))],
            unet=unet,
            num_inference_steps=self.options.num_inference_steps,
            guidance_scale=self.options.guidance_scale,
            resolution=self.resolution,
            batch_size=self.options.evaluation_batch_size,
        )

    def draw(self, step: int) -> None:
        from palate.evaluation.grid import before_after_grid

        self.base = self.base or self._generate(self.policy.frozen)
        tuned = self._generate(self.policy.trainable_module) if step else self.base
        self.folder.mkdir(parents=True, exist_ok=True)
        before_after_grid(list(self.options.validation_prompts), self.base, tuned, self.folder / f"step-{step:06d}.png", columns=4)
        self.denoiser.release()


def _compare(recipe: Recipe, denoiser: Any, base: Any, tuned: Any, resolution: int, out: Path, command: str) -> None:
    from palate.evaluation.compare import compare, diversity, headline, write_metrics
    from palate.evaluation.grid import before_after_grid
    from palate.evaluation.report import write_report
    from palate.judges import load_judge, score
    from palate.training.log import read_log

    options, began = recipe.evaluation, time.monotonic()
    unique = _evaluation_prompts(recipe)
    prompts = [p for p in unique for _ in range(options.images_per_prompt)]
    seeds = [options.evaluation_seed + i for i in range(len(prompts))]
    pictures = {}
    for side, unet in (("base", base), ("tuned", tuned)):
        pictures[side] = _generated(recipe, denoiser, unet, prompts, seeds, resolution, out / "evaluation" / side, side)
    scores, told = {}, {}
    for name, (kind, folder, tells) in _judges(recipe).items():
        judge = load_judge(kind, folder, device=denoiser.device)
        scores[name] = tuple(score(judge, pictures[side], prompts) for side in ("base", "tuned"))
        told[name] = tells
    found = compare(scores, prompts, kinds=told)
    sentence = headline(found, unseen=options.evaluation_prompts == "miniature-unseen")
    variety = diversity(pictures["base"], pictures["tuned"], prompts)
    shown = _first_of_each(prompts, 12)
    before_after_grid(
        [prompts[i] for i in shown],
        [pictures["base"][i] for i in shown],
        [pictures["tuned"][i] for i in shown],
        out / "before_after.png",
        columns=4,
    )
    run_file = out / "run.json"
    run = json.loads(run_file.read_text()) if run_file.is_file() else {}
    write_metrics(out / "metrics.json", found, {"headline": sentence, "diversity": dataclasses.asdict(variety)})
    method = f"{recipe.objective['name']} in {_space_name(recipe.space)} space"
    shown = _first_of_each(prompts, 48)
    write_report(
        out / "report.html",
        title=f"{Path(recipe.model.pretrained_model_name_or_path).name}, aligned by {method}",
        headline=sentence,
        comparisons=found,
        prompts=[prompts[i] for i in shown],
        base_images=[pictures["base"][i] for i in shown],
        tuned_images=[pictures["tuned"][i] for i in shown],
        training_curves=read_log(out / "log.jsonl") if (out / "log.jsonl").is_file() else [],
        settings={"command": run.get("command") or command, **_flat(recipe.as_dict())},
        versions=run.get("versions", versions()),
        notes=[variety.sentence()],
    )
    _tell(f"compared in {time.monotonic() - began:.0f} s; see {out / 'report.html'}")
    print(sentence)


def _generated(
    recipe: Recipe, denoiser: Any, unet: Any, prompts: list[str], seeds: list[int], resolution: int, folder: Path, side: str
) -> list[Any]:
    """One picture per prompt, kept as PNG beside a manifest."""
    options = recipe.evaluation
    _tell(f"generating {len(prompts)} pictures of the {side} model")
    images = denoiser.generate(
        prompts,
        seeds,
        unet=unet,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        resolution=resolution,
        batch_size=options.evaluation_batch_size,
        progress=True,
    )
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    lines = []
    for index, (image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
        name = f"{index:05d}.png"
        image.save(partial / name)
        lines.append(json.dumps({"file": name, "prompt": prompt, "seed": seed, "model": side}))
    (partial / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return images


def _first_of_each(prompts: list[str], limit: int) -> list[int]:
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(prompt, index)
    return list(first.values())[:limit]


def _space_name(space: Any) -> str:
    parts = space if isinstance(space, list) else [space]
    return " + ".join(p["name"] for p in parts)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{name}.")
        elif inner is not None:
            flat[prefix + name] = inner
    return flat


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def options_help() -> str:
    """Every option of a recipe with its default, by section."""
    lines = ["palate train RECIPE [--option value ...]", "", "Recipes: " + ", ".join(recipes.built_in()), ""]
    hints = typing.get_type_hints(Recipe)
    lines += ["objective  --objective dpo | cpo | sft | package.module:function, its keywords as --objective.beta 2000"]
    lines += ["space      --space latent | perceptual, its keywords as --space.layers mid"]
    for name in recipes.SECTIONS:
        kind = hints[name]
        if not dataclasses.is_dataclass(kind):
            continue
        lines += ["", name]
        for leaf in dataclasses.fields(kind):
            default = leaf.default if leaf.default is not dataclasses.MISSING else leaf.default_factory()  # type: ignore[misc]
            lines.append(f"  --{leaf.name} (default: {default})")
    return "\n".join(lines)
