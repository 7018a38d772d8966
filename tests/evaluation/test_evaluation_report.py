"""What the comparison says, writes and shows."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import http.client
import io
import json
import re
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from palate.base.errors import UserError
from palate.evaluation import grid
from palate.evaluation.compare import compare, count_votes, headline, percent, rank, versus
from palate.evaluation.diversity import diversity, thumbnail
from palate.evaluation.folders import Result
from palate.evaluation.grid import before_after_grid
from palate.evaluation.report import Chapter, chapter_of, page_of, write_report
from palate.evaluation.watch import server_of
from palate.miniature.captions import caption
from tools.miniature import scenes

rng = np.random.default_rng(0)
SCENES = [scenes.random_scene(rng) for _ in range(4)]
PROMPTS = [caption(s, rng) for s in SCENES]
BASE = [scenes.shoot(s, np.random.default_rng(i), flaw_share=1.0).image for i, s in enumerate(SCENES)]
TUNED = [scenes.shoot(s, np.random.default_rng(i), flaw_share=0.0).image for i, s in enumerate(SCENES)]


def wins(share: float, n: int = 100) -> tuple[list[float], list[float]]:
    """Scores of n prompts of which ``share`` are won by 1 and the rest lost by 1."""
    return [0.0] * n, [1.0 if i < share * n else -1.0 for i in range(n)]


IDS = [f"prompt {i}" for i in range(100)]


def test_compare_orders_and_marks():
    scores = {"labeller": wins(0.9), "other": wins(0.8), "fresh": wins(0.7), "filter": wins(0.6)}
    kinds = {"labeller": "labels", "other": "alignment"}
    found = compare(scores, IDS, kinds=kinds, contaminated={"filter"}, draws=500)
    assert [c.judge for c in found] == ["fresh", "other", "filter", "labeller"]
    assert [c.contaminated for c in found] == [False, False, True, True]
    fresh = found[0]
    assert fresh.kind == "held out"
    # 70 won by 1, 30 lost by 1: mean difference 0.4.
    assert (fresh.win_rate.rate, fresh.mean_base, fresh.mean_tuned) == pytest.approx((0.7, 0.0, 0.4))
    assert fresh.difference.difference == pytest.approx(0.4)
    assert fresh.p < 0.01
    with pytest.raises(UserError, match="no scores of judge 'lost'"):
        compare(scores, IDS, kinds={"lost": "labels"})


def test_tensors_are_scores():
    a, b = wins(0.7)
    assert compare({"j": (torch.tensor(a), np.array(b))}, IDS, draws=300) == compare({"j": (a, b)}, IDS, draws=300)


def test_headline_is_honest():
    def say(**kinds_and_shares):
        scores = {name: wins(share) for name, share in kinds_and_shares.items()}
        return headline(compare(scores, IDS, kinds={"labels": "labels"} if "labels" in scores else {}))

    assert re.fullmatch(
        r"An independent judge prefers the aligned model's picture in 81 % of 100 unseen prompts "
        r"\(95 % interval 7\d-8\d %\)\.",
        say(fresh=0.81, labels=0.99),
    )
    assert say(fresh=0.53).startswith("No clear difference: an independent judge prefers")
    assert say(fresh=0.5).startswith("No clear difference")
    assert say(fresh=0.3).startswith("The aligned model is worse here")
    assert say(labels=0.9).startswith("The judge it was trained on prefers")
    with pytest.raises(UserError, match="no comparison"):
        headline([])


def test_headline_counts_ties_and_several_seeds():
    base, tuned = [0.0] * 200, [1.0] * 150 + [0.0] + [-1.0] * 49
    text = headline(compare({"j": (base, tuned)}, IDS * 2, draws=500), unseen=False)
    # 150.5 of 200 = 75.25 %
    assert "75 % of 200 pairs of pictures from 100 prompts (" in text
    assert "1 tie counted as half" in text


def test_percent_never_rounds_into_certainty():
    assert [percent(x) for x in (0.0, 0.0004, 0.314, 0.4996, 0.5, 0.5004, 0.996, 1.0)] == [
        "0",
        "0.0",
        "31",
        "50.0",
        "50",
        "50.0",
        "99.6",
        "100",
    ]


def small(*greys: int) -> np.ndarray:
    return np.stack([thumbnail(Image.new("RGB", (64, 64), (v,) * 3)) for v in greys])


def test_diversity_by_hand():
    # Within a: 0 and 255 are 1 apart, b: 0 and 51 are 0.2 apart, mean 0.6; after: all alike.
    d = diversity(small(0, 255, 0, 51), small(7, 7, 7, 7), ["a", "a", "b", "b"])
    assert (d.base, d.tuned, d.over) == (pytest.approx(0.6), pytest.approx(0), "seeds of a prompt")
    assert "-100 %" in d.sentence()
    # 0 stands there twice, once for each prompt; after, all four are alike.
    assert (d.twins_base, d.twins_tuned) == (0.5, 1.0)
    assert [flag.split()[0] for flag in d.flags()] == ["Variety", "100"]
    assert "repeated" in d.flags()[0]
    # One picture a prompt: pairs (0, 255), (0, 51), (51, 255) are 1, 0.2 and 0.8 apart, mean 2/3.
    d = diversity(small(0, 255, 51), small(255, 0, 204), ["a", "b", "c"])
    assert (d.base, d.tuned, d.over) == (pytest.approx(2 / 3), pytest.approx(2 / 3), "prompts")
    assert "+0 %" in d.sentence()
    assert d.flags() == []


def test_a_fall_in_variety_needs_an_interval():
    """Distances of 40 prompts, two seeds each, halved: flagged. Two prompts, of which one fell: not clear, not flagged."""
    rng = np.random.default_rng(0)
    base = rng.uniform(size=(80, 16, 16, 3)).astype(np.float32)
    middle = base.reshape(40, 2, -1).mean(axis=1).repeat(2, axis=0).reshape(base.shape)
    prompts = [f"prompt {i // 2}" for i in range(80)]
    d = diversity(base, (base + middle) / 2, prompts)
    assert d.ratio == pytest.approx(0.5)
    assert d.low == pytest.approx(0.5, abs=1e-6) == d.high
    assert d.flags()
    d = diversity(small(0, 255, 0, 51), small(0, 128, 0, 61), ["a", "a", "b", "b"])
    assert d.ratio < 0.7
    assert d.low < 1 < d.high
    assert d.flags() == []


def test_loud_colours_are_flagged():
    grey, red = np.full((4, 16, 16, 3), 0.5, np.float32), np.zeros((4, 16, 16, 3), np.float32)
    grey[..., 0], red[..., 0] = 0.6, 1.0
    d = diversity(grey, red, ["a", "b", "c", "d"])
    # 0.1 of 0.6 before, 1 after.
    assert (d.saturation_base, d.saturation_tuned) == (pytest.approx(1 / 6), pytest.approx(1))
    assert any("saturated" in flag for flag in d.flags())


ALIKE = diversity(small(0, 100), small(0, 100), ["a", "b"])


def test_prompt_following_does_not_drop_in_silence():
    scores = {"fresh": wins(0.9), "clipscore:somewhere": wins(0.2)}
    found = versus("base", "tuned", scores, IDS, ALIKE, draws=300)
    assert "clipscore:somewhere says that pictures follow their prompts less" in found.flags[0]
    # One judge by its kind, another by the part it plays.
    found = versus("base", "tuned", {"mini": wins(0.2)}, IDS, ALIKE, kinds={"mini": "prompt following"}, draws=300)
    assert "mini says" in found.flags[0]
    for name in ("clipscore?dtype=bfloat16", "vlm_bertscore:models/vision", "vlm_strict:models/vision?questions=q.jsonl"):
        assert name in versus("base", "tuned", {name: wins(0.2)}, IDS, ALIKE, draws=300).flags[0]
    found = versus("base", "tuned", {"fresh": wins(0.9)}, IDS, ALIKE, draws=300)
    assert found.flags == ["No judge looked at whether pictures follow their prompts; add one of kind clipscore."]
    found = versus("base", "tuned", {"clipscore": wins(0.9)}, IDS, ALIKE, contaminated={"clipscore"}, draws=300)
    assert found.flags[0].startswith("Every judge here was part of training")


def test_macro_average_leaves_contaminated_judges_out():
    scores = {"a": wins(0.8), "b": wins(0.6), "trained": wins(1.0)}
    found = versus("base", "tuned", scores, IDS, ALIKE, contaminated={"trained"}, draws=300)
    assert found.macro is not None
    assert (found.macro.rate, found.macro.judges) == (pytest.approx(0.7), 2)
    assert found.macro.low < 0.7 < found.macro.high
    assert versus("base", "tuned", {"a": wins(0.8)}, IDS, ALIKE, draws=300).macro is None


def test_groups_are_the_judge_on_their_rows():
    base, tuned = wins(0.5)
    kinds = ["people" if i < 50 else "places" for i in range(90)] + [None] * 10
    (found,) = compare({"j": (base, tuned)}, IDS, groups={"category": kinds}, draws=300)
    assert [(g.field, g.value, g.win_rate.n, g.win_rate.rate) for g in found.groups] == [
        ("category", "people", 50, 1.0),
        ("category", "places", 40, 0.0),
    ]


def test_votes_give_the_same_numbers_as_scores():
    base, tuned = wins(0.7)
    base[0] = tuned[0]  # a tie
    shares = [(1.0 if t > b else 0.0 if t < b else 0.5) for b, t in zip(base, tuned, strict=True)]
    votes = [
        (p, "tuned", "base", s) if i % 2 else (p, "base", "tuned", 1 - s)
        for i, (p, s) in enumerate(zip(IDS, shares, strict=True))
    ]
    found = count_votes(["base", "tuned"], votes, draws=500)
    (by_score,) = compare({"j": (base, tuned)}, IDS, draws=500)
    assert found.pairs == [("tuned", "base", by_score.win_rate)]
    assert found.ranking is None
    found = count_votes(["base", "tuned", "third"], [*votes, ("x", "third", "base", 1.0)], draws=200)
    assert found.ranking is not None
    assert found.ranking.comparisons == 101
    assert found.ranking.shares[1][0] == pytest.approx(0.695)
    assert found.ranking.shares[1][2] is None
    with pytest.raises(UserError, match="did you mean 'tuned'"):
        count_votes(["base", "tuned"], [("p", "base", "tunde", 1.0)])
    with pytest.raises(UserError, match="no votes yet"):
        count_votes(["base", "tuned"], [])


def test_grid(tmp_path):
    prompts = [*PROMPTS[:3], "word " * 80 + "x" * 300]
    before_after_grid(prompts, BASE, TUNED, tmp_path / "grid.png", columns=3, tile=96)
    sheet = Image.open(tmp_path / "grid.png").convert("RGB")
    assert sheet.width == 2 * grid.MARGIN + 3 * (2 * 96 + grid.SEAM) + 2 * grid.GAP
    # The first pair lies where it should: enlarged, before beside after.
    x, y = grid.MARGIN, grid.MARGIN + 24
    for image, left in ((BASE[0], x), (TUNED[0], x + 96 + grid.SEAM)):
        shown = sheet.crop((left, y, left + 96, y + 96)).resize((64, 64), Image.Resampling.BOX)
        assert np.abs(np.asarray(shown, float) - np.asarray(image, float)).mean() < 6
    with pytest.raises(UserError, match="as many of each"):
        before_after_grid(PROMPTS, BASE[:1], TUNED, tmp_path / "no.png")


def test_captions_fit():
    font = ImageFont.load_default(size=15)
    for text in ("", "short", "x" * 300, PROMPTS[0] * 9, "a " + "y" * 200 + " b"):
        lines = grid._wrap(text, font, 200)
        assert len(lines) <= grid.LINES
        assert all(font.getlength(line) <= 200 for line in lines)
    assert grid._wrap("two words", font, 200) == ["two words"]


class Page(HTMLParser):
    """Checks nesting and collects tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


