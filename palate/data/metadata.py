"""What programs write into the pictures they draw: prompt, seed and model, of A1111 and its kin, ComfyUI and SwarmUI."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, cast

from PIL import Image

from palate.base.jsonl import decode

FORMATS = ("PNG", "JPEG", "WEBP")
COMMENT, EXIF, MODEL, MAKE = 0x9286, 0x8769, 0x0110, 0x010F
"""EXIF: the user's comment, the directory it stands in, and the two tags into which ComfyUI writes ``prompt:`` and more."""
DEEPEST = 200
"""Nodes of a workflow from a sampler to its words."""
WORDS = ("text", "text_g", "text_l", "clip_l", "clip_g", "t5xxl", "prompt", "string", "value")
"""Inputs of ComfyUI's nodes that hold words; besides ``positive`` and ``negative``."""
NO_WORDS = ("clip", "vae", "model", "image", "pixels", "mask", "control_net", "latent", "samples", "sampler", "sigmas")
"""How the names of inputs begin that lead to something else than words."""
Nodes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Drawn:
    """How a picture was drawn, as its program wrote it."""

    prompt: str
    """Plain words; see :func:`plain_words`."""
    negative: str | None = None
    seed: int | None = None
    model: str | None = None
    """Name of the checkpoint, without folder and ending."""


def read_drawn(path: str | Path) -> Drawn | None:
    """What a PNG, JPEG or WebP says of how it was drawn; None where it says nothing, or cannot be read."""
    try:
        return _read(Path(path), Path(path).stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=1 << 16)
def _read(path: Path, changed: int) -> Drawn | None:
    """``changed`` renews the cache: a folder is read for its rows, for their number, and for what it leaves out."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            texts = {name: text for name, text in image.info.items() if isinstance(text, str)}
            exif = image.getexif()
            tags = [exif.get(MODEL), exif.get(MAKE)]
            comment = exif.get_ifd(EXIF).get(COMMENT)
    except Exception:  # on damaged files PIL raises nearly anything; whoever reads the picture tells
        return None
    for name, _, text in (str(tag).partition(":") for tag in tags if tag):
        texts.setdefault(name, text)
    if comment:
        texts.setdefault("parameters", _comment(comment))
    found = parameters(texts.get("parameters", "")) or workflow(texts.get("prompt", ""))
    return found if found and found.prompt else None


def plain_words(prompt: str) -> str:
    """A prompt without what is meant for a program: ``<lora:name:1>``, ``(word:1.2)``, ``((word))``, ``[word]``, ``BREAK``.

    Prompts that change on the way (``[cat:dog:0.5]``) and alternatives (``[cat|dog]``) stay as they are.
    """
    words = re.sub(r"<[a-z]\w*:[^<>]*>", " ", prompt)
    words = re.sub(r"\s*\bBREAK\b\s*", ", ", words)
    escaped = {r"\(": "\0", r"\)": "\1", r"\[": "\2", r"\]": "\3"}
    for written, held in escaped.items():
        words = words.replace(written, held)
    before = ""
    while before != words:  # from the inside out
        before = words
        words = re.sub(r"\(([^()]*?)(?::\s*-?[\d.]+)?\)", r"\1", words)
        words = re.sub(r"\[([^\[\]:|]*)\]", r"\1", words)
    for written, held in escaped.items():
        words = words.replace(held, written[1])
    words = re.sub(r"\s+", " ", words)
    return re.sub(r"\s*,(?:\s*,)+", ",", words).strip(" ,")


# A1111, Forge, Fooocus in A1111's layout, and SwarmUI ----------------------------------------------------------------------


def parameters(text: str) -> Drawn | None:
    """What A1111 (three paragraphs: prompt, ``Negative prompt:``, ``Steps: ...``) or SwarmUI (JSON) keeps under that name."""
    if text.lstrip().startswith("{"):
        return _swarm(text)
    settings = list(re.finditer(r"^Steps: \d+.*", text, re.MULTILINE | re.DOTALL))
    if not settings:
        return None
    head, tail = text[: settings[-1].start()], settings[-1].group()
    prompt, _, negative = head.partition("Negative prompt:")
    seed, model = re.search(r"\bSeed: (\d+)", tail), re.search(r'\bModel: (?:"([^"]*)"|([^,\n]*))', tail)
    return _drawn(prompt, negative, seed and seed[1], model and (model[1] or model[2]))


def _swarm(text: str) -> Drawn | None:
    found = _object(text).get("sui_image_params")
    if not isinstance(found, dict):
        return None
    return _drawn(*(found.get(name) for name in ("prompt", "negativeprompt", "seed", "model")))


# ComfyUI -------------------------------------------------------------------------------------------------------------------


def workflow(text: str) -> Drawn | None:
    """What ComfyUI keeps under ``prompt``: the nodes that were run; the first sampler before a saved picture counts."""
    nodes: Nodes = {
        name: node
        for name, node in _object(text).items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict) and isinstance(node.get("class_type"), str)
    }
    sampler = _first_sampler(nodes)
    if sampler is None:
        return None
    ends = [sampler, *(nodes[name] for key in ("guider", "noise") if (name := _link(nodes, sampler, key)))]
    positive, negative = (
        next(
            (w for end in ends for key in keys if (name := _link(nodes, end, key)) and (w := _words(nodes, name, keys[0]))), ""
        )
        for keys in (("positive", "conditioning", "cond1"), ("negative",))
    )
    seed = next((s for end in ends for key in ("seed", "noise_seed") if (s := _number(nodes, end, key)) is not None), None)
    return _drawn(positive, negative, seed, next((m for end in ends if (m := _checkpoint(nodes, end))), None))


def _first_sampler(nodes: Nodes) -> Mapping[str, Any] | None:
    """A sampler that goes on from no other's result; one whose result is saved before one whose is not."""
    samplers = {
        name for name, node in nodes.items() if "latent_image" in node["inputs"] and {"positive", "guider"} & {*node["inputs"]}
    }
    saved = {above for name, node in nodes.items() if "Save" in node["class_type"] for above in _above(nodes, name)}
    first = [name for name in sorted(samplers, key=lambda n: (len(n), n)) if not samplers & _above(nodes, name)]
    chosen = next((name for name in first if name in saved), first[0] if first else None)
    return nodes[chosen] if chosen is not None else None


