"""The result as one HTML page that needs nothing but itself: no network, no other file, no script to be read."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from palate.base.errors import UserError, short
from palate.base.files import write_atomically
from palate.base.jsonl import read_lines
from palate.base.options import leaves, parse
from palate.data.images import decode
from palate.evaluation import charts
from palate.evaluation.compare import Comparison, Group, Versus, by_weight, percent
from palate.evaluation.folders import Result, read_result, read_run, shown_of
from palate.evaluation.statistics import Average, WinRate

PAGE = Path(__file__).parent / "page"
SHEETS = 12  # of samples during training
SHOWN, LONGEST = 48, 512  # pairs of pictures on a page, and pixels of a picture's longest side: a page stays small


@dataclass(frozen=True)
class Chapter:
    """One run or one comparison, ready to be shown.

    ``pictures``: prompt, and a picture of each side, which may be fewer than were compared; ``labels``: what the sides are
    called; ``edited``: beside each of ``pictures``, what it was edited from. ``curves``: rows of the training log,
    ``{"step": 10, "loss": 0.69, ...}``; every number that occurs in two rows or more becomes a chart. ``samples``: sheets of
    pictures that were drawn during training, by the number of updates. ``progress``: how far a run has come. ``settings``:
    whatever a reader needs to repeat the run, nested at will.
    """

    title: str
    result: Result | None = None
    pictures: Sequence[tuple[str, Sequence[Image.Image]]] = ()
    labels: Sequence[str] = ("before", "after")
    edited: Sequence[Image.Image | None] = ()
    curves: Sequence[Mapping[str, object]] = ()
    samples: Sequence[tuple[int, Image.Image]] = ()
    progress: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, object] = field(default_factory=dict)
    command: str | None = None


def chapter_of(folder: str | Path) -> Chapter:
    """What lies in the folder of a run or of a comparison, finished or not.

    Raises:
        UserError: neither a log nor a comparison is there, or one is damaged.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix == ".json":
        folder = folder.parent
    found = next((folder / n for n in ("comparison.json", "metrics.json") if (folder / n).is_file()), None)
    log = folder / "log.jsonl"
    if found is None and not log.is_file():
        raise UserError(
            f"{folder} holds no comparison.json, metrics.json or log.jsonl; name the folder of a run or a comparison"
        )
    result, extra = read_result(found) if found else (None, {})
    run = read_run(folder)
    recipe = folder / "recipe.yaml"
    settings = parse(recipe.read_text(encoding="utf-8"), str(recipe)) if recipe.is_file() else {}
    labels, pictures, edited, title = ["before", "after"], [], [], folder.resolve().name
    if result is not None:
        if not recipe.is_file():
            settings, title = {"folders": ", ".join(result.folders), **result.settings}, " and ".join(result.models)
            labels = list(result.models)
        pictures = [(shown["prompt"], _open(result.folders, shown["files"])) for shown in result.shown[:SHOWN]]
        edited = [_edited(result.folders[0], shown.get("init_image")) for shown in result.shown[:SHOWN]]
    elif (sides := _unjudged(folder)) is not None:
        pictures = [(shown["prompt"], _open(sides, shown["files"])) for shown in shown_of(sides)]
    curves = [row for _, row in read_lines(log, may_be_cut=True)] if log.is_file() else []
    settings = settings if isinstance(settings, dict) else {}
    return Chapter(
        title=str(extra.get("title") or title),
        result=result,
        pictures=pictures,
        labels=labels,
        edited=edited,
        curves=curves,
        samples=_samples(folder / "samples"),
        progress=_progress(curves, settings),
        settings=_telling(settings),
        versions=run.get("versions") or {},
        command=run.get("command") or extra.get("command"),
    )


def _samples(folder: Path) -> list[tuple[int, Image.Image]]:
    """The sheets that a run has drawn so far, evenly thinned where there are many: the first and the last are among them."""
    found = sorted(
        (int(path.stem.removeprefix("step-")), path) for path in folder.glob("step-*.png") if path.stem[5:].isdigit()
    )
    kept = [found[round(i * (len(found) - 1) / (SHEETS - 1))] for i in range(SHEETS)] if len(found) > SHEETS else found
    return [(step, decode(path.read_bytes())) for step, path in kept]


