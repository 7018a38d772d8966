"""``palate serve-judge``: any judge behind HTTP, for another process or machine to ask."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from palate.base.errors import UserError
from palate.base.machine import found_device
from palate.base.options import Batch, Port, check_ranges
from palate.verbs import asks_help, carry_out

USAGE = "palate serve-judge NAME [--option value ...]"


@dataclass(frozen=True)
class ServeOptions:
    """How the judge is reached."""

    host: str = "127.0.0.1"
    """Who may ask: this machine only; any other address needs a token in the environment variable PALATE_API_KEY."""
    port: Port = 8300
    """Where; 0 for any free one."""
    device: str | None = None
    """``cpu`` or ``cuda``; the GPU if there is one."""
    batch_size: Batch = 32
    """Pictures judged at once."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(words: list[str]) -> int:
    if not words or (words[0].startswith("-") and not asks_help(words)):
        raise UserError("palate serve-judge expects the name of a judge, such as: palate serve-judge pickscore:FOLDER")
    about = ("NAME as in recipes: pickscore:FOLDER, my_module:function.",)
    return carry_out(words, ServeOptions, _serve, usage=USAGE, about=about)


def _serve(first: list[str], options: ServeOptions) -> None:
    from palate.names.judges import find_judges

    where = found_device(options.device)
    named = find_judges(first)[first[0]]
    from palate.judges.http import KEY
    from palate.judges.remote import Identity
    from palate.judges.server import serve_judge

    token = os.environ.get(KEY)
    who = Identity(named.name, named.kind, named.fingerprint(), named.role)
    server = serve_judge(
        named.load(where),
        who,
        host=options.host,
        port=options.port,
        token=token,
        batch_size=options.batch_size,
    )
    with server:
        address = f"http://{options.host}:{server.server_address[1]}"
        print(f"{named.name} is served at {address}; ask it as the judge remote:{address} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
