"""The result as one HTML page that needs nothing but itself: no network, no other file, no script to be read."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from palate.base.errors import UserError
from palate.base.files import write_atomically
from palate.base.jsonl import read_lines
from palate.base.options import parse
from palate.data.images import decode
from palate.evaluation.charts import _bar, _curves, _distance, _number
from palate.evaluation.compare import Comparison, Group, Ranking, Versus, by_weight, percent
from palate.evaluation.folders import Result, read_result, read_run

PAGE = files("palate.evaluation") / "page"
STYLE = "\n" + PAGE.joinpath("report.css").read_text(encoding="utf-8")

# Without it the pictures stand side by side; with it they can also lie on each other and flip, or be slid over one another.
SCRIPT = "\n" + PAGE.joinpath("report.js").read_text(encoding="utf-8")

SHOWN, LONGEST = 48, 512  # pairs of pictures on a page, and pixels of a picture's longest side: a page stays small


@dataclass(frozen=True)
class Chapter:
    """One run or one comparison, ready to be shown.

    ``pictures``: prompt, and a picture of each side, which may be fewer than were compared; ``labels``: what the sides are
    called; ``edited``: beside each of ``pictures``, what it was edited from. ``curves``: rows of the training log,
    ``{"step": 10, "loss": 0.69, ...}``; every number that occurs in two rows or more becomes a chart. ``settings``: whatever a
    reader needs to repeat the run, nested at will.
    """

    title: str
    result: Result | None = None
    pictures: Sequence[tuple[str, Sequence[Image.Image]]] = ()
    labels: Sequence[str] = ("before", "after")
    edited: Sequence[Image.Image | None] = ()
    curves: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
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
    return Chapter(
        title=str(extra.get("title") or title),
        result=result,
        pictures=pictures,
        labels=labels,
        edited=edited,
        curves=[row for _, row in read_lines(log, may_be_cut=True)] if log.is_file() else [],
        settings=settings if isinstance(settings, dict) else {},
        versions=run.get("versions") or {},
        command=run.get("command") or extra.get("command"),
    )


def write_report(path: str | Path, chapters: Sequence[Chapter]) -> None:
    """Write one self-contained HTML file, atomically. All text is escaped."""
    if not chapters:
        raise UserError("there is nothing to report; name the folder of a run or of a comparison")
    title = chapters[0].title if len(chapters) == 1 else f"{len(chapters)} results"
    page = Template(PAGE.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        style=STYLE,
        style_hash=_sha256(STYLE),
        script=SCRIPT,
        script_hash=_sha256(SCRIPT),
        contents=_contents(chapters) if len(chapters) > 1 else "",
        chapters="".join(_chapter(c, f"result-{i}") for i, c in enumerate(chapters, start=1)),
    )
    write_atomically(path, page.encode())


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


def _contents(chapters: Sequence[Chapter]) -> str:
    rows = []
    for number, chapter in enumerate(chapters, start=1):
        v = chapter.result.versus[0] if chapter.result else None
        best = by_weight(v.comparisons)[0] if v and v.comparisons else None
        cells = "<td></td><td></td><td>no comparison yet</td>"
        if best is not None:
            w = best.win_rate
            cells = f"""<td>{_bar(w)}</td><td class="num"><strong>{percent(w.rate)} %</strong>
<span class="soft">{percent(w.low)}–{percent(w.high)} %</span></td><td data-name="Judge">{escape(best.judge)}</td>"""
        tone = _verdict(best) if best else "even"
        rows.append(
            f'<tr class="{tone}"><th scope="row"><a href="#result-{number}">{escape(chapter.title)}</a></th>{cells}</tr>'
        )
    return f"""<header><h1>{len(chapters)} results</h1><table class="contents small"><thead><tr><th scope="col">Result</th>
<th scope="col">Preferred to its base</th><th scope="col">Share</th><th scope="col">Most independent judge</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></header>"""


def _chapter(c: Chapter, anchor: str) -> str:
    pairs = c.result.versus if c.result else []
    hero = "".join(_hero(v.headline, by_weight(v.comparisons)) for v in pairs)
    hero = hero or '<div class="hero"><h1>Training so far. It has not been compared with its base.</h1></div>'
    aligned = c.labels[-1] if len(c.labels) == 2 and tuple(c.labels) != ("before", "after") else "the aligned model"
    judges = "".join(
        _flags(v.flags, f": {v.model}" if len(pairs) > 1 else "")
        + _judges(v, v.model if len(pairs) > 1 else aligned, several=len(pairs) > 1)
        for v in pairs
    )
    rankings = _rankings(c.result.rankings) if c.result else ""
    notes = (
        [
            *c.result.notes,
            *(f"{v.model}: {v.diversity.sentence()}" if len(pairs) > 1 else v.diversity.sentence() for v in pairs),
        ]
        if c.result
        else []
    )
    return f"""<article id="{anchor}"><header><p class="kicker">{escape(c.title)}</p>{hero}</header>
{judges}{rankings}{_pictures(c.pictures, c.labels, c.edited)}{_distance(c.curves)}{_curves(c.curves)}{_notes(notes)}
{_making(c.command, dict(c.settings), dict(c.versions))}</article>"""


def _flags(flags: Sequence[str], of: str) -> str:
    items = "".join(f"<li>{escape(flag)}</li>" for flag in flags)
    return f'<section><h2>Warnings{escape(of)}</h2><ul class="flags">{items}</ul></section>' if items else ""


def _rankings(rankings: Sequence[Ranking]) -> str:
    if not rankings:
        return ""
    parts = []
    for r in rankings:
        order = sorted(range(len(r.models)), key=lambda i: -r.elo[i])
        dirty = ' <span class="tag dirty">trained on</span>' if r.contaminated else ""
        head = "".join(f'<th scope="col">beats {escape(r.models[j])}</th>' for j in order)
        rows = "".join(
            f"""<tr><th scope="row">{escape(r.models[i])}</th>
