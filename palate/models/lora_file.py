"""What a LoRA file of another program holds, tensor by tensor: every one is understood, or the file is refused by its name.

Names of layers come in many forms, dotted as in diffusers and PEFT, or with underscores as kohya's scripts write them; see
:func:`placed`. Values are read as they are: the change of a layer is ``alpha / rank * up @ down``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from palate.base.errors import UserError, first_line, short
from palate.base.hub import is_hub_id
from palate.models.adapters import MATRICES, LycorisLayer
from palate.models.files import LORA_FILE, lora_in

ADAPTER = r"(?:\.[^.]+)?"
ROLES = {
    "down": rf"\.lora_A{ADAPTER}\.weight|\.lora_down\.weight|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight",
    "up": rf"\.lora_B{ADAPTER}\.weight|\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "bias": rf"\.lora_B{ADAPTER}\.bias",
    "magnitude": rf"\.lora_magnitude_vector(?:{ADAPTER}\.weight)?",
    "alpha": r"\.alpha",
    **{f"{mark}_{part}": rf"\.{mark}_{part}{ADAPTER}" for mark, parts in MATRICES.items() for part in parts},
}
"""How the names of a layer's tensors end, by what they are; PEFT also writes the name of the adapter, such as ``default``."""
MATRIX_ROLES = ("down", *(role for role in ROLES if role.startswith(tuple(MATRICES))))
END = re.compile(f"(?:{'|'.join(f'(?P<{role}>{end})' for role, end in ROLES.items())})$")

OTHER_KINDS = {
    "a DoRA in kohya's layout": (".dora_scale",),
    "a file with whole differences of weights": (".diff", ".diff_b", ".set_weight"),
    "an OFT": (".oft_", ".boft_", ".oft_blocks", ".oft_diag"),
    "an IA3": (".on_input", ".ia3_"),
    "a GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    "a VeRA": (".vera_",),
    "an AdaLoRA": (".lora_E", ".ranknum"),
    "a file with trained norms": (".w_norm", ".b_norm"),
    "a file with trained words": ("bundle_emb.", "emb_params", "string_to_param", ".lora_embedding_"),
}
"""What is no LoRA, by what stands in the names of its tensors."""