EVIL = "<script>alert(1)</script>\"'&$title"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    scores = {"labeller": wins(0.9), EVIL: wins(0.8)}
    kinds = [EVIL if i % 2 else "places" for i in range(100)]
    pair = versus("base", EVIL, scores, IDS, ALIKE, kinds={"labeller": "labels"}, groups={EVIL: kinds}, unseen=True, draws=300)
    ranking = rank(EVIL, ["base", EVIL, "third"], np.array([[0.0, 3, 2], [4, 0, 1], [5, 2, 0]]))
    rows = [
        {"step": i, "loss": 0.7 - i / 1000, "implicit_accuracy": 0.5 + i / 500, "name": "text", "bad": float("nan")}
        for i in range(50)
    ]
    for row in rows[::10]:
        row.update(held_out_accuracy=0.6, held_out_accuracy_low=0.3, held_out_accuracy_high=0.8)
    chapter = Chapter(
        title=EVIL,
        result=Result(["base", EVIL, "third"], ["a", "b", "c"], 100, 100, [pair], [ranking], {}, [EVIL]),
        pictures=list(zip([*PROMPTS[:3], EVIL], zip(BASE, TUNED, strict=True), strict=True)),
        curves=[*rows, {"step": 50, EVIL: 1.0}, {"step": 51, EVIL: 2}],
        settings={"seed": 7, "unset": None, "objective": {"name": EVIL, "beta": 5000}},
        versions={"torch": EVIL},
        command=f"palate train {EVIL}",
    )
    write_report(path, [chapter])
    return path.read_text(encoding="utf-8")