<td class="num" data-name="Strength"><strong>{r.elo[i]:.0f}</strong>
<span class="soft">{r.low[i]:.0f}–{r.high[i]:.0f}</span></td>"""
            + "".join(f'<td class="num" data-name="Beats {escape(r.models[j])}">{_share(r.shares[i][j])}</td>' for j in order)
            + "</tr>"
            for i in order
        )
        parts.append(
            f"""<h3>{escape(r.judge)}{dirty}</h3><div class="scroll"><table><thead><tr><th scope="col">Model</th>
<th scope="col">Strength</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"""
        )
    return f"""<section><h2>All models together</h2>
<p>Strength is on the scale of chess: the mean is 1000, and 400 points are odds of ten to one. Behind it stands the
95 % interval over prompts.</p>{"".join(parts)}</section>"""


def _share(share: float | None) -> str:
    return "–" if share is None else f"{percent(share)} %"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _verdict(c: Comparison | Group) -> str:
    if not c.win_rate.clear:
        return "even"
    return "good" if c.win_rate.rate > 0.5 else "bad"


def _hero(headline: str, ordered: list[Comparison]) -> str:
    number = ""
    if ordered:
        share = percent(ordered[0].win_rate.rate)
        number = f'<div class="figure {_verdict(ordered[0])}" aria-hidden="true">{share}<small> %</small></div>'
    return f'<div class="hero">{number}<h1>{escape(headline)}</h1></div>'


def _judges(v: Versus, who: str, *, several: bool) -> str:
    ordered = by_weight(v.comparisons)
    if not ordered:
        return ""
    rows = "".join(_judge(c) for c in ordered)
    if v.macro is not None:
        m = v.macro
        tone = "good" if m.low > 0.5 else "bad" if m.high < 0.5 else "even"
        rows += f"""<tr class="{tone}"><th scope="row">mean of {m.judges}<br><span class="tag">not trained on</span></th>
<td>{_bar(m)}</td><td class="num"><strong>{percent(m.rate)} %</strong>
<span class="soft">{percent(m.low)}–{percent(m.high)} %</span></td><td></td><td></td><td></td></tr>"""
    heading = f"What the judges say of {escape(v.model)}" if several else "What the judges say"
    w = ordered[0].win_rate
    each = "one pair each" if w.n == w.prompts else f"{w.n} pairs in all"
    return f"""<section><h2>{heading}</h2>
<p>Both models drew the same {w.prompts} prompts ({each}) from the same starting noise. A judge is a program that scores a
picture; it prefers the one it scores higher. 50 % would mean that nothing it can see has changed. The shaded bar is the
{percent(ordered[0].confidence)} % interval over prompts.</p>
<table><thead><tr><th scope="col">Judge</th><th scope="col">Prefers {escape(who)}</th><th scope="col">Share</th>
<th scope="col">Wins, ties, losses</th><th scope="col">Mean score, before to after</th><th scope="col">p</th></tr></thead>
<tbody>{rows}</tbody></table>{_explain(ordered)}{_groups(ordered)}</section>"""


def _groups(ordered: list[Comparison]) -> str:
    """The parts of the prompts, by each judge and field, behind a click; the first is open."""
    tables = []
    parts = [(c, name) for c in ordered for name in dict.fromkeys(group.field for group in c.groups)]
    for c, field_name in parts:
        rows = "".join(
            f"""<tr class="{_verdict(g)}"><th scope="row">{escape(g.value)}</th><td>{_bar(g.win_rate)}</td><td class="num">
<strong>{percent(g.win_rate.rate)} %</strong>
<span class="soft">{percent(g.win_rate.low)}–{percent(g.win_rate.high)} %</span></td>
<td class="num" data-name="Prompts">{g.win_rate.prompts}</td></tr>"""
            for g in c.groups
            if g.field == field_name
        )
        tables.append(
            f"""<details{"" if tables else " open"}><summary>{escape(c.judge)} by {escape(field_name)}</summary>
