"""Picture folders compared: paired by prompt, seed and index, judged by the scores that lie beside the pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np

from palate.base.errors import UserError, nearest
from palate.base.jsonl import JsonObject, read_object, short, write_object
from palate.base.options import parse
from palate.evaluation.compare import LABELS, Comparison, Group, Ranking, Versus, rank, versus
from palate.evaluation.diversity import Diversity, diversity, thumbnails
from palate.evaluation.manifest import Picture, ScoreFile, Side, differences, read_side
from palate.evaluation.statistics import Average, MeanDifference, WinRate
from palate.judges.kinds import KINDS

SHOWN_PROMPTS = "compared"
"""In ``run.json``: the prompts of the comparison, where they are those of the data that are held out."""
MEND = "mend it, or delete it to do without what it tells"
GROUPS = 40  # a field of the metadata with more values than these is no category


class Shown(TypedDict):
    """One prompt, and the file of each side."""

    prompt: str
    files: list[str]
    init_image: NotRequired[str]


@dataclass(frozen=True)
class Result:
    """A comparison of two or more picture folders; the first is the base."""

    models: list[str]
    folders: list[str]
    prompts: int
    pictures: int
    versus: list[Versus]
    rankings: list[Ranking]
    settings: Mapping[str, object]
    notes: list[str]
    shown: list[Shown] = field(default_factory=list)
    """A few pairs for the report."""

    def to_dict(self) -> JsonObject:
        """As JSON: the first model against the base at the top, other models under ``others``."""
        told = asdict(self)
        first, *others = told.pop("versus")
        return {**first, "others": others, **told}


def compare_folders(
    folders: Sequence[str | Path],
    *,
    judges: Sequence[str] = (),
    trained_on: Collection[str] = (),
    allow_different_settings: bool = False,
    unseen: bool = False,
    who: str | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> Result:
    """Compare the pictures of ``folders``, the first being the base, by the scores in them.

    Args:
        judges: which judges to ask; all that have scored every folder unless named.
        trained_on: judges or kinds of judges that took part in training; score files of role "labels" are known to.
        allow_different_settings: compare what two sides have in common although prompts or settings differ.
        unseen: the prompts were in none of the training pairs.
        who: what to call the model in the headline; its name unless given.

    Raises:
        UserError: fewer than two folders; sides that differ in prompts, seeds or settings; a judge that is unknown, has not
            scored a side, or scored two sides with different weights.
    """
    if len(folders) < 2:
        raise UserError("a comparison needs two picture folders or more: the base first, then the others")
    sides = _named(list(map(read_side, folders)))
    notes = differences(sides, allow_different_settings)
    names = _common_judges(sides, judges)
    keys, left_out = _common_keys(sides, names)
    if left_out:
        notes.append(f"{left_out} pictures without a score on some side are left out of all sides.")
    prompts = [sides[0].pictures[key].task for key in keys]
    files = {name: _score_files(sides, name) for name in names}
    scores = {
        name: [np.array([f.scores[s.pictures[k].file] for k in keys]) for s, f in zip(sides, found, strict=True)]
        for name, found in files.items()
    }
    kinds = {name: found[0].role for name, found in files.items()}
    notes += [f"{name} was {' and '.join(f[0].serves)}, as its server said." for name, f in files.items() if f[0].serves]
    followed: dict[str, Sequence[str]] = dict.fromkeys(trained_on, ())
    for name, told in (item for side in sides for item in rewards_of(side).items()):
        followed[name] = (*followed.get(name, ()), *told)

    def follows(name: str, reward: str) -> bool:
        judges, rewards = (name, *files[name][0].serves), (reward, *followed[reward])
        return any(_same(judge, known) for judge in judges for known in rewards)

    dirty = [n for n in names if kinds[n] == LABELS or any(follows(n, reward) for reward in followed)]
    notes += [f"Training followed {r}, which judged nothing here." for r in followed if not any(follows(n, r) for n in names)]
    small = [thumbnails(s.folder / s.pictures[k].file for k in keys) for s in sides]
    told = {
        "kinds": kinds,
        "contaminated": dirty,
        "groups": _groups([sides[0].pictures[k] for k in keys]),
        "draws": draws,
        "seed": seed,
    }
    found = [
        versus(
            sides[0].name,
            side.name,
            {name: (columns[0], columns[i]) for name, columns in scores.items()},
            prompts,
            diversity(small[0], small[i], prompts),
            unseen=unseen,
            who=who or side.name,
            **told,
        )
        for i, side in enumerate(sides)
        if i > 0
    ]
    rankings = []
    if len(sides) > 2:
        models = [s.name for s in sides]
        for name in names:
            rankings.append(rank(name, models, _wins(scores[name], prompts), contaminated=name in dirty, seed=seed))
        fair = [n for n in names if n not in dirty]
        if len(fair) > 1:
            wins = sum((_wins(scores[n], prompts) for n in fair), start=np.zeros(())) / len(fair)
            rankings.insert(0, rank("all untouched judges", models, wins, seed=seed))
    return Result(
        models=[s.name for s in sides],
        folders=[str(s.folder) for s in sides],
        prompts=len(set(prompts)),
        pictures=len(keys),
        versus=found,
        rankings=rankings,
        settings=dict(sides[0].settings),
        notes=notes,
        shown=_shown(sides, keys, 24),
    )


def rewards_of(side: Side) -> dict[str, Sequence[str]]:
    """The rewards that trained the model of a folder, if its run lies around the folder or is named as the model.

    With each stand the names of the judges that were behind its addresses, as the run noted them.
    """
    named = [Path(text) for text in _texts(read_object(side.folder / "model.json", optional=True)) if text]
    models = [place for path in named for place in (path, path.parent)]
    for place in (side.folder, *side.folder.resolve().parents[:2], *models):
        path = place / "recipe.yaml"
        if path.is_file():
            found = parse(path.read_text(encoding="utf-8"), str(path))
            # best/ has the recipe of the run around it, and nothing else of it.
            notes = {name: told for home in (place.parent, place) for name, told in _serves(home).items()}
            return {name: notes.get(name, ()) for name in rewards_in(found)} if isinstance(found, dict) else {}
    return {}


def _serves(home: Path) -> dict[str, list[str]]:
    """The judges behind the addresses of rewards, as the run in that folder noted them."""
    return {name: _texts(names) for name, names in read_run(home).get("serves", {}).items()}


def read_run(folder: Path) -> JsonObject:
    """``run.json``, what a run noted of itself; empty where there is none, as beside pictures that no run drew.

    Raises:
        UserError: it is damaged. It is never taken for a missing one: it tells which judges were behind served rewards.
    """
    path = folder / "run.json"
    run = read_object(path, optional=True, otherwise=MEND)
    for name in ("serves", "chosen", "versions"):
        if not isinstance(run.get(name, {}), dict):
            raise UserError(f"{path}: {name} is {short(run[name])}, expected an object; {MEND}")
    shown = run.get(SHOWN_PROMPTS, [])
    if not isinstance(shown, list) or not all(isinstance(text, str) for text in cast("list[object]", shown)):
        raise UserError(f"{path}: {SHOWN_PROMPTS} is {short(shown)}, expected a list of prompts; {MEND}")
    return run


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _texts(part)]


def rewards_in(recipe: Mapping[str, object]) -> list[str]:
    """The names of the rewards that a recipe trains on; none where it trains on pairs."""
    online = recipe.get("online") or {}
    if not isinstance(online, dict) or not online.get("train_prompts"):
        return []
    rewards = online.get("rewards") or ()
    return [rewards] if isinstance(rewards, str) else [str(name) for name in rewards]


def _same(judge: str, reward: str) -> bool:
    """Whether a judge has the taste of a reward: its own, or that of a part of a weighted sum."""
    return judge.partition(":")[0] == reward or not _tastes(judge).isdisjoint(_tastes(reward))


def _tastes(name: str) -> set[str]:
    """Whose taste a judge's name stands for: its kind whatever the weights, but an address or a function of one's own is
    nobody else's; of a weighted sum that of every part."""
    found = set()
    for term in name.split(" + "):
        whole = re.sub(r"^\s*[-+.\deE]+\s*\*\s*", "", term).strip().partition("?")[0]
        kind = whole.partition(":")[0]
        found.add(kind if kind in KINDS and KINDS[kind].place != "url" else whole)
    return found