def test_report_is_whole(page):
    parsed = Page(page)
    assert parsed.open == []
    assert headline(compare({"j": wins(0.8)}, IDS, draws=300), who="the aligned model").partition("prefers")[0] in page
    assert "unset" not in page
    assert page.index("held out</span>") < page.index("trained on</span>")
    assert "<dt>objective.beta</dt><dd>5000</dd>" in page
    assert "<dt>seed</dt><dd>7</dd>" in page
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == 8
    assert {i["alt"] for i in images if i["alt"].startswith("before")} == {f"before: {p}" for p in [*PROMPTS[:3], EVIL]}
    charts = [a["aria-label"] for tag, a in parsed.tags if tag == "svg" and a.get("class") != "bar"]
    # An interval is drawn around its measure, not as a measure of its own.
    assert "implicit accuracy, held-out pairs from 0.6 to 0.6" in charts
    assert not any("low" in chart for chart in charts)
    measure = page.index("held-out pairs from 0.6")
    assert page[measure : page.index("</svg>", measure)].count("<polyline") == 3
    assert len(charts) == 4
    assert charts[0].startswith("implicit accuracy, training pairs from 0.5")
    assert charts[2].startswith("loss from 0.69")


def test_report_needs_nothing_else(page):
    """No address but data:, nothing of the user's runs, and the policy admits this style and this script alone."""
    parsed = Page(page)
    for _, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
        assert "style" not in attributes
    assert "url(" not in page
    assert "@import" not in page
    assert "<script>alert" not in page
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    for kind in ("style", "script"):
        content = re.search(rf"<{kind}>(.*?)</{kind}>", page, re.S).group(1)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page
    assert "prefers-color-scheme:dark" in page