def _above(nodes: Nodes, name: str) -> set[str]:
    """All nodes on which one depends."""
    found: set[str] = set()
    left = [name]
    while left:
        new = {link for value in nodes[left.pop()]["inputs"].values() for link in _links(nodes, value)} - found
        found |= new
        left += new
    return found


def _links(nodes: Nodes, value: object) -> Iterator[str]:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in nodes:
        yield value[0]


def _link(nodes: Nodes, node: Mapping[str, Any], key: str) -> str | None:
    return next(_links(nodes, node["inputs"].get(key)), None)


def _words(nodes: Nodes, name: str, side: str, depth: int = 0) -> str:
    """The words that a conditioning was made of; several are joined with a comma."""
    node = nodes[name]
    if depth > DEEPEST or "ZeroOut" in node["class_type"]:
        return ""
    inputs = node["inputs"]
    found = [inputs[key] for key in (side, *WORDS) if isinstance(inputs.get(key), str)]
    if not any(found):
        ahead = [side] if _link(nodes, node, side) else [key for key in inputs if not key.startswith(NO_WORDS)]
        found = [_words(nodes, link, side, depth + 1) for key in ahead if (link := _link(nodes, node, key))]
    return ", ".join(dict.fromkeys(words.strip() for words in found if words.strip()))


def _number(nodes: Nodes, node: Mapping[str, Any], key: str) -> int | None:
    """An input's whole number, or that of the node it comes from."""
    link = _link(nodes, node, key)
    given = [node["inputs"].get(key)] if link is None else [nodes[link]["inputs"].get(k) for k in ("seed", "value", "int")]
    return next((value for value in given if isinstance(value, int) and not isinstance(value, bool)), None)


def _checkpoint(nodes: Nodes, node: Mapping[str, Any]) -> str | None:
    """The file of weights at the end of a chain of models."""
    for _ in range(DEEPEST):
        link = _link(nodes, node, "model")
        if link is None:
            break
        node = nodes[link]
    return next((v for k in ("ckpt_name", "unet_name", "model_name") if isinstance(v := node["inputs"].get(k), str)), None)


# Parts ---------------------------------------------------------------------------------------------------------------------


def _drawn(prompt: object, negative: object, seed: object, model: object) -> Drawn | None:
    words, against = (plain_words(text) if isinstance(text, str) else "" for text in (prompt, negative))
    number = int(seed) if isinstance(seed, int | str) and re.fullmatch(r"\d{1,20}", str(seed)) else None
    name = PurePosixPath(model.strip().replace("\\", "/")).name if isinstance(model, str) else ""
    return Drawn(words, against or None, number, re.sub(r"\.(safetensors|ckpt|gguf|sft|pt)$", "", name) or None)


def _object(text: str) -> dict[str, Any]:
    """A JSON object; an empty one for anything else."""
    try:
        found = decode(text)
    except ValueError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _comment(data: bytes | str) -> str:
    """A user's comment, which begins with eight bytes that name its coding (EXIF 2.32, section 4.6.5)."""
    if isinstance(data, str):
        return data.removeprefix("UNICODE").removeprefix("ASCII").lstrip("\0")
    if not data.startswith(b"UNICODE\0"):
        return data.removeprefix(b"ASCII\0\0\0").lstrip(b"\0").decode(errors="replace")
    text = data[8:]
    # Of the two orders of bytes, which EXIF leaves to the file, programs write either.
    return text.decode("utf-16-le" if text[1:2] == b"\0" else "utf-16-be", errors="replace")
