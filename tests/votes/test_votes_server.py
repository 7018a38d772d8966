"""The server's door: links, other sites, too much, too often."""

from __future__ import annotations

import functools
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from palate.cli import main
from palate.votes import server
from palate.votes.server import Bucket

ROOT = Path(__file__).parents[2]


@pytest.fixture
def visitor(study_of, client_of):
    visitor = client_of(study_of(prompts=6))
    visitor.join("Ann <script>")
    return visitor


def test_vote_undo_and_results(study_of, client_of):
    study = study_of(prompts=6)
    visitor = client_of(study)
    assert visitor.get("/api/state").json()["join"]
    visitor.join("Ann <script>")
    shown = visitor.get("/api/state").json()["open"][0]
    assert visitor.get(f"/picture/{shown['pictures'][0]}").content.startswith(b"\x89PNG")
    for question in ("appeal", "overall", "following"):
        assert visitor.vote(shown["id"], question, "1", f"named-{question}").status_code == 200
    state = visitor.vote(shown["id"], "following", "1", "named-following").json()
    assert state["done"] == 1
    assert visitor.tell("/api/undo", vote="named-following").json()["open"][0]["answered"] == ["appeal", "overall"]
    assert visitor.get("/results").status_code == visitor.get("/api/results").status_code == 403
    assert visitor.get(f"/enter/{study.key('owner')}").headers["location"] == "/results"
    told = visitor.get("/api/results").json()
    assert told["votes"] == 2
    assert told["raters"][0]["name"] == "Ann <script>"  # escaped where it is shown: the page sets text, never markup
    assert set(told["questions"]) == {"overall", "appeal"}


def test_results_are_of_the_pairs_at_hand(study_of, client_of):
    """What was said of two pictures of one model counts neither in a comparison of models nor in its agreement."""
    for mode in ("collect", "compare"):
        study = study_of(prompts=3, per_prompt=2, mode=mode, questions=("overall",))
        visitor = client_of(study)
        visitor.join()
        while shown := visitor.get("/api/state").json()["open"]:
            visitor.vote(shown[0]["id"], "overall", "1")
    within = 3 * 6 - 6  # of four pictures of a prompt six pairs, of which two are of both models and one seed
    visitor.get(f"/enter/{study.key('owner')}")
    told = visitor.get("/api/results").json()
    assert (told["judged"], told["pairs"], told["votes"], told["elsewhere"]) == (6, 6, 12, within)
    assert told["questions"]["overall"]["comparisons"][0]["win_rate"]["n"] == 12


def test_every_answer_carries_the_guards(visitor):
    for path in ("/", "/assets/vote.js", "/assets/vote.css", "/api/state", "/results", "/nowhere", "/picture/nothing"):
        headers = visitor.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere():
    for name in ("vote.html", "results.html"):
        text = (server.PAGE / name).read_text()
        assert not any(word in text for word in (" style=", "<style", " onclick", "http:", "https:", "//"))
        assert text.count("<script") == text.count('<script src="/assets/')
    for path in server.PAGE.glob("*.js"):
        assert not any(word in path.read_text() for word in ("innerHTML", "insertAdjacentHTML", "eval(", "document.write"))
    for path in server.PAGE.glob("*.css"):
        assert "url(" not in path.read_text()
        assert "@import" not in path.read_text()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"X-Palate": "guessed"},
        {"X-Palate": ""},
    ],
)
def test_posting_from_elsewhere_is_refused(visitor, headers):
    shown = visitor.get("/api/state").json()["open"][0]
    body = {"vote": "forged-vote", "showing": shown["id"], "question": "appeal", "choice": "1"}
    assert visitor.tell("/api/vote", headers, **body).status_code == 403
    assert visitor.get("/api/state").json()["last"] is None
    same = {"Origin": "http://localhost:8421", "Sec-Fetch-Site": "same-origin"}
    assert visitor.tell("/api/vote", same, **body).status_code == 200


def test_a_name_of_another_site_for_our_address_is_refused(visitor):
    assert visitor.get("/", headers={"Host": "evil.example:8421"}).status_code == 421
    assert visitor.get("/api/state", headers={"Host": "evil.example"}).status_code == 421


def test_others_on_the_network_need_the_link(study_of, client_of):
    study = study_of()
    stranger = client_of(study, host="0.0.0.0")
    assert stranger.get("/").status_code == stranger.get("/api/state").status_code == 403
    assert stranger.post("/api/join", json={"name": ""}).status_code == 403
    opaque = next(iter(study._by_opaque))
    assert stranger.get(f"/picture/{opaque}").status_code == 403
    assert stranger.get("/enter/guessed").status_code == 403
    entered = stranger.get(f"/enter/{study.key('rater')}")
    assert entered.headers["location"] == "/"
    assert "httponly" in entered.headers["set-cookie"].lower()
    stranger.join()
    assert stranger.get("/api/state").json()["open"]
    assert stranger.get("/api/results").status_code == 403  # raters do not see results


