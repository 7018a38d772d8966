"""``palate serve-judge``: any judge behind HTTP, for another process or machine to ask."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from palate.base.errors import UserError
from palate.base.options import checked, help_lines, overrides


@dataclass(frozen=True)
class ServeOptions:
    """How the judge is reached."""

    host: str = "127.0.0.1"
    """Who may ask: this machine only; any other address needs a token in the environment variable PALATE_API_KEY."""
    port: int = 8300
    """Where; 0 for any free one."""
    device: str | None = None
    """``cpu`` or ``cuda``; the GPU if there is one."""
    batch_size: int = 32
    """Pictures judged at once."""


def main(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        lines = [
            "palate serve-judge NAME [--option value ...]",
            "",
            "NAME as in recipes: pickscore:FOLDER, my_module:function.",
        ]
        if not {"-h", "--help"} & set(words):
            raise UserError("palate serve-judge expects the name of a judge, such as: palate serve-judge pickscore:FOLDER")
        print("\n".join([*lines, *help_lines(ServeOptions)]))
        return 0
    options = checked(ServeOptions, overrides(words[1:]), "palate serve-judge")
    from palate.names.judges import find_judges

    named = find_judges(words[:1])[words[0]]
    import torch

    from palate.judges.http import KEY
    from palate.judges.remote import Identity
    from palate.judges.server import serve_judge

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    token = os.environ.get(KEY)
    who = Identity(named.name, named.kind, named.fingerprint(), named.role)
    server = serve_judge(
        named.load(device), who, host=options.host, port=options.port, token=token, batch_size=options.batch_size
    )
    with server:
        address = f"http://{options.host}:{server.server_address[1]}"
        print(f"{named.name} is served at {address}; ask it as the judge remote:{address} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
    return 0
