"""The page's server: who may ask what, and how often. What it protects against stands in docs/votes.md."""

from __future__ import annotations

import asyncio
import errno
import hmac
import json
import math
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from palate.base.errors import UserError
from palate.base.hosts import LOOPBACK, host_name
from palate.base.jsonl import JsonObject
from palate.evaluation.report import colours
from palate.votes.exchange import votes_csv
from palate.votes.share import result_page
from palate.votes.store import DiskError, Lock
from palate.votes.study import RefusedError, Study, VoteOptions

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
except ImportError as error:
    raise UserError(
        f"the page needs {(error.name or 'starlette').partition('.')[0]}; install it with: pip install 'palate[votes]'"
    ) from None

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
MAX_BODY = 8192
PATIENCE = 20.0  # seconds for a whole request to arrive
PORTS = 20  # so many are tried, from the one asked for
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
MONTH = 30 * 24 * 3600


class Bucket:
    """At most ``burst`` requests at once and ``rate`` a second on the average, for each name."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self._clock = rate, burst, clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> float:
        """0 if the request may pass, else how many seconds to wait."""
        now = self._clock()
        left, before = self._left.get(name, (float(self.burst), now))
        left = min(float(self.burst), left + (now - before) * self.rate)
        if left < 1:
            return (1 - left) / self.rate
        if len(self._left) > 10_000:  # whoever is forgotten begins with a full bucket again
            self._left.clear()
        self._left[name] = (left - 1, now)
        return 0.0


def make_app(study: Study, *, host: str = "127.0.0.1") -> Starlette:
    """The page of a study. On a loopback host no link is needed to vote; the owner's results need one everywhere."""
    private = host in LOOPBACK
    mark = study.key("cookie")[:8]  # cookies know hosts but not ports: two pages on one machine must not share them
    access_cookie, rater_cookie = f"palate-access-{mark}", f"palate-rater-{mark}"
    votes, joins, reads = Bucket(5.0, 40), Bucket(5.0, 300), Bucket(50.0, 300)
    remembered = _Remembered()
    counting = asyncio.Lock()

    def role(request: Request) -> str | None:
        shown = request.cookies.get(access_cookie, "")
        for name in ("owner", "rater"):
            if _same(shown, study.key(name)):
                return name
        return "rater" if private else None

    def rater_of(request: Request) -> str | None:
        return study.rater(request.cookies.get(rater_cookie, ""))

    def form_token(request: Request) -> str:
        return study.key("form " + request.cookies.get(rater_cookie, ""))

    def slow_down(bucket: Bucket, name: str) -> None:
        if wait := bucket.take(name):
            raise _TooManyError(wait)

    def address(request: Request) -> str:
        return request.client.host if request.client else ""

    def keep(response: Response, name: str, value: str) -> Response:
        # Lax: with Strict, whoever follows the link from a mail would be sent away.
        response.set_cookie(name, value, max_age=3 * MONTH, httponly=True, samesite="lax", path="/")
        return response

    async def page(request: Request) -> Response:
        if role(request) is None:
            return PlainTextResponse("This page needs its whole link: ask whoever invited you.", 403)
        return _file("vote.html")

    async def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name == "colours.css":
            return Response(colours(), media_type=KINDS[".css"])
        if name not in ("vote.css", "vote.js", "results.css", "results.js", "icon.svg"):
            raise RefusedError(404, "there is no such file")
        return _file(name)

    async def enter(request: Request) -> Response:
        slow_down(joins, address(request))
        key = request.path_params["key"]
        for name, where in (("owner", "/results"), ("rater", "/")):
            if _same(key, study.key(name)):
                return keep(RedirectResponse(where, 303), access_cookie, key)
        if (token := await run_in_threadpool(study.enter, key)) is not None:
            return keep(keep(RedirectResponse("/", 303), access_cookie, study.key("rater")), rater_cookie, token)
        return PlainTextResponse("This link is not valid (any more): ask whoever invited you.", 403)

    async def state(request: Request) -> Response:
        rater = rater_of(request)
        if rater is None:
            about = {
                "mode": study.mode,
                "questions": study.questions,
                "pairs": len(study.pairs),
                "ended": study.ended,
                "at_once": study.options.at_once,
            }
            about |= {"until": _when(study), "thanks": study.options.thanks, "personal": bool(study.options.people)}
            return JSONResponse({"join": True, "form": form_token(request), **about})
        slow_down(reads, rater)
        found = await run_in_threadpool(study.state, rater)
        return JSONResponse({**found, "form": form_token(request)})

    async def join(request: Request) -> Response:
        slow_down(joins, address(request))
        body = await _body(request, {"name": str})
        token = await run_in_threadpool(study.join, body["name"])
        return keep(JSONResponse({"joined": True}), rater_cookie, token)

    async def vote(request: Request) -> Response:
        rater = _known(rater_of(request))
        slow_down(votes, rater)
        body = await _body(request, {"vote": str, "showing": str, "question": str, "choice": str, "seconds": float})
        name = body.pop("vote")
        return JSONResponse(await run_in_threadpool(lambda: study.vote(rater, name=name, **body)))

    async def undo(request: Request) -> Response:
        rater = _known(rater_of(request))
        slow_down(votes, rater)
        body = await _body(request, {"vote": str})
        return JSONResponse(await run_in_threadpool(study.undo, rater, body["vote"]))

    async def picture(request: Request) -> Response:
        rater = rater_of(request)
        if rater is None and role(request) != "owner":
            raise RefusedError(401, "join first")
        slow_down(reads, rater or "owner")
        data = await run_in_threadpool(study.picture, request.path_params["name"])
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})

    async def results_page(request: Request) -> Response:
        if role(request) != "owner":
            return PlainTextResponse("Results are for the owner: open the link that 'palate vote' printed.", 403)
        return _file("results.html")

    def only_owner(request: Request) -> None:
        if role(request) != "owner":
            raise RefusedError(403, "results are for the owner: open the link that 'palate vote' printed")

    async def results_file(request: Request) -> Response:
        only_owner(request)
        page = await run_in_threadpool(lambda: result_page(study.folder, study.told(), study.votes_here()))
        saved = {"Content-Disposition": f'attachment; filename="{_plain_name(study.folder.name)}-votes.html"'}
        return Response(page, media_type=KINDS[".html"], headers=saved)

    async def results_table(request: Request) -> Response:
        only_owner(request)
        text = await run_in_threadpool(lambda: votes_csv(study.votes_here()))
        saved = {"Content-Disposition": f'attachment; filename="{_plain_name(study.folder.name)}-votes.csv"'}
        return Response(text, media_type="text/csv; charset=utf-8", headers=saved)

    async def results_data(request: Request) -> Response:
        only_owner(request)
        async with counting:
            if (began := time.monotonic()) >= remembered.until:
                state = await run_in_threadpool(study.store.rows, "SELECT count(*), sum(undone) FROM votes")
                if (now := (*state[0], len(study.gone))) != remembered.state:
                    remembered.told, remembered.state = await run_in_threadpool(study.told), now
                # Of many thousand votes the intervals take seconds, in which raters would wait.
                remembered.until = time.monotonic() + max(2.0, 10 * (time.monotonic() - began))
            return JSONResponse(remembered.told)

    routes = [
        Route("/", page),
        Route("/enter/{key}", enter),
        Route("/assets/{name}", asset),
        Route("/picture/{name}", picture),
        Route("/results", results_page),
        Route("/results/page", results_file),
        Route("/results/votes.csv", results_table),
        Route("/api/state", state),
        Route("/api/results", results_data),
        Route("/api/join", join, methods=["POST"]),
        Route("/api/vote", vote, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
    ]

    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            _check_host(request, private)
            if role(request) is None and request.url.path.startswith(("/api/", "/picture/")):
                raise RefusedError(403, "this page needs its whole link: ask whoever invited you")
            if request.method not in ("GET", "HEAD"):
                _check_origin(request, form_token(request))
            response = await call(request)
        except _TooManyError as error:
            response = JSONResponse({"error": "too many requests: the page waits a moment"}, 429)
            response.headers["Retry-After"] = str(max(1, round(error.wait)))
        except RefusedError as error:
            response = JSONResponse({"error": str(error)}, error.status)
        except DiskError as error:
            print(f"error: a vote could not be kept: {error}", file=sys.stderr, flush=True)
            response = JSONResponse(
                {"error": "the vote could not be saved: the owner's disk is full or cannot be written"}, 507
            )
        response.headers.setdefault("Cache-Control", "no-store")
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response

    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)])