<table class="groups small"><thead><tr><th scope="col">Prompts</th><th scope="col">Preferred</th><th scope="col">Share</th>
<th scope="col">Number</th></tr></thead><tbody>{rows}</tbody></table></details>"""
        )
    return "".join(tables)


def _explain(ordered: list[Comparison]) -> str:
    lines = []
    if not ordered[0].contaminated:
        lines.append("A held-out judge took no part in training: its verdict is the one to trust.")
    if any(c.contaminated for c in ordered):
        lines.append(
            "A judge marked “trained on” shaped the votes or rewards that training followed: it shows that training worked."
        )
    return f'<p class="soft">{" ".join(lines)}</p>' if lines else ""


def _judge(c: Comparison) -> str:
    w, d = c.win_rate, c.difference
    if c.contaminated:
        tag = '<span class="tag dirty">trained on</span>'
    else:
        tag = f'<span class="tag{" held" if c.kind == "held out" else ""}">{escape(c.kind)}</span>'
    low, high = percent(w.low), percent(w.high)
    p = "below 0.001" if c.p < 0.001 else f"{c.p:.3f}"
    return f"""<tr class="{_verdict(c)}"><th scope="row">{escape(c.judge)}<br>{tag}</th>
<td>{_bar(w)}</td><td class="num"><strong>{percent(w.rate)} %</strong> <span class="soft">{low}–{high} %</span></td>
<td data-name="Wins, ties, losses" class="num">{w.wins}, {w.ties}, {w.losses}</td>
<td data-name="Mean score"><span class="num">{_number(c.mean_base)} → {_number(c.mean_tuned)}</span>
<span class="soft num">({d.difference:+.3g}, {_number(d.low)} to {_number(d.high)})</span></td>
<td data-name="p" class="num">{p}</td></tr>"""


def _pictures(
    pictures: Sequence[tuple[str, Sequence[Image.Image]]], labels: Sequence[str], edited: Sequence[Image.Image | None]
) -> str:
    if not pictures:
        return ""
    for prompt, images in pictures:
        if len(images) != len(labels):
            raise UserError(f"{len(images)} pictures of {prompt!r} came with {len(labels)} sides; give as many of each")
    many = " many" if len(labels) > 2 else ""
    cards = "".join(
        f"""<figure class="pair"><div class="views{many}">{"".join(map(_view, labels, [prompt] * len(labels), images))}</div>
<figcaption>{escape(prompt)}{_origin(origin)}</figcaption></figure>"""
        for (prompt, images), origin in zip_longest(pictures, edited)
    )
    slide = "" if many else '<button class="over" type="button" aria-pressed="false">Slide</button>'
    names = " and ".join(labels) if len(labels) == 2 else ", ".join(labels)
    return f"""<section class="compared"><h2>{escape(names[:1].upper() + names[1:])}</h2>
<p>The same prompt and the same starting noise. Chosen without looking at any score.</p>
<div class="tools" hidden><button class="side" type="button" aria-pressed="true">Side by side</button>{slide}
<button class="stack" type="button" aria-pressed="false">Flip</button>
<button class="all" type="button" hidden>Flip all</button></div>
<div class="pairs">{cards}</div></section>"""


def _view(label: str, prompt: str, image: Image.Image) -> str:
    picture = _image(f"{label}: {prompt}", image)
    return f'<div class="view">{picture}<span aria-hidden="true">{escape(label)}</span></div>'


def _image(alt: str, image: Image.Image, longest: int = LONGEST) -> str:
    # Small pictures are enlarged here by a whole factor: Lanczos keeps edges that a browser's own enlarging blurs.
    image = image.convert("RGB")
    factor = max(1, round(256 / max(image.size)))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=86, method=4)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="data:image/webp;base64,{data}" {size} alt="{escape(alt)}">'


def _origin(image: Image.Image | None) -> str:
    return "" if image is None else f'<span class="origin">edited from {_image("what was edited", image, 96)}</span>'


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in notes)
    return f"<section><h2>Notes</h2><ul>{items}</ul></section>" if items else ""


def _making(command: Any, settings: dict[str, Any], versions: dict[str, Any]) -> str:
    shown = f"<pre>{escape(str(command))}</pre>" if command else ""
    groups = [(name, values) for name, values in (("Settings", settings), ("Versions", versions)) if values]
    lists = "".join(f"<div><h3>{name}</h3><dl>{_entries(values)}</dl></div>" for name, values in groups)
    return f'<section><h2>How it was made</h2>{shown}<div class="making">{lists}</div></section>' if shown or lists else ""


def _entries(values: Mapping[str, Any], prefix: str = "") -> str:
    parts = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            parts.append(_entries(value, f"{name}."))
        elif value is not None:
            parts.append(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>")
    return "".join(parts)
