"""What families of latent diffusion models share: reading a pipeline's parts, the VAE, text encoders, drawing pictures."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from palate.base import hub
from palate.base.errors import UserError, first_line, short
from palate.data.encode import PIXELS_AT_ONCE
from palate.diffusion.denoising import Conditioning
from palate.models import whole
from palate.models.fit import check_class
from palate.models.quantised import quantise


class Source:
    """A pipeline folder or hub id, and the device its parts go to.

    options: ``revision``, ``variant``.
    """

    def __init__(self, name: str, device: str | torch.device, **options: str):
        self.name, self.device, self.options = name, torch.device(device), options
        self._listed: list[str] | None = None
        self.plain = {k: v for k, v in options.items() if k != "variant"}  # configurations and tokenizers have no variants

    def config(self, kind: Any, part: str | None) -> dict[str, Any]:
        """The configuration of a part, or of the whole pipeline."""
        return dict(kind.load_config(self.name, subfolder=part, **self.plain))

    def scheduler_config(self) -> dict[str, Any]:
        from diffusers import DDPMScheduler

        return self.config(DDPMScheduler, "scheduler")  # any scheduler's configuration can be read by any class

    def has(self, part: str) -> bool:
        """Whether the pipeline has the part: ``model_index.json`` may name it with null."""
        library, kind = self._index.get(part) or (None, None)
        return library is not None and kind is not None

    def kind(self, part: str) -> Any:
        """The class of a part that ``model_index.json`` names. Raises UserError: none, or one that this version lacks."""
        import diffusers
        import transformers

        if not self.has(part):
            raise UserError(f"{self.name} comes without {part} (model_index.json), which is needed here")
        library, kind = self._index[part]
        found = getattr(diffusers if library == "diffusers" else transformers, kind, None)
        if found is None:
            raise UserError(f"{part} of {self.name} is a {kind}, which this version of {library} does not know; update it")
        return found

    @cached_property
    def _index(self) -> dict[str, Any]:
        from diffusers import DiffusionPipeline

        return self.config(DiffusionPipeline, None)

    def read(
        self, kind: Any, part: str, *, quantize: str | None = None, home: torch.device | None = None, **options: object
    ) -> Any:
        """A frozen part of the pipeline, refused if any weight is missing: libraries fill in random ones.

        quantize: as :class:`palate.models.latent.Latent` has it; blocks come to the device a layer at a time for it.
        home: where it is put; on the device unless given.
        """
        module = read_part(kind, self.name, f"{part} of {self.name}", subfolder=part, **options, **self._options_of(part))
        if quantize is not None:
            quantise(module, quantize, self.device)
        return module.to(home or self.device).eval().requires_grad_(False)

    def _options_of(self, part: str) -> dict[str, str]:
        """Without the variant where this part has plain files alone: one may be had in half precision and the others not."""
        return self.options if "variant" not in self.options or self._has(part, self.options["variant"]) else self.plain

    def _has(self, part: str, variant: str) -> bool:
        """Whether a part has files of a variant, such as diffusion_pytorch_model.fp16.safetensors; of a hub, by its list."""
        return any(whole.is_weights(name) and whole.variant_of(name) == variant for name in self.files(part))

    def files(self, part: str) -> list[str]:
        """Names of a part's files; empty where that is not known without fetching them."""
        if Path(self.name).exists():
            return sorted(path.name for path in Path(self.name, part).glob("*"))
        return [name.removeprefix(f"{part}/") for name in self._on_hub() if name.startswith(f"{part}/")]

    def _on_hub(self) -> list[str]:
        if self._listed is None:
            self._listed = hub.files(
                self.name, otherwise="Name a folder, or leave out --variant", revision=self.options.get("revision")
            )
        return self._listed

    def _is_listed(self) -> bool:
        """Whether it is known what files there are; a mirror of the hub need not tell."""
        try:
            return Path(self.name).exists() or bool(self._on_hub())
        except UserError:
            return False

    def check_files(self, parts: Sequence[str]) -> None:
        """Raise ``UserError`` unless there are weights of each part, whole as far as names and heads tell, and some part has
        those of the variant asked for."""
        variant = self.options.get("variant")
        if variant is not None and not any(self._has(part, variant) for part in parts):
            raise UserError(
                f"no part of {self.name} has files of variant {short(variant, 40, quoted=False)}: leave out --variant"
            )
        for part in parts if self._is_listed() else []:
            names, wanted, where = self.files(part), self._options_of(part).get("variant"), f"{part} of {self.name}"
            weights = [name for name in names if whole.is_weights(name)]
            if not weights:
                raise UserError(f"{where} cannot be loaded: {part}/ holds no weights; download it again")
            if wanted is None and all(map(whole.variant_of, weights)):
                raise UserError(f"{where} cannot be loaded: it has no plain weights; {self._advice(weights)}")
            found = whole.found_by_name(names, part, where, wanted)
            if Path(self.name).exists():
                whole.check_heads(Path(self.name, part), *found, where)

    def _advice(self, weights: Sequence[str]) -> str:
        """Where there are only weights such as diffusion_pytorch_model.fp16.safetensors."""
        found = sorted({whole.variant_of(name) for name in weights})
        told = f"its files are of variant {' and '.join(found)}"
        if "variant" in self.options:  # which others have; diffusers too reads one at a time
            return f"{told} alone: rename those of one to plain names, without .{found[0]}"
        return f"{told}: add --variant {found[0]}"

    def check_finite(self, part: str) -> None:
        """Raise ``UserError`` if a weight of a folder's part is NaN or infinite, or a file is damaged; one in memory at a time.

        For what is needed only at the end of a run; of a hub the files are looked at when they were fetched.
        """
        variant = self._options_of(part).get("variant")
        for path in sorted(Path(self.name, part).glob("*.safetensors")):
            if whole.variant_of(path.name) == (variant or ""):
                _check_file(path, f"{part} of {self.name}")


