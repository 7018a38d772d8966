"""A recipe carried out: encode, train, save, compare, report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from palate.base.errors import UserError
from palate.base.files import write_atomically
from palate.base.hub import check_push, push
from palate.base.jsonl import JsonObject, read_object, write_object
from palate.base.machine import is_main, processes, tell, versions
from palate.data.prompts import Prompt
from palate.evaluation.accuracy import accuracy
from palate.evaluation.folders import SHOWN_PROMPTS, read_run
from palate.miniature import prompt_lists, world
from palate.models.families import cut_warning
from palate.models.files import KOHYA_FILE, WEIGHTS
from palate.runs import recipe as recipes
from palate.runs.assembly import Assembled, assemble, not_edited
from palate.runs.card import PUBLIC, write_card
from palate.runs.compare import Samples, compare_models, evaluate
from palate.runs.evidence import (
    counts_of,
    doubts,
    encoded_of,
    learnable,
    mixed,
    readers_of,
    references_of,
    validation_reader,
)
from palate.runs.export import about_training
from palate.runs.idle import idle_line
from palate.runs.loading import at_home, denoiser_of, policy_of
from palate.runs.methods import bind_space, draws_of
from palate.runs.plan import foretell
from palate.runs.ready import check_machine, tell_needs
from palate.runs.recipe import Recipe
from palate.runs.sections import HELD_OUT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from palate.diffusion.denoising import Conditioning
    from palate.models.denoiser import Denoiser
    from palate.models.policy import Policy
    from palate.runs.assembly import Online
    from palate.spaces.space import Space
    from palate.training.checkpoints import Stateful
    from palate.training.options import TrainOptions
    from palate.training.references import References
    from palate.training.source import Source
    from palate.training.steps import Step


def train(recipe: Recipe, *, command: str = "") -> Path:
    """Train as ``recipe`` says and, unless its evaluation prompts are null, compare with the base model.

    Returns:
        The output folder: ``pytorch_lora_weights.safetensors`` and its kohya twin (or ``unet/``), ``recipe.yaml``,
        ``run.json``, ``log.jsonl``, ``train.log``, ``samples/``, checkpoints, and from the comparison ``evaluation/``,
        ``report.html``, ``before_after.png``, and with judges ``metrics.json``; and ``README.md``, a model card.

    Raises:
        UserError: a mistake in the recipe or the data; before any weights are loaded where that is possible. A run that
            fails before its first checkpoint leaves no output behind.
        palate.training.loop.Stopped: interrupted, after saving a checkpoint.
        KeyboardInterrupt: interrupted before or after training; its text says how to go on.
    """
    from palate.training.place import company

    recipe = at_home(recipe)
    if is_main():
        _check_output(recipe, Path(recipe.training.output_dir))
        if recipe.training.push_to_hub is not None:
            check_push(recipe.training.push_to_hub)
        check_machine(recipe)
    found = assemble(recipe)
    check_dtype()
    own = [] if found.online is None else found.online.prompts
    # Where each process holds a part of the model, the comparison tells of its own.
    drawn = [*([] if sharded(recipe) else found.compared), *found.validation, *own]
    for told in (idle_line(recipe), not_edited(drawn)):
        if told:
            tell(told)
    with company():
        if found.online is None:
            _train_offline(found, command)
        else:
            _train_online(found, found.online, command)
    return found.out


def check_dtype() -> None:
    """Raise ``UserError`` where what a recipe names, or who calls, has set another default dtype of torch than float32."""
    import torch

    if (own := torch.get_default_dtype()) is not torch.float32:
        raise UserError(
            f"torch's default dtype is {str(own).removeprefix('torch.')}, which a module that the recipe names, or the program "
            "around it, has set; expected float32, in which weights are trained: name it for each tensor instead"
        )


# The two orders of events --------------------------------------------------------------------------------------------------


def _train_offline(found: Assembled, command: str) -> None:
    """Read, encode, train, finish."""
    from palate.diffusion.denoising import Conditioning
    from palate.training.measures import implicit_margins
    from palate.training.place import meeting

    recipe = found.recipe
    options = recipe.evaluation
    if options.evaluation_prompts in prompt_lists.NAMES and recipe.data.train_data not in world.PAIRS:
        tell(
            f"the comparison draws {len(found.compared)} prompts of the miniature world ({options.evaluation_prompts}), not of "
            "your data: name a file with --evaluation_prompts, or null for no comparison"
        )
    readers, validation = readers_of(recipe), validation_reader(recipe)
    denoiser = _trainable(found)
    counted = foretell(recipe, denoiser, single=readers[0].single)
    with denoiser.encoding():
        tell_needs(recipe, denoiser, readers)
        encoded, held_out, sizes = encoded_of(recipe, denoiser, readers, validation)
        nothing = _no_prompt(denoiser) if recipe.training.caption_dropout else None
        if recipe.policy.train_text_encoder:
            words = denoiser.words()
            encoded, held_out = encoded.with_words(words), None if held_out is None else held_out.with_words(words)
            nothing = None if nothing is None else Conditioning({**nothing.tensors, **denoiser.no_words(words)})
    encoded = learnable(encoded, recipe.method)
    data = mixed(encoded, recipe, sizes)
    if held_out is None and recipe.evaluation.evaluation_prompts == HELD_OUT:
        tell("nothing is held out: the pictures before and after show prompts of the training data")
    found = found.showing([Prompt(text) for text in (encoded if held_out is None else held_out).prompts])
    policy = policy_of(recipe, denoiser)
    space = bind_space(recipe.space, policy)
    in_any = meeting().any if sharded(recipe) else bool
    references = references_of(recipe, policy, in_any)
    step = _step_of(recipe, policy, space, nothing, references)
    samples = Samples(recipe, found.validation, denoiser, policy)
    denoiser.release()
    origin = {"data": encoded.digest(), "weights": policy.weights_sketch()}
    if sharded(recipe):
        from palate.training.sharded import cut_up

        cut_up(policy)

    def on_evaluate(done: int) -> dict[str, float]:
        if held_out is None or (held_out.items.label == 0.5).all():
            return {}
        margins, labels = implicit_margins(policy, space, held_out, batch_size=recipe.training.train_batch_size)
        rate = accuracy(margins.tolist(), labels.tolist(), held_out.prompts)
        if done and recipe.training.early_stopping_patience is not None:
            _keep_best(recipe, policy, done, rate.rate, in_any)
        return {"held_out_accuracy": rate.rate, "held_out_accuracy_low": rate.low, "held_out_accuracy_high": rate.high}

    what = "pictures" if readers[0].single else "pairs"
    about = {"command": command, "versions": versions(), what: len(data), **counts_of(readers[0].counts), **_shown(found)}
    if len(readers) > 1:
        about["more"] = {reader.source: counts_of(reader.counts) for reader in readers[1:]}
    if validation is not None:
        about["validation"] = counts_of(validation.counts)
    if recipe.training.resume_from_checkpoint is None:
        step.begin(data)
        about |= {"chosen": dict(step.state)} if step.state else {}
        if "beta" in step.state:
            tell(f"beta {step.state['beta']:g}, chosen from the spread of errors")
    told = doubts(encoded, recipe.method)
    try:
        _train(recipe, recipe.training, policy, step, data, samples, on_evaluate, about, origin, counted, doubts=told)
    finally:
        if references is not None:
            references.close()
            tell(f"of the reference's errors {references.computed} were computed and {references.found} found in the cache")
    _finish(found, denoiser, policy, command)


def _train_online(found: Assembled, wanted: Online, command: str) -> None:
    """The same job where the policy draws what it learns from."""
    from palate.runs import online

    recipe = found.recipe
    tell(online.told(recipe, wanted))
    denoiser = _trainable(found)
    counted = foretell(recipe, denoiser)
    tell_needs(recipe, denoiser, [])
    if told := cut_warning(denoiser, (text for prompt in wanted.prompts for text in (prompt.text, prompt.negative))):
        tell(told)
    policy = policy_of(recipe, denoiser)
    step, rollouts = online.rollouts_of(recipe, wanted, denoiser, policy, progress=is_main() and sys.stderr.isatty())
    samples = Samples(recipe, found.validation, denoiser, policy)
    watch = online.Watch(found, denoiser, policy, rollouts, tell) if wanted.held_out else None
    denoiser.release()
    # The last of them: held-out rewards are measured on the first.
    found = found.showing(wanted.prompts[::-1])
    about: JsonObject = {"command": command, "versions": versions(), "prompts": len(wanted.prompts), **_shown(found)}
    # Whom an address served cannot be asked later.
    if serves := {name: reward.serves for name, reward in wanted.rewards.items() if reward.serves}:
        about["serves"] = serves
    texts = "\n".join(prompt.text for prompt in wanted.prompts)
    origin = {"prompts": hashlib.sha256(texts.encode()).hexdigest()[:16], "weights": policy.weights_sketch()}
    _train(
        recipe,
        wanted.options,
        policy,
        step,
        rollouts,
        samples,
        watch,
        about,
        origin,
        counted,
        {"watch": watch} if watch else {},
    )
    _finish(found, denoiser, policy, command)


# Parts ---------------------------------------------------------------------------------------------------------------------


def _shown(found: Assembled) -> JsonObject:
    """For ``run.json``: the prompts of the comparison where they follow from the data, which need not be there later."""
    held_out = found.recipe.evaluation.evaluation_prompts == HELD_OUT
    return {SHOWN_PROMPTS: [prompt.text for prompt in found.prompts]} if held_out else {}


def _trainable(found: Assembled) -> Denoiser:
    """The model, with a word on what is to be minded in training it. Raises UserError for a size that it cannot draw."""
    # Of which each process holds a part, it comes to the device in parts.
    denoiser = denoiser_of(found.recipe, home="cpu" if sharded(found.recipe) else None)
    for prompt in (*found.validation, *found.compared):
        if prompt.shape is not None:
            denoiser.check_shape(prompt.shape)
    if denoiser.caution:
        tell(denoiser.caution)
    return denoiser


def _no_prompt(denoiser: Denoiser) -> Conditioning:
    import torch

    with torch.no_grad():
        return denoiser.unconditional()


def _step_of(recipe: Recipe, policy: Policy, space: Space, nothing: Conditioning | None, references: References | None) -> Step:
    """The step of a recipe that learns from what is there before training. nothing: what stands for no prompt."""
    from palate.training import steps

    options, objective = recipe.training, recipe.method
    draws = draws_of(options, no_prompt=nothing)
    make = steps.pair_step if objective.evidence == "pairs" else steps.sample_step
    return make(policy, space, objective.function, draws, auto_beta=objective.auto_beta, references=references)


def _finish(found: Assembled, denoiser: Denoiser, policy: Policy, command: str) -> None:
    """Save what was trained and compare it with the base model."""
    recipe, out = found.recipe, found.out
    if sharded(recipe):
        policy = _gathered(recipe, policy)
    if not is_main():
        return
    written = policy.save(out)
    tell(f"wrote {written}")
    if recipe.policy.train_method == "lora" and recipe.policy.lora_kind == "dora":
        tell("for ComfyUI and A1111, which scale a DoRA in ways of their own, merge it: palate export ... --format pipeline")
    elif recipe.policy.train_method == "lora" and denoiser.kohya is not None:
        from palate.models.kohya import save_kohya

        twin = save_kohya(denoiser, policy.trainable_module, out / KOHYA_FILE, about=about_training(recipe, out.resolve().name))
        tell(f"wrote {twin}, the same for ComfyUI and A1111")
    if found.compared:
        try:
            if sharded(recipe):
                evaluate(recipe, command=command)
            else:
                compare_models(found, denoiser, policy.frozen, policy.trainable_module, command)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the trained weights are in {out}; compare them with: palate evaluate {out}") from None
    write_card(out, recipe, denoiser)
    if recipe.training.push_to_hub is not None:
        tell(f"pushed to {push(out, recipe.training.push_to_hub, PUBLIC, message='Align by Palate')}")


def sharded(recipe: Recipe) -> bool:
    """Whether each process holds a part of the model."""
    return recipe.training.shard_model and processes() > 1


def _gathered(recipe: Recipe, policy: Policy) -> Policy:
    """The trained weights, whole again in the first process, in a policy that has no others; every process calls this."""
    from torch import nn

    from palate.training.sharded import whole

    weights = {name: whole(tensor) for name, tensor in policy.state_dict().items()}
    found = policy_of(recipe, denoiser_of(recipe, outline="shapes"))
    buffers = dict(policy.trainable_module.named_buffers())
    for name, tensor in {**weights, **buffers}.items():
        path, _, own = name.rpartition(".")
        part = found.trainable_module.get_submodule(path)
        setattr(part, own, nn.Parameter(tensor) if name in weights else tensor)
    return found


def _keep_best(recipe: Recipe, policy: Policy, done: int, rate: float, in_any: Callable[[bool], bool]) -> None:
    """The weights of the highest held-out accuracy so far, in ``best/``: with a recipe a run, which every verb takes.

    Where each process holds a part of the model every one calls this, and does as the first one finds.
    """
    best = Path(recipe.training.output_dir) / "best"
    if not in_any(is_main() and rate > read_object(best / "found.json", optional=True).get("held_out_accuracy", -1.0)):
        return
    if sharded(recipe):
        policy = _gathered(recipe, policy)
    if not is_main():
        return
    policy.save(best)
    own = dataclasses.replace(recipe.training, output_dir=str(best), resume_from_checkpoint=None)
    recipes.write(dataclasses.replace(recipe, training=own), best / "recipe.yaml")
    write_object(best / "found.json", {"step": done, "held_out_accuracy": rate})


def _check_output(recipe: Recipe, out: Path) -> None:
    """Refuse an output folder that cannot be used, and a checkpoint that does not fit, before anything is read."""
    from palate.training import checkpoints

    if out.exists() and not out.is_dir():
        raise UserError(f"output_dir {out} is a file; name a folder")
    wanted, found = recipe.training.resume_from_checkpoint, checkpoints.latest(out)
    if wanted is not None:
        path = found if wanted == "latest" else Path(wanted)
        if path is None:
            raise UserError(f"{out} holds no checkpoint to resume from; leave out --resume_from_checkpoint to begin anew")
        read_run(out)  # the page and the card tell of it in the end
        # Without its weights, which are read where they are needed.
        saved = checkpoints.Checkpoint(path, {}, {}, _saved_recipe(path))
        # What data and weights it was is looked at once they have been read.
        may_differ = checkpoints.MAY_DIFFER | {checkpoints.ORIGIN}
        checkpoints.check_recipe(saved, recipe.as_dict(), may_differ, defaults=recipes.defaults())
    elif found is not None:
        raise UserError(
            f"{out} already holds a run; continue it with --resume_from_checkpoint latest, or name another --output_dir"
        )
    elif any((out / name).exists() for name in ("recipe.yaml", "log.jsonl", *WEIGHTS)):
        raise UserError(f"{out} already holds a run, without checkpoints; name another --output_dir, or delete that folder")


def _saved_recipe(path: Path) -> JsonObject:
    if not path.is_dir():
        raise UserError(f"there is no checkpoint at {path}; expected a folder such as checkpoint-500, or latest")
    return read_object(path / "recipe.json", otherwise=f"checkpoint {path} is damaged: resume from an earlier one")


def _train(
    recipe: Recipe,
    options: TrainOptions,
    policy: Policy,
    step: Step,
    data: Source,
    samples: Samples,
    on_evaluate: Callable[[int], Mapping[str, float]] | None,
    about: JsonObject,
    origin: Mapping[str, str],
    counted: float | None,
    states: Mapping[str, Stateful] | None = None,
    doubts: Sequence[str] = (),
) -> None:
    """The loop, with the files that say what was run. What fails before there is a checkpoint or ``best/`` leaves nothing."""
    from palate.training import checkpoints, loop
    from palate.training.place import company

    out = Path(recipe.training.output_dir)
    if sharded(recipe) and recipe.evaluation.validation_prompts:
        tell("shard_model: no sample pictures are drawn while it trains, for that takes the whole model in one process")
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
        with company():
            loop.train(
                step,
                policy,
                data,
                options=options,
                states=states,
                recipe={**recipe.as_dict(), checkpoints.ORIGIN: dict(origin)},
                defaults=recipes.defaults(),
                # Where each process holds a part of the model, one of them cannot draw alone.
                on_sample=None if sharded(recipe) else samples.draw,
                on_evaluate=on_evaluate,
                doubts=doubts,
                counted=counted,
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
