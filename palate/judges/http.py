"""JSON over HTTP, with patience: time-outs, retries with growing pauses, and plain words when it comes to nothing."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from palate.base.errors import UserError, first_line
from palate.base.hosts import LOOPBACK

KEY = "PALATE_API_KEY"
"""Environment variable with the key or token that is sent; no other variable is ever read, whatever a recipe says."""
MAX_ANSWER = 64 << 20
LONGEST_PAUSE = 30.0
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


def ask(url: str, content: object = None, *, timeout: float = 120.0, retries: int = 4, pause: float = 1.0) -> Any:
    """The JSON answer to a POST of ``content`` (to a GET without it).

    A server that is down, slow or overloaded is asked ``retries`` times more, after ``pause`` seconds, then twice as long each
    time (at most 30 s, or what it asks for itself by Retry-After).

    Raises:
        UserError: no answer, a refusal, or an answer that is not JSON.
    """
    text = _patiently(url, None if content is None else json.dumps(content).encode(), timeout, retries, pause)
    if len(text) > MAX_ANSWER:
        raise UserError(f"{url} answers with more than {MAX_ANSWER >> 20} MB; is it the right address?")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{url} answers no JSON but {text[:80]!r}; is it the right address?") from None


class _LaterError(Exception):
    """No answer, but another try may bring one, after so many seconds at the least."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


def _patiently(url: str, body: bytes | None, timeout: float, retries: int, pause: float) -> bytes:
    why = ""
    for attempt in range(retries + 1):
        try:
            return _once(url, body, timeout)
        except _LaterError as error:
            why = str(error)
            if attempt < retries:
                time.sleep(max(min(pause * 2**attempt, LONGEST_PAUSE), error.wait))
    raise UserError(f"{url} does not answer after {retries + 1} tries ({why}); is its server running?")


def _once(url: str, body: bytes | None, timeout: float) -> bytes:
    """What the server answers, cut behind :data:`MAX_ANSWER`."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    # A proxy is for the world outside.
    handlers = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []
    opener = urllib.request.build_opener(_NoRedirect, *handlers)
    try:
        with opener.open(urllib.request.Request(url, data=body, headers=headers), timeout=timeout) as answer:
            text = answer.read(MAX_ANSWER + 1)
            if answer.length and len(text) <= MAX_ANSWER:
                raise http.client.IncompleteRead(text, answer.length)
            return text
    except urllib.error.HTTPError as error:
        why = f"status {error.code}: {_said(error)}"
        if error.code in (401, 403):
            raise UserError(f"{url} refuses the request ({why}); set {KEY} to its key") from error
        if error.code not in AGAIN:
            raise UserError(f"{url} refuses the request ({why})") from error
        raise _LaterError(why, _asked_to_wait(error)) from error
    # A cut connection comes as http.client's own errors, a slow one as TimeoutError, both outside URLError at times.
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        slow = isinstance(reason, TimeoutError | socket.timeout)
        raise _LaterError(f"no answer within {timeout:g} s" if slow else first_line(error)) from error
    except ValueError as error:
        raise UserError(f"{url} is no usable URL ({error}); expected one such as http://127.0.0.1:8300") from error


def _said(error: urllib.error.HTTPError) -> str:
    """What the body of an error says, in one short line."""
    try:
        text = error.read(4096).decode(errors="replace")
    except OSError:
        return error.reason
    try:
        found = json.loads(text)
        found = found.get("error", found.get("detail", text)) if isinstance(found, dict) else text
        found = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, RecursionError):
        found = text or error.reason
    return " ".join(str(found).split())[:200]


def _asked_to_wait(error: urllib.error.HTTPError) -> float:
    text = (error.headers.get("Retry-After") or "").strip()
    return min(float(text), LONGEST_PAUSE) if text.isdigit() else 0.0
