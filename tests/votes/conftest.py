"""A study in a folder, and a browser's part in it."""

from __future__ import annotations

import itertools

import pytest
from party import picture_folder

from palate.votes.server import make_app
from palate.votes.study import Study, VoteOptions


@pytest.fixture
def study_of(tmp_path):
    """Opens a study of ``prompts`` prompts in ``tmp_path``; again with the same arguments, as a restart would."""
    opened = []

    def make(prompts: int = 4, per_prompt: int = 1, models=("plain", "tuned"), clock=None, **options) -> Study:
        if not (tmp_path / models[0]).exists():
            picture_folder(tmp_path, prompts=prompts, per_prompt=per_prompt, models=models)
        for study in opened:
            study.close()
        opened.append(Study(tmp_path, VoteOptions(**options), **({"clock": clock} if clock else {})))
        return opened[-1]

    yield make
    for study in opened:
        study.close()


@pytest.fixture
def client_of():
    """Visitors of a study: ``get(path)``, ``tell(path, **body)`` with the page's headers, ``vote(...)``."""
    from starlette.testclient import TestClient

    names = itertools.count()

    class Visitor(TestClient):
        def __init__(self, study: Study, host: str = "127.0.0.1") -> None:
            super().__init__(make_app(study, host=host), base_url="http://localhost:8421", follow_redirects=False)

        def form(self) -> str:
            return self.get("/api/state").json()["form"]

        def tell(self, path: str, headers=None, **body):
            return self.post(path, json=body, headers={"X-Palate": self.form(), **(headers or {})})

        def join(self, name: str = "") -> None:
            assert self.tell("/api/join", name=name).status_code == 200

        def vote(self, showing: str, question: str, choice: str, vote: str | None = None):
            name = vote or f"vote-{next(names):06d}"
            return self.tell("/api/vote", vote=name, showing=showing, question=question, choice=choice, seconds=1.5)

    return Visitor
