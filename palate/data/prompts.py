"""Prompts: from files, built-in lists and functions, and the order in which online training draws them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from palate.base.errors import UserError, broken, nearest, said, short
from palate.base.jsonl import BROKEN, JsonObject, decode, lines
from palate.base.shapes import Shape

LISTS = {
    "animals": "animals.txt",
    "imagenet-animals": "imagenet-animals.txt",
    "animal-activities": "animal-activities.txt",
    "counting": "counting.jsonl",
}
"""Built-in lists, those of the DDPO paper: name -> file in ``prompt_lists/``."""

OWN = ("prompt", "negative", "negative_prompt", "seed", "width", "height", "metadata")
"""What a line of JSONL calls the parts of a prompt; all else is its metadata."""

DRAWS = 1000
"""How often a function that makes one prompt is called."""


@dataclass(frozen=True)
class Prompt:
    """What is asked for, and what its list tells about it."""

    text: str
    negative: str | None = None
    """What the picture should not show; the caller's own default unless given."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """Such as ``category`` and ``challenge``; handed to rewards, and kept in manifests."""
    shape: Shape | None = None
    """Of its pictures; the caller's own unless given."""
    seed: int | None = None
    """Of its first picture, from 0 to 2**64 - 1, further ones counting on; the caller's own unless given."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a text file (one a line) or of a JSONL file (one object with "prompt" a line), in order.

    JSONL is recognised by its ending or by a first line that is a JSON object. Beside "prompt" an object may have "negative"
    (or "negative_prompt"), a "seed", and "width" and "height" in pixels; "metadata", an object, and all that goes by other
    names become the prompt's metadata. Blank lines are skipped, duplicates kept.

    Raises:
        UserError: a missing, unreadable or empty file, or a line of JSONL without a prompt.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: expected a text file with one prompt a line, or JSONL with 'prompt'") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it (iconv -f CODING -t UTF-8 OLD -o NEW)"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected a file of prompts") from None
    told = lines(text)
    if not told:
        raise UserError(f"{path} has no prompts: write one a line")
    if path.suffix.lower() == ".jsonl" or _object(told[0][1]) is not None:
        return [_prompt(path, number, line) for number, line in told]
    if path.suffix.lower() == ".json":
        raise UserError(f"{path} is JSON, but not one object a line: convert it to JSONL with 'prompt', or to plain text")
    if path.suffix.lower() in (".tsv", ".csv", ".parquet"):
        raise UserError(f"{path} is a table: write its column of prompts to a text file, one prompt a line")
    return [Prompt(line) for _, line in told]


def _object(line: str) -> JsonObject | None:
    try:
        found = decode(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _prompt(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}, line {number}"
    if (row := _object(line)) is None:
        raise UserError(f'{where}: not a JSON object; expected one such as {{"prompt": "a red boat"}} a line')
    if broken(row):
        raise UserError(f"{where}: holds {BROKEN}; mend or remove the line")
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        columns = short(", ".join(sorted(row)) or "none", quoted=False)
        raise UserError(f"{where}: 'prompt' must be a non-empty string, found {short(prompt)} (columns: {columns})")
    negative = row.get("negative", row.get("negative_prompt"))
    if not isinstance(negative, str | None):
        raise UserError(f"{where}: 'negative' must be a string, found {short(negative)}")
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: 'metadata' must be an object, found {short(metadata)}")
    others = {name: value for name, value in row.items() if name not in OWN}
    return Prompt(prompt.strip(), negative, others | metadata, _shape(where, row), _seed(where, row.get("seed")))


def _seed(where: str, given: object) -> int | None:
    seed = int(given) if isinstance(given, float) and given.is_integer() else given  # as tables write them
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**64):
        return seed
    raise UserError(f"{where}: 'seed' must be a whole number from 0 to 2**64 - 1, found {short(given)}")


def _shape(where: str, row: JsonObject) -> Shape | None:
    sides = [row.get(name) for name in ("width", "height")]
    sides = [int(side) if isinstance(side, float) and side.is_integer() else side for side in sides]  # as tables write them
    if sides == [None, None]:
        return None
    if None in sides:
        raise UserError(f"{where}: {'width' if sides[0] is None else 'height'} is missing: give both, or neither")
    return Shape.of("x".join(map(str, sides)), f"{where}: the size")


def built_in(name: str) -> list[Prompt]:
    """One of :data:`LISTS`; raises ``UserError`` for another name."""
    if name not in LISTS:
        raise UserError(f"no list of prompts {short(name)}{nearest(name, LISTS)}")
    return read_prompts(Path(__file__).parent / "prompt_lists" / LISTS[name])


def from_function(function: Callable[[], Any], name: str) -> list[Prompt]:
    """The prompts that a function without arguments makes.

    It returns a list of them; or, as ddpo-pytorch's and TRL's prompt functions do, one at random, ``(text, metadata)``: then
    it is called :data:`DRAWS` times, from one fixed state of the random numbers of Python, NumPy and torch, and every draw
    is kept. A prompt is a text, ``(text, metadata)`` or a :class:`Prompt`.

    Raises:
        UserError: the function raises, or returns something else or nothing.
    """
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(0)
        np.random.seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = function()
            if _is_one(made):
                made = [made, *(function() for _ in range(DRAWS - 1))]
            made = list(made)
    except (Exception, SystemExit) as error:
        raise UserError(f"{name} raised {type(error).__name__}: {said(error)}; expected a list of prompts, or one") from error
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    if not made:
        raise UserError(f"{name} made no prompts; expected a list of texts, or one (text, metadata) a call")
    prompts = []
    for one in made:
        prompt = one if isinstance(one, Prompt) else Prompt(one) if isinstance(one, str) else None
        prompt = Prompt(one[0], None, one[1]) if prompt is None and _is_one(one) else prompt
        if prompt is None or not prompt.text.strip():
            raise UserError(f"{name} made {short(one)}; expected a text, or (text, metadata) with a dictionary")
        if broken([prompt.text, prompt.negative or "", prompt.metadata]):
            raise UserError(f"{name} made {BROKEN}: {short(one)}")
        prompts.append(prompt)
    return prompts


def _is_one(made: object) -> bool:
    pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], str) and isinstance(made[1], Mapping)
    return pair or isinstance(made, str | Prompt)


class PromptSampler:
    """Prompts in random order, each as often as any other: one shuffled pass over the list after the other.

    What a round draws depends on the seed and the number of the round alone: there is no state to save, and any round can be
    drawn again.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int):
        if not prompts:
            raise UserError("there are no prompts to draw from")
        self.prompts, self.seed = list(prompts), seed

    def draw(self, round: int, groups: int, group_size: int = 1) -> list[Prompt]:
        """``groups * group_size`` prompts of round ``round`` (from 0): the same one ``group_size`` times, then the next."""
        n, orders = len(self.prompts), {}
        drawn: list[Prompt] = []
        for position in range(round * groups, (round + 1) * groups):
            number, row = divmod(position, n)
            if number not in orders:
                orders[number] = np.random.default_rng([self.seed % 2**64, number]).permutation(n)
            drawn += [self.prompts[orders[number][row]]] * group_size
        return drawn
