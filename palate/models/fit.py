"""Whether the parts of a pipeline fit each other and this diffusers, by their configurations, before any weights are read.

All that drawing needs at the end of a run is tried here at its beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

from palate.base.errors import UserError, first_line

Config = Mapping[str, Any]

MORE_CHANNELS = {9: "inpainting", 8: "editing by instructions", 7: "upscaling", 5: "depth"}
"""What a U-Net is for that takes more than latents of four channels, by how many it takes."""


def check_sampler(config: Config, name: str, *, draws: bool = False) -> None:
    """Raise ``UserError`` unless diffusers has the scheduler's class and makes one of the configuration.

    draws: also unless it samples, from the noise that its betas tell: a step is tried, of zeros. Some of diffusers' classes
    invert, inpaint or correct instead, or have noise levels of their own.
    """
    import diffusers

    kind = config.get("_class_name")
    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if kind not in known:
        near = ", ".join(get_close_matches(str(kind), known, n=3, cutoff=0.3))
        raise UserError(
            f"the scheduler of {name} is {f'{_a(kind)}, a class' if kind else 'of no class'} that diffusers "
            f"{diffusers.__version__} does not have{f' (the nearest: {near})' if near else ''}: write a class of diffusers "
            "into scheduler/scheduler_config.json, such as DDIMScheduler"
        )
    made = getattr(diffusers, kind)
    reason = ""
    if draws and "beta_schedule" not in signature(made.__init__).parameters:
        reason = "has noise levels of its own"
    elif draws and "Inverse" in kind:
        reason = "goes from pictures to noise"
    if not reason:
        try:
            sampler = made.from_config(config)
        except (TypeError, ValueError, ImportError, NotImplementedError, RuntimeError, KeyError) as error:
            raise UserError(f"the scheduler of {name}, {_a(kind)}, cannot be made: {first_line(error)}") from error
        reason = _why_no_step(sampler) if draws else ""
    if reason:
        raise UserError(
            f"the scheduler of {name}, {_a(kind)}, {reason}: write one that draws pictures into "
            "scheduler/scheduler_config.json, such as DDIMScheduler"
        )


def _why_no_step(sampler: Any) -> str:
    """Empty if it takes one."""
    import torch

    try:
        sampler.set_timesteps(2)
        latents = torch.zeros(1, 4, 8, 8)
        sampler.step(sampler.scale_model_input(latents, sampler.timesteps[0]), sampler.timesteps[0], latents)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, ImportError, ZeroDivisionError) as error:
        return f"takes no step ({first_line(error)})"
    return ""


def check_steps(config: Config, num_inference_steps: int) -> None:
    """Raise ``UserError`` unless the sampler that the configuration names can take so many steps.

    One of times that are whole numbers, as DDIM is, may also begin one after the last that the model knows.
    """
    import diffusers

    name = config["_class_name"]
    sampler = getattr(diffusers, name).from_config(config)
    try:
        sampler.set_timesteps(num_inference_steps)
        last = sampler.config.num_train_timesteps - 1
        late = not hasattr(sampler, "sigmas") and float(sampler.timesteps.max()) > last
        reason = f"the first would be of time {float(sampler.timesteps.max()):g}, the last time is {last}" if late else ""
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        reason = first_line(error)
    if reason:
        raise UserError(
            f"num_inference_steps is {num_inference_steps}, which {name} cannot take ({reason}): 25 to 50 are usual"
        )


def check_class(config: Config, part: str, name: str, expected: str) -> None:
    """Raise ``UserError`` unless a part of diffusers is of the class that is read here; one that names none passes."""
    kind = config.get("_class_name", expected)
    if kind != expected:
        preview = "; it is for previews" if "Tiny" in str(kind) else ""
        raise UserError(
            f"{part} of {name} is {_a(kind)}{preview}; expected {_a(expected)}: give the part that the model was published with"
        )


def _a(kind: object) -> str:
    """A class with its article: an AutoencoderKL, a UNet2DModel."""
    return f"{'an' if str(kind)[:1] in 'AEIO' else 'a'} {kind}"


def text_config(name: str, part: str, **options: str) -> Config:
    """The configuration of a CLIP text encoder. Raises UserError if it cannot be read, or is of another kind."""
    from transformers import CLIPTextConfig

    try:
        found, _ = CLIPTextConfig.get_config_dict(name, subfolder=part, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{part} of {name} cannot be loaded: {first_line(error)}") from error
    if not found:
        raise UserError(f"{part} of {name} cannot be loaded: {part}/config.json is missing; download it again")
    kind = str(found.get("model_type", "clip_text_model"))
    if kind not in ("clip_text_model", "clip"):
        raise UserError(f"{part} of {name} is a text encoder of kind {kind}; expected CLIP's")
    return {**CLIPTextConfig().to_dict(), **(found.get("text_config") or found)}


def check_channels(network: Config, vae: Config, part: str, name: str, *, pack: int = 1) -> None:
    """Raise ``UserError`` unless the network takes and gives latents as the VAE has them, ``pack`` squared of them as one."""
    latent = pack**2 * int(vae.get("latent_channels", 4))
    for way, verb in (("in_channels", "takes"), ("out_channels", "gives")):
        count = network.get(way) or (latent if way == "out_channels" else 4)
        if count != latent:
            task = MORE_CHANNELS.get(count) if way == "in_channels" and latent == 4 else None
            what = f" is of a model for {task}: it" if task else ""
            raise UserError(
                f"{part} of {name}{what} {verb} {count} channels, and latents of its VAE have {latent}: give a text-to-image "
                "model whose parts are of one kind"
            )


def check_text_width(network: Config, texts: Sequence[Config], name: str) -> None:
    """Raise ``UserError`` unless a U-Net's cross attention takes what the text encoders give, side by side."""
    given = sum(int(text["hidden_size"]) for text in texts)
    wanted = network.get("encoder_hid_dim") or network.get("cross_attention_dim", 1280)
    for width in wanted if isinstance(wanted, list | tuple) else [wanted]:
        if width != given:
            whose = "text encoder gives" if len(texts) == 1 else "text encoders give"
            raise UserError(
                f"unet of {name} attends to {width} numbers a token, and its {whose} {given}: they are of different models"
            )


def check_added(network: Config, name: str, pooled: int | None, time_ids: int = 6) -> None:
    """Raise ``UserError`` unless a U-Net takes the conditions beside the text that its pipeline gives.

    Args:
        pooled: width of the pooled embedding that comes with ``time_ids`` numbers, as in SDXL; None where nothing is given.
    """
    kinds = [network.get(k) for k in ("addition_embed_type", "class_embed_type", "num_class_embeds")]
    wanted = next((str(kind) for kind in kinds if kind is not None), None)
    if pooled is None and wanted is not None:
        raise UserError(f"unet of {name} wants a condition beside the text ({wanted}), which its pipeline does not give")
    if pooled is None:
        return
    if wanted != "text_time":
        raise UserError(
            f"unet of {name} takes {wanted or 'nothing'} beside the text; expected size and crop (text_time) as in SDXL"
        )
    width = time_ids * int(network.get("addition_time_embed_dim") or 0) + pooled
    if network.get("projection_class_embeddings_input_dim") != width:
        raise UserError(
            f"unet of {name} takes {network.get('projection_class_embeddings_input_dim')} numbers beside the text, and its "
            f"pipeline gives {width} ({pooled} of the text encoder): they are parts of different models"
        )