def write_result(path: str | Path, result: Result, extra: Mapping[str, object] | None = None) -> None:
    """Write ``comparison.json`` or ``metrics.json``, atomically."""
    path = Path(path)
    folders = [Path(os.path.relpath(folder, path.parent)).as_posix() for folder in result.folders]
    write_object(path, {**result.to_dict(), "folders": folders, **(extra or {})})


def read_result(path: str | Path) -> tuple[Result, JsonObject]:
    """What :func:`write_result` wrote: the result, its folders as they are reached from here, and what else stands there.

    Raises:
        UserError: the file is missing, damaged or older than this version.
    """
    path = Path(path)
    told = read_object(path, otherwise="compare again")
    try:
        ours = {f.name for f in (*fields(Versus), *fields(Result))} | {"others"}
        extra = {name: told[name] for name in told if name not in ours}
        pairs = [_versus(part) for part in (told, *told["others"])]
        folders = [str(path.parent / folder) for folder in told["folders"]]
        rest = {f.name: told[f.name] for f in fields(Result) if f.name not in ("versus", "rankings", "folders")}
        result = Result(versus=pairs, rankings=[Ranking(**r) for r in told["rankings"]], folders=folders, **rest)
        _check_shown(result)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no comparison that this version wrote ({error!r}); compare again") from error
    return result, extra


