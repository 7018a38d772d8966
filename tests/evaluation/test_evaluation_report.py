"""What the comparison says, writes and shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from palate.errors import UserError
from palate.evaluation import grid
from palate.evaluation.compare import compare, diversity, headline, percent, write_metrics
from palate.evaluation.grid import before_after_grid
from palate.evaluation.report import write_report
from palate.miniature import scenes

rng = np.random.default_rng(0)
SCENES = [scenes.random_scene(rng) for _ in range(4)]
PROMPTS = [scenes.caption(s, rng) for s in SCENES]
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


def test_diversity_by_hand():
    def grey(value):
        return Image.new("RGB", (64, 64), (value,) * 3)

    # Within a: 0 and 255 are 1 apart, b: 0 and 51 are 0.2 apart, mean 0.6; after: all alike.
    d = diversity([grey(v) for v in (0, 255, 0, 51)], [grey(7)] * 4, ["a", "a", "b", "b"])
    assert (d.base, d.tuned, d.over) == (pytest.approx(0.6), pytest.approx(0), "seeds of a prompt")
    assert "-100 %" in d.sentence()
    assert "repeated" in d.sentence()
    # One picture a prompt: pairs (0, 255), (0, 51), (51, 255) are 1, 0.2 and 0.8 apart, mean 2/3.
    d = diversity([grey(v) for v in (0, 255, 51)], [grey(v) for v in (255, 0, 204)], ["a", "b", "c"])
    assert (d.base, d.tuned, d.over) == (pytest.approx(2 / 3), pytest.approx(2 / 3), "prompts")
    assert "+0 %" in d.sentence()


def test_metrics_are_json(tmp_path):
    found = compare({"j": wins(0.7)}, IDS, draws=300)
    write_metrics(tmp_path / "deep" / "metrics.json", found, {"headline": headline(found)})
    read = json.loads((tmp_path / "deep" / "metrics.json").read_text())
    assert read["comparisons"][0]["win_rate"]["rate"] == 0.7
    assert read["headline"].startswith("An independent judge")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["metrics.json"]
    with pytest.raises(UserError, match="cannot be written as JSON"):
        write_metrics(tmp_path / "bad.json", found, {"x": float("nan")})
    assert not (tmp_path / "bad.json").exists()


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
    found = compare({"labeller": wins(0.9), EVIL: wins(0.8)}, IDS, kinds={"labeller": "labels"}, draws=300)
    rows = [
        {"step": i, "loss": 0.7 - i / 1000, "implicit_accuracy": 0.5 + i / 500, "name": "text", "bad": float("nan")}
        for i in range(50)
    ]
    write_report(
        path,
        title=EVIL,
        headline=headline(found),
        comparisons=found[::-1],
        prompts=[*PROMPTS[:3], EVIL],
        base_images=BASE,
        tuned_images=TUNED,
        training_curves=[*rows, {"step": 50, EVIL: 1.0}, {"step": 51, EVIL: 2}],
        settings={"command": f"palate train {EVIL}", "seed": 7, "objective": {"name": EVIL, "beta": 5000}},
        versions={"torch": EVIL},
        notes=[EVIL],
    )
    return path.read_text(encoding="utf-8")


def test_report_is_whole(page):
    parsed = Page(page)
    assert parsed.open == []
    assert headline(compare({"j": wins(0.8)}, IDS, draws=300)).replace("'", "&#x27;") in page
    assert page.index("held out</span>") < page.index("trained on</span>")
    assert "<dt>objective.beta</dt><dd>5000</dd>" in page
    assert "<dt>seed</dt><dd>7</dd>" in page
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == 8
    assert {i["alt"] for i in images if i["alt"].startswith("Before")} == {
        f"Before alignment: {p}" for p in [*PROMPTS[:3], EVIL]
    }
    charts = [a["aria-label"] for tag, a in parsed.tags if tag == "svg" and a.get("class") != "bar"]
    assert len(charts) == 3
    assert charts[0].startswith("loss from 0.69")


def test_report_needs_nothing_else(page):
    """No address but data:, nothing of the user's runs, and the policy admits this style and this script alone."""
    parsed = Page(page)
    for _, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
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
    write_report(tmp_path / "r.html", title="t", headline="h", comparisons=[], prompts=[], base_images=[], tuned_images=[])
    assert Page((tmp_path / "r.html").read_text()).open == []
    with pytest.raises(UserError, match="as many of each"):
        write_report(
            tmp_path / "r.html", title="t", headline="h", comparisons=[], prompts=["a"], base_images=[], tuned_images=[]
        )
