"""Judges by the names that recipes and commands use."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from os.path import isfile  # pathlib's raises for a name that is too long
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from palate.base.errors import UserError, nearest, short
from palate.base.options import foreign
from palate.judges import KINDS, check_judge
from palate.judges.remote import Identity, RemoteJudge, identity
from palate.miniature import world

if TYPE_CHECKING:
    import torch

    from palate.evaluation.manifest import ScoreFile
    from palate.judges import Judge

HELD_OUT = "held out"
READ = {
    *(".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".onnx", ".npy", ".npz", ".pkl", ".joblib", ".model", ".gguf"),
    *(".json", ".yaml", ".yml", ".toml", ".txt", ".py"),
}
"""Endings of what a function of one's own reads; logs, tables and databases it may as well write."""
SAMPLED = 1 << 20  # bytes read at either end of a large file


@dataclass(frozen=True)
class NamedJudge:
    """A judge that is known to be loadable, but not loaded."""

    name: str
    kind: str
    """One of :data:`palate.judges.KINDS`, ``function`` or ``weighted``."""
    folder: Path | None = None
    """Of its weights, if it has any."""
    role: str = HELD_OUT
    """What it tells: "held out", or for a miniature judge such as "looks"."""
    url: str | None = None
    """What it asks, if it asks somebody."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of its kind."""
    parts: tuple[tuple[float, NamedJudge], ...] = ()
    """Weight and judge, of a weighted sum."""
    served: Identity | None = None
    """Who answers at the address of a remote judge, as its server told when it was found."""

    def load(self, device: str | torch.device = "cpu") -> Judge:
        from palate.judges import load_judge
        from palate.judges.guard import Guarded
        from palate.judges.weighted import Weighted

        if self.kind == "weighted":
            return Weighted([(weight, part.load(device)) for weight, part in self.parts])
        if self.kind == "function":
            return Guarded(foreign(self.name), self.name)
        judge = load_judge(self.kind, self.folder or self.url, device=device, **self.options)
        if isinstance(judge, RemoteJudge):
            judge.expected = self.served
        return judge

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the judge's kind, options or weights, and with the files that options name.

        A function of one's own is known by its source, that of the modules beside it which it uses, and the files and models'
        folders that these name as a text. Of weights above 2 MB
        the size and both ends are read, so that it takes no time. A remote judge has the fingerprint that its server tells; of
        one that tells none, and of a model behind an endpoint, only the address and names are known.
        """
        if self.served is not None and self.served.fingerprint:
            return self.served.fingerprint
        about = [self.kind, self.url, dict(self.options), [[weight, part.fingerprint()] for weight, part in self.parts]]
        about += [self.name if self.kind == "function" else "", *([asdict(self.served)] if self.served else [])]
        about += [KINDS[self.kind].version] if self.kind in KINDS and KINDS[self.kind].version > 1 else []
        digest = hashlib.sha256(json.dumps(about).encode())
        named = (Path(value).expanduser() for value in self.options.values() if isinstance(value, str) and value)
        for place in (self.folder, *(path for path in named if path.exists())):
            _add_files(digest, place)
        for path in sources(self.name) if self.kind == "function" else ():
            digest.update(f"{path.name} ".encode() + path.read_bytes())
            for place in _named_in(path):
                _add_files(digest, place)
        return digest.hexdigest()[:16]

    @property
    def members(self) -> tuple[NamedJudge, ...]:
        """Itself, and every judge that it is a sum of."""
        return (self, *(member for _, part in self.parts for member in part.members))

    @property
    def serves(self) -> tuple[str, ...]:
        """Names of the judges behind its addresses, as their servers tell."""
        return tuple(member.served.judge for member in self.members if member.served)

    def header(self) -> ScoreFile:
        """What a file of its scores begins with."""
        from palate.evaluation.manifest import ScoreFile

        return ScoreFile(self.name, self.kind, self.fingerprint(), self.role, self.serves)


def _add_files(digest: hashlib._Hash, place: Path | None) -> None:
    """A file, or those of a folder that hold weights, settings or words; of large ones the size and both ends."""
    if place is None:
        return
    folder = place if place.is_dir() else place.parent
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file() and (path == place or path.suffix in (".safetensors", ".pt", ".pth", ".json", ".txt")):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLED))
                if path.stat().st_size > SAMPLED:
                    file.seek(-SAMPLED, os.SEEK_END)
                    digest.update(file.read())


def _named_in(source: Path) -> list[Path]:
    """Files, and folders of models, that a file of Python names as a text: relative to it, or to where we are."""
    found = dict[Path, None]()
    for node in ast.walk(_tree(source)):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if 1 < len(text) < 256 and "\n" not in text and "\0" not in text:
            # As a path, and as the module that importlib is asked for.
            for place in (source.parent / text, Path(text).expanduser(), source.parent / f"{text}.py"):
                if (place.suffix in READ and isfile(place)) or isfile(place / "config.json"):
                    found[place.resolve()] = None
    return sorted(found)


def sources(name: str) -> list[Path]:
    """The files that the function ``module:function`` is named and written in, which may be two, and those beside them that
    they import, and so on; none where there is no source."""
    function = foreign(name)
    written = getattr(function, "__module__", None) or type(function).__module__
    found = dict[Path, None]()
    for module in dict.fromkeys((name.partition(":")[0], written)):
        text = getattr(sys.modules.get(module), "__file__", None) or ""
        first = Path(text).resolve()
        if first.suffix != ".py" or (first.is_relative_to(sysconfig.get_path("stdlib")) and "site-packages" not in first.parts):
            continue
        # Where its top module lies; of what is installed, the package alone is its own.
        root = first.parents[module.count(".") + (first.name == "__init__.py")]
        root = root / module.partition(".")[0] if "site-packages" in root.parts else root
        waiting = [first]
        while waiting:
            path = waiting.pop()
            if path not in found and path.is_relative_to(root):
                found[path] = None
                waiting += _imported(path, root)
    return list(found)


def _tree(path: Path) -> ast.Module:
    """A file of Python, parsed; an empty one where it cannot be."""
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _imported(path: Path, root: Path) -> Iterator[Path]:
    """The files below ``root`` that a file of Python imports, wherever in it."""
    for node in ast.walk(_tree(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        base, within = root, ""
        if isinstance(node, ast.ImportFrom):
            base, within = (path.parents[node.level - 1] if node.level else root), node.module or ""
        for name in (within, *names):
            parts = [*within.split("."), *(name.split(".") if name != within else ())]
            place = base.joinpath(*filter(None, parts))
            yield from (file.resolve() for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


def find_judges(names: Iterable[str]) -> dict[str, NamedJudge]:
    """The judges of these names, each once, in order; no weights are read (those of a hub id are fetched).

    A name is one of

    - ``mini-heldout``: of the miniature world;
    - ``pickscore``: the published weights; ``pickscore:models/PickScore_v1``: from a folder; ``pickscore:owner/model``: a hub
      id; ``jpeg_compressibility``: without weights;
    - ``remote:http://127.0.0.1:8300``: a judge that ``palate serve-judge`` serves; ``vqascore:http://127.0.0.1:8000/v1#model``:
      a vision model behind an OpenAI-compatible endpoint;
    - ``package.module:function``: your own, importable from here;
    - ``0.5*pickscore + 0.3*aesthetic``: a weighted sum of any of these.

    Options of a judge follow a question mark: ``pickscore:FOLDER?dtype=bfloat16``.

    Raises:
        UserError: an unknown name or option, or a folder in which something is missing.
    """
    return {name: _find(name) for name in names}


def score_folders(
    judges: Iterable[NamedJudge], folders: Iterable[str | Path], *, device: str | torch.device = "cpu", progress: bool = False
) -> None:
    """Let judges score what they have not scored yet of picture folders; one judge in memory at a time."""
    from palate.evaluation.manifest import read_manifest
    from palate.evaluation.scoring import score_folder

    read = {str(folder): read_manifest(folder) for folder in folders}
    for named in judges:
        judge, header = named.load(device), named.header()
        for folder, pictures in read.items():
            score_folder(judge, header, folder, pictures, progress=progress)


def _find(name: str) -> NamedJudge:
    terms = [term.strip() for term in name.split(" + ")]
    weights = [re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*(.+)", term) for term in terms]
    if len(terms) > 1 or weights[0]:
        parts = tuple(
            (float(found[1]), _find(found[2])) if found else (1.0, _find(term))
            for term, found in zip(terms, weights, strict=True)
        )
        return NamedJudge(name, "weighted", parts=parts)
    if name in world.JUDGES:
        kind, role = world.JUDGES[name]
        return _checked(name, kind, str(world.checkpoint(name)), {}, role)
    kind = re.split("[:?]", name, maxsplit=1)[0]  # of pickscore:FOLDER?dtype=bfloat16, and of pickscore?dtype=bfloat16
    where = name.removeprefix(kind).removeprefix(":")
    if kind in KINDS:
        return _checked(name, kind, *_options(name, where), HELD_OUT)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) and _importable(kind):
        foreign(name)
        return NamedJudge(name, "function")
    bare = [k for k, v in KINDS.items() if v.place == "nothing" or (v.hub and ":" not in name)]
    forms = [*world.JUDGES, *bare, *(f"{k}:{v.place.upper()}" for k, v in KINDS.items() if k not in bare)]
    raise UserError(f"no judge {short(name)}{nearest(name, [*forms, 'package.module:function'])}")


def _checked(name: str, kind: str, where: str, options: dict[str, Any], role: str) -> NamedJudge:
    place = check_judge(kind, where or None, **options)
    folder, url = (place, None) if isinstance(place, Path) else (None, place)
    served = identity(url) if kind == "remote" and url else None
    return NamedJudge(name, kind, folder, (served and served.role) or role, url, options, served=served)


def _options(name: str, where: str) -> tuple[str, dict[str, Any]]:
    """``FOLDER?dtype=bfloat16`` or ``URL?timeout=60#model`` in two."""
    if where and Path(where).expanduser().exists():
        return where, {}
    where, _, model = where.partition("#")
    where, question, text = where.partition("?")
    pairs = parse_qsl(text, keep_blank_values=True)
    if (question and not pairs) or any(not value for _, value in pairs):
        raise UserError(f"judge {short(name)}: expected options as ?name=value&name=value after its folder or URL")
    return where, {**dict(pairs), **({"model": model} if model else {})}


def _importable(module: str) -> bool:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False
