"""Names by which a server of this machine is asked."""

from __future__ import annotations

from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def host_name(header: str) -> str:
    """Of a ``Host`` header, ``name``, ``name:port``, ``[address]`` or ``[address]:port``; empty if it is none of these.

    Another site may give its own name our address (DNS rebinding) and would then be same-origin with us; only the header tells.
    """
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
