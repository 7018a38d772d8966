"""The page in a real browser: keyboard and touch, two raters, undo, reload, a server that is killed and comes back."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from party import picture_folder

sync_api = pytest.importorskip("playwright.sync_api", reason="the pages in a browser: pip install playwright")
expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the pages in a browser: apt-get install chromium")
ROOT = Path(__file__).parents[2]
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True}


class _Server:
    """``palate vote`` as a process, which may be killed and started again on the same port."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.words, self.port = folder, words, 0
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "palate", "vote", str(self.folder), "--port", str(self.port), *self.words]
        self.process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        lines = [self.process.stdout.readline() for _ in range(4)]
        self.url, self.owner = lines[1].split()[-1], lines[2].split()[1]
        self.port = int(re.search(r":(\d+)/", self.url).group(1))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def votes(self, question: str = "overall") -> list[tuple]:
        """Valid votes as (model or other choice, name of the rater), oldest first."""
        connection = sqlite3.connect(self.folder / "votes.db")
        rows = connection.execute(
            "SELECT votes.choice, a.model, b.model, raters.name FROM votes JOIN showings ON showings.id = votes.showing "
            "JOIN pictures a ON a.id = picture_0 JOIN pictures b ON b.id = picture_1 JOIN raters ON raters.id = showings.rater "
            "WHERE undone = 0 AND question = ? ORDER BY votes.rowid",
            (question,),
        ).fetchall()
        connection.close()
        return [({"first": a, "second": b}.get(choice, choice), name) for choice, a, b, name in rows]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium's own does not work for root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*words: str, prompts: int = 4, per_prompt: int = 1, models=("plain", "tuned")) -> _Server:
        servers.append(_Server(picture_folder(tmp_path, prompts=prompts, per_prompt=per_prompt, models=models), *words))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def visit(browser):
    """A rater with a browser of their own, past the welcome; errors of the page fail the test."""
    contexts, errors = [], []

    def enter(server: _Server, device=DESKTOP, name: str = ""):
        context = browser.new_context(**device)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if "Content Security Policy" in m.text else None)
        page.goto(server.url)
        page.fill("#name", name)
        page.click("#join button")
        _ready(page)
        return page

    yield enter
    for context in contexts:
        context.close()
    assert not errors


def _ready(page) -> None:
    """The ballot is there, and its pictures, and an answer is no slip of the key any more."""
    expect(page.locator("#ballot")).to_be_visible()
    time.sleep(0.3)


def _count(page, done: int, total: int) -> None:
    expect(page.locator("#count")).to_have_text(re.compile(f"^{done} of {total}"))


def _saved(server: _Server, count: int, question: str = "overall") -> list[tuple]:
    until = time.monotonic() + 10
    while len(server.votes(question)) != count and time.monotonic() < until:
        time.sleep(0.05)
    assert len(server.votes(question)) == count
    return server.votes(question)


def test_compare_by_keyboard(serve, visit):
    server = serve()
    page = visit(server, name="Ann <b>")
    expect(page.locator("#question")).to_have_text("Which picture is more appealing?")
    expect(page.locator("#prompt")).not_to_contain_text("&")  # the prompt of every pair has one; appeal hides it
    expect(page.locator("#turn")).to_have_text("Question 1 of 3")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#question")).to_have_text("Which picture do you prefer?")
    expect(page.locator("#turn")).to_have_text("Question 2 of 3")
    expect(page.locator("#bar")).to_have_attribute("style", re.compile(r"scaleX\(0\.08"))  # a third of one of four pairs
    expect(page.locator("#prompt")).to_contain_text("<b>&")
    _ready(page)
    page.keyboard.press("ArrowDown")
    expect(page.locator("#question")).to_have_text("Which picture follows the words better?")
    _ready(page)
    page.keyboard.press("ArrowUp")
    _count(page, 1, 4)
    assert _saved(server, 1)[0] == ("tie", "Ann <b>")
    assert _saved(server, 1, "following")[0][0] == "bad"
    assert _saved(server, 1, "appeal")[0][0] in ("plain", "tuned")
    _ready(page)
    page.keyboard.press("s")  # the rest of this pair
    _count(page, 2, 4)
    page.keyboard.press("u")
    _count(page, 1, 4)
    expect(page.locator("#live")).to_contain_text("Undone.")
    assert len(_saved(server, 0, "none")) == 0
    page.keyboard.press("z")
    assert page.locator("#zoom").get_attribute("aria-pressed") == "true"
    page.keyboard.press("f")
    expect(page.locator("#frame-2")).to_be_hidden()
    page.keyboard.press(" ")
    expect(page.locator("#frame-1")).to_be_hidden()
    expect(page.locator("#frame-2")).to_be_visible()
    page.keyboard.press("f")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    for _ in range(9):
        _ready(page)
        page.keyboard.press("ArrowRight")
    expect(page.locator("#finished")).to_be_visible()
    _saved(server, 4)
    page.goto(server.owner)
    expect(page.locator("#headline")).to_contain_text(re.compile("preferred|No clear difference"))
    expect(page.locator("#rater-rows")).to_contain_text("Ann <b>")
    expect(page.locator(".panel h2").first).to_have_text("Overall preference")


