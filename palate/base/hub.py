"""Files of a model hub, from the cache of this machine or fetched; what to do where there is no network."""

from __future__ import annotations

# The hub's client is typed in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

from palate.base.errors import UserError, first_line

FOLDERS = {
    *("checkpoint", "checkpoints", "data", "lora", "loras", "model", "models", "out", "output", "outputs", "pairs", "pictures"),
    *("result", "results", "run", "runs", "tmp", "weights"),
}
"""Names that people, and these pages, give to folders."""
FILES = {
    *(".arrow", ".bin", ".ckpt", ".csv", ".db", ".gz", ".json", ".jsonl", ".parquet", ".png", ".pt", ".pth", ".safetensors"),
    *(".tar", ".tsv", ".txt", ".yaml", ".yml", ".zip"),
}


def is_hub_id(name: str) -> bool:
    """Whether ``name`` could be ``owner/model`` and is no path: none that is there, none that looks like one, and none in a
    folder of here, where it will be a slip of the pen unless it was fetched before."""
    return (
        has_form_of_id(name) and not Path(name).exists() and (not Path(name.partition("/")[0]).exists() or _was_fetched(name))
    )


def has_form_of_id(name: str) -> bool:
    """Whether ``name`` is ``owner/model`` by its letters alone."""
    owner, _, repo = name.partition("/")
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", name) is not None
        and owner.lower() not in FOLDERS
        and Path(repo).suffix.lower() not in FILES
    )


def _was_fetched(name: str) -> bool:
    """Whether the hub's cache has a folder of that model or data set; found without the client, whose import settles more."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    return any((cache / f"{kind}--{name.replace('/', '--')}").is_dir() for kind in ("models", "datasets"))


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


def files(repo: str, *, otherwise: str, revision: str | None = None, kind: str = "model") -> list[str]:
    """Names of the files of a repository; without a network, of those that are on this machine. Errors as :func:`fetch`."""
    _settle()
    from huggingface_hub import HfApi, snapshot_download

    try:
        return HfApi().list_repo_files(repo, revision=revision, repo_type=kind)
    except Exception as error:
        try:
            folder = Path(snapshot_download(repo, revision=revision, repo_type=kind, local_files_only=True))
        except Exception:
            raise _not_had(repo, error, otherwise) from error
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _not_had(repo: str, error: BaseException, otherwise: str) -> UserError:
    # The client's own words advise to unset a variable that nobody but _settle may have set.
    offline = any(words in str(error) for words in ("offline mode is enabled", "outgoing traffic has been disabled"))
    reason = "there is no network, or HF_HUB_OFFLINE is set" if offline else first_line(error)
    return UserError(f"{repo} is not on this machine and could not be fetched ({reason}). {otherwise}")


def check_push(repo: str) -> None:
    """Refuse to begin what cannot be pushed at the end: a name that is none, no token, no network.

    Raises:
        UserError: any of these.
    """
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo) is None:
        raise UserError(f"push_to_hub is {repo!r}; expected owner/name of a repository of yours")
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:
        raise UserError(
            f"cannot push to {repo}: the hub does not know you ({first_line(error)}). "
            "Set HF_TOKEN to a token that may write, or run 'hf auth login'"
        ) from error


def push(folder: str | Path, repo: str, files: Sequence[str], *, message: str) -> str:
    """Upload those files of ``folder`` that match, in one commit; the repository is made if need be, private. Returns its page.

    Raises:
        UserError: the hub refused; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True, private=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), allow_patterns=list(files), commit_message=message)
    except Exception as error:
        raise UserError(
            f"{folder} could not be pushed to {repo} ({first_line(error)}); it is complete here: try again with "
            f"palate export {folder} --push_to_hub {repo}"
        ) from error
    return str(url)


PATIENCE = 5
"""Seconds for the hub to take a call."""


def _settle() -> None:
    if "huggingface_hub" not in sys.modules and not _network():
        os.environ["HF_HUB_OFFLINE"] = "1"  # only what was downloaded before, at once instead of after half a minute


def _network() -> bool:
    """Whether the hub can be reached; behind a proxy that need not be known here."""
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if getproxies():
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        # The client itself would try five times, for half a minute.
        with socket.create_connection((address.hostname, port), timeout=PATIENCE):
            return True
    except (OSError, ValueError):
        return False
