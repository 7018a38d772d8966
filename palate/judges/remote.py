"""A judge in another process or on another machine, asked by JSON; :mod:`palate.judges.server` is the other end."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError
from palate.base.options import SECONDS, Batch, at_least, check_ranges
from palate.data.images import encoded
from palate.judges.http import ask
from palate.judges.pictures import one_each


@dataclass(frozen=True)
class Identity:
    """Who a served judge is, as ``GET URL/judge`` tells; a server of another make may tell its name alone."""

    judge: str
    """Its name where it is served."""
    kind: str = ""
    fingerprint: str = ""
    """That of :meth:`palate.names.judges.NamedJudge.fingerprint` where it is served."""
    role: str = ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a served judge is asked."""

    batch_size: Batch = 8
    """Pictures a request."""
    concurrency: Annotated[int, at_least(1, 256)] = 2
    """Requests at a time."""
    timeout: Annotated[float, SECONDS] = 120.0
    """Seconds."""
    retries: Annotated[int, at_least(0, 1000)] = 4

    def __post_init__(self) -> None:
        check_ranges(self)


class RemoteJudge:
    """Scores by ``POST URL/score`` with ``{"images": [PNG in base64], "prompts": [...]}``, answered by ``{"scores": [...]}``.

    Pictures are rounded to 8 bits; there is no gradient. Requests of ``batch_size`` pictures go out ``concurrency`` at a time.
    """

    expected: Identity | None = None
    """Who must answer; anybody unless set."""

    def __init__(self, url: str, options: Options):
        self.url, self.options = url.rstrip("/"), options

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        one_each(images, prompts)
        files = encoded(images, "PNG")
        size = self.options.batch_size
        parts = [slice(i, i + size) for i in range(0, len(files), size)]
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            scores = pool.map(lambda part: self._ask(files[part], list(prompts[part])), parts)
            found = [score for part in scores for score in part]
        return torch.tensor(found, dtype=torch.float32, device=images.device)

    def _ask(self, files: list[bytes], prompts: list[str]) -> list[float]:
        content = {"images": [base64.b64encode(file).decode() for file in files], "prompts": prompts}
        answer = ask(f"{self.url}/score", content, timeout=self.options.timeout, retries=self.options.retries)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(files) or not all(s is None or _number(s) for s in scores):
            raise UserError(
                f"{self.url}/score answers {str(answer)[:120]}; expected {{'scores': [{len(files)} numbers]}}. "
                "Is it a judge that palate serve-judge serves?"
            )
        self._check_who(answer)
        return [math.nan if score is None else float(score) for score in scores]

    def _check_who(self, answer: Mapping[str, object]) -> None:
        """A server may be ended and another judge served at its address between two requests."""
        wanted, told = self.expected, answer.get("fingerprint")
        if wanted is not None and wanted.fingerprint and told and told != wanted.fingerprint:
            raise UserError(
                f"{self.url} served {wanted.judge} (fingerprint {wanted.fingerprint}) when this began, and now serves another "
                f"judge ({told}); serve {wanted.judge} there again, or begin anew"
            )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def prepare(kind: str, place: str, options: Options) -> Callable[[str | torch.device], RemoteJudge]:
    """Behind a URL such as ``http://127.0.0.1:8300``; whether the server is there is asked by :func:`identity`."""
    return lambda _: RemoteJudge(place, options)


def identity(place: str, *, timeout: float = 10.0, retries: int = 2) -> Identity:
    """Asks the server who it is: a wrong address is better known before hours of training than after.

    Raises:
        UserError: no answer, or not that of a served judge.
    """
    answer = ask(f"{place.rstrip('/')}/judge", timeout=timeout, retries=retries)
    given = answer if isinstance(answer, dict) else {}
    told = {f.name: given[f.name] for f in fields(Identity) if given.get(f.name) is not None}
    if "judge" not in told or not all(isinstance(value, str) for value in told.values()):
        raise UserError(
            f"{place} is no served judge (it answers {str(answer)[:120]}; expected {{'judge': NAME}}, and kind, fingerprint "
            "and role as texts if it tells them); start one: palate serve-judge NAME"
        )
    return Identity(**told)