def test_collect_by_touch_on_a_phone(serve, visit):
    server = serve("--mode", "collect", prompts=2, per_prompt=2, models=("plain",))
    page = visit(server, PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.locator("#frame-2")).to_be_hidden()  # one at a time, at the full width
    box = page.locator("#frame-1").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert box["width"] > 300
    expect(page.locator(".answer .word-1")).to_have_text("First")
    for button in page.locator("#ballot button:visible").all():
        assert button.bounding_box()["height"] >= 40
        assert button.bounding_box()["x"] + button.bounding_box()["width"] <= 360
    page.locator("#help-open").tap()
    expect(page.locator("#help-title")).to_be_in_viewport(ratio=1)  # a narrow page begins at its top
    page.locator("#help-close").tap()
    page.locator(".answer .word-1").tap()  # of a picture that was not seen nothing is said: it is shown instead
    expect(page.locator("#frame-2")).to_be_visible()
    expect(page.locator("#notice")).to_contain_text("now you have seen both")
    _count(page, 0, 2)
    page.locator("#frame-2").tap()  # flips back, and is no vote
    expect(page.locator("#frame-1")).to_be_visible()
    page.locator("#zoom").tap()
    page.locator("#frame-1").tap()  # ends the zoom and is no vote
    _count(page, 0, 2)
    page.locator(".answer .word-2").tap()
    _count(page, 1, 2)
    page.locator("#undo").tap()
    _count(page, 0, 2)
    _ready(page)
    page.locator("#flicker").tap()  # both, above each other
    for frame in (page.locator("#frame-1"), page.locator("#frame-2")):
        assert frame.bounding_box()["width"] > 150
    expect(page.locator(".answer .word-1")).to_have_text("Upper")
    page.locator(".answer", has_text="Tie").tap()
    _ready(page)
    page.locator("#frame-2").tap()
    expect(page.locator("#finished")).to_be_visible()
    assert [choice for choice, _ in _saved(server, 2)] == ["tie", "plain"]
    expect(page.locator("#liked img")).to_have_count(1)


def test_a_second_click_on_begin_is_no_vote_and_nothing_looks_chosen(serve, browser):
    """Under the button lies the left picture: neither the click nor the pointer that rests there may speak for it."""
    server = serve("--questions", "overall", "--repeats", "0")
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#join button")).to_be_visible()
    box = page.locator("#join button").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    expect(page.locator("#ballot")).to_be_visible()
    page.mouse.click(x, y)
    _ready(page)
    _count(page, 0, 4)
    frame = page.locator("#frame-1").bounding_box()
    page.mouse.move(frame["x"] + 40, frame["y"] + 40)
    page.mouse.move(frame["x"] + 80, frame["y"] + 80)
    ring = "getComputedStyle(document.querySelector('#frame-1')).outlineStyle"
    assert page.evaluate(ring) == "solid"
    time.sleep(0.6)
    page.mouse.click(frame["x"] + 80, frame["y"] + 80)
    _count(page, 1, 4)
    _ready(page)
    assert page.evaluate(ring) == "none"  # the pointer rests where the next picture came
    context.close()
    assert len(_saved(server, 1)) == 1