TEXT = {
    "text_encoder_3.": "text_encoder_3",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "lora_te3_": "text_encoder_3",
    "lora_te2_": "text_encoder_2",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
    "text_model.": "text_encoder",
}
NETWORK = (
    *("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "lora_unet_", "lora_transformer_", "lycoris_"),
)
AROUND = r"^(?:base_model\.model\.|module\.|_orig_mod\.)*"
"""What PEFT, PyTorch's data parallelism and its compiler put before the names of layers."""
TOLD = {
    "r": "a whole number above 0",
    "lora_alpha": "a number",
    "rank_pattern": "numbers by layer",
    "alpha_pattern": "numbers by layer",
    "use_rslora": "true or false",
    "use_dora": "true or false",
    "lora_bias": "true or false",
}
"""What decides the change of a layer, of all that PEFT's configuration tells, and what it must be."""
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of PEFT's ``init_lora_weights`` that leave the model's own weights as they are."""
BESIDE = (
    *("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Options of PEFT that make more of a LoRA than matrices beside the model's own weights."""


def placed(stem: str) -> tuple[str | None, str]:
    """A layer's name in a file -> the text encoder it is in, or None for the network; and its name there, with underscores.

    >>> placed("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q")
    (None, 'mid_block_attentions_0_transformer_blocks_0_attn1_to_q')
    >>> placed("lora_te2_text_model_encoder_layers_0_self_attn_q_proj")
    ('text_encoder_2', 'text_model_encoder_layers_0_self_attn_q_proj')
    """
    stem = re.sub(AROUND, "", stem)
    prefix = next((p for p in (*TEXT, *NETWORK) if stem.startswith(p)), "")
    part = TEXT.get(prefix)
    rest = stem if prefix == "text_model." else re.sub(AROUND, "", stem.removeprefix(prefix))
    name = rest.replace(".", "_").replace("_processor_", "_")
    return part, _of_text(name) if part else name


def _of_text(name: str) -> str:
    """Attention in text encoders has names of its own; older files have those of the network."""
    olds = {
        "_self_attn_to_q": "q_proj",
        "_self_attn_to_k": "k_proj",
        "_self_attn_to_v": "v_proj",
        "_self_attn_to_out": "out_proj",
    }
    return next((f"{name.removesuffix(old)}_self_attn_{new}" for old, new in olds.items() if name.endswith(old)), name)


@dataclass
class Layer:
    """The tensors of one layer, by what they are in :data:`ROLES`."""

    named: str
    """As the file has it."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.tensors["down"].shape[0]

    @property
    def alpha(self) -> float | None:
        return float(self.tensors["alpha"]) if "alpha" in self.tensors else None

    @property
    def lycoris(self) -> LycorisLayer | None:
        """Its matrices, where it is of a LoHa or LoKr; without an alpha, or a rank to divide it by, its strength is 1."""
        for mark in MATRICES:
            if found := {role.removeprefix(f"{mark}_"): t for role, t in self.tensors.items() if role.startswith(f"{mark}_")}:
                layer = LycorisLayer(mark, found)
                return layer if None in (self.alpha, layer.dim) else LycorisLayer(mark, found, self.alpha / layer.dim)
        return None

    @property
    def kind(self) -> str:
        found = self.lycoris
        return found.kind if found else "dora" if "magnitude" in self.tensors else "lora"

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        if (found := self.lycoris) is not None:
            return found.idle
        return self.alpha == 0 or not (self.tensors["down"].any() and self.tensors["up"].any())

    @property
    def dead(self) -> bool:
        """Whether it changes nothing and cannot learn to: the gradient of either matrix is a multiple of the other."""
        if (found := self.lycoris) is not None:
            return found.dead
        return self.alpha == 0 or not (self.tensors["down"].any() or self.tensors["up"].any())


def find_lora(path: str | Path, *, texts: bool = False) -> Path:
    """The file of a LoRA that is trained on or exported, named by itself or by its folder; only the names in it are read.

    texts: whether it may also be of the text encoders.

    Raises:
        UserError: it is missing, no safetensors file, holds no LoRA, or more than its matrices, or not every alpha.
    """
    file = lora_in(Path(path).expanduser())
    if not file.is_file():
        how = f"; a LoRA of a hub is downloaded first: hf download {path} --local-dir DIR" if is_hub_id(str(path)) else ""
        raise UserError(f"no LoRA at {path}: expected a .safetensors file, or a folder with {LORA_FILE}{how}")
    names = names_in(file)
    check_kind(file, names)
    _check_alphas(file, names)
    _check_trained(file, names, texts=texts)
    return file


def names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be put into a model: it is no readable safetensors file ({first_line(error)}); a LoRA is expected"
        ) from error


def check_kind(file: Path, names: Sequence[str]) -> None:
    """Raise ``UserError`` if names tell that the file is no LoRA, or of another kind than plain ones, of whatever family."""
    kinds = {name: None if _role(name) else _kind(name) for name in names}
    if not any("lora" in name.lower() or kinds[name] or _role(name) for name in names):
        raise UserError(f"{file} holds no LoRA: none of its {len(names)} weights is named as one")
    for kind in OTHER_KINDS:
        if of_kind := [name for name in names if kinds[name] == kind]:
            raise UserError(
                f"{file} is {kind}, or holds parts of one ({_such(of_kind, names)}): only LoRA, LoCon, DoRA, LoHa and LoKr are "
                "read. Merge it into the model with the program that made it, and give that model"
            )


def check_names(file: Path, names: Sequence[str], *, trained: bool) -> None:
    """Raise ``UserError`` unless all names are those of a LoRA's tensors, and, with ``trained``, of those that are trained."""
    check_kind(file, names)
    if unknown := [name for name in names if _role(name) is None]:
        raise UserError(
            f"{file} holds what is no part of a LoRA ({_such(unknown, names)}): only matrices and their alphas are read"
        )
    _check_alphas(file, names)
    if trained:
        _check_trained(file, names)


def _check_alphas(file: Path, names: Sequence[str]) -> None:
    with_alpha, layers = ({placed(stem_of(n)) for n in names if _role(n) in roles} for roles in (("alpha",), MATRIX_ROLES))
    if with_alpha and (without := layers - with_alpha):
        has = len(layers) - len(without)
        raise UserError(f"{file} has an alpha for {has} of its {len(layers)} layers: the strength of the others is not known")


def _check_trained(file: Path, names: Sequence[str], *, texts: bool = False) -> None:
    roles = {name: _role(name) for name in names}
    of_text = [] if texts else [n for n in names if placed(stem_of(n))[0] is not None]
    biases = [n for n in names if roles[n] == "bias"]
    for others, what in ((biases, "has biases"), (of_text, "changes a text encoder")):
        if others:
            raise UserError(
                f"{file} {what}, and so also changes what is not trained here ({_such(others, names)}): "
                "give one of the network alone"
            )


def _such(some: Sequence[str], of: Sequence[str]) -> str:
    return f"{len(some)} of its {len(of)} tensors, such as {short_name(some[0])}"


def short_name(name: str) -> str:
    """A name of a file, which may be anything, on one line and not longer than it needs to be."""
    name = " ".join(name.split())
    return name if len(name) <= 120 else f"{name[:60]}...{name[-50:]}"


def _kind(name: str) -> str | None:
    for kind, marks in OTHER_KINDS.items():
        if any(name.endswith(m) or (m.endswith(("_", ".")) and m in name) for m in marks):
            return kind
    return None


def _role(name: str) -> str | None:
    found = END.search(name)
    return None if found is None else found.lastgroup


def is_named(name: str) -> bool:
    """Whether a tensor is named as a part of a LoRA."""
    return _role(name) is not None


def stem_of(name: str) -> str:
    """The layer that a tensor is of, as the file has it."""
    return END.sub("", name, count=1)


def layers_of(file: Path, tensors: Mapping[str, Tensor]) -> list[Layer]:
    """The layers of a file whose names were checked.

    Raises:
        UserError: numbers that are not finite or no floating point, halves without the other, a layer that comes twice.
    """
    layers: dict[tuple[str | None, str], Layer] = {}
    for name, tensor in tensors.items():
        role, stem = _role(name), stem_of(name)
        assert role is not None
        tensor = _readable(file, name, tensor, role)
        layer = layers.setdefault(placed(stem), Layer(stem))
        if role in layer.tensors:
            raise UserError(f"{file} holds {short_name(name)} twice, under another name too; it is damaged")
        layer.tensors[role] = tensor
    for layer in layers.values():
        if layer.lycoris is not None:
            _check_factors(file, layer)
            continue
        _check_halves(file, layer, tensors)
        if "mid" in layer.tensors:
            _fold(layer.tensors)
    return list(layers.values())


def _readable(file: Path, name: str, tensor: Tensor, role: str) -> Tensor:
    if role == "alpha" and tensor.numel() != 1:
        raise UserError(f"{file}: {short_name(name)} holds {tensor.numel()} numbers; an alpha is one")
    if role != "alpha" and not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{file}: {short_name(name)} is stored as {kind}; a LoRA in floating point is expected")
    if not tensor.float().isfinite().all():
        raise UserError(f"{file} holds numbers that are not finite ({short_name(name)}); it cannot be used")
    return tensor if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) else tensor.float()


