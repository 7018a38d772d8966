"""Remote judges: scores through HTTP are those of the judge behind it; servers that are down, slow, talk nonsense or refuse."""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from palate.base.errors import UserError
from palate.data.images import encoded, to_tensor
from palate.judges import load_judge, score
from palate.judges.http import ask
from palate.judges.remote import Identity
from palate.judges.server import serve_judge
from palate.names.judges import find_judges


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def answering(*answers):
    """A server that gives these (status, headers, body) in turn, the last for ever; also the requests it got."""
    got, queue = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            got.append((self.path, dict(self.headers), body))
            status, headers, text = queue.pop(0) if len(queue) > 1 else queue[0]
            if callable(text):
                text = text()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, got


def test_scores_through_http_are_the_judge_s_own(judge_dir):
    judge = load_judge("pickscore", judge_dir)
    images = (torch.rand(5, 3, 40, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    prompts = ["a red house", "a tower", "", "a red house", 'ä "tree"\n']
    with running(serve_judge(judge, Identity("mine"), port=0)) as url:
        name = f"remote:{url}?batch_size=2&concurrency=3"
        found = find_judges([name])[name]
        assert (found.kind, found.url, found.folder) == ("remote", url, None)
        torch.testing.assert_close(found.load()(images, prompts), judge(images, prompts), rtol=1e-5, atol=1e-5)
        with pytest.raises(UserError, match="one prompt per picture"):
            found.load()(images, prompts[:2])


def test_a_score_that_is_no_number_comes_back_as_nan():
    with running(serve_judge(lambda images, prompts: torch.tensor([float("inf")]), Identity("odd"), port=0)) as url:
        assert load_judge("remote", url)(torch.rand(1, 3, 4, 4), [""]).isnan().all()


def test_round_trip_of_pictures():
    x = torch.arange(256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    assert torch.equal(to_tensor([Image.open(io.BytesIO(encoded(x, "PNG")[0]))]), x)


def mean(images, prompts):
    return images.mean((1, 2, 3))


def post(url, body, **headers):
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    connection.request("POST", "/score", body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_the_server_refuses_what_is_no_request(monkeypatch):
    picture = base64.b64encode(encoded(torch.rand(1, 3, 4, 4), "PNG")[0]).decode()
    good = json.dumps({"images": [picture], "prompts": ["a"]})
    monkeypatch.setattr("palate.judges.server.MAX_PICTURES", 2)
    with running(serve_judge(mean, Identity("mean"), port=0)) as url:
        assert post(url, good)[0] == 200
        assert post(url, good, **{"Content-Type": "text/plain"})[0] == 415
        assert post(url, good, Host="evil.example")[0] == 403
        assert post(url, "{")[0] == 400
        assert post(url, json.dumps({"images": [picture], "prompts": []}))[0] == 400
        assert post(url, json.dumps({"images": [picture] * 3, "prompts": ["a"] * 3}))[0] == 413
        status, said = post(url, json.dumps({"images": [base64.b64encode(b"GIF89a").decode()], "prompts": ["a"]}))
        assert status == 400
        assert "picture 0" in said["error"]
        monkeypatch.setattr("palate.judges.server.MAX_BODY", 10)
        assert post(url, good)[0] == 413
        with pytest.raises(UserError, match="status 404"):
            ask(f"{url}/other")
        with pytest.raises(UserError, match="is no usable URL"):
            ask("ftp")


def test_a_judge_that_fails_does_not_end_its_server():
    def judge(images, prompts):
        if prompts == ["bad"]:
            raise RuntimeError("secret")
        return images.mean((1, 2, 3))

    with running(serve_judge(judge, Identity("moody"), port=0)) as url:
        remote = load_judge("remote", url, retries=0)
        with pytest.raises(UserError, match="the judge failed: RuntimeError"):
            remote(torch.rand(1, 3, 4, 4), ["bad"])
        assert remote(torch.ones(1, 3, 4, 4), ["good"]).item() == 1


def test_a_token_is_needed_from_outside_and_checked(monkeypatch):
    monkeypatch.delenv("PALATE_API_KEY", raising=False)
    with pytest.raises(UserError, match="can be reached from outside: set PALATE_API_KEY"):
        serve_judge(mean, Identity("mean"), host="0.0.0.0", port=0)
    with running(serve_judge(mean, Identity("mean"), port=0, token="s3cret")) as url:
        remote = load_judge("remote", url)
        with pytest.raises(UserError, match=r"401.*set PALATE_API_KEY"):
            remote(torch.ones(1, 3, 4, 4), [""])
        monkeypatch.setenv("PALATE_API_KEY", "s3cret")
        assert remote(torch.ones(1, 3, 4, 4), [""]).item() == 1
        with pytest.raises(UserError, match="give another --port"):
            serve_judge(mean, Identity("mean"), port=int(url.rpartition(":")[2]))


def test_an_overloaded_server_is_asked_again():
    busy = (503, {}, b"")
    with answering(busy, busy, (200, {}, b'{"scores": [2.5]}')) as (url, got):
        assert ask(url, {}, pause=0.01) == {"scores": [2.5]}
        assert len(got) == 3
    with answering((429, {"Retry-After": "1"}, b""), (200, {}, b"1")) as (url, got):
        began = time.monotonic()
        assert ask(url, {}, pause=0.01) == 1
        assert time.monotonic() - began >= 1
    with answering((500, {}, b'{"error": {"message": "out of\\nmemory"}}')) as (url, got):
        with pytest.raises(UserError, match=r"after 3 tries .status 500: out of memory"):
            ask(url, {}, retries=2, pause=0.01)
        assert len(got) == 3


def test_servers_that_are_down_slow_or_talk_nonsense():
    with pytest.raises(UserError, match="does not answer after 2 tries"):
        ask("http://127.0.0.1:9", {}, retries=1, pause=0.01)

    def slow():
        time.sleep(0.5)
        return b"1"

    with answering((200, {}, slow)) as (url, _), pytest.raises(UserError, match=r"no answer within 0\.1 s"):
        ask(url, {}, timeout=0.1, retries=1, pause=0.01)
    with answering((200, {}, b"<html>")) as (url, _), pytest.raises(UserError, match="no JSON but b'<html>'"):
        ask(url, {})
    with answering((200, {"Content-Length": "100"}, b"{")) as (url, _), pytest.raises(UserError, match="does not answer"):
        ask(url, {}, retries=0)
    for nonsense in ({"scores": [1, 2]}, {"scores": ["1"]}, {"scores": [True]}, [1], {}):
        text = json.dumps(nonsense).encode()
        with answering((200, {}, text)) as (url, _), pytest.raises(UserError, match=r"expected \{'scores': \[1 numbers\]\}"):
            load_judge("remote", url)(torch.rand(1, 3, 4, 4), [""])
    for nonsense in (b"{}", b"[]", b'{"judge": "a", "fingerprint": 5}'):
        with answering((200, {}, nonsense)) as (url, _), pytest.raises(UserError, match="is no served judge"):
            find_judges([f"remote:{url}"])


def test_a_redirect_does_not_carry_the_key_away(monkeypatch):
    monkeypatch.setenv("PALATE_API_KEY", "s3cret")
    with answering((200, {}, b"1")) as (elsewhere, got), answering((302, {"Location": elsewhere}, b"")) as (url, first):
        with pytest.raises(UserError, match="status 302"):
            ask(url)
        assert first[0][1]["Authorization"] == "Bearer s3cret"
        assert got == []


def test_the_command_serves_until_it_is_interrupted(palate, monkeypatch, capsys):
    mine = find_judges(["mini-aesthetic"])["mini-aesthetic"]

    def asked(self, *args):
        address = f"http://127.0.0.1:{self.server_address[1]}"
        thread = threading.Thread(target=self.handle_request)
        thread.start()
        told = {"judge": "mini-aesthetic", "kind": "aesthetic", "fingerprint": mine.fingerprint(), "role": "looks"}
        assert ask(f"{address}/judge") == told
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", asked)
    code, said, errors = palate("serve-judge", "mini-aesthetic", port=0)
    assert code == 0
    assert "mini-aesthetic is served at http://127.0.0.1:" in said
    assert palate("serve-judge")[0] == 2
    code, _, errors = palate("serve-judge", "mini-aesthetic", prot=1)
    assert "did you mean 'port'" in errors
    code, said, _ = palate("serve-judge", "--help")
    assert code == 0
    assert "--port (default: 8300)" in said


def test_a_score_of_pictures_of_many_sizes():
    images = [Image.new("RGB", (4 + i, 5), (51, 51, 51)) for i in range(3)]
    with running(serve_judge(mean, Identity("mean"), port=0)) as url:
        assert score(load_judge("remote", url), images, ["a"] * 3).tolist() == pytest.approx([0.2] * 3)


def found_at(url):
    return find_judges([f"remote:{url}"])[f"remote:{url}"]


def test_a_remote_judge_is_who_its_server_says():
    mine = find_judges(["mini-clip"])["mini-clip"]
    with running(serve_judge(mean, Identity("mini-clip", mine.kind, mine.fingerprint(), mine.role), port=0)) as url:
        found = found_at(url)
        assert (found.fingerprint(), found.role, found.serves) == (mine.fingerprint(), "prompt following", ("mini-clip",))
        both = find_judges([f"0.5*remote:{url} + jpeg_compressibility"]).popitem()[1]
        assert both.serves == ("mini-clip",)
        assert mine.serves == ()


def test_scores_of_another_judge_at_the_same_address_are_refused(palate, tmp_path):
    picture = Image.new("RGB", (8, 8), (51, 51, 51))
    picture.save(tmp_path / "a.png")
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.png", "prompt": "a", "seed": 1}\n')
    with running(serve_judge(mean, Identity("first", fingerprint="f00"), port=0)) as url:
        port, judges = int(url.rpartition(":")[2]), f"[remote:{url}]"
        assert palate("score", tmp_path, judges=judges)[0] == 0
        assert palate("score", tmp_path, judges=judges)[0] == 0
    with running(serve_judge(mean, Identity("second", fingerprint="ba2"), port=port)):
        code, _, errors = palate("score", tmp_path, judges=judges)
        assert (code, len(errors.splitlines())) == (2, 1)
        assert "holds scores whose fingerprint is 'f00', now it is 'ba2'" in errors
    assert palate("score", tmp_path, judges=judges)[0] == 2  # nobody is there


def test_another_judge_at_the_address_of_one_in_use_is_refused():
    with running(serve_judge(mean, Identity("first", fingerprint="f00"), port=0)) as url:
        judge, port = found_at(url).load(), int(url.rpartition(":")[2])
        assert judge(torch.ones(1, 3, 4, 4), [""]).item() == 1
    with (
        running(serve_judge(mean, Identity("second", fingerprint="ba2"), port=port)),
        pytest.raises(UserError, match=r"served first .fingerprint f00. when this began.*ba2"),
    ):
        judge(torch.ones(1, 3, 4, 4), [""])


def test_a_server_of_another_make_need_not_say_more_than_a_name():
    with answering((200, {}, b'{"judge": "theirs", "version": 3}'), (200, {}, b'{"scores": [2.5]}')) as (url, _):
        theirs = found_at(url)
        assert theirs.load()(torch.rand(1, 3, 4, 4), [""]).item() == 2.5
        assert (theirs.role, theirs.serves) == ("held out", ("theirs",))
    # Its name is all that tells it from another at this address.
    again, other = (dataclasses.replace(theirs, served=Identity(name)) for name in ("theirs", "another"))
    assert again.fingerprint() == theirs.fingerprint() != other.fingerprint()