def test_a_break_whenever_one_likes(serve, visit):
    server = serve("--questions", "overall", "--repeats", "0", "--thanks", "Cake at four.", prompts=2)
    page = visit(server, name="Ann")
    page.keyboard.press("ArrowLeft")
    _ready(page)
    page.locator("#rest").click()
    expect(page.locator("#pause-text")).to_contain_text("1 pair judged, 1 to go")
    page.locator("#go-on").click()
    _ready(page)
    page.keyboard.press("ArrowRight")
    expect(page.locator("#thanks")).to_have_text("Thank you, Ann")
    expect(page.locator("#owner-text")).to_have_text("Cake at four.")
    expect(page.locator("#finished-text")).to_have_text("You have judged 2 pairs. That was all there is for you.")
    expect(page.locator("#liked img")).to_have_count(2)


def test_a_chain_has_every_possible_challenger_there(serve, visit):
    # Six pictures of a prompt: the best has a challenger left in each of the five turns, whatever the order.
    server = serve("--mode", "collect", "--chain", "true", "--repeats", "0", prompts=2, per_prompt=6, models=("plain",))
    page = visit(server)
    asked, finished = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfinished", lambda request: finished.append(request.url))
    for turn in range(5):
        _ready(page)
        # What may come next is fetched after the pair is shown; on a busy machine that takes its time.
        while len(finished) < len(asked) or page.evaluate("document.readyState") != "complete":
            page.wait_for_timeout(50)
        quiet = len(asked)
        while page.wait_for_timeout(500) or len(asked) > quiet:
            quiet = len(asked)
        before = [page.locator(f"#frame-{side} img").get_attribute("src") for side in ("1", "2")]
        asked.clear()
        page.keyboard.press(("ArrowLeft", "ArrowRight", "ArrowDown")[turn % 3])
        expect(page.locator("#live")).to_contain_text(f"Pair {turn + 2}.")
        now = [page.locator(f"#frame-{side} img").get_attribute("src") for side in ("1", "2")]
        if turn % 3 < 2:
            assert before[turn % 3] in now
        assert not [url for url in asked if url.endswith(tuple(now))]  # nothing that is shown had to be asked for
    _saved(server, 5)


def test_undo_passes_over_a_skip_that_another_filled(serve, visit):
    server = serve("--questions", "overall", "--raters", "1", "--repeats", "0", prompts=2)
    one = visit(server)
    one.keyboard.press("ArrowLeft")
    _ready(one)
    one.keyboard.press("s")
    expect(one.locator("#finished")).to_be_visible()
    other = visit(server)
    other.keyboard.press("ArrowLeft")
    _saved(server, 3)
    one.locator("#finished-undo").click()
    expect(one.locator("#notice")).to_contain_text("Undo again for the one before")
    expect(one.locator("#finished")).to_be_visible()
    one.locator("#finished-undo").click()
    expect(one.locator("#ballot")).to_be_visible()
    assert _saved(server, 2)[0][0] == "skip"


def test_two_raters_in_parallel(serve, visit):
    server = serve("--questions", "overall", "--raters", "2", "--repeats", "0")
    pages = [visit(server, name=name) for name in ("Ann", "Bob")]
    for _ in range(4):
        for page in pages:
            _ready(page)
            page.keyboard.press("ArrowLeft")
    for page in pages:
        expect(page.locator("#finished")).to_be_visible()
    names = [name for _, name in _saved(server, 8)]
    assert sorted(names) == ["Ann"] * 4 + ["Bob"] * 4


def test_reload_in_the_middle(serve, visit):
    server = serve("--questions", "overall", "--repeats", "0")
    page = visit(server)
    page.keyboard.press("ArrowLeft")
    _count(page, 1, 4)
    _saved(server, 1)
    before = page.locator("#frame-1 img").get_attribute("src")
    page.reload()
    _ready(page)
    _count(page, 1, 4)
    assert page.locator("#frame-1 img").get_attribute("src") == before
    page.keyboard.press("u")  # what was done before the reload
    _count(page, 0, 4)
    _saved(server, 0)
    assert page.locator("#frame-1 img").get_attribute("src") != before