def _check_file(path: Path, what: str) -> None:
    try:
        with safe_open(path, "pt") as opened:
            wrong = [name for name in opened.keys() if not opened.get_tensor(name).isfinite().all()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what} cannot be loaded: {first_line(error)}; download it again") from error
    _refuse_not_finite(wrong, what)


def read_part(kind: Any, name: str, what: str, **options: Any) -> Any:
    """A module by its class's ``from_pretrained``, refused if any weight is missing, for libraries fill in random ones, or is
    not finite.

    Args:
        what: the module, as messages call it.
    """
    try:
        module, found = kind.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{what} cannot be loaded: {first_line(error)}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise UserError(f"{what} lacks {len(missing)} weights, the first is {missing[0]}; download it again")
    check_finite(module, what)
    return module


def check_finite(module: nn.Module, what: str) -> None:
    """Raise ``UserError`` if a weight of ``module``, called ``what``, is NaN or infinite."""
    _refuse_not_finite([n for n, p in module.named_parameters() if not p.isfinite().all()], what)


def _refuse_not_finite(wrong: Sequence[str], what: str) -> None:
    if wrong:
        raise UserError(
            f"{what} holds NaN or infinity ({len(wrong)} of its weights, the first is {wrong[0]}): it is damaged, or its "
            "training went astray; give another"
        )