def serve(folder: str | Path, options: VoteOptions) -> None:
    """Serve the page until interrupted.

    Raises:
        UserError: see ``Study``; also a folder that another process serves, an address or a port that cannot be used.
        KeyboardInterrupt: its text says where the votes are.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}; expected one of pictures")
    with closing(Lock(folder)) as lock, closing(Study(folder, options)) as study:
        _serve(study, options, lock)


def _serve(study: Study, options: VoteOptions, lock: Lock) -> None:
    listener, port = _listen(options.host, options.port)
    shown = _own_address(options.host)
    where = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    lock.tell(f"the page {where}")
    private = options.host in LOOPBACK
    for note in study.notes:
        print(f"note: {note}", file=sys.stderr)
    together = "pairs" if options.at_once == 2 else f"sets of up to {options.at_once}"
    what = f"{len(study.pairs)} {together}, {study.raters_per_pair} rater{'s' if study.raters_per_pair > 1 else ''} each"
    print(f"{study.mode}: {what}; asked for: {', '.join(study.questions)}")
    if not options.people:
        print(f"  to vote:  {where}{'/' if private else '/enter/' + study.key('rater')}")
    for name in options.people:
        print(f"  to vote, {name}:  {where}/enter/{study.personal_key(name)}")
    print(f"  results:  {where}/enter/{study.key('owner')}   (yours alone)")
    if study.until:
        print(f"  voting closes {_when(study)}{', which is over: only the results are open' if study.ended else ''}")
    print(f"  votes are kept in {study.store.path}; stop with Ctrl-C", flush=True)
    config = uvicorn.Config(
        make_app(study, host=options.host),
        http=_PatientProtocol,
        log_level="warning",
        access_log=False,  # which would tell the links
        server_header=False,
        lifespan="off",
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the votes are in {study.store.path}; the same command goes on") from None


class _PatientProtocol(H11Protocol):
    """uvicorn's waits for the rest of a request for ever: some hundreds of visitors who never end one lock all others out."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._hurry()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._hurry()

    def _hurry(self) -> None:
        self.loop.call_later(PATIENCE, self._show_out, self.cycle)

    def _show_out(self, last: RequestResponseCycle | None) -> None:
        """Close, if since ``last`` was answered no other request has come in whole."""
        if self.cycle is last and (last is None or last.response_complete) and not self.transport.is_closing():
            self.transport.close()