def _check_shown(result: Result) -> None:
    """Raise ValueError unless a result names what a page shows: notes, models, and of every prompt a file of each folder."""
    for name in ("models", "notes"):
        if not all(isinstance(text, str) for text in [*getattr(result, name)]):
            raise ValueError(f"{name} are no texts")
    for shown in [*result.shown]:
        if not isinstance(shown["prompt"], str) or list(map(type, shown["files"])) != [str] * len(result.folders):
            raise ValueError(f"what is shown of {short(shown['prompt'])} is not a file of each folder")


def _versus(told: JsonObject) -> Versus:
    return Versus(
        base=told["base"],
        model=told["model"],
        headline=told["headline"],
        comparisons=[_comparison(c) for c in told["comparisons"]],
        macro=Average(**told["macro"]) if told["macro"] else None,
        diversity=Diversity(**told["diversity"]),
        flags=list(told["flags"]),
    )


def _comparison(told: JsonObject) -> Comparison:
    def inner(part: JsonObject) -> JsonObject:
        return {**part, "win_rate": WinRate(**part["win_rate"]), "difference": MeanDifference(**part["difference"])}

    return Comparison(**{**inner(told), "groups": tuple(Group(**inner(g)) for g in told["groups"])})


def _named(sides: list[Side]) -> list[Side]:
    """Every side by a name of its own: its model's, or its folder's where two models have one name."""
    names = [s.name for s in sides]
    if len(set(names)) < len(names):
        names = [s.folder.resolve().name for s in sides]
    if len(set(names)) < len(names):
        names = [str(s.folder) for s in sides]
    if len(set(names)) < len(names):
        raise UserError(f"the folder {next(n for n in names if names.count(n) > 1)} was given twice; name different ones")
    return [Side(n, s.folder, s.pictures, s.settings, s.scores) for n, s in zip(names, sides, strict=True)]