class Vae:
    """Pictures to scaled latents and back; in memory from its first use until :meth:`release`, on the device where it is used.

    Always float32, for SDXL's own VAE overflows in float16, unless the pipeline runs in float16 and the VAE's configuration
    says ``force_upcast: false``, as that of sdxl-vae-fp16-fix does. The caller decides whether gradients flow.

    part_name: what people call the network whose latents are decoded.
    """

    kind: ClassVar[str] = "AutoencoderKL"

    def __init__(self, source: Source, dtype: torch.dtype, part_name: str):
        self._source, self._module, self._part_name = source, None, part_name
        self.config = config = source.config(source.kind("vae"), "vae")
        check_class(config, "vae", source.name, self.kind)
        if not config.get("block_out_channels"):
            raise UserError(f"the VAE of {source.name} is a {self.kind}, which is not supported; use an AutoencoderKL")
        self._dtype = dtype if dtype == torch.float16 and config.get("force_upcast") is False else torch.float32
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def module(self) -> Any:
        if self._module is None:
            self._module = self._source.read(self._source.kind("vae"), "vae", torch_dtype=self._dtype)
        return self._module.to(self._source.device)

    @property
    def loaded(self) -> bool:
        return self._module is not None

    def wait(self) -> None:
        """In main memory until it is used again."""
        if self._module is not None:
            self._module.to("cpu")

    def release(self) -> None:
        self._module = None

    def digest(self) -> str:
        config = self.module.config
        return digest(self.module, *(config.get(k) for k in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")))

    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``(b, 3, h, w)`` in [-1, 1] to scaled latents (the posterior's mean), float32."""
        return self.scaled(self.module.encode(images.to(self._source.device, self._dtype)).latent_dist.mean.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to pictures ``(b, 3, h, w)`` in [0, 1], float32; large ones one after the other, as they are encoded.

        Raises:
            UserError: the result is not finite.
        """
        latents = latents.to(self._source.device, torch.float32)
        at_once = max(1, PIXELS_AT_ONCE // (latents.shape[-1] * latents.shape[-2] * self.factor**2))
        raw = self.unscaled(latents).to(self._dtype).split(at_once)
        pictures = torch.cat([self.module.decode(part).sample.float() for part in raw])
        if not pictures.isfinite().all():
            where = "the VAE" if latents.isfinite().all() else f"the {self._part_name}"
            kind = str(self._dtype).removeprefix("torch.")
            raise UserError(
                f"{where} of {self._source.name} gave NaN or infinity (the VAE ran in {kind}): use mixed_precision bf16 or no, "
                "and, if this model was trained here, a lower learning rate"
            )
        return (pictures / 2 + 0.5).clamp(0, 1)

    def scaled(self, raw: Tensor) -> Tensor:
        """The VAE's own latents as the network knows them."""
        shift, scale = self._normalisation(raw)
        return (raw - shift) * scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The VAE's own latents again."""
        shift, scale = self._normalisation(latents)
        return latents / scale + shift

    def _normalisation(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is taken from the VAE's latents, and by what the rest is multiplied."""
        config = self.module.config
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = (like.new_tensor(list(x)).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std))
            return mean, config.scaling_factor / std
        return config.shift_factor or 0.0, config.scaling_factor


TextParts = tuple[Any, Any]
"""A tokenizer and a text encoder of transformers, or None twice."""


class TextEncoder:
    """A tokenizer and a text encoder, of the classes that ``model_index.json`` names; in memory from their first use until
    :meth:`release`, on the device where they are used.

    The caller decides whether gradients flow.

    ending: of the folders' names, ``_2`` for SDXL's second.
    dtype: of the encoder's weights; see :func:`large`.
    length: tokens that prompts are cut or padded to; as many as tokenizer and encoder know unless given.
    template: (tokenizer, prompt) -> what is read in the prompt's place, such as a turn of a chat.
    masked: padding is hidden from the encoder; unless given, as its configuration says (``use_attention_mask``).
    """

    def __init__(
        self,
        source: Source,
        ending: str = "",
        *,
        dtype: torch.dtype = torch.float32,
        length: int | None = None,
        template: Callable[[Any, str], str] | None = None,
        masked: bool | None = None,
    ):
        self._source, self.ending = source, ending
        self._dtype, self._length, self._template, self._masked = dtype, length, template, masked
        self._pair: TextParts | None = None

    @property
    def pair(self) -> TextParts:
        if self._pair is None:
            name, folder = self._source.name, f"tokenizer{self.ending}"
            try:
                tokenizer = self._source.kind(folder).from_pretrained(name, subfolder=folder, **self._source.plain)
            except (OSError, ValueError) as error:
                raise UserError(f"the {folder} of {name} cannot be loaded: {first_line(error)}") from error
            if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a missing folder
                raise UserError(f"the {folder} of {name} has no words; expected vocab.json and merges.txt in {folder}/")
            part = f"text_encoder{self.ending}"
            encoder = self._source.read(self._source.kind(part), part, dtype=self._dtype)
            if len(tokenizer) > encoder.config.vocab_size:
                raise UserError(
                    f"the {folder} of {name} has {len(tokenizer)} words, and its text encoder knows "
                    f"{encoder.config.vocab_size}: they are parts of different models"
                )
            # Of a tokenizer without a limit, model_max_length is a huge number.
            length = self._length or min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            tokenizer.model_max_length = length
            self._pair = tokenizer, encoder
        tokenizer, encoder = self._pair
        return tokenizer, encoder.to(self._source.device)

    @property
    def loaded(self) -> bool:
        return self._pair is not None

    def wait(self) -> None:
        """The encoder in main memory until it is used again."""
        if self._pair is not None:
            self._pair[1].to("cpu")

    def release(self) -> None:
        self._pair = None

    def digest(self) -> str:
        tokenizer, encoder = self.pair
        words = f"{tokenizer.model_max_length} {tokenizer.backend_tokenizer.to_str()} {tokenizer.pad_token}"
        read = [] if self._template is None else [self._template(tokenizer, "a prompt")]
        return digest(encoder, words, self.masked, *read)

    @property
    def masked(self) -> bool:
        """Whether padding is hidden from the encoder."""
        return getattr(self.pair[1].config, "use_attention_mask", False) if self._masked is None else self._masked

    def tokens(self, prompts: list[str]) -> Any:
        """``input_ids`` and ``attention_mask``, each ``(b, length)``, on the device."""
        tokenizer, _ = self.pair
        return tokenizer(
            self._read(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self._source.device)

    def __call__(self, prompts: list[str], *, hidden_states: bool = False) -> Any:
        """What the encoder gives for prompts, cut or padded to its length."""
        tokens = self.tokens(prompts)
        mask = tokens.attention_mask if self.masked else None
        return self.pair[1](tokens.input_ids, attention_mask=mask, output_hidden_states=hidden_states)

    def longer(self, prompts: list[str]) -> tuple[list[bool], int]:
        """Which prompts are longer than the encoder reads, and how many tokens that is."""
        tokenizer, _ = self.pair
        ids = tokenizer(self._read(prompts), truncation=False, padding=False, verbose=False).input_ids if prompts else []
        limit = tokenizer.model_max_length
        return [len(tokens) > limit for tokens in ids], limit

    def _read(self, prompts: list[str]) -> list[str]:
        return prompts if self._template is None else [self._template(self.pair[0], prompt) for prompt in prompts]


class Words:
    """What text encoders read of prompts: ids and attention masks ``(b, 2, length)`` by name, ``tokens`` and ``tokens_2``.

    Numbers below 0 stand for no prompt, where that is not the empty one: see :meth:`nothing`.
    """

    def __init__(self, texts: Sequence[TextEncoder]) -> None:
        # Copies: batches are made in a thread beside the one that draws samples.
        self._tokenizers = {f"tokens{text.ending}": copy.deepcopy(text.pair[0]) for text in texts}

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tokenizer in self._tokenizers.items():
            limit = tokenizer.model_max_length
            read = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
            found[name] = torch.stack([read.input_ids, read.attention_mask], dim=1)
        return found

    def nothing(self, *, empty: bool) -> dict[str, Tensor]:
        """One row for no prompt: the empty one, or what leaves the conditioning as it is."""
        return {name: x if empty else torch.full_like(x, -1) for name, x in self([""]).items()}


def large(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the weights of a text encoder of billions of parameters (T5, Qwen): bfloat16 beside a network in half precision on a
    GPU, else float32. float16 is too narrow for them."""
    return torch.float32 if dtype == torch.float32 or device.type == "cpu" else torch.bfloat16


def digest(module: nn.Module, *settings: object) -> str:
    """Digest of weights and of what else decides the module's result."""
    found = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def sketch(module: nn.Module) -> str:
    """Which weights these are, told by the beginning of each: other trainings differ in all of them."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().reshape(-1)[:256].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def zeros_like(cond: Conditioning) -> Conditioning:
    return Conditioning({name: torch.zeros_like(tensor) for name, tensor in cond.tensors.items()})


class Remembered:
    """Text encodings of single prompts on the CPU, so that drawing needs no text encoder for them."""

    def __init__(self, encode: Callable[[list[str]], Conditioning], unconditional: Callable[[], Conditioning]):
        self._encode, self._unconditional = encode, unconditional
        self._rows: dict[str | None, Conditioning] = {}

    @torch.no_grad()
    def add(self, prompts: Sequence[str]) -> None:
        """Encode what is not known yet."""
        if None not in self._rows:
            self._rows[None] = self._unconditional().to("cpu")
        wanted = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        for start in range(0, len(wanted), 64):
            part = wanted[start : start + 64]
            encoded = self._encode(part).to("cpu")
            self._rows.update({p: encoded.rows([i]) for i, p in enumerate(part)})

    def __getitem__(self, prompts: Sequence[str | None]) -> Conditioning:
        """One row per prompt; the row of None is what guidance leads away from."""
        return Conditioning.cat([self._rows[p] for p in prompts])


def assemble(kind: str, scheduler_config: Mapping[str, Any], **parts: object) -> Any:
    """A diffusers pipeline of class ``kind`` that shows no bars, with the sampler that the configuration names."""
    import diffusers

    scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(scheduler_config)
    pipeline = getattr(diffusers, kind)(scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def to_picture(pixels: Tensor, prompt: str) -> Image.Image:
    """Of pixels ``(3, h, w)`` in [0, 1]. Raises UserError if all are black."""
    if not pixels.any():
        raise UserError(f"the picture of {short(prompt)} is all black: the model is damaged, or overflows at this precision")
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