def test_the_server_is_killed_and_comes_back(serve, visit):
    server = serve("--questions", "overall", "--repeats", "0", prompts=6)
    page = visit(server)
    page.keyboard.press("ArrowLeft")
    _saved(server, 1)
    server.kill()
    _ready(page)
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#notice")).to_contain_text("Your vote is kept here")
    _ready(page)
    page.keyboard.press("ArrowRight")  # the next pair was there already
    server.start()
    _saved(server, 3)
    expect(page.locator("#notice")).to_be_hidden()
    _count(page, 3, 6)
    for _ in range(3):
        _ready(page)
        page.keyboard.press("ArrowDown")
    expect(page.locator("#finished")).to_be_visible()
    _saved(server, 6)


def test_a_picture_that_vanishes_is_skipped(serve, visit, tmp_path):
    server = serve("--questions", "overall", prompts=8)
    for path in sorted(tmp_path.glob("tuned/*.png"))[1:]:
        path.rename(path.with_suffix(".away"))
    page = visit(server)
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#finished")).to_be_visible()
    _saved(server, 1)


def test_names_and_order_for_a_screen_reader(serve, visit):
    page = visit(serve())
    assert page.locator("#frame-1").get_attribute("aria-label") == "The left picture is better"
    expect(page.locator("#live")).to_contain_text("Pair 1. Which picture is more appealing?")
    order = []
    page.locator("#question").focus()
    for _ in range(8):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.dataset.choice || document.activeElement.id"))
    assert order == ["1", "2", "1", "tie", "bad", "2", "skip", "zoom"]  # undo has nothing to undo yet
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    _count(page, 1, 4)


def test_best_of_four_by_key_and_on_a_phone(serve, visit):
    server = serve(
        "--mode", "collect", "--at_once", "4", "--repeats", "0", "--raters", "2", prompts=2, per_prompt=4, models=("plain",)
    )
    page = visit(server, name="Ann")
    expect(page.locator("#question")).to_have_text("Which picture do you like best?")
    expect(page.locator(".frame:visible")).to_have_count(4)
    page.keyboard.press("ArrowLeft")  # of four, says nothing
    _count(page, 0, 2)
    boxes = [frame.bounding_box() for frame in page.locator(".frame:visible").all()]
    assert len({(round(box["x"]), round(box["y"])) for box in boxes}) == 4
    assert all(box["y"] + box["height"] <= page.locator("#answers").bounding_box()["y"] for box in boxes)
    page.keyboard.press("3")
    _count(page, 1, 2)
    expect(page.locator("#live")).to_contain_text("Picture 3 is the best. Set 2.")
    _ready(page)
    time.sleep(0.6)
    page.locator("#frame-4").click()
    expect(page.locator("#finished-text")).to_contain_text("You have judged 2 sets.")
    phone = visit(server, PHONE, name="Bob")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    expect(phone.locator(".frame:visible")).to_have_count(1)  # one at a time; a tap shows the next
    for button in phone.locator("#ballot button:visible").all():
        assert button.bounding_box()["height"] >= 40
        assert button.bounding_box()["x"] + button.bounding_box()["width"] <= 360
    phone.locator(".answer[data-choice='2']:visible").tap()
    expect(phone.locator("#notice")).to_contain_text("This is picture 2 of 4: look at the others, too.")
    time.sleep(0.6)
    phone.locator("#frame-2").tap()
    phone.locator("#frame-3").tap()
    expect(phone.locator("#frame-4")).to_be_visible()
    phone.locator(".answer[data-choice='2']:visible").tap()
    _count(phone, 1, 2)
    phone.locator("#undo").tap()
    _count(phone, 0, 2)
    assert len(_saved(server, 2)) == 2
    page.goto(server.owner)
    expect(page.locator("#summary")).to_contain_text("2 of 2 sets judged, 2 votes by 1 rater")