def test_report_of_little(tmp_path):
    write_report(tmp_path / "r.html", [Chapter("t")])
    assert Page((tmp_path / "r.html").read_text()).open == []
    with pytest.raises(UserError, match="give as many of each"):
        write_report(tmp_path / "r.html", [Chapter("t", pictures=[("a", BASE[:1])])])
    with pytest.raises(UserError, match="nothing to report"):
        write_report(tmp_path / "r.html", [])


def test_online_curves_lie_over_what_was_judged(tmp_path):
    """Rewards against pictures judged, and the view that tells when training went too far.

    A round of two updates is drawn before the first of them, and told in its line: step 3 tells of the model of step 2.
    """
    kl = {0: 0.0, 2: 0.2, 4: 0.6, 6: 1.2}
    rows = [{"step": 0, "reward_queries": 0, "held_out/mini-clip": 0.0}]
    for step in range(1, 9):
        rows.append({"step": step, "reward_queries": 32 * ((step + 1) // 2), "loss": 0.1})
        if step % 2:
            rows[-1] |= {"reward_mean": step / 10, "reward/jpeg_compressibility": -10.0 + step, "kl_path": kl[step - 1]}
        else:
            rows[-1] |= {"held_out/mini-clip": 1 - (step - 3) ** 2 / 9}
    write_report(tmp_path / "r.html", [Chapter("online", curves=rows)])
    page = (tmp_path / "r.html").read_text()
    assert Page(page).open == []
    assert "pictures judged 32<" in page
    view = page[page.index("How far is too far") : page.index("<h2>Training")]
    # The last round's updates led as far as those before: from 1.2 to 1.8. Places are 12 + 342 x / 1.8.
    assert "KL divergence from the base 1.8<" in view
    assert "was not measured" in view
    assert "mini-clip, held out 0 → -1.78" in view
    assert "jpeg_compressibility, trained on -9 → -3" in view
    assert re.findall(r'class="dotm" cx="([\d.]+)"', view) == ["12.0", "50.0", "126.0", "240.0", "354.0"]
    assert re.findall(r'class="dotm trained" cx="([\d.]+)"', view) == ["12.0", "50.0", "126.0", "240.0"] * 2
    # Two lines of one colour differ in their strokes, and each has the stroke of its key.
    drawn = re.findall(r'<polyline class="smooth( trained)?" stroke-dasharray="([^"]+)"', view)
    assert drawn == re.findall(r'<path class="smooth( trained)?" stroke-dasharray="([^"]+)"', view)
    assert len(set(drawn)) == len(drawn) == 3
    # Without a measure that training does not see, it could not tell anything.
    blind = [{k: v for k, v in row.items() if "held_out" not in k} for row in rows]
    write_report(tmp_path / "r.html", [Chapter("online", curves=blind)])
    page = (tmp_path / "r.html").read_text()
    assert "How far is too far" not in page
    # The mean of one reward is that reward.
    one = [{k: v for k, v in row.items() if k != "reward/jpeg_compressibility"} for row in blind]
    twice = [{**row, "reward/taste": row["reward_mean"]} if "reward_mean" in row else row for row in one]
    write_report(tmp_path / "r.html", [Chapter("online", curves=twice)])
    page = (tmp_path / "r.html").read_text()
    assert "taste, trained on<span>0.1 → 0.7" in page
    assert "mean reward" not in page


def test_the_distance_of_pairs_is_that_of_their_line(tmp_path):
    rows = [{"step": 0, "held_out_accuracy": 0.5}]
    rows += [{"step": 10 * i, "logit_abs": i / 2, "implicit_accuracy": 0.6, "held_out_accuracy": 0.6} for i in range(1, 4)]
    write_report(tmp_path / "r.html", [Chapter("pairs", curves=rows)])
    page = (tmp_path / "r.html").read_text()
    assert re.findall(r'class="dotm" cx="([\d.]+)"', page) == ["12.0", "126.0", "240.0", "354.0"]
    assert "implicit preference, size 1.5<" in page
    assert "was not measured" not in page


def test_pictures_come_before_the_one_table_of_categories(tmp_path):
    groups = {"category": ["a", "b"] * 50, "challenge": ["x"] * 50 + ["y"] * 50}
    pair = versus("base", "tuned", {"one": wins(0.9), "two": wins(0.8)}, IDS, ALIKE, groups=groups, draws=300)
    result = Result(["base", "tuned"], ["a", "b"], 100, 100, [pair], [], {}, [])
    write_report(tmp_path / "r.html", [Chapter("t", result, pictures=[("p", [BASE[0], TUNED[0]])])])
    page = (tmp_path / "r.html").read_text()
    assert (
        page.index("<h2>What the judges say") < page.index('<section class="compared">') < page.index("<h2>By kind of prompt")
    )
    table = page[page.index("sortable") :]
    rows = re.findall(r'data-name="Judge">(\w+)</td><th scope="row">(\w)<br><span class="soft">(\w+)', table)
    assert rows == [
        (j, v, f)
        for j in ("one", "two")
        for v, f in (("a", "category"), ("b", "category"), ("x", "challenge"), ("y", "challenge"))
    ]


def downloads(page: str) -> dict[str, list[dict[str, str]]]:
    found = re.findall(r'download="([^"]+)" href="data:text/csv;charset=utf-8;base64,([^"]*)"', page)
    return {name: list(csv.DictReader(io.StringIO(base64.b64decode(data).decode()))) for name, data in found}


def test_numbers_can_be_taken_away(tmp_path):
    groups = {"category": ["=cmd", "b"] * 50}
    pair = versus("base", "/home/me/tuned", {"one": wins(0.9)}, IDS, ALIKE, groups=groups, draws=300)
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "note": "text"}]
    write_report(
        tmp_path / "r.html", [Chapter("t", Result(["base", "x"], ["a", "b"], 100, 100, [pair], [], {}, []), curves=rows)]
    )
    found = downloads((tmp_path / "r.html").read_text())
    assert found["training.csv"] == [{"step": "1", "loss": "0.5", "note": ""}, {"step": "2", "loss": "0.25", "note": "text"}]
    overall, first, second = found["comparison.csv"]
    assert (overall["judge"], overall["model"], overall["field"]) == ("one", "…/tuned", "")
    assert float(overall["share"]) == pair.comparisons[0].win_rate.rate
    assert (first["field"], first["value"], second["value"]) == ("category", "'=cmd", "b")  # no table takes it for a formula
    assert int(first["prompts"]) + int(second["prompts"]) == int(overall["prompts"])


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("palate train r --output_dir /home/me/out/x --seed 1", "palate train r --output_dir …/x --seed 1"),
        ("pickscore:/srv/models/PickScore", "pickscore:…/PickScore"),
        ("--a=/tmp/b/c", "--a=…/c"),
        ("and/or, 1/2/3, s/m/l", "and/or, 1/2/3, s/m/l"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("out/mine/report.html", "out/mine/report.html"),
    ],
)
def test_folders_of_the_machine_are_not_told(tmp_path, told, shown):
    write_report(tmp_path / "r.html", [Chapter("t", command=told)])
    assert f"<pre>{shown}</pre>" in html.unescape((tmp_path / "r.html").read_text())


