"""The report of runs that go on, served to a browser of this machine, which loads it anew when there is something new."""

from __future__ import annotations

import hashlib
import http.server
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from palate.base.errors import UserError
from palate.base.hosts import LOOPBACK, host_name
from palate.evaluation.report import chapter_of, page_of

SHOWN_IN = ("log.jsonl", "run.json", "metrics.json", "comparison.json", "samples", "evaluation/base", "evaluation/tuned")
"""What of a folder its report is made of."""


def state_of(folders: Sequence[str | Path]) -> str:
    """Digits that change with what the report shows."""
    digest = hashlib.sha256()
    for path in (Path(folder) / name for folder in folders for name in SHOWN_IN):
        if path.exists():
            known = path.stat()
            digest.update(f"{path} {known.st_mtime_ns} {known.st_size} ".encode())
    return digest.hexdigest()[:16]


def server_of(folders: Sequence[str | Path], port: int) -> http.server.ThreadingHTTPServer:
    """A server on this machine alone; port 0 for any. Raises UserError: the port is taken."""

    class Handler(http.server.BaseHTTPRequestHandler):
        server_version, sys_version = "palate", ""

        def do_GET(self) -> None:
            if host_name(self.headers.get("Host", "")) not in LOOPBACK:  # another site's name for our address
                self._say(HTTPStatus.FORBIDDEN, "ask 127.0.0.1", "text/plain")
            elif self.path == "/":
                self._say(HTTPStatus.OK, _page(folders), "text/html")
            elif self.path == "/state":
                self._say(HTTPStatus.OK, state_of(folders), "text/plain")
            else:
                self._say(HTTPStatus.NOT_FOUND, "there is only /", "text/plain")

        def _say(self, status: HTTPStatus, text: str, kind: str) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None: ...

    try:
        return http.server.ThreadingHTTPServer((LOOPBACK[0], port), Handler)
    except OSError as error:
        raise UserError(f"port {port} cannot be used: {error.strerror}; name another with --port, or 0 for any") from error


def _page(folders: Sequence[str | Path]) -> str:
    try:
        return page_of([chapter_of(folder) for folder in folders], watched=True)
    except UserError as error:  # a run that has not written its first line, or one that is being compared at this moment
        return page_of([], watched=True, waiting=str(error))
