"""The model and the policy of a recipe, and how its pictures are drawn."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any

from palate.base.errors import UserError
from palate.base.machine import tell
from palate.base.shapes import Shape
from palate.models.adapters import Adapter, check_adapter
from palate.runs.methods import check_space, check_times
from palate.runs.models import load_base
from palate.runs.recipe import Recipe

if TYPE_CHECKING:
    from palate.models.denoiser import Denoiser
    from palate.models.drawing import Drawing
    from palate.models.policy import Policy


def policy_of(recipe: Recipe, denoiser: Denoiser) -> Policy:
    from palate.models.policy import Policy

    policy = Policy(
        denoiser,
        kind=recipe.policy.train_method,
        rank=recipe.policy.rank,
        lora_alpha=recipe.policy.lora_alpha,
        lora_layers=recipe.policy.lora_layers,
        adapter=adapter_of(recipe),
        texts=recipe.policy.train_text_encoder,
        gradient_checkpointing=recipe.policy.gradient_checkpointing,
        seed=recipe.training.seed,
        pretrained_lora=recipe.policy.pretrained_lora,
    )
    if recipe.policy.compile and not any(p.is_meta for p in denoiser.network.parameters()):
        policy.compile_blocks()
    return policy


def adapter_of(recipe: Recipe) -> Adapter:
    options = recipe.policy
    return Adapter(options.lora_kind, options.use_rslora, options.lora_dropout, options.rank_pattern, options.alpha_pattern)


def shape_of(recipe: Recipe, denoiser: Denoiser) -> Shape:
    """Of the pictures. Raises UserError if it does not fit the model."""
    shape = Shape.of(recipe.data.resolution or denoiser.default_resolution)
    denoiser.check_shape(shape)
    return shape


def shapes_of(recipe: Recipe, denoiser: Denoiser) -> list[Shape]:
    """Those in which pictures are trained on; one if ``resolution`` leaves no choice. Raises UserError: not of this model."""
    from palate.data.buckets import buckets

    options, shape = recipe.data, shape_of(recipe, denoiser)
    if not options.buckets:
        return [shape]
    step = options.bucket_step or math.lcm(64, denoiser.step)
    if step % denoiser.step:
        raise UserError(f"bucket_step is {step}; expected a multiple of {denoiser.step}, as {denoiser.name} needs")
    found = buckets(shape, step, options.bucket_aspect, denoiser.most)
    if len(found) < 2:
        tell(
            f"buckets: resolution {shape} leaves no choice of shapes in steps of {step}, so all pictures are {shape}; a lower "
            "bucket_step gives more"
        )
        return [shape]
    return found


def drawing_of(recipe: Recipe, denoiser: Denoiser) -> Drawing:
    """How pictures are drawn of the model before and after training. Raises UserError: steps that its sampler cannot take."""
    from palate.models.drawing import Drawing

    options = recipe.evaluation
    denoiser.check_steps(options.num_inference_steps)
    shape = shape_of(recipe, denoiser)
    return Drawing(options.num_inference_steps, options.guidance_scale, shape, options.evaluation_batch_size)


def at_home(recipe: Recipe) -> Recipe:
    """The recipe with ``~/`` written out, which a shell does only where a word begins with it."""

    def written_out(options: Any, *names: str) -> Any:
        given = {name: getattr(options, name) for name in names}
        return dataclasses.replace(
            options, **{n: os.path.expanduser(v) for n, v in given.items() if (v or "").startswith("~/")}
        )

    more = {os.path.expanduser(name): share for name, share in recipe.data.more_train_data.items()}
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, more_train_data=more))
    return dataclasses.replace(
        recipe,
        model=written_out(recipe.model, "pretrained_model_name_or_path"),
        data=written_out(recipe.data, "train_data", "validation_data", "cache_dir"),
        policy=written_out(recipe.policy, "pretrained_lora"),
        training=written_out(recipe.training, "output_dir", "resume_from_checkpoint"),
        evaluation=written_out(recipe.evaluation, "evaluation_prompts", "refiner"),
    )


def denoiser_of(recipe: Recipe, *, home: str | None = None, outline: str | None = None) -> Denoiser:
    """Raises UserError if its family cannot be trained in the recipe's space.

    home, outline: see :func:`palate.models.families.load_denoiser`.
    """
    options = recipe.model
    denoiser = load_base(
        options.pretrained_model_name_or_path,
        mixed_precision=recipe.training.mixed_precision,
        revision=options.revision,
        variant=options.variant,
        quantize=options.quantize,
        # All weights are trained, from their full precision on; the forward pass is autocast all the same.
        full=recipe.policy.train_method == "full",
        home=home,
        outline=outline,
    )
    check_space(recipe.space, denoiser)
    if recipe.policy.train_text_encoder and not denoiser.text_targets:
        raise UserError(
            f"train_text_encoder is for Stable Diffusion 1, 2 and XL, and {denoiser.name} is a {denoiser.card.pipeline}, whose "
            "text encoders stay as they are: leave it out"
        )
    if recipe.method.evidence != "trajectories":  # which are trained at the steps of sampling
        check_times(recipe.training, recipe.space, denoiser.schedule)
    if recipe.policy.pretrained_lora is not None:
        from palate.models.lora import check_lora
        from palate.models.policy import twin

        check_lora(
            denoiser, twin(denoiser.network, share=True), recipe.policy.pretrained_lora, texts=recipe.policy.train_text_encoder
        )
    elif recipe.policy.train_method == "lora":
        check_adapter(denoiser, adapter_of(recipe), denoiser.lora_targets[recipe.policy.lora_layers])
    return denoiser
