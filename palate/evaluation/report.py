"""The result as one HTML page that needs nothing but itself: no network, no other file, no script to be read."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from palate.errors import UserError
from palate.evaluation.compare import Comparison, by_weight, percent
from palate.files import write_atomically

STYLE = """
:root{--paper:#faf9f6;--card:#fff;--ink:#23211d;--soft:#6a665d;--line:#e3e0d8;--good:#1f7a5a;--bad:#b3442f;--even:#8a7430;
--raw:#b9b4a8;--wash:#eef4f0}
@media (prefers-color-scheme:dark){:root{--paper:#171614;--card:#201f1c;--ink:#eceae4;--soft:#a39e93;--line:#38352f;
--good:#5cc59b;--bad:#ee8a72;--even:#d8bd68;--raw:#5d594f;--wash:#1d2824}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 72px}
h2{font-size:21px;line-height:1.3;margin:56px 0 6px;letter-spacing:-.01em}
p{margin:0 0 12px;max-width:72ch}
.kicker{color:var(--soft);font-size:15px;margin-bottom:20px}
.soft{color:var(--soft)}
.hero{display:flex;gap:28px;align-items:center;flex-wrap:wrap}
.figure{font-size:84px;line-height:1;font-weight:650;letter-spacing:-.04em;white-space:nowrap}
.figure small{font-size:.5em;font-weight:500;letter-spacing:0}
h1{flex:1 1 320px;font-size:25px;line-height:1.35;font-weight:550;margin:0;letter-spacing:-.01em;text-wrap:pretty}
.good{--tone:var(--good)}.bad{--tone:var(--bad)}.even{--tone:var(--even)}
.figure,.num strong{color:var(--tone)}
table+p{margin-top:16px}
table{width:100%;border-collapse:collapse;margin-top:16px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:12px 16px 12px 0;border-bottom:1px solid var(--line);vertical-align:middle}
thead th{font-size:13px;font-weight:500;color:var(--soft);padding-bottom:8px}
tbody th{font-weight:600;min-width:120px;overflow-wrap:anywhere}
td:last-child,th:last-child{padding-right:0}
.tag{display:inline-block;font-size:12px;font-weight:500;line-height:1.4;padding:1px 8px;border-radius:9px;margin-top:3px;
border:1px solid var(--line);color:var(--soft);white-space:nowrap}
.tag.held{border-color:var(--good);color:var(--good)}
.tag.dirty{border-color:var(--even);color:var(--even)}
.bar{display:block;width:220px;max-width:100%;height:auto}
.track{fill:var(--line)}.half{stroke:var(--soft);stroke-dasharray:2 2}.span{opacity:.32}
.span,.dot{fill:var(--tone)}
.num{white-space:nowrap}.num strong{font-size:18px}
.tools{display:flex;gap:8px;flex-wrap:wrap;margin:16px 0 0}
.tools[hidden]{display:none}
button{font:inherit;font-size:14px;color:var(--ink);background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:7px 14px;cursor:pointer}
button:hover{border-color:var(--soft)}
button[aria-pressed=true]{background:var(--ink);color:var(--paper);border-color:var(--ink)}
:focus-visible{outline:2px solid var(--good);outline-offset:2px}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:28px 24px;margin-top:20px}
.pair{margin:0;min-width:0}
.views{display:grid;grid-template-columns:1fr 1fr;gap:3px;border-radius:8px;overflow:hidden}
.view{position:relative;margin:0;background:var(--line)}
.view img{display:block;width:100%;height:auto}
.view span{position:absolute;left:8px;bottom:8px;font-size:12px;line-height:1;padding:4px 7px;border-radius:6px;
background:rgba(20,19,17,.72);color:#fff}
.pair figcaption{font-size:14px;line-height:1.45;margin-top:8px;color:var(--soft);overflow-wrap:anywhere}
.stacked .views{grid-template-columns:1fr;cursor:pointer}
.stacked .view{grid-area:1/1}
.stacked .views .after{visibility:visible}.stacked .views .before{visibility:hidden}
.stacked .views.flipped .after{visibility:hidden}.stacked .views.flipped .before{visibility:visible}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:24px;margin-top:16px}
.chart{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px 10px;min-width:0}
.chart figcaption{display:flex;justify-content:space-between;gap:12px;font-size:14px;font-weight:600}
.chart figcaption span{font-weight:400;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.chart svg{display:block;width:100%;height:auto;margin-top:6px}
.chart text{font-size:11px;fill:var(--soft);font-family:inherit}
.raw{fill:none;stroke:var(--raw);stroke-width:1}.smooth{fill:none;stroke:var(--good);stroke-width:2;stroke-linejoin:round}
.axis{stroke:var(--line)}
ul{padding-left:20px;margin:8px 0;max-width:72ch}
li{margin-bottom:6px}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow-x:auto;font-size:13px;
line-height:1.5;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(120px,max-content) minmax(0,1fr);gap:4px 20px;font-size:14px;margin:12px 0}
dt{color:var(--soft);overflow-wrap:anywhere}
dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.making{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:8px 48px}
h3{font-size:15px;margin:16px 0 0}
details{margin-top:20px}
summary{cursor:pointer;color:var(--soft);font-size:14px}
@media (max-width:700px){
main{padding:24px 16px 56px}
.figure{font-size:64px}h1{font-size:21px;flex-basis:100%}.hero{gap:14px}h2{margin-top:44px}
thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table,tbody,tr,th,td{display:block}
tbody tr{border-bottom:1px solid var(--line);padding:14px 0}
tbody th,td{border:0;padding:3px 0}
td[data-name]::before{content:attr(data-name) ": ";color:var(--soft);font-size:13px}
.bar{width:100%}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}
}
@media print{.tools{display:none}.pair,.chart{break-inside:avoid}}
"""

# Without it the pictures stand side by side; with it they can also lie on each other and flip.
SCRIPT = """
(function(){
var pairs=document.querySelector('.pairs'),tools=document.querySelector('.tools');
if(!pairs||!tools)return;
tools.hidden=false;
var side=tools.querySelector('.side'),stack=tools.querySelector('.stack'),all=tools.querySelector('.all');
var views=[].slice.call(pairs.querySelectorAll('.views'));
function show(stacked){
pairs.classList.toggle('stacked',stacked);
side.setAttribute('aria-pressed',String(!stacked));stack.setAttribute('aria-pressed',String(stacked));all.hidden=!stacked;
views.forEach(function(v){
v.classList.remove('flipped');
if(stacked){v.tabIndex=0;v.setAttribute('role','button');v.setAttribute('aria-pressed','false');
v.setAttribute('aria-label','Show the picture before alignment')}
else{['tabindex','role','aria-pressed','aria-label'].forEach(function(a){v.removeAttribute(a)})}
});}
function flip(v,on){v.classList.toggle('flipped',on);v.setAttribute('aria-pressed',String(v.classList.contains('flipped')))}
side.onclick=function(){show(false)};
stack.onclick=function(){show(true)};
all.onclick=function(){var on=!views.every(function(v){return v.classList.contains('flipped')});
views.forEach(function(v){flip(v,on)})};
views.forEach(function(v){
v.onclick=function(){if(pairs.classList.contains('stacked'))flip(v)};
v.onkeydown=function(e){if((e.key===' '||e.key==='Enter')&&pairs.classList.contains('stacked')){e.preventDefault();flip(v)}};
});
})();
"""


def write_report(
    path: str | Path,
    *,
    title: str,
    headline: str,
    comparisons: Sequence[Comparison],
    prompts: Sequence[str],
    base_images: Sequence[Image.Image],
    tuned_images: Sequence[Image.Image],
    training_curves: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    versions: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write one self-contained HTML file, atomically.

    ``prompts``, ``base_images``, ``tuned_images``: the pairs to show, which may be fewer than were compared.
    ``training_curves``: rows of the training log, ``{"step": 10, "loss": 0.69, ...}``; every number that occurs in two rows or
    more becomes a chart. ``settings``: whatever a reader needs to repeat the run, nested at will; an entry ``command`` is
    shown as a command line. All text is escaped.
    """
    if not len(prompts) == len(base_images) == len(tuned_images):
        raise UserError(f"{len(prompts)} prompts, {len(base_images)} and {len(tuned_images)} pictures; give as many of each")
    ordered = by_weight(comparisons)
    settings = dict(settings or {})
    command = settings.pop("command", None)
    page = Template(files("palate.evaluation").joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        style=STYLE,
        style_hash=_sha256(STYLE),
        script=SCRIPT,
        script_hash=_sha256(SCRIPT),
        hero=_hero(headline, ordered),
        judges=_judges(ordered),
        pictures=_pictures(prompts, base_images, tuned_images),
        curves=_curves(training_curves),
        notes=_notes(notes),
        making=_making(command, settings, dict(versions or {})),
    )
    write_atomically(path, page.encode())


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _verdict(c: Comparison) -> str:
    if not c.win_rate.clear:
        return "even"
    return "good" if c.win_rate.rate > 0.5 else "bad"


def _hero(headline: str, ordered: list[Comparison]) -> str:
    number = ""
    if ordered:
        share = percent(ordered[0].win_rate.rate)
        number = f'<div class="figure {_verdict(ordered[0])}" aria-hidden="true">{share}<small> %</small></div>'
    return f'<div class="hero">{number}<h1>{escape(headline)}</h1></div>'


def _judges(ordered: list[Comparison]) -> str:
    if not ordered:
        return ""
    rows = "".join(_judge(c) for c in ordered)
    w = ordered[0].win_rate
    each = "one pair each" if w.n == w.prompts else f"{w.n} pairs in all"
    return f"""<section><h2>What the judges say</h2>
<p>Both models drew the same {w.prompts} prompts ({each}) from the same starting noise. A judge is a program that scores a
picture; it prefers the one it scores higher. 50 % would mean that alignment changed nothing it can see. The shaded bar is the
{percent(ordered[0].confidence)} % interval over prompts.</p>
<table><thead><tr><th scope="col">Judge</th><th scope="col">Prefers the aligned model</th><th scope="col">Share</th>
<th scope="col">Wins, ties, losses</th><th scope="col">Mean score, before to after</th><th scope="col">p</th></tr></thead>
<tbody>{rows}</tbody></table>{_explain(ordered)}</section>"""


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
<td>{_bar(c)}</td><td class="num"><strong>{percent(w.rate)} %</strong> <span class="soft">{low}–{high} %</span></td>
<td data-name="Wins, ties, losses" class="num">{w.wins}, {w.ties}, {w.losses}</td>
<td data-name="Mean score"><span class="num">{_number(c.mean_base)} → {_number(c.mean_tuned)}</span>
<span class="soft num">({d.difference:+.3g}, {_number(d.low)} to {_number(d.high)})</span></td>
<td data-name="p" class="num">{p}</td></tr>"""


def _bar(c: Comparison) -> str:
    w = c.win_rate
    label = f"{percent(w.rate)} %, interval {percent(w.low)} to {percent(w.high)} %"
    x, low, high = (10 + 200 * v for v in (w.rate, w.low, w.high))
    return f"""<svg class="bar" viewBox="0 0 220 26" role="img" aria-label="{label}">
<rect class="track" x="10" y="12" width="200" height="2" rx="1"/><line class="half" x1="110" x2="110" y1="2" y2="24"/>
<rect class="span" x="{low:.1f}" y="8" width="{max(high - low, 1):.1f}" height="10" rx="5"/>
<circle class="dot" cx="{x:.1f}" cy="13" r="5"/></svg>"""


def _pictures(prompts: Sequence[str], base: Sequence[Image.Image], tuned: Sequence[Image.Image]) -> str:
    if not prompts:
        return ""
    cards = "".join(
        f"""<figure class="pair"><div class="views">{_view("before", prompt, b)}{_view("after", prompt, t)}</div>
<figcaption>{escape(prompt)}</figcaption></figure>"""
        for prompt, b, t in zip(prompts, base, tuned, strict=True)
    )
    return f"""<section><h2>Before and after</h2>
<p>The same prompt and the same starting noise, without and with alignment.</p>
<div class="tools" hidden><button class="side" type="button" aria-pressed="true">Side by side</button>
<button class="stack" type="button" aria-pressed="false">Click a picture to flip it</button>
<button class="all" type="button" hidden>Flip all</button></div>
<div class="pairs">{cards}</div></section>"""


def _view(when: str, prompt: str, image: Image.Image) -> str:
    # Small pictures are enlarged here by a whole factor: Lanczos keeps edges that a browser's own enlarging blurs.
    image = image.convert("RGB")
    factor = max(1, round(256 / max(image.size)))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    alt = escape(f"{when.capitalize()} alignment: {prompt}")
    picture = f'<img src="data:image/jpeg;base64,{data}" {size} alt="{alt}">'
    return f'<div class="view {when}">{picture}<span aria-hidden="true">{when}</span></div>'


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for index, row in enumerate(rows):
        step = row.get("step", index)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                series.setdefault(name, []).append((float(step), float(value)))
    names = sorted((n for n, points in series.items() if len(points) > 1), key=_importance)
    if not names:
        return ""
    first, rest = [n for n in names if _importance(n) < 3], [n for n in names if _importance(n) == 3]
    more = _charts(rest, series)
    if first and rest:
        more = f"<details><summary>More curves</summary>{more}</details>"
    return f"""<section><h2>Training</h2>
<p>The bold line is a moving average where the log is dense. An accuracy says how often the model being trained orders a pair
as the votes do; 0.5 (dashed) is chance.</p>{_charts(first, series)}{more}</section>"""


def _importance(name: str) -> int:
    name = name.lower()
    return 0 if name == "loss" else 1 if "accuracy" in name else 2 if "loss" in name or "margin" in name else 3


def _charts(names: list[str], series: Mapping[str, list[tuple[float, float]]]) -> str:
    return f'<div class="charts">{"".join(_chart(name, series[name]) for name in names)}</div>' if names else ""


def _chart(name: str, points: list[tuple[float, float]]) -> str:
    points = _thin(sorted(points), 400)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    smooth = _moving_average(ys, max(1, len(ys) // 15)) if len(ys) > 30 else ys
    shares = "accuracy" in name.lower() and min(ys) >= 0 and max(ys) <= 1
    low, high = (min(0.4, *ys), max(0.6, *ys)) if shares else (min(ys), max(ys))
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    left, right, top, bottom = 52, 354, 8, 128

    def line(values: list[float], style: str) -> str:
        span = (xs[-1] - xs[0]) or 1
        at = (
            f"{left + (x - xs[0]) / span * (right - left):.1f},{bottom - (v - low) / (high - low) * (bottom - top):.1f}"
            for x, v in zip(xs, values, strict=True)
        )
        return f'<polyline class="{style}" points="{" ".join(at)}"/>'

    chance = ""
    if shares:
        y = bottom - (0.5 - low) / (high - low) * (bottom - top)
        chance = f'<line class="half" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    title = escape(name.replace("_", " ").replace("/", ", "))
    start, end = _number(smooth[0]), _number(smooth[-1])
    return f"""<figure class="chart"><figcaption>{title}<span>{start} → {end}</span></figcaption>
<svg viewBox="0 0 360 146" role="img" aria-label="{title} from {start} to {end}">
<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>{chance}
{line(ys, "raw") if smooth is not ys else ""}{line(smooth, "smooth")}
<text x="{left - 6}" y="{top + 8}" text-anchor="end">{_number(high)}</text>
<text x="{left - 6}" y="{bottom}" text-anchor="end">{_number(low)}</text>
<text x="{left}" y="{bottom + 15}">step {xs[0]:g}</text>
<text x="{right}" y="{bottom + 15}" text-anchor="end">{xs[-1]:g}</text></svg></figure>"""


def _thin(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most ``limit`` points, each the mean of its neighbours."""
    size = -(-len(points) // limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def _moving_average(values: list[float], radius: int) -> list[float]:
    windows = (values[max(0, i - radius) : i + radius + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def _notes(notes: Sequence[str]) -> str:
    lines = [notes] if isinstance(notes, str) else notes
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
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
        else:
            parts.append(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>")
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