def _listen(host: str, port: int) -> tuple[socket.socket, int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for tried in range(port, min(port + PORTS, 65536)):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, tried))
            listener.listen(256)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise UserError(
                    f"cannot listen on {host}, port {tried}: {error.strerror}; name another --host or --port"
                ) from None
            continue
        taken = listener.getsockname()[1]
        if tried != port:
            print(f"port {port} is taken: this page is on {taken}", file=sys.stderr)
        return listener, int(taken)
    raise UserError(f"the ports from {port} to {port + PORTS - 1} are all taken; name another with --port")


def _own_address(host: str) -> str:
    """What others type: of a machine that listens everywhere, the address from which it would reach others."""
    if host not in ("0.0.0.0", "::"):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation; nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _when(study: Study) -> str:
    """When voting closes, as people read it; empty where it does not."""
    return "" if study.until is None else study.until.strftime("%A, %d %B %Y, %H:%M")


def _plain_name(text: str) -> str:
    """A name that a header may hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "palate"


@dataclass
class _Remembered:
    """The results as they were counted last, and when to look again."""

    told: dict[str, object] = field(default_factory=dict)
    state: tuple[object, ...] = ()
    until: float = -math.inf


class _TooManyError(Exception):
    def __init__(self, wait: float) -> None:
        super().__init__(wait)
        self.wait = wait


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _known(rater: str | None) -> str:
    if rater is None:
        raise RefusedError(401, "the page does not know you; reload it")
    return rater


def _utf8(text: str) -> bool:
    """JSON can also write halves of characters, which no file and no database holds."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _file(name: str) -> Response:
    return Response((PAGE / name).read_bytes(), media_type=KINDS[Path(name).suffix])


def _check_host(request: Request, private: bool) -> None:
    # Not request.url, which tells the server's own address where the header is no name at all.
    if private and host_name(request.headers.get("host", "")) not in LOOPBACK:
        raise RefusedError(421, "this page answers to localhost alone")


def _check_origin(request: Request, form: str) -> None:
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if origin is not None and origin != f"{request.url.scheme}://{request.headers.get('host', '')}":
        raise RefusedError(403, "requests from other sites are refused")
    if site not in (None, "same-origin"):
        raise RefusedError(403, "requests from other sites are refused")
    if not _same(request.headers.get("x-palate", ""), form):
        raise RefusedError(403, "this page is out of date; reload it")


async def _body(request: Request, kinds: dict[str, type]) -> JsonObject:
    """A JSON object with exactly these members; ``seconds`` may be missing."""
    data = b""
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                data += part
                if len(data) > MAX_BODY:
                    raise RefusedError(413, f"too much: at most {MAX_BODY} bytes")
    except TimeoutError:
        raise RefusedError(408, "the request did not arrive in time") from None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not set(found) <= set(kinds) or set(kinds) - set(found) - {"seconds"}:
        raise RefusedError(400, f"expected a JSON object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        value = found.get(name, 0.0)
        if kind is float and type(value) is int and abs(value) < 1e9:
            found[name] = value = float(value)
        if not isinstance(value, kind) or value != value or (isinstance(value, str) and not _utf8(value)):
            raise RefusedError(400, f"{name} must be {'a number' if kind is float else 'text'}")
    return found
