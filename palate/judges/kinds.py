"""The kinds of judges: where their weights come from, how large they are, which module makes them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from palate.base.errors import UserError, nearest, short
from palate.base.hub import is_hub_id, snapshot
from palate.base.options import keywords

CLIP_FILES = ("*.json", "*.txt", "model*.safetensors", "tokenizer/*")
VISION_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors")
H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
L14 = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Kind:
    """A kind of judge.

    Its module has ``Options``, a dataclass of keywords, and ``prepare(kind, place, options)``, which refuses what is missing
    without reading weights and returns what reads them: a function of a device that gives the judge.
    """

    module: str
    """In ``palate.judges``."""
    place: str = "folder"
    """What follows the colon of its name: ``nothing``, ``folder`` (or hub id), ``endpoint`` (these or a URL), ``url``."""
    hub: str = ""
    """Repository of the published weights, which the bare name means."""
    files: tuple[str, ...] = CLIP_FILES
    """Patterns of the files it needs of its repository."""
    size: str = ""
    """Of those files."""
    tokenizer: str = ""
    """Repository of its tokenizer, where the weights come without."""
    version: int = 1
    """Raised where the same weights begin to score otherwise, so that scores from before are none of theirs."""


KINDS: dict[str, Kind] = {
    "pickscore": Kind("clip", hub="yuvalkirstain/PickScore_v1", size="3.9 GB", tokenizer=H14),
    "clipscore": Kind("clip", hub=L14, size="1.7 GB", tokenizer=L14),
    "hpsv2": Kind("hps", hub="xswu/HPSv2", files=("HPS_v2_compressed.pt",), size="2 to 4 GB", tokenizer=H14, version=2),
    "hpsv2.1": Kind("hps", hub="xswu/HPSv2", files=("HPS_v2.1_compressed.pt",), size="2 to 4 GB", tokenizer=H14, version=2),
    "imagereward": Kind(
        "imagereward",
        hub="THUDM/ImageReward",
        files=("ImageReward.pt", "med_config.json"),
        size="1.8 GB",
        tokenizer="google-bert/bert-base-uncased",
    ),
    "aesthetic": Kind("aesthetic", hub=L14, size="1.7 GB", tokenizer=L14),
    "aesthetic_v1": Kind("aesthetic", hub=L14, size="1.7 GB", tokenizer=L14),
    "vqascore": Kind("alignment", place="endpoint", files=VISION_FILES),
    "vlm_bertscore": Kind("alignment", place="endpoint", files=VISION_FILES),
    "vlm_strict": Kind("alignment", place="endpoint", files=VISION_FILES),
    "remote": Kind("remote", place="url"),
    "jpeg_compressibility": Kind("jpeg", place="nothing"),
    "jpeg_incompressibility": Kind("jpeg", place="nothing"),
}
"""What :func:`palate.judges.load_judge` can load."""


def kind_of(name: str) -> Kind:
    if name not in KINDS:
        raise UserError(f"unknown judge {short(name)}{nearest(name, KINDS)}")
    return KINDS[name]


def module_of(kind: str) -> ModuleType:
    return importlib.import_module(f"palate.judges.{kind_of(kind).module}")


def options_of(kind: str, given: Mapping[str, object]) -> object:
    """The options of a judge, complete and typed, as the record that its module names; unknown ones are refused."""
    record = module_of(kind).Options
    try:
        return record(**keywords(record, given, f"judge {kind}"))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith("judge ") else f"judge {kind}: {error}") from None


def find_place(kind: str, where: str | Path | None) -> Path | str | None:
    """The folder (fetched, if it is a hub id), URL or nothing that a judge of this kind is made from.

    Raises:
        UserError: there is no such folder, or it cannot be fetched: says which files, how large, where to put them.
    """
    of, text = kind_of(kind), str(where or "")
    if of.place == "nothing":
        if text:
            raise UserError(f"judge {kind} needs no weights, but {short(text)} was given; leave it out")
        return None
    if text.startswith(("http://", "https://")):
        if of.place == "folder":
            raise UserError(f"judge {kind} reads weights, it cannot ask {text}; give a folder, or remote:{text}")
        return text
    if of.place == "url":
        raise UserError(f"judge {kind} needs a URL such as {kind}:http://127.0.0.1:8300; got {short(text)}")
    if not text and not of.hub:
        raise UserError(f"judge {short(kind)} needs the folder of its model; none was given")
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return folder
    repo = text or of.hub
    if not is_hub_id(repo):
        raise UserError(f"no folder {text}; expected the folder of a model for judge {kind}")
    return snapshot(repo, of.files, otherwise=how_to_get(kind, repo, text))


def how_to_get(kind: str, repo: str, folder: str = "") -> str:
    """What a person without a network does: which files, how large, where to put them."""
    of, target = KINDS[kind], folder or f"models/{repo.split('/')[-1]}"
    size = f" ({of.size})" if of.size and repo == of.hub else ""
    files = " ".join(f"--include '{pattern}'" for pattern in of.files)
    return (
        f"Without a network, run 'hf download {repo} {files} --local-dir {target}'{size} where there is one, "
        f"copy the folder here and name the judge {kind}:{target}"
    )


def tokenizer_folder(kind: str, folder: Path, *names: str) -> Path:
    """Where the tokenizer of a judge is: the folder or its subfolder ``tokenizer``, else a repository that has it.

    ``names`` are the files of a tokenizer in its older form; ``tokenizer.json`` alone is enough.
    """
    for place in (folder / "tokenizer", folder):
        if (place / "tokenizer.json").is_file() or all((place / name).is_file() for name in names):
            return place
    repo = KINDS[kind].tokenizer
    files = ("tokenizer.json", "tokenizer_config.json", *names)
    how = (
        f"{folder} has no tokenizer. Run 'hf download {repo} {' '.join(files)} --local-dir {folder / 'tokenizer'}' "
        "(2 MB), or copy these files there"
    )
    return snapshot(repo, files, otherwise=how)