def _check_halves(file: Path, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
    for missing, there in (("down", "up"), ("up", "down")):
        if missing not in layer.tensors:
            names = [n for n in tensors if stem_of(n) == layer.named]
            end = ".lora_up.weight" if missing == "up" else ".lora_down.weight"
            raise UserError(
                f"{file} cannot be used: {short_name(layer.named + end)} is missing, the other half of "
                f"{short_name(next((n for n in names if _role(n) == there), names[0]))}"
            )


def _check_factors(file: Path, layer: Layer) -> None:
    """Both factors are there, each whole or as two matrices, and nothing else is."""
    found = layer.lycoris
    assert found is not None
    given = {role for role in layer.tensors if role != "alpha"}
    wanted: set[str] = set()
    for number in "12":
        pair = {f"{found.mark}_w{number}_{half}" for half in "ab"}
        whole = f"{found.mark}_w{number}"
        wanted |= {whole} if whole in given else pair | (given & {f"{found.mark}_t{number}"})
    if wrong := sorted(wanted ^ given):
        what = "is missing" if wrong[0] in wanted else "has no place beside the others"
        raise UserError(f"{file} cannot be used: {short_name(f'{layer.named}.{wrong[0]}')} {what}")


def _fold(tensors: dict[str, Tensor]) -> None:
    """Tucker's form of a convolution, up (out, r) of mid (r, r, k, k) of down (r, in), is a LoRA with ``mid down`` below."""
    mid, down = tensors.pop("mid"), tensors["down"]
    tensors["down"] = torch.einsum("rskl,si->rikl", mid.float(), down.float().flatten(1))


def told_config(file: Path, part: str) -> dict[str, Any] | None:
    """What a file, or PEFT's ``adapter_config.json`` beside it, tells of the LoRA of ``part``, as arguments of ``LoraConfig``.

    Raises:
        UserError: it is damaged, or tells of more than a LoRA.
    """
    beside = file.with_name("adapter_config.json")
    try:
        with safe_open(file, "pt") as opened:
            told = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        own = {key.removeprefix(f"{part}."): value for key, value in told.items() if key.startswith(f"{part}.")}
        if not own and file.name == "adapter_model.safetensors" and beside.is_file():
            own = dict(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"what {file} tells of its LoRA cannot be read: {first_line(error)}; save it again") from error
    _check_told(file, own)
    return {name: own[name] for name in TOLD if name in own} or None


def _check_told(file: Path, told: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if a configuration tells of what only its own program can do, or holds what is no such value."""
    if (kind := told.get("peft_type") or "LORA") != "LORA":
        raise UserError(
            f"{file} tells that it is of kind {short(kind, 40)}: in PEFT's layout only LoRA and DoRA are read, LoHa and LoKr "
            "in that of LyCORIS"
        )
    if (start := told.get("init_lora_weights", True)) not in STARTS:
        raise UserError(
            f"{file} began from changed weights of its model (init_lora_weights {short(start, 40)}), without which it is not "
            "what was trained: save it as a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    if more := [name for name in BESIDE if told.get(name)]:
        raise UserError(f"{file} is more than a LoRA ({more[0]} {short(told[more[0]], 40)}): only LoRA and DoRA are read")
    for name, expected in TOLD.items():
        if name in told and not _is_told(name, told[name]):
            raise UserError(f"{file} tells {name} {short(told[name], 40)}; expected {expected}: save it again")


def _is_told(name: str, value: object) -> bool:
    if name.endswith("_pattern"):
        return isinstance(value, dict) and all(
            _is_told("lora_alpha", number) for number in cast("dict[str, object]", value).values()
        )
    if TOLD[name] == "true or false":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if name == "lora_alpha" else isinstance(value, int) and value > 0


def tells_alpha(file: Path) -> bool:
    """Whether a LoRA tells its strength: diffusers' in the metadata, PEFT's beside it, kohya's in a number for every layer."""
    with safe_open(file, "pt") as opened:
        of_file = "lora_adapter_metadata" in (opened.metadata() or {})
    beside = file.name == "adapter_model.safetensors" and file.with_name("adapter_config.json").is_file()
    return of_file or beside or any(name.endswith(".alpha") for name in names_in(file))