def test_samples_over_time_are_thinned_and_in_order(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "log.jsonl").write_text("")
    for step in range(0, 4000, 100):
        BASE[0].save(tmp_path / "samples" / f"step-{step:06d}.png")
    write_report(tmp_path / "r.html", [chapter_of(tmp_path)])
    steps = [int(n) for n in re.findall(r'class="sample" data-step="(\d+)"', (tmp_path / "r.html").read_text())]
    assert steps == sorted(set(steps))
    assert (len(steps), steps[0], steps[-1]) == (12, 0, 3900)
    assert '<input type="range" min="0" max="11" value="11">' in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("settings", "rows", "told"),
    [
        ({"training": {"max_train_steps": 100}}, [(0, 0), (10, 20)], "10 updates in 20 s, 0.5 a second; about 3 min to go"),
        ({"training": {"max_train_steps": 100}}, [(0, 0), (100, 200)], "100 updates in 3 min, 0.5 a second"),
        ({"training": {"num_train_epochs": 4}}, [(0, 0), (10, 10, 1.0)], "10 updates in 10 s, 1 a second; about 30 s to go"),
        (
            {"online": {"train_prompts": "p", "rounds": 4}},  # round 1: one is learned from
            [(0, 0), (10, 10, 0.5, 1.0)],
            "10 updates in 10 s, 1 a second; about 30 s to go",
        ),
        (
            {"online": {"train_prompts": "p", "rounds": 4}, "training": {"max_train_steps": 20}},  # which ends it before
            [(0, 0), (10, 10, 0.5, 1.0)],
            "10 updates in 10 s, 1 a second; about 10 s to go",
        ),
        ({}, [(0, 0)], ""),
        ({}, [("a", None), (10, 20), (20, "b")], ""),  # mended by hand, and not well
        ({"training": {"num_train_epochs": "x"}}, [(0, 0), (10, 10)], "10 updates in 10 s, 1 a second"),
        ({}, [], ""),
    ],
)
def test_progress_by_hand(tmp_path, settings, rows, told):
    named = [dict(zip(("step", "seconds", "epoch", "round"), row, strict=False)) for row in rows]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    assert chapter_of(tmp_path).progress == told


