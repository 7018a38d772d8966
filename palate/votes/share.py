"""The results of votes as one HTML page that needs nothing but itself: what one sends to those who did not vote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from jinja2 import Environment
from PIL import Image

from palate.base.errors import UserError
from palate.base.files import check_file, write_atomically
from palate.data.images import decode
from palate.data.votes import PLACES, QUESTIONS, Vote
from palate.evaluation import charts
from palate.evaluation.compare import percent
from palate.evaluation.report import embedded, environment, page_style, sha256, tone
from palate.evaluation.statistics import WinRate
from palate.votes.results import Comparison, Rate

if TYPE_CHECKING:
    from palate.votes.study import Told

TITLES = {"overall": "Overall preference", "appeal": "Visual appeal, prompt hidden", "following": "Prompt following"}
SHOWN = 12
"""Pairs of pictures on the page, evenly spaced over the prompts: chosen without looking at the votes."""


@dataclass(frozen=True)
class Side:
    """A picture, its model, and how many votes preferred it."""

    picture: Image.Image
    model: str
    preferred: int


@dataclass(frozen=True)
class Judged:
    """Pictures that were shown together, and what was said of them."""

    prompt: str
    votes: int
    sides: list[Side]


@dataclass(frozen=True)
class ShareOptions:
    """The page of results, to be sent."""

    output: str
    """The HTML file to write; names of raters are not in it."""

    def __post_init__(self) -> None:
        if not self.output.endswith(".html"):
            raise UserError(f"output is {self.output!r}; expected a file name that ends in .html")


def share(folder: str | Path, options: ShareOptions) -> str:
    """Write the page of a folder's votes. Returns a sentence; ``UserError`` for a folder without votes."""
    from contextlib import closing

    from palate.votes.store import NAME, Lock
    from palate.votes.study import Study, VoteOptions

    folder, output = Path(folder), Path(options.output)
    if not (folder / NAME).is_file():
        raise UserError(f"{folder} holds no votes; 'palate vote {folder}' collects them")
    check_file(output, "output")
    asked = VoteOptions(**_asked(folder), allow_different_settings=True)
    with closing(Lock(folder)), closing(Study(folder, asked)) as study:
        votes = study.votes_here()
        if not votes:
            raise UserError(f"{folder / NAME} holds no votes on its pictures yet")
        told = study.told()
        write_atomically(output, result_page(study.folder, told, votes).encode())
    return f"wrote {output}: {told['votes']} votes, without the raters' names"


def _asked(folder: Path) -> dict[str, str | int]:
    """How the latest votes were asked for: their mode, and how many pictures at once."""
    import sqlite3

    from palate.data.votes import open_votes, unreadable
    from palate.votes.store import NAME

    connection = open_votes(folder / NAME)
    try:
        query = "SELECT mode, max(2 + (picture_2 IS NOT NULL) + (picture_3 IS NOT NULL)) FROM showings WHERE mode = ?"
        latest = "SELECT mode FROM showings WHERE mode IN ('compare', 'collect') ORDER BY number DESC LIMIT 1"
        found = connection.execute(latest).fetchone()
        return {} if found is None else dict(zip(("mode", "at_once"), connection.execute(query, found).fetchone(), strict=True))
    except sqlite3.DatabaseError as error:
        raise unreadable(folder / NAME, error) from None
    finally:
        connection.close()


def result_page(folder: Path, told: Told, votes: Sequence[Vote]) -> str:
    """The page as text. ``votes`` are those that ``told`` counts; their pictures lie in ``folder``."""
    seconds = [taken for taken in {v["id"]: v["seconds"] for v in votes}.values() if taken is not None]
    checked = sum(r["checked"] for r in told["raters"])
    return (
        _templates()
        .get_template("share.html")
        .render(
            title=folder.name,
            style=page_style(),
            headline=headline(told),
            hero=_only(told),
            told=told,
            titles=TITLES,
            shown=_judged(folder, votes),
            seconds=median(seconds) if seconds else None,
            raters=_most_raters(votes),
            passed=sum(r["passed"] for r in told["raters"]) / checked if checked else None,
            day=f"{datetime.now():%d %B %Y}".lstrip("0"),
        )
    )


def _most_raters(votes: Sequence[Vote]) -> int:
    """How many people judged the same pictures, at most."""
    raters: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for vote in votes:
        raters[vote["shown"]].add(vote["rater"])
    return max(map(len, raters.values()), default=0)


def headline(told: Told) -> str:
    """What the votes say, in a sentence; the page of the owner has the same."""
    only = _only(told)
    if only is None:
        return f"{told['votes']} votes on {told['judged']} {'pairs' if told['at_once'] == 2 else 'sets'}"
    a, b, rate = only["a"], only["b"], only["win_rate"]
    if rate["low"] > 0.5:
        return f"{b} is preferred in {percent(rate['rate'])} % of the votes"
    if rate["high"] < 0.5:
        return f"{a} is preferred in {percent(1 - rate['rate'])} % of the votes"
    return f"No clear difference between {a} and {b}"


def _only(told: Told) -> Comparison | None:
    """The comparison of two models, on the question that says most, where there are but two."""
    questions = told["questions"]
    found = (questions.get("overall") or next(iter(questions.values()), None) or {"comparisons": []})["comparisons"]
    return found[0] if len(found) == 1 else None


def _judged(folder: Path, votes: Sequence[Vote]) -> list[Judged]:
    question = next((q for q in QUESTIONS if any(v["question"] == q for v in votes)), "")
    together: dict[tuple[int, ...], list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote["question"] == question and not vote["repeat"]:
            together[vote["shown"]].append(vote)
    groups = sorted(together.values(), key=lambda group: (group[0]["prompt"], group[0]["image_0"]))
    found: list[Judged] = []
    for group in groups[:: max(1, len(groups) // SHOWN)][:SHOWN]:
        # Every vote speaks of all pictures of its showing, so that the group names them all.
        named = {vote[f"picture_{n}"]: (vote[f"image_{n}"], vote[f"model_{n}"]) for vote in group for n in (0, 1)}
        files = [folder / named[number][0] for number in group[0]["shown"]]
        if not all(file.is_file() and file.resolve().is_relative_to(folder.resolve()) for file in files):
            continue
        try:
            pictures = [decode(file.read_bytes()) for file in files]
        except (OSError, ValueError):
            continue
        preferred = {
            vote["id"]: vote[f"picture_{0 if vote['choice'] == 'first' else 1}"] for vote in group if vote["choice"] in PLACES
        }
        chosen = list(preferred.values())
        sides = [
            Side(picture, named[number][1], chosen.count(number))
            for number, picture in zip(group[0]["shown"], pictures, strict=True)
        ]
        found.append(Judged(group[0]["prompt"], len({vote["id"] for vote in group}), sides))
    return found


def _win(rate: Rate) -> WinRate:
    return WinRate(**{name: rate[name] for name in WinRate.__dataclass_fields__})


@cache
def _templates() -> Environment:
    found = environment(Path(__file__).parent / "page")
    found.filters |= {"bar": charts.bar, "percent": percent, "sha256": sha256, "shown": embedded, "tone": tone, "win": _win}
    return found