@pytest.mark.parametrize(
    "name", ["..%2f..%2fvotes.db", "../plain/000-0.png", "%2e%2e/votes.db", "plain%2f000-0.png", "%00", "vote.html"]
)
def test_no_path_leads_anywhere(visitor, name):
    for room in ("picture", "assets"):
        assert visitor.get(f"/{room}/{name}").status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"x" * 9000, 413),
        (b"not json", 400),
        (b"[1]", 400),
        (b'{"vote": 3, "showing": "a", "question": "appeal", "choice": "1"}', 400),
        (b'{"vote": "abcdefgh", "showing": "a", "question": "appeal", "choice": "1", "seconds": NaN}', 400),
        (b'{"vote": "abcdefgh", "showing": "a", "question": "appeal", "choice": "1", "more": 1}', 400),
        (b'{"vote": "abcdefgh", "showing": "a", "question": "appeal", "choice": "1"}', 404),
        (b'{"vote": "abcdefgh", "showing": "a", "question": "apeal", "choice": "1"}', 400),
        (b"[" * 8000, 400),
    ],
)
def test_bad_bodies(visitor, body, status):
    answer = visitor.post("/api/vote", content=body, headers={"X-Palate": visitor.form()})
    assert answer.status_code == status
    assert answer.json()["error"]


def test_another_raters_pair_is_not_mine(study_of, client_of):
    study = study_of()
    one, other = client_of(study), client_of(study)
    one.join()
    other.join()
    theirs = other.get("/api/state").json()["open"][0]["id"]
    assert one.vote(theirs, "appeal", "1").status_code == 404


def test_too_often(visitor):
    shown = visitor.get("/api/state").json()["open"][0]["id"]
    answers = (visitor.vote(shown, "appeal", "1", "the-same-vote") for _ in range(400))  # a busy machine needs more than 40
    slow = next(a for a in answers if a.status_code == 429)
    assert int(slow.headers["retry-after"]) >= 1


def test_bucket():
    now = [0.0]
    bucket = Bucket(2.0, 3, clock=lambda: now[0])
    assert [bucket.take("a") for _ in range(4)] == [0, 0, 0, 0.5]  # the fourth waits for half a second's refill
    assert bucket.take("b") == 0
    now[0] = 0.5
    assert [bucket.take("a"), bucket.take("a")] == [0, 0.5]


def test_a_full_disk_is_an_answer(study_of, client_of, monkeypatch, capsys):
    from palate.votes.store import DiskError

    study = study_of()
    visitor = client_of(study)
    visitor.join()
    shown = visitor.get("/api/state").json()["open"][0]["id"]

    def full(*args, **kwargs):
        raise DiskError("database or disk is full")

    monkeypatch.setattr(study.store, "add_vote", full)
    answer = visitor.vote(shown, "appeal", "1", "kept-later")
    assert answer.status_code == 507
    assert "disk is full" in answer.json()["error"]
    assert "votes.db" not in answer.json()["error"]
    assert "disk is full" in capsys.readouterr().err
    monkeypatch.undo()
    assert visitor.vote(shown, "appeal", "1", "kept-later").json()["open"][0]["answered"] == ["appeal"]


def test_many_threads_at_once(study_of):
    """Raters in parallel: every acknowledged vote is there once, no pair goes to more raters than asked."""
    study = study_of(prompts=12, raters=3, questions=("overall",), repeats=0.0)
    acknowledged, errors = [], []

    def rate(number: int) -> None:
        try:
            rater = study.rater(study.join())
            for turn in range(12):
                open_ = study.state(rater)["open"]
                if not open_:
                    return
                name = f"rater{number:02d}-{turn:02d}"
                study.vote(rater, name=name, showing=open_[0]["id"], question="overall", choice="1")
                acknowledged.append(name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=rate, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    votes = study.store.valid_votes()
    assert sorted(v["id"] for v in votes) == sorted(acknowledged)
    assert int(study.queue.held.max()) <= 3


def test_serving_for_real(study_of, tmp_path):
    """The command: links are printed, a taken port is told, a second server refused, Ctrl-C is calm."""
    study_of().close()
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    words = [sys.executable, "-m", "palate", "vote", str(tmp_path), "--port", str(port)]
    # A test run in the background of a shell ignores Ctrl-C, and so would the command.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, preexec_fn=heeding, **pipes)
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        assert "compare: 4 pairs, 5 raters each" in lines[0]
        assert f"http://127.0.0.1:{port}/" not in lines[1]
        assert "/enter/" in lines[2]
        assert main(["vote", str(tmp_path)]) == 2
        import httpx2

        url = lines[1].split()[-1]
        assert httpx2.get(url, timeout=10, trust_env=False).status_code == 200
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        taken.close()
    assert f"port {port} is taken" in err
    assert "the same command goes on" in err
    assert "Traceback" not in err


def test_all_ports_taken(study_of, monkeypatch, tmp_path, capsys):
    study_of().close()
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    monkeypatch.setattr(server, "PORTS", 1)
    assert main(["vote", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "all taken" in capsys.readouterr().err
    taken.close()
    assert main(["vote", str(tmp_path), "--host", "203.0.113.7"]) == 2
    assert "cannot listen on 203.0.113.7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vote"], ""),
        (["vote", "nowhere"], "there is no folder"),
        (["vote", ".", "--mod", "compare"], "did you mean 'mode'"),
        (["vote", "exprot", "out"], "did you mean 'export'"),
        (["vote", "export"], "expects the folder"),
        (["vote", "export", "."], "needs --output"),
        (["vote", "--port", "1"], "expects a folder"),
    ],
)
def test_bad_words(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    assert main(words) == (2 if message else 0)
    assert message in capsys.readouterr().err
    assert time.perf_counter() - began < 20