def test_settings_are_those_that_tell_of_the_result(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    online = {"train_prompts": None, "rounds": 3}
    settings = {
        "data": {"cache_dir": "/x/y", "train_data": "/x/pairs"},
        "training": {"seed": 7, "output_dir": "o"},
        "online": online,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    assert chapter_of(tmp_path).settings == {"data": {"train_data": "/x/pairs"}, "training": {"seed": 7}}
    write_report(tmp_path / "r.html", [chapter_of(tmp_path)])
    assert "<dd>…/pairs</dd>" in (tmp_path / "r.html").read_text()


# Watching ----------------------------------------------------------------------------------------------------------------


def test_a_watched_page_is_of_this_machine_and_tells_when_it_changed(tmp_path):
    def ask(path: str, host: str = "127.0.0.1") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 1}\n')
    with server_of([tmp_path], 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status, page = ask("/")
        assert status == 200
        assert Page(page).open == []
        assert "connect-src 'self'" in page
        first = ask("/state")
        assert first == ask("/state")
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"step": 2, "loss": 0.4, "seconds": 2}\n')
        assert ask("/state") != first
        assert "loss from 0.5 to 0.4" in ask("/")[1]
        (tmp_path / "log.jsonl").unlink()
        assert "Nothing to show yet" in ask("/")[1]
        assert ask("/etc/passwd")[0] == ask("/../log.jsonl")[0] == 404
        assert ask("/", host="evil.example")[0] == 403
        server.shutdown()
    assert "connect-src" not in page_of([Chapter("t")])


def test_large_pictures_stay_small(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8))
    write_report(tmp_path / "r.html", [Chapter("t", pictures=[("p", [noise, noise])])])
    page = Page((tmp_path / "r.html").read_text())
    assert {a["width"] for tag, a in page.tags if tag == "img"} == {"512"}
    assert (tmp_path / "r.html").stat().st_size < 700_000