def _progress(rows: Sequence[Mapping[str, object]], settings: Mapping[str, Any]) -> str:
    """How far a run has come, how fast, and how long it may take still; empty before its first line."""
    timed = [(_number(row.get("step")), _number(row.get("seconds"))) for row in rows]
    timed = [(step, seconds) for step, seconds in timed if math.isfinite(step + seconds)]
    if len(timed) < 2 or timed[-1][0] <= timed[0][0]:
        return ""
    (first, began), (done, seconds) = timed[0], timed[-1]
    speed = (done - first) / max(seconds - began, 1e-3)
    told = f"{done:.0f} updates in {_time(seconds)}, {speed:.3g} a second"
    training, online, last = settings.get("training") or {}, settings.get("online") or {}, rows[-1]
    share = _share(done, training.get("max_train_steps"))
    if online.get("train_prompts"):
        share = max(_share(last.get("round"), online.get("rounds")), share)  # whichever ends it
    elif math.isnan(share):
        share = _share(last.get("epoch"), training.get("num_train_epochs", 1))
    left = done / share - done if 0 < share < 1 else 0
    return f"{told}; about {_time(left / speed)} to go" if left >= 1 else told


def _number(value: object) -> float:
    """Of a log or a recipe that may have been mended by hand; NaN where no such number stands."""
    return float(value) if isinstance(value, int | float) else math.nan


def _share(done: object, of: object) -> float:
    """NaN where it is not known."""
    return _number(done) / (_number(of) or math.nan)


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


PRIVATE = ("output_dir", "cache_dir", "resume_from_checkpoint", "push_to_hub")
"""Options that tell of a machine and not of a result."""


def _telling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what does nothing in a run, and without folders of the machine."""
    idle = [] if (settings.get("online") or {}).get("train_prompts") else ["online"]
    kept = {name: value for name, value in settings.items() if name not in (*idle, *PRIVATE)}
    return {name: _telling(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _unjudged(folder: Path) -> list[str] | None:
    """The picture folders of a run that no judge has seen."""
    sides = [folder / "evaluation" / side for side in ("base", "tuned")]
    return [str(side) for side in sides] if all((side / "manifest.jsonl").is_file() for side in sides) else None


def _open(folders: Sequence[str], names: Sequence[str]) -> list[Image.Image]:
    images = []
    for folder, name in zip(folders, names, strict=True):
        path = Path(folder) / name
        if not path.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"{name} leads outside {folder}; compare again")
        try:
            images.append(decode(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise UserError(f"the picture {path} cannot be shown ({error}); compare again") from error
    return images


def _edited(folder: str, name: str | None) -> Image.Image | None:
    """What a picture was edited from, where it was kept."""
    return _open([folder], [name])[0] if name is not None and Path(folder, name).is_file() else None


def write_report(path: str | Path, chapters: Sequence[Chapter]) -> None:
    """Write one self-contained HTML file, atomically. All text is escaped."""
    if not chapters:
        raise UserError("there is nothing to report; name the folder of a run or of a comparison")
    write_atomically(path, page_of(chapters).encode())


def page_of(chapters: Sequence[Chapter], *, watched: bool = False, waiting: str = "") -> str:
    """The page as text.

    watched: it asks the server that it came from, which is :mod:`palate.evaluation.watch`, for what is new. waiting: why there
    is nothing to show yet.
    """
    for prompt, images, labels in ((*shown, c.labels) for c in chapters for shown in c.pictures):
        if len(images) != len(labels):
            raise UserError(f"{len(images)} pictures of {short(prompt)} came with {len(labels)} sides; give as many of each")
    script = Markup((PAGE / "report.js").read_text(encoding="utf-8"))
    title = (waiting and "Palate") or (chapters[0].title if len(chapters) == 1 else f"{len(chapters)} results")
    watch = Markup((PAGE / "watch.js").read_text(encoding="utf-8")) if watched else ""
    told = {"title": title, "style": page_style(), "script": script, "watch": watch, "waiting": waiting, "chapters": chapters}
    return _templates().get_template("report.html").render(told)


def colours() -> str:
    """The style sheet with the colours of all pages, light and dark."""
    return (PAGE / "colours.css").read_text(encoding="utf-8")


def page_style() -> Markup:
    """The style sheet of a page that stands alone."""
    return Markup(colours() + (PAGE / "report.css").read_text(encoding="utf-8"))


def environment(folder: Path) -> Environment:
    """What fills in the templates of a folder of pages; all text is escaped, and no name may be missing."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


