"""The prompt sets that papers compare models on, each with what its file tells of a prompt."""

from __future__ import annotations

import csv
import io
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from palate.base.errors import UserError, nearest, said, short
from palate.base.files import write_atomically
from palate.base.jsonl import decode, lines
from palate.data.prompts import Prompt

HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
TIMEOUT = 60  # seconds
RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class PromptSet:
    """A published list: where its file lies, and how it is read."""

    about: str
    url: str
    read: Callable[[Path], list[Prompt]]


def load_prompt_set(name: str, path: str | Path | None = None, *, cache_dir: str | Path | None = None) -> list[Prompt]:
    """The prompts of a set, in its own order; ``metadata`` holds ``category`` and more where the set has them.

    Args:
        name: one of :data:`SETS`.
        path: the set's file on disk; without it the file is fetched once and kept.
        cache_dir: where fetched files are kept, ``~/.cache/palate/prompts`` unless given.

    Raises:
        UserError: an unknown name, no file and no network, or a file of another format.
    """
    if name not in SETS:
        raise UserError(f"no prompt set {short(name)}{nearest(name, SETS)}")
    found = SETS[name]
    file = Path(path).expanduser() if path else _fetched(name, Path(cache_dir or "~/.cache/palate/prompts").expanduser())
    try:
        prompts = found.read(file)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; expected the file of {name}, which lies at {found.url}") from None
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {said(error)}"
        raise UserError(f"{file} is not the file of {name} ({reason}); expected that of {found.url}") from error
    if not prompts:
        raise UserError(f"{file} has no prompts; expected the file of {name}, which lies at {found.url}")
    return prompts


def _fetched(name: str, folder: Path) -> Path:
    url = SETS[name].url
    file = folder / url.rsplit("/", 1)[-1]
    if file.is_file():
        return file
    try:
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except (OSError, ValueError) as error:
        raise UserError(
            f"the prompts of {name} are not on this machine and could not be fetched ({said(error, 80)}). Download {url} where "
            f"there is a network, and put it at {file}, or give its place: {name}:FILE"
        ) from error
    write_atomically(file, content)
    return file


def _partiprompts(path: Path) -> list[Prompt]:
    # Without quoting: some prompts hold a bare double quote.
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [
        Prompt(row["Prompt"].strip(), metadata={"category": row["Category"], "challenge": row["Challenge"]}) for row in rows
    ]


def _hpsv2(path: Path) -> list[Prompt]:
    """One list of 3200 in the benchmark's order, or a folder with one list for each style."""
    if path.is_dir():
        styles = [(style, _texts(path / f"{style}.json")) for style in HPSV2_STYLES]
    else:
        texts = _texts(path)
        if len(texts) != 3200:
            raise ValueError(f"{len(texts)} prompts instead of 4 times 800")
        styles = [(style, texts[800 * i : 800 * i + 800]) for i, style in enumerate(HPSV2_STYLES)]
    return [Prompt(text, metadata={"category": style}) for style, part in styles for text in part]


def _drawbench(path: Path) -> list[Prompt]:
    """The sheet with ``Prompts,Category``, or one prompt a line; repeated lines, as some copies have, count once."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        found = {row["Prompts"].strip(): {"category": row["Category"]} for row in csv.DictReader(io.StringIO(text))}
    else:
        found = {line.strip(): {} for line in text.split("\n") if line.strip()}
    return [Prompt(prompt, metadata=metadata) for prompt, metadata in found.items()]


def _geneval(path: Path) -> list[Prompt]:
    rows = [decode(line) for _, line in lines(path.read_text(encoding="utf-8"))]
    return [
        Prompt(row["prompt"], metadata={"category": row["tag"], **{k: v for k, v in row.items() if k != "prompt"}})
        for row in rows
    ]


def _listed(path: Path) -> list[Prompt]:
    return [Prompt(text) for text in _texts(path)]


def _texts(path: Path) -> list[str]:
    """A JSON list of texts, or of objects with ``prompt``."""
    rows: list[object] = decode(path.read_text(encoding="utf-8"))
    return [str(row["prompt"] if isinstance(row, dict) else row).strip() for row in rows]


SETS = {
    "partiprompts": PromptSet(
        "1632 prompts of 12 categories and 11 challenges (Yu et al. 2022)",
        f"{RAW}/google-research/parti/main/PartiPrompts.tsv",
        _partiprompts,
    ),
    "hpsv2": PromptSet(
        "3200 prompts, 800 for each of anime, concept-art, paintings, photo (Wu et al. 2023)",
        f"{RAW}/AIDC-AI/Diffusion-SDPO/main/prompts/hpsv2.json",
        _hpsv2,
    ),
    "pickapic": PromptSet(
        "487 distinct prompts of Pick-a-Pic v2's unique test split (Kirstain et al. 2023)",
        f"{RAW}/AIDC-AI/Diffusion-SDPO/main/prompts/papv2.json",
        _listed,
    ),
    "drawbench": PromptSet(
        "200 prompts (Saharia et al. 2022)",
        f"{RAW}/NVlabs/DiffusionNFT/main/dataset/drawbench/test.txt",
        _drawbench,
    ),
    "geneval": PromptSet(
        "553 prompts of 6 tasks, with what must be seen (Ghosh et al. 2023)",
        f"{RAW}/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
        _geneval,
    ),
}
"""By the name that commands use; ``name:FILE`` reads a local file."""
