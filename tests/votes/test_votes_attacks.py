"""Tried on the page of votes and on a served judge: foreign hosts, slow and endless requests, broken texts, bombs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time

import pytest
import torch
from PIL import Image

from palate.judges import server as judge_server
from palate.judges.remote import Identity
from palate.judges.server import serve_judge
from palate.votes import server as vote_server
from palate.votes.server import make_app

HOSTS = [
    "evil.example",
    "localhost@evil.example",
    "127.0.0.1.evil.example",
    "evil.example:8421",
    "[",
    "[::1",
    "0",
    "2130706433",
]


@pytest.fixture
def visitor(study_of, client_of):
    visitor = client_of(study_of(prompts=3))
    visitor.join("Ann")
    return visitor


# The page ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("path", ["/", "/api/state", "/results", "/picture/x", "/assets/vote.js"])
def test_a_page_for_this_machine_answers_to_no_other_name(visitor, host, path):
    assert visitor.get(path, headers={"Host": host}).status_code == 421


def test_cookies_are_kept_from_scripts_and_other_sites(study_of, client_of):
    study = study_of(prompts=3)
    visitor = client_of(study, host="0.0.0.0")
    set_by = [visitor.get(f"/enter/{study.key('rater')}").headers["set-cookie"]]
    set_by.append(visitor.tell("/api/join", name="Ann").headers["set-cookie"])
    for cookie in set_by:
        assert "httponly" in cookie.lower()
        assert "samesite=lax" in cookie.lower()
        assert "domain=" not in cookie.lower()


TEXTS = [
    chr(0xD800),
    "a" + chr(0xDFFF),
    "x" * 5000,
    "\x00",
    "\x1b[31m",
    "‮evil",
    "'; DROP TABLE votes; --",
    "<img src=x onerror=alert(1)>",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_no_text_is_a_fault_of_the_server(visitor, study_of, text):
    headers = {"X-Palate": visitor.form(), "Content-Type": "application/json"}
    shown = visitor.get("/api/state").json()["open"][0]
    whole = {"vote": "vote-000001", "showing": shown["id"], "question": "overall", "choice": "1", "seconds": 1.0}
    for path, body in (
        ("/api/join", {"name": text}),
        ("/api/undo", {"vote": text}),
        *(("/api/vote", {**whole, name: text}) for name in ("vote", "showing", "question", "choice")),
    ):
        # As ASCII, in which JSON writes halves of characters too.
        answer = visitor.post(path, content=json.dumps(body).encode(), headers=headers)
        assert answer.status_code < 500, path
        assert "text/html" not in answer.headers["content-type"]
    assert visitor.get("/api/state").status_code == 200


@pytest.mark.parametrize(
    "name", ["../votes.db", "..%2fvotes.db", "%2e%2e/votes.db", "....//votes.db", "/etc/passwd", "votes.db"]
)
@pytest.mark.parametrize("under", ["/picture/", "/assets/", "/enter/", "/"])
def test_no_path_leads_to_a_file(visitor, under, name):
    answer = visitor.get(under + name)
    assert answer.status_code in (403, 404)
    assert b"SQLite" not in answer.content
    assert b"root:" not in answer.content


@contextlib.contextmanager
def served(study):
    """The page on a real port."""
    import uvicorn

    config = uvicorn.Config(make_app(study), http=vote_server._PatientProtocol, log_level="critical", lifespan="off")
    page = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(page.serve([listener])), daemon=True)
    thread.start()
    while not page.started:
        time.sleep(0.01)
    try:
        yield listener.getsockname()
    finally:
        page.should_exit = True
        thread.join(timeout=10)


def closed_within(connection: socket.socket, seconds: float, drip: bytes = b"") -> bool:
    """Whether the other end hangs up, though it is sent a byte now and then."""
    connection.settimeout(0.1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if drip:
                connection.send(drip)
            if connection.recv(65536) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


STARTS = {
    "nothing": b"",
    "half a request": b"GET / HTTP/1.1\r\nHost: localhost\r\n",
    "another after a whole one": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT",
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("drip", [b"", b"x"], ids=["silent", "a byte now and then"])
def test_who_does_not_end_a_request_is_shown_out(study_of, monkeypatch, start, drip):
    monkeypatch.setattr(vote_server, "PATIENCE", 0.5)
    with served(study_of(prompts=3)) as address, socket.create_connection(address) as slow:
        slow.sendall(start)
        assert closed_within(slow, 5, drip if start else b"")


def test_a_slow_body_is_refused_and_others_are_served_meanwhile(study_of, monkeypatch):
    monkeypatch.setattr(vote_server, "PATIENCE", 0.5)
    study = study_of(prompts=3)
    head = f"POST /api/join HTTP/1.1\r\nHost: localhost\r\nX-Palate: {study.key('form ')}\r\nContent-Length: 100\r\n\r\n"
    with served(study) as address, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(address)) for _ in range(50)]
        for connection in slow:
            connection.sendall(head.encode())
        with socket.create_connection(address) as other:
            other.settimeout(5)
            other.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert other.recv(100).startswith(b"HTTP/1.1 200")
        slow[0].settimeout(5)
        assert slow[0].recv(100).startswith(b"HTTP/1.1 408")


# The judge ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def judging(**options):
    server = serve_judge(lambda images, prompts: images.mean((1, 2, 3)), Identity("mean"), port=0, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address
    finally:
        server.shutdown()
        server.server_close()


def asked(address, head: str, body: bytes = b"") -> bytes:
    with socket.create_connection(address) as connection:
        connection.settimeout(10)
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n" + body)
        answer = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                answer += part
                if b"}" in part:
                    break
    return answer


@pytest.mark.parametrize("host", [*HOSTS, ""])
def test_a_judge_for_this_machine_answers_to_no_other_name(host):
    with judging() as address:
        assert b" 403 " in asked(address, f"GET /judge HTTP/1.1\nHost: {host}\n").splitlines()[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8300", "localhost", "localhost:1", "[::1]", "[::1]:8300"])
def test_a_judge_answers_to_every_way_of_writing_this_machine(host):
    with judging() as address:
        assert b" 200 " in asked(address, f"GET /judge HTTP/1.1\nHost: {host}\n").splitlines()[0]


LENGTHS = {"²": 411, "-1": 411, "1e3": 411, "9" * 5000: 413, "9" * 12: 413, "": 411}


@pytest.mark.parametrize(("length", "status"), LENGTHS.items(), ids=[length[:5] for length in LENGTHS])
def test_lengths_that_are_none(length, status):
    head = f"POST /score HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {length}\n"
    with judging() as address:
        assert f" {status} ".encode() in asked(address, head).splitlines()[0]
        chunked = head.replace(length or "never", "2") + "Transfer-Encoding: chunked\n"
        assert b" 411 " in asked(address, chunked).splitlines()[0]


def test_a_request_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(judge_server, "PATIENCE", 0.5)
    for start in (b"", b"GET /judge HTTP/1.1\r\nHost: localhost\r\nX: ", b"POST /score HTTP/1.1\r\nHost: localhost\r\n"):
        with judging() as address, socket.create_connection(address) as slow:
            slow.sendall(start)
            assert closed_within(slow, 5, b"x" if start else b"")
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50000\r\n\r\n"
    with judging() as address, socket.create_connection(address) as slow:
        slow.sendall(head)
        assert closed_within(slow, 5, b"x")


def test_no_more_connections_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(judge_server, "MAX_CONNECTIONS", 3)
    with judging() as address, contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address)) for _ in range(3)]
        time.sleep(0.2)
        assert b"200" not in asked(address, "GET /judge HTTP/1.1\nHost: localhost\n")
        for connection in held:
            connection.close()
        time.sleep(0.2)
        assert b" 200 " in asked(address, "GET /judge HTTP/1.1\nHost: localhost\n").splitlines()[0]


def test_pictures_that_are_large_together(monkeypatch):
    monkeypatch.setattr(judge_server, "MAX_PIXELS", 100 * 100)
    stream = io.BytesIO()
    Image.new("RGB", (100, 100)).save(stream, "PNG")
    picture = base64.b64encode(stream.getvalue()).decode()
    with judging() as address:
        for count, status in ((2, 200), (3, 413)):
            body = json.dumps({"images": [picture] * count, "prompts": ["a"] * count}).encode()
            head = f"POST /score HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {len(body)}\n"
            assert f" {status} ".encode() in asked(address, head, body).splitlines()[0]


HEADERS = ("Host: localhost\nHost: evil.example\n", "Host: localhost\nAuthorization: Bearer a\nAuthorization: Bearer b\n")


@pytest.mark.parametrize("headers", HEADERS)
def test_headers_that_come_twice_are_refused(headers):
    with judging() as address:
        assert b" 400 " in asked(address, f"GET /judge HTTP/1.1\n{headers}").splitlines()[0]
        head = "POST /score HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 5\nContent-Length: 2\n"
        assert b" 400 " in asked(address, head, b"{}").splitlines()[0]


def test_a_body_that_nobody_asked_for_is_no_second_request():
    second = b"GET /judge HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = f"GET /judge HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(second)}\r\n\r\n".encode()
    with judging() as address, socket.create_connection(address) as connection:
        connection.settimeout(10)
        connection.sendall(head + second)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    assert answer.count(b"HTTP/1.1 200") == 1


def test_an_answer_does_not_tell_what_the_server_is_made_of():
    with judging() as address:
        assert b"Python" not in asked(address, "GET /judge HTTP/1.1\nHost: localhost\n")
        assert b"Python" not in asked(address, "NONSENSE / HTTP/1.1\nHost: localhost\n")


def test_clients_that_hang_up_leave_no_trace(capsys):
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
    with judging() as address:
        for sent in (b"GET /judge HT", head, head + b"x" * 100):
            connection = socket.create_connection(address)
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no farewell
            connection.close()
        assert b" 200 " in asked(address, "GET /judge HTTP/1.1\nHost: localhost\n").splitlines()[0]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [OSError("no weights"), BrokenPipeError("its own"), SystemExit(3), MemoryError(), KeyError(1)]
)
def test_whatever_a_judge_raises_is_answered(capsys, error):
    def failing(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise error

    server = serve_judge(failing, Identity("moody"), port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    body = json.dumps({"images": [base64.b64encode(stream.getvalue()).decode()], "prompts": ["a"]}).encode()
    head = f"POST /score HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {len(body)}\n"
    try:
        answer = asked(server.server_address, head, body)
    finally:
        server.shutdown()
        server.server_close()
    assert b" 500 " in answer.splitlines()[0]
    assert f"the judge failed: {type(error).__name__}".encode() in answer
    assert capsys.readouterr().err.startswith(f"moody: {type(error).__name__}")


def test_a_token_and_what_others_sent_stay_out_of_the_log(capsys):
    def failing(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise RuntimeError(f"cannot read {prompts[0]}")

    server = serve_judge(failing, Identity("moody"), port=0, token="s3cret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    body = json.dumps({"images": [base64.b64encode(stream.getvalue()).decode()], "prompts": ["\x1b[2J" + "x" * 9999]}).encode()
    head = f"POST /score HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: {len(body)}\n"
    try:
        assert b" 401 " in asked(server.server_address, head + "Authorization: Bearer other\n", body).splitlines()[0]
        answer = asked(server.server_address, head + "Authorization: Bearer s3cret\n", body)
    finally:
        server.shutdown()
        server.server_close()
    assert b" 500 " in answer.splitlines()[0]
    assert b"nosniff" in answer
    logged = capsys.readouterr()
    assert "s3cret" not in logged.err + logged.out + answer.decode()
    (line,) = logged.err.splitlines()
    assert line.isprintable()
    assert len(line) < 120