def _common_judges(sides: Sequence[Side], wanted: Sequence[str]) -> list[str]:
    known = {name for side in sides for name in side.scores}
    if not known:
        raise UserError(f"{sides[0].folder} holds no scores; first: palate score {sides[0].folder} --judges ...")
    for name in wanted:
        if name not in known:
            raise UserError(f"no scores of judge {name!r}{nearest(name, known)}")
    names = list(dict.fromkeys(wanted)) or [n for n in sides[0].scores if all(n in s.scores for s in sides)]
    for name in names or sorted(known):
        lacking = [str(s.folder) for s in sides if name not in s.scores]
        if lacking:
            raise UserError(f"judge {name} has not scored {lacking[0]}; run: palate score {lacking[0]} --judges {name}")
    return names


def _score_files(sides: Sequence[Side], name: str) -> list[ScoreFile]:
    found = [side.scores[name] for side in sides]
    for side, file in zip(sides, found, strict=True):
        if file.fingerprint != found[0].fingerprint:
            raise UserError(
                f"judge {name} scored {sides[0].folder} and {side.folder} with different weights; score one of them again"
            )
    return found


def _common_keys(sides: Sequence[Side], names: Sequence[str]) -> tuple[list[tuple[str, int, int]], int]:
    """The pictures that every side has and every judge has scored, and how many could not be scored."""
    keys = [k for k in sides[0].pictures if all(k in s.pictures for s in sides)]
    if not keys:
        raise UserError(f"{sides[0].folder} and {sides[1].folder} share no prompt with the same seed: nothing can be paired")
    bad = set()
    for side in sides:
        for name in names:
            file = side.scores[name]
            for key in keys:
                picture = side.pictures[key].file
                if file.stale(side.folder, side.pictures[key]):
                    raise UserError(
                        f"judge {name} scored {side.folder / picture} before that picture or its prompt changed; run: "
                        f"palate score {side.folder} --judges {name}"
                    )
                if picture in file.scores:
                    continue
                if picture not in file.bad:
                    raise UserError(
                        f"judge {name} has not scored {side.folder / picture}; run: palate score {side.folder} --judges {name}"
                    )
                bad.add(key)
    kept = [k for k in keys if k not in bad]
    if not kept:
        raise UserError(f"no picture of {sides[0].folder} could be scored on all sides; see the errors in its scores/")
    return kept, len(bad)


def _groups(pictures: Sequence[Picture]) -> dict[str, list[str | None]]:
    """Fields of the metadata that sort prompts into a few kinds, such as category and challenge."""
    fields = sorted({name for p in pictures for name in p.metadata})
    found = {}
    for name in fields:
        values = [p.metadata.get(name) for p in pictures]
        kinds = {v for v in values if isinstance(v, str)}
        if 2 <= len(kinds) <= GROUPS and len(kinds) <= len({p.prompt for p in pictures}) / 2:
            found[name] = [v if isinstance(v, str) else None for v in values]
    return found


def _wins(columns: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
    """``(prompts, m, m)``: how often i beat j on each prompt, ties as half."""
    x = np.stack(columns, axis=1)
    points = (x[:, :, None] > x[:, None, :]) + 0.5 * (x[:, :, None] == x[:, None, :])
    points *= 1 - np.eye(x.shape[1])
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    wins = np.zeros((len(number), *points.shape[1:]))
    np.add.at(wins, [number[p] for p in prompts], points)
    return wins


def shown_of(folders: Sequence[str | Path]) -> list[Shown]:
    """A few pictures that all folders have, scored or not, as a result has them."""
    sides = list(map(read_side, folders))
    return _shown(sides, [key for key in sides[0].pictures if all(key in side.pictures for side in sides)], 24)


def _shown(sides: Sequence[Side], keys: Sequence[tuple[str, int, int]], limit: int) -> list[Shown]:
    """The first picture of evenly spaced prompts: chosen without looking at a score."""
    first = list({sides[0].pictures[key].task: key for key in reversed(keys)}.values())[::-1]
    picked = np.unique(np.linspace(0, len(first) - 1, min(limit, len(first))).astype(int))
    found = []
    for key in (first[i] for i in picked):
        shown = Shown(prompt=key[0], files=[s.pictures[key].file for s in sides])
        if (init_image := sides[0].pictures[key].init_image) is not None:
            shown["init_image"] = init_image
        found.append(shown)
    return found