@cache
def _templates() -> Environment:
    """The page's templates, with all that they ask."""
    found = environment(PAGE)
    found.finalize = _without_folders
    found.filters |= {
        "bar": charts.bar,
        "by_weight": by_weight,
        "csv_of_pairs": _csv_of_pairs,
        "csv_of_rows": _csv_of_rows,
        "curves": charts.curves,
        "distance": charts.distance,
        "entries": _entries,
        "number": charts.number,
        "parts": _parts,
        "percent": percent,
        "sha256": sha256,
        "shown": embedded,
        "tone": tone,
    }
    return found


def sha256(text: str) -> str:
    """What a content-security policy names a style or script by."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def tone(w: WinRate | Average) -> str:
    """The class of a share: whether its interval lies above a half, below it, or on both sides."""
    return "good" if w.low > 0.5 else "bad" if w.high < 0.5 else "even"


def _parts(pairs: Sequence[Versus]) -> list[tuple[str, str, Group]]:
    """The kinds of prompts, by model and judge."""
    return [(v.model, c.judge, group) for v in pairs for c in by_weight(v.comparisons) for group in c.groups]


_FOLDERS = re.compile(r"(?<![^\s'\"=:\[(])(?:/[^/\s'\":]+)+/(?=[^/\s'\"]|$)")


def _without_folders(told: object) -> object:
    """Absolute paths by their last part: a page is sent to others, and a machine's folders are nobody else's."""
    return _FOLDERS.sub("…/", told) if isinstance(told, str) and not isinstance(told, Markup) else told


def _csv_of_pairs(pairs: Sequence[Versus]) -> str:
    """Every judge of every model, over all prompts and over each kind of them, as an address of its own."""
    rows: list[Mapping[str, object]] = []
    for v in pairs:
        for c in by_weight(v.comparisons):
            rows.append({"model": v.model, "base": v.base, "judge": c.judge, "kind": c.kind, **_numbers(c)})
            rows += [
                {"model": v.model, "base": v.base, "judge": c.judge, "kind": c.kind, "field": g.field, "value": g.value}
                | _numbers(g)
                for g in c.groups
            ]
    return _csv_of_rows(rows)


def _numbers(found: Comparison | Group) -> dict[str, object]:
    w, d = found.win_rate, found.difference
    told = {"share": w.rate, "share_low": w.low, "share_high": w.high, "wins": w.wins, "ties": w.ties, "losses": w.losses}
    return {**told, "prompts": w.prompts, "difference": d.difference, "difference_low": d.low, "difference_high": d.high}


def _csv_of_rows(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with a column for every name that one of them has, as an address that needs no server."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.getvalue().encode()).decode()}"


def _cell(value: object) -> object:
    """A value; of a text that a table would take for a formula, the text."""
    value = _without_folders(value)
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


class Embedded(NamedTuple):
    """A picture inside a page."""

    data: str
    """WebP in base64."""
    width: int
    height: int


def embedded(image: Image.Image, longest: int = LONGEST) -> Embedded:
    """A picture of at most ``longest`` pixels a side as a page of its own holds it."""
    # Small pictures are enlarged here by a whole factor: Lanczos keeps edges that a browser's own enlarging blurs.
    image = image.convert("RGB")
    factor = max(1, round(256 / max(image.size)))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=86, method=4)
    return Embedded(base64.b64encode(buffer.getvalue()).decode(), image.width, image.height)


def _entries(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Nested settings as ``objective.beta`` and its value, where there is one."""
    return ((".".join(names), value) for names, value in leaves(values) if value is not None)
