"""Files of a model hub, from the cache of this machine or fetched; what to do where there is no network."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

from palate.errors import UserError


def is_hub_id(name: str) -> bool:
    """Whether ``name`` could be ``owner/model`` and is no path."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def fetch(repo: str, file: str, *, otherwise: str, revision: str | None = None, kind: str = "model") -> Path:
    """One file of a repository (``kind`` "model" or "dataset").

    ``otherwise`` ends the message of the ``UserError`` where it cannot be had.
    """
    _settle()
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision, repo_type=kind))
    # The hub's client raises its own errors, those of its network library, OSError and ValueError.
    except Exception as error:
        raise _not_had(repo, error, otherwise) from error


def snapshot(repo: str, patterns: Sequence[str], *, otherwise: str, kind: str = "model") -> Path:
    """The folder of a repository with those of its files that match ``patterns``; errors as :func:`fetch`."""
    _settle()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), repo_type=kind))
    except Exception as error:
        raise _not_had(repo, error, otherwise) from error


def files(repo: str, *, otherwise: str, kind: str = "model") -> list[str]:
    """Names of the files of a repository; without a network, of those that are on this machine. Errors as :func:`fetch`."""
    _settle()
    from huggingface_hub import HfApi, snapshot_download

    try:
        return HfApi().list_repo_files(repo, repo_type=kind)
    except Exception as error:
        try:
            folder = Path(snapshot_download(repo, repo_type=kind, local_files_only=True))
        except Exception:
            raise _not_had(repo, error, otherwise) from error
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _not_had(repo: str, error: BaseException, otherwise: str) -> UserError:
    return UserError(f"{repo} is not on this machine and could not be fetched ({first_line(error)}). {otherwise}")


def first_line(error: BaseException) -> str:
    """The beginning of a library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _settle() -> None:
    if "huggingface_hub" not in sys.modules and not _network():
        os.environ["HF_HUB_OFFLINE"] = "1"  # only what was downloaded before, at once instead of after half a minute


def _network() -> bool:
    """Whether the hub has an address; behind a proxy that need not be known here."""
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(getproxies()) or bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False
