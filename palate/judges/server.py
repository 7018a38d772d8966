"""The other end of a remote judge: any judge behind HTTP with JSON, so that it may live in an environment of its own.

Python's own server is enough: one judge on one device answers one request at a time, and an environment with hostile
dependencies gets none of ours on top.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import json
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn

from PIL import Image

from palate.base.errors import UserError, short
from palate.base.hosts import LOOPBACK, host_name
from palate.data.images import decode
from palate.judges import Judge, score
from palate.judges.remote import Identity

MAX_BODY = 128 << 20
MAX_PICTURES = 256
MAX_PIXELS = 2**28  # of a request, as RGB 0.8 GB
MAX_CONNECTIONS = 64
PATIENCE = 60.0  # seconds for a client to say what it wants
SLOWEST = 100_000  # bytes a second of what follows


class _RefusedError(Exception):
    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


def serve_judge(
    judge: Judge, who: Identity, *, host: str = "127.0.0.1", port: int = 8300, token: str | None = None, batch_size: int = 32
) -> ThreadingHTTPServer:
    """A server around a judge; its ``serve_forever()`` answers ``GET /judge`` and ``POST /score``.

    Args:
        judge: asked by one request at a time.
        who: what ``GET /judge`` tells; its fingerprint comes with all scores.
        host: loopback unless told otherwise; anything else needs a token.
        port: 0 for any free one (``server_address`` tells which).
        token: what a client must send as ``Authorization: Bearer TOKEN``.
        batch_size: pictures judged at once.

    Raises:
        UserError: no token where one is needed, or the port is taken.
    """
    if host not in LOOPBACK and not token:
        raise UserError(
            f"host {host} can be reached from outside: set PALATE_API_KEY to a token here and where it is asked from"
        )
    try:
        return _Server(judge, who, host, port, token, batch_size)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve at {host}:{port} ({error}); give another --port") from error


class _InTime(socket.SocketIO):
    """A socket's bytes until ``deadline``: the time-out of a socket begins anew with every byte."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, "rb")
        self.connection, self.deadline = connection, time.monotonic() + PATIENCE

    def readinto(self, buffer: Any) -> int | None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self.connection.settimeout(left)
        return super().readinto(buffer)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, judge: Judge, who: Identity, host: str, port: int, token: str | None, batch_size: int):
        super().__init__((host, port), _Handler)
        self.judge, self.who, self.host, self.token, self.batch_size = judge, who, host, token, batch_size
        self.busy = threading.Lock()
        self.room = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up as they like; of all else the kind, without what a client may have sent."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"{self.who.judge}: a request failed: {type(error).__name__}", file=sys.stderr, flush=True)

    def identity(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self.who).items() if value}

    def scores(self, images: list[Image.Image], prompts: list[str]) -> dict[str, object]:
        try:
            with self.busy:
                scores = score(self.judge, images, prompts, self.batch_size)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # a foreign judge may raise anything; the next request is another matter
            # Of what others sent, which a terminal must not take for its own.
            print(f"{self.who.judge}: {type(error).__name__}: {short(str(error))}", file=sys.stderr, flush=True)
            raise _RefusedError(500, f"the judge failed: {type(error).__name__}") from error
        mark = {"fingerprint": self.who.fingerprint} if self.who.fingerprint else {}
        return {"scores": [s if math.isfinite(s) else None for s in scores.tolist()], **mark}


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "palate", ""  # which Python this is concerns nobody
    timeout = PATIENCE

    def setup(self) -> None:
        super().setup()
        self.arriving = _InTime(self.connection)
        self.rfile = io.BufferedReader(self.arriving)

    def handle_one_request(self) -> None:
        self.arriving.deadline = time.monotonic() + PATIENCE
        super().handle_one_request()

    def do_GET(self) -> None:
        # A body that nobody reads would be taken for the next request.
        self.close_connection |= any(name in self.headers for name in ("Content-Length", "Transfer-Encoding"))
        self._answer(lambda: self.server.identity() if self.path == "/judge" else _no_page(self.path))

    def do_POST(self) -> None:
        self._answer(lambda: self.server.scores(*_read(self._body())) if self.path == "/score" else _no_page(self.path))

    def _body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":  # what a foreign web page may not send unasked
            raise _RefusedError(415, "send application/json")
        length = self._once("Content-Length")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise _RefusedError(411, "Content-Length is missing")
        if len(length) > 15 or int(length) > MAX_BODY:
            raise _RefusedError(413, f"at most {MAX_BODY >> 20} MB a request")
        self.arriving.deadline = time.monotonic() + PATIENCE + int(length) / SLOWEST
        return self.rfile.read(int(length))

    def _answer(self, work: Callable[[], Mapping[str, object]]) -> None:
        try:
            self._allow()
            status, content = 200, work()
        except _RefusedError as error:
            status, content = error.status, {"error": str(error)}
            self.close_connection = True  # its body may not have been read
        except UserError as error:
            status, content = 400, {"error": str(error)}
        self._send(status, content)

    def _send(self, status: int, content: Mapping[str, object]) -> None:
        data = json.dumps(content).encode()
        self.connection.settimeout(PATIENCE)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _allow(self) -> None:
        sent, token = self._once("Authorization"), self.server.token
        if token and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
            raise _RefusedError(401, "wrong or missing token")
        if (
            self.server.host in LOOPBACK and host_name(self._once("Host")) not in LOOPBACK
        ):  # a web page that calls itself by our address
            raise _RefusedError(403, "ask for 127.0.0.1")

    def _once(self, name: str) -> str:
        """A header that may come once: of two, others on the way may take the other one. Empty where there is none."""
        found = self.headers.get_all(name, [""])
        if len(found) > 1:
            raise _RefusedError(400, f"{name} comes {len(found)} times")
        return found[0]

    def log_message(self, *_: object) -> None:
        """Requests are not worth a line each."""


def _no_page(path: str) -> NoReturn:
    raise _RefusedError(404, f"no page {short(path, 100, quoted=False)}; GET /judge or POST /score")


def _read(body: bytes) -> tuple[list[Image.Image], list[str]]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise _RefusedError(400, "the body is not JSON") from None
    images, prompts = _texts(content, "images"), _texts(content, "prompts")
    if images is None or prompts is None or len(images) != len(prompts):
        raise _RefusedError(400, "expected {'images': [base64 pictures], 'prompts': [as many texts]}")
    if len(images) > MAX_PICTURES:
        raise _RefusedError(413, f"at most {MAX_PICTURES} pictures a request")
    pictures: list[Image.Image] = []
    for index, text in enumerate(images):
        if sum(picture.width * picture.height for picture in pictures) > MAX_PIXELS:
            raise _RefusedError(413, f"at most {MAX_PIXELS} pixels a request: send fewer pictures at once")
        try:
            pictures.append(decode(base64.b64decode(text, validate=True)))
        except (ValueError, binascii.Error) as error:
            raise _RefusedError(400, f"picture {index} {error}") from None
    return pictures, prompts


def _texts(content: object, key: str) -> list[str] | None:
    """The list of texts below a key, if there is one."""
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, list) and all(isinstance(part, str) for part in found) else None
