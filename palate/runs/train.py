"""A recipe carried out: encode, train, save, compare, report."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.base.errors import UserError
from palate.base.files import write_atomically
from palate.base.hub import check_push, push
from palate.base.machine import is_main, tell, versions
from palate.evaluation.accuracy import accuracy
from palate.miniature import world
from palate.models import cut_warning
from palate.names.judges import NamedJudge, find_judges, score_folders
from palate.names.prompts import find_prompts
from palate.runs import recipe as recipes
from palate.runs.card import PUBLIC, write_card
from palate.runs.export import about_training
from palate.runs.models import check_refiner_fits, load_base
from palate.runs.recipe import Recipe

if TYPE_CHECKING:
    from palate.data.prompts import Prompt
    from palate.evaluation.manifest import Picture


def train(recipe: Recipe, *, command: str = "") -> Path:
    """Train as ``recipe`` says and, if it names evaluation prompts, compare with the base model.

    Returns:
        The output folder: ``pytorch_lora_weights.safetensors`` and its kohya twin (or ``unet/``), ``recipe.yaml``,
        ``run.json``, ``log.jsonl``, ``train.log``, ``samples/``, checkpoints, and from the comparison ``evaluation/``,
        ``report.html``, ``before_after.png``, ``metrics.json``; and ``README.md``, a model card.

    Raises:
        UserError: a mistake in the recipe or the data; before any weights are loaded where that is possible. A run that
            fails before its first checkpoint leaves no output behind.
        palate.training.loop.Stopped: interrupted, after saving a checkpoint.
        KeyboardInterrupt: interrupted before or after training; its text says how to go on.
    """
    recipe = _at_home(recipe)
    out = Path(recipe.training.output_dir)
    if is_main():
        _check_output(recipe, out)
        if recipe.training.push_to_hub is not None:
            check_push(recipe.training.push_to_hub)
    _evaluation_prompts(recipe)
    _judges(recipe)
    check_refiner_fits(recipe.evaluation.refiner, recipe.model.pretrained_model_name_or_path, revision=recipe.model.revision)
    if recipe.policy.pretrained_lora is not None:
        from palate.models.lora import find_lora

        find_lora(recipe.policy.pretrained_lora)
    if recipe.online.train_prompts is not None:
        return _train_online(recipe, out, command)
    reader = _reader(recipe)

    validation = _validation_reader(recipe)

    from palate.training import steps
    from palate.training.fits import Draws
    from palate.training.measures import implicit_margins

    denoiser = _denoiser(recipe)
    resolution = recipe.data.resolution or denoiser.default_resolution
    objective, evidence = recipes.resolve_objective(recipe.objective)
    encoded, held_out = _encoded(recipe, denoiser, resolution, reader, validation)
    encoded = _learnable(encoded, objective, evidence)
    policy = _policy(recipe, denoiser)
    space = recipes.resolve_space(recipe.space, policy)
    wanted = recipe.training
    draws = Draws(
        wanted.t_min,
        wanted.t_max,
        wanted.snr_gamma,
        wanted.caption_dropout,
        denoiser.unconditional() if wanted.caption_dropout else None,
    )
    make = steps.pair_step if evidence == "pairs" else steps.sample_step
    step = make(policy, space, objective, draws, auto_beta=recipe.objective.get("beta") == recipes.AUTO)
    samples = _Samples(recipe, denoiser, policy, resolution)
    denoiser.release()

    def on_evaluate(step: int) -> dict[str, float]:
        if held_out is None or all(p.label == 0.5 for p in held_out.items):
            return {}
        margins, labels = implicit_margins(policy, space, held_out, batch_size=recipe.training.train_batch_size)
        found = accuracy(margins.tolist(), labels.tolist(), held_out.prompts)
        return {"held_out_accuracy": found.rate, "held_out_accuracy_low": found.low, "held_out_accuracy_high": found.high}

    what = "pictures" if reader.single else "pairs"
    about = {"command": command, "versions": versions(), what: len(encoded), **_counts(reader.counts)}
    if wanted.resume_from_checkpoint is None:
        step.begin(encoded)
        about |= {"chosen": dict(step.state)} if step.state else {}
        if "beta" in step.state:
            tell(f"beta {step.state['beta']:g}, chosen from the spread of errors")
    _train(
        recipe,
        recipe.training,
        policy,
        step,
        encoded,
        samples,
        on_evaluate,
        about,
    )
    _finish(recipe, denoiser, policy, resolution, out, command)
    return out


def evaluate(recipe: Recipe, *, command: str = "") -> None:
    """Compare base and tuned model of a finished run again, in its folder."""
    recipe = _at_home(recipe)
    out = Path(recipe.training.output_dir)
    if recipe.evaluation.evaluation_prompts is None:
        raise UserError(f"{out}/recipe.yaml names no prompts; add --evaluation_prompts FILE")
    _evaluation_prompts(recipe)
    _judges(recipe)
    check_refiner_fits(recipe.evaluation.refiner, recipe.model.pretrained_model_name_or_path, revision=recipe.model.revision)
    lora, full = out / "pytorch_lora_weights.safetensors", out / "unet"
    if not lora.is_file() and not full.is_dir():
        raise UserError(f"{out} holds neither {lora.name} nor unet/; is the training finished?")
    from palate.models.lora import load_lora, tuned
    from palate.models.policy import twin

    denoiser = _denoiser(recipe)
    base = twin(denoiser.unet, share=True)
    if recipe.policy.pretrained_lora is not None:
        load_lora(denoiser, base, recipe.policy.pretrained_lora)
    resolution = recipe.data.resolution or denoiser.default_resolution
    _compare(recipe, denoiser, base, tuned(denoiser, lora if lora.is_file() else full), resolution, out, command)
    write_card(out, recipe, family=denoiser.family)


# Parts ---------------------------------------------------------------------------------------------------------------------


def _train_online(recipe: Recipe, out: Path, command: str) -> Path:
    """The same job where the policy draws what it learns from."""
    from palate.runs import online

    found = online.find(recipe)
    tell(online.told(recipe, found))
    denoiser = _denoiser(recipe)
    resolution = recipe.data.resolution or denoiser.default_resolution
    if told := cut_warning(denoiser, (text for prompt in found.prompts for text in (prompt.text, prompt.negative))):
        tell(told)
    policy = _policy(recipe, denoiser)
    step, rollouts = online.assemble(recipe, found, denoiser, policy, resolution, progress=is_main() and sys.stderr.isatty())
    samples = _Samples(recipe, denoiser, policy, resolution)
    watch = online.Watch(recipe, found, denoiser, policy, rollouts, resolution, tell) if found.held_out else None
    denoiser.release()
    about: dict[str, Any] = {"command": command, "versions": versions(), "prompts": len(found.prompts)}
    # Whom an address served cannot be asked later.
    if serves := {name: reward.serves for name, reward in found.rewards.items() if reward.serves}:
        about["serves"] = serves
    _train(recipe, online.training_options(recipe), policy, step, rollouts, samples, watch, about)
    _finish(recipe, denoiser, policy, resolution, out, command)
    return out


def _policy(recipe: Recipe, denoiser: Any) -> Any:
    from palate.models.policy import Policy

    return Policy(
        denoiser,
        kind=recipe.policy.train_method,
        rank=recipe.policy.rank,
        lora_alpha=recipe.policy.lora_alpha,
        lora_layers=recipe.policy.lora_layers,
        gradient_checkpointing=recipe.policy.gradient_checkpointing,
        seed=recipe.training.seed,
        pretrained_lora=recipe.policy.pretrained_lora,
    )


def _finish(recipe: Recipe, denoiser: Any, policy: Any, resolution: int, out: Path, command: str) -> None:
    """Save what was trained and compare it with the base model."""
    if not is_main():
        return
    written = policy.save(out)
    tell(f"wrote {written}")
    if recipe.policy.train_method == "lora":
        from palate.models.export import KOHYA_FILE, save_kohya

        twin = save_kohya(denoiser, policy.trainable_module, out / KOHYA_FILE, about=about_training(recipe, out.resolve().name))
        tell(f"wrote {twin}, the same for ComfyUI and A1111")
    if recipe.evaluation.evaluation_prompts is not None:
        try:
            _compare(recipe, denoiser, policy.frozen, policy.trainable_module, resolution, out, command)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the trained weights are in {out}; compare them with: palate evaluate {out}") from None
    write_card(out, recipe, family=denoiser.family)
    if recipe.training.push_to_hub is not None:
        tell(f"pushed to {push(out, recipe.training.push_to_hub, PUBLIC, message='Align by Palate')}")


def _at_home(recipe: Recipe) -> Recipe:
    """The recipe with ``~/`` written out, which a shell does only where a word begins with it."""

    def written_out(options: Any, *names: str) -> Any:
        given = {name: getattr(options, name) for name in names}
        return dataclasses.replace(
            options, **{n: os.path.expanduser(v) for n, v in given.items() if (v or "").startswith("~/")}
        )

    return dataclasses.replace(
        recipe,
        model=written_out(recipe.model, "pretrained_model_name_or_path"),
        data=written_out(recipe.data, "train_data", "validation_data", "cache_dir"),
        policy=written_out(recipe.policy, "pretrained_lora"),
        training=written_out(recipe.training, "output_dir", "resume_from_checkpoint"),
        evaluation=written_out(recipe.evaluation, "evaluation_prompts", "refiner"),
    )


def _check_output(recipe: Recipe, out: Path) -> None:
    """Refuse an output folder that cannot be used, and a checkpoint that does not fit, before anything is read."""
    from palate.training import checkpoints

    if out.exists() and not out.is_dir():
        raise UserError(f"output_dir {out} is a file; name a folder")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"output_dir {out} cannot be made: {parent} is not a folder you may write to; name another")
    wanted, found = recipe.training.resume_from_checkpoint, checkpoints.latest(out)
    if wanted is not None:
        path = found if wanted == "latest" else Path(wanted)
        if path is None:
            raise UserError(f"{out} holds no checkpoint to resume from; leave out --resume_from_checkpoint to begin anew")
        # Without its weights, which are read where they are needed.
        checkpoints.check_recipe(checkpoints.Checkpoint(path, {}, {}, _saved_recipe(path)), recipe.as_dict())
    elif found is not None:
        raise UserError(
            f"{out} already holds a run; continue it with --resume_from_checkpoint latest, or name another --output_dir"
        )
    elif any((out / name).exists() for name in ("recipe.yaml", "log.jsonl", "pytorch_lora_weights.safetensors", "unet")):
        raise UserError(f"{out} already holds a run, without checkpoints; name another --output_dir, or delete that folder")


def _saved_recipe(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"there is no checkpoint at {path}; expected a folder such as checkpoint-500, or latest")
    try:
        return json.loads((path / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}); resume from an earlier one") from error


def _reader(recipe: Recipe) -> Any:
    """The pairs or pictures, of which the first is read at once: most mistakes in a data file are in every row."""
    from palate.data.pairs import read

    options = recipe.data
    reader = read(
        world.find_pairs(options.train_data),
        ties=options.ties,
        max_bad_rows=options.max_bad_rows,
        max_train_samples=options.max_train_samples,
        absolute_winners=options.absolute_winners,
        deduplicate=options.deduplicate,
        max_pairs_per_prompt=options.max_pairs_per_prompt,
        columns=options.columns or None,
        vote_question=options.vote_question,
        vote_weights=options.vote_weights,
    )
    if reader.single and recipes.resolve_objective(recipe.objective)[1] == "pairs":
        raise UserError(
            f"objective {recipe.objective['name']} compares two pictures, but {options.train_data} holds single ones: use kto "
            "or sft, or name pairs"
        )
    next(iter(reader))
    return reader


def _validation_reader(recipe: Recipe) -> Any:
    """The pairs on which implicit accuracy is measured, if they are named; the first is read at once."""
    from palate.data.pairs import read_pairs

    options = recipe.data
    if options.validation_data is None:
        return None
    reader = read_pairs(
        world.find_pairs(options.validation_data),
        max_bad_rows=options.max_bad_rows,
        columns=options.columns or None,
        vote_question=options.vote_question,
    )
    next(iter(reader))
    return reader


def _encoded(recipe: Recipe, denoiser: Any, resolution: int, reader: Any, validation: Any) -> tuple[Any, Any]:
    """What is trained on, and the held-out pairs or None; they share no prompt."""
    from palate.data.cache import TensorCache
    from palate.data.encode import encode
    from palate.data.encoded import EncodedPairs

    options = recipe.data
    how = {
        **denoiser.encoders(),
        "cache": TensorCache(options.cache_dir),
        "resolution": resolution,
        "random_flip": options.random_flip,
        "center_crop": options.center_crop,
        "seed": recipe.training.seed,
        "progress": is_main() and sys.stderr.isatty(),
    }
    encoded = encode(reader, **how)
    _say_counts(reader.counts, "pictures" if reader.single else "pairs")
    if told := cut_warning(denoiser, encoded.prompts):
        tell(told)
    if validation is not None:
        held_out = encode(validation, **how)
        kept = encoded.without_prompts(held_out.prompts)
        if len(kept) < len(encoded):
            tell(f"{len(encoded) - len(kept)} left out, whose prompts are in {options.validation_data}")
        return kept, held_out
    # Implicit accuracy is of pairs; single pictures are all trained on.
    if isinstance(encoded, EncodedPairs) and options.validation_fraction > 0 and len(set(encoded.prompts)) > 1:
        return encoded.split(options.validation_fraction, recipe.training.seed)
    return encoded, None


def _learnable(encoded: Any, objective: Any, evidence: str) -> Any:
    """What an objective can learn from."""
    from palate.data.encoded import EncodedPairs

    if evidence == "pairs":
        return encoded
    if isinstance(encoded, EncodedPairs):
        return encoded.without_ties()
    if "label" not in inspect.signature(objective).parameters:
        return encoded.liked()
    if len({item.label > 0.5 for item in encoded.items}) == 1:
        tell("all pictures have the same vote: this objective learns from likes beside dislikes")
    return encoded


def _denoiser(recipe: Recipe) -> Any:
    options = recipe.model
    return load_base(
        options.pretrained_model_name_or_path,
        mixed_precision=recipe.training.mixed_precision,
        revision=options.revision,
        variant=options.variant,
        # All weights are trained, from their full precision on; the forward pass is autocast all the same.
        full=recipe.policy.train_method == "full",
    )


def _train(
    recipe: Recipe,
    options: Any,
    policy: Any,
    step: Any,
    data: Any,
    samples: _Samples,
    on_evaluate: Any,
    about: dict[str, Any],
) -> None:
    """The loop, with the files that say what was run. What fails before there is a checkpoint or ``best/`` leaves nothing."""
    from palate.training import checkpoints, loop

    out = Path(recipe.training.output_dir)
    made = not out.exists()
    fresh = made or not any(out.iterdir())
    try:
        if is_main():
            out.mkdir(parents=True, exist_ok=True)
            # Without the wish to resume: the recipe of a resumed run is that of an uninterrupted one.
            told = dataclasses.replace(recipe.training, resume_from_checkpoint=None)
            recipes.write(dataclasses.replace(recipe, training=told), out / "recipe.yaml")
            # A resumed run is repeated by the command it began with.
            if recipe.training.resume_from_checkpoint is None or not (out / "run.json").is_file():
                text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
                write_atomically(out / "run.json", text.encode())
        loop.train(
            step,
            policy,
            data,
            options=options,
            recipe=recipe.as_dict(),
            on_sample=samples.draw if recipe.evaluation.validation_prompts else None,
            on_evaluate=on_evaluate,
        )
    except (UserError, OSError, KeyboardInterrupt) as error:
        kept = checkpoints.latest(out)
        if fresh and is_main() and kept is None and not (out / "best").exists():
            shutil.rmtree(out, ignore_errors=True)
            if not made:
                out.mkdir()
        if kept is not None and type(error) is KeyboardInterrupt:  # a second Ctrl-C, which did not wait for a checkpoint
            raise KeyboardInterrupt(f"the same command with --resume_from_checkpoint latest goes on from {kept.name}") from None
        raise


def _counts(counts: Any) -> dict[str, Any]:
    return {
        "rows": counts.rows,
        "ties_dropped": counts.ties_dropped,
        "ties_kept": counts.ties_kept,
        "unlabelled": counts.unlabelled,
        "identical": counts.identical,
        "left_out": dict(counts.left_out),
        "bad_rows": [str(b) for b in counts.bad],
    }


def _say_counts(counts: Any, what: str) -> None:
    for bad in counts.bad:
        tell(f"skipped {bad}")
    parts = {
        "ties dropped": counts.ties_dropped,
        "ties kept": counts.ties_kept,
        "without a label": counts.unlabelled,
        "showing one picture twice": counts.identical,
        **counts.left_out,
        "bad rows skipped": len(counts.bad),
    }
    told = [f"{counts.rows} rows: {counts.pairs} {what}", *(f"{n} {reason}" for reason, n in parts.items() if n)]
    tell(", ".join(told))


def _evaluation_prompts(recipe: Recipe) -> list[Prompt]:
    wanted = recipe.evaluation.evaluation_prompts
    return [] if wanted is None else find_prompts(wanted)[: recipe.evaluation.num_evaluation_prompts]


def _judges(recipe: Recipe) -> dict[str, NamedJudge]:
    """Refuses unknown ones before any weights are loaded."""
    found = find_judges(recipe.evaluation.judges)
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
        before_after_grid(
            list(self.options.validation_prompts), self.base, tuned, self.folder / f"step-{step:06d}.png", columns=4
        )
        self.denoiser.release()


def _compare(recipe: Recipe, denoiser: Any, base: Any, tuned: Any, resolution: int, out: Path, command: str) -> None:
    from palate.evaluation.folders import compare_folders, write_result
    from palate.evaluation.generation import plan
    from palate.evaluation.grid import before_after_grid
    from palate.evaluation.report import chapter_of, write_report

    options, began = recipe.evaluation, time.monotonic()
    planned = plan(_evaluation_prompts(recipe), model="", images_per_prompt=options.images_per_prompt)
    planned = [dataclasses.replace(p, seed=options.evaluation_seed + i) for i, p in enumerate(planned)]
    prompts = [p.prompt for p in planned]
    pictures, refiner = {}, None
    if options.refiner is not None:
        from palate.models import load_refiner

        precision, device = recipe.training.mixed_precision, str(denoiser.device)
        refiner = load_refiner(options.refiner, start=options.refiner_start, mixed_precision=precision, device=device)
    for side, unet in (("base", base), ("tuned", tuned)):
        folder = out / "evaluation" / side
        pictures[side] = _generated(recipe, denoiser, unet, refiner, planned, resolution, folder, side)
    del refiner
    denoiser.release()  # room for the judges
    sides = [out / "evaluation" / side for side in pictures]
    judges = _judges(recipe)
    score_folders(judges.values(), sides, device=denoiser.device, progress=sys.stderr.isatty())
    unseen = options.evaluation_prompts == "miniature-unseen"
    trained_on = list(recipe.online.rewards) if recipe.online.train_prompts is not None else []
    found = compare_folders(sides, judges=list(judges), trained_on=trained_on, unseen=unseen, who="the aligned model")
    shown = _first_of_each(prompts, 12)
    before_after_grid(
        [prompts[i] for i in shown],
        [pictures["base"][i] for i in shown],
        [pictures["tuned"][i] for i in shown],
        out / "before_after.png",
        columns=4,
    )
    method = f"{recipe.objective['name']} in {_space_name(recipe.space)} space"
    title = f"{Path(recipe.model.pretrained_model_name_or_path).name}, aligned by {method}"
    # run.json tells the command of a training; the weights may also have come without it.
    extra = {"title": title} if (out / "run.json").is_file() else {"title": title, "command": command}
    write_result(out / "metrics.json", found, extra)
    write_report(out / "report.html", [chapter_of(out)])
    tell(f"compared in {time.monotonic() - began:.0f} s; see {out / 'report.html'}")
    print(found.versus[0].headline)


def _generated(
    recipe: Recipe,
    denoiser: Any,
    unet: Any,
    refiner: Any,
    pictures: list[Picture],
    resolution: int,
    folder: Path,
    side: str,
) -> list[Any]:
    """The pictures of one side, anew, in a picture folder."""
    from PIL import Image

    from palate.evaluation.generation import drawing, generate, settings

    options = recipe.evaluation
    sampling = {
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "resolution": resolution,
    }
    tell(f"generating {len(pictures)} pictures of the {side} model")
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    generate(
        drawing(denoiser, unet, refiner, **sampling),
        [dataclasses.replace(p, model=side) for p in pictures],
        partial,
        settings=settings(denoiser, seed=options.evaluation_seed, versions=versions(), **sampling),
        model={"name": side, "base": recipe.model.pretrained_model_name_or_path, "refiner": options.refiner},
        batch_size=options.evaluation_batch_size,
        progress=sys.stderr.isatty(),
    )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return [Image.open(folder / p.file).convert("RGB") for p in pictures]


def _first_of_each(prompts: list[str], limit: int) -> list[int]:
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(prompt, index)
    return list(first.values())[:limit]


def _space_name(space: Any) -> str:
    parts = space if isinstance(space, list) else [space]
    return " + ".join(p["name"] for p in parts)
