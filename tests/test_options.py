"""Ranges and choices that options say in their annotations."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, get_args, get_type_hints

import pytest

from palate.base.errors import UserError, nearest, short
from palate.base.options import (
    NOT_NEGATIVE,
    POSITIVE,
    Count,
    OneOf,
    Range,
    check_ranges,
    checked,
    keywords,
    overrides,
    ranges,
    typed,
)
from palate.data.options import Reading
from palate.judges.alignment import Options as VisionJudge
from palate.judges.remote import Options as RemoteJudge
from palate.online.options import OnlineOptions
from palate.runs.accuracy import AccuracyOptions
from palate.runs.export import ExportOptions
from palate.runs.label import LabelOptions
from palate.runs.sections import DataOptions, EvaluationOptions, PolicyOptions
from palate.training.options import TrainOptions
from palate.verbs.compare import Options as CompareOptions
from palate.verbs.generate import GenerateOptions
from palate.verbs.score import ScoreOptions
from palate.verbs.serve_judge import ServeOptions
from palate.votes.study import VoteOptions


def _types(hint: object) -> tuple[object, ...]:
    return get_args(hint) or (hint,)


NEEDED = {
    AccuracyOptions: {},
    CompareOptions: {},
    DataOptions: {},
    EvaluationOptions: {},
    ExportOptions: {"format": "lora-from-full", "output": "o"},
    GenerateOptions: {"prompts": "p", "output_dir": "o"},
    LabelOptions: {"output": "o.parquet"},
    OnlineOptions: {},
    PolicyOptions: {},
    Reading: {},
    RemoteJudge: {},
    ScoreOptions: {"judges": "[j]"},
    ServeOptions: {},
    TrainOptions: {},
    VisionJudge: {},
    VoteOptions: {},
}
"""Every set of options that takes numbers, and what it cannot be made without."""
WHOLE = [(kind, f.name) for kind in NEEDED for f in fields(kind) if int in _types(get_type_hints(kind)[f.name])]
SEEDS = [(kind, name) for kind, name in WHOLE if name.endswith("seed")]


SHARE = Range(above=0, at_most=1, expected="a share above 0")


@dataclass(frozen=True)
class Example:
    free: int = -5
    count: Count = 1
    most: Count | None = None
    share: Annotated[float, SHARE] = 1.0
    rate: Annotated[float, POSITIVE] | None = None
    seed: Annotated[int, NOT_NEGATIVE] = 0
    mode: Annotated[str, OneOf("drop", "keep")] = "drop"
    kinds: Annotated[tuple[str, ...], OneOf("a", "b")] = ()

    def __post_init__(self) -> None:
        check_ranges(self)


def test_ranges_are_known_by_option_also_through_none() -> None:
    found = ranges(Example)
    assert list(found) == ["count", "most", "share", "rate", "seed", "mode", "kinds"]
    assert [found[name] for name in ("share", "rate", "mode")] == [SHARE, POSITIVE, OneOf("drop", "keep")]
    assert found["count"] == found["most"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"count": 0}, "count is 0; expected at least 1"),
        ({"most": -1}, "most is -1; expected at least 1"),
        ({"share": 0.0}, "share is 0.0; expected a share above 0"),
        ({"share": 1.5}, "share is 1.5; expected a share above 0"),
        ({"rate": math.inf}, "rate is inf; expected a positive number"),
        ({"rate": math.nan}, "rate is nan; expected a positive number"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"mode": "keeps"}, "mode is 'keeps' (did you mean 'keep'? choose from drop, keep)"),
        ({"kinds": ("a", "c")}, "kinds is 'c' (choose from a, b)"),
    ],
)
def test_what_lies_outside_is_told(given: dict, told: str) -> None:
    with pytest.raises(UserError) as direct:
        Example(**given)
    assert str(direct.value) == told


def test_words_of_the_command_line_are_checked_alike() -> None:
    assert checked(Example, overrides(["--share", "1", "--most", "null", "--kinds", "b"]), "x").kinds == ("b",)
    with pytest.raises(UserError, match="count is 0; expected at least 1"):
        checked(Example, overrides(["--count", "0"]), "x")


@pytest.mark.parametrize("kind", NEEDED)
def test_every_bound_is_checked(kind: type) -> None:
    for name, admitted in ranges(kind).items():
        if isinstance(admitted, OneOf):
            outside = ["no such word"]
        else:
            ends = [admitted.at_least, admitted.above, admitted.at_most, admitted.below]
            low, high = [end for end in ends[:2] if end is not None], [end for end in ends[2:] if end is not None]
            outside = [*(str(end - 1) for end in low), *(str(end + 1) for end in high)]
        for given in outside:
            with pytest.raises(UserError, match=f"^{name} is "):
                checked(kind, {**NEEDED[kind], name: given}, "palate train")


@pytest.mark.parametrize(("kind", "name"), WHOLE, ids=[f"{kind.__name__}-{name}" for kind, name in WHOLE])
@pytest.mark.parametrize("huge", [str(10**30), "-" + "9" * 40, "9" * 5000, "1e300"])
def test_no_whole_number_is_without_an_end(kind: type, name: str, huge: str) -> None:
    with pytest.raises(UserError, match=f"^{name} is ") as told:
        checked(kind, {**NEEDED[kind], name: huge}, "palate train")
    assert len(str(told.value)) < 200


@pytest.mark.parametrize(("kind", "name"), SEEDS, ids=[f"{kind.__name__}-{name}" for kind, name in SEEDS])
def test_every_seed_of_64_bits_is_taken_to_the_last_digit(kind: type, name: str) -> None:
    for seed in (2**64 - 1, 2**63, 2**53 + 1, 0, -1, -(2**63)):
        assert getattr(checked(kind, {**NEEDED[kind], name: str(seed)}, "x"), name) == seed
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(UserError, match=rf"^{name} is {seed}; expected a whole number from -2\*\*63 to 2\*\*64 - 1"):
            checked(kind, {**NEEDED[kind], name: str(seed)}, "x")


def test_there_are_seeds() -> None:
    assert {name for _, name in SEEDS} == {"seed", "evaluation_seed"}
    assert len(SEEDS) == 5


def test_whole_numbers_are_read_digit_by_digit() -> None:
    assert typed(int, "18446744073709551615", "seed") == 2**64 - 1
    assert typed(int, "1e3", "steps") == typed(int, 1000.0, "steps") == 1000
    for given in ("1.5", "", "abc", "inf", True):
        with pytest.raises(UserError, match="expected a whole number"):
            typed(int, given, "steps")


@pytest.mark.parametrize("value", ["1e-300", "1e-31", "1e31", "-1e39", "1e308"])
def test_what_float32_does_not_hold_is_refused(value: str) -> None:
    for read in (lambda: typed(float, value, "rate"), lambda: typed(float | None, float(value), "rate")):
        with pytest.raises(UserError, match=r"^rate is -?1e[-+]\d+, which float32 does not hold; expected a number of a size "):
            read()
    assert POSITIVE.refusal(abs(float(value)))
    for fine in (0.0, 1e-30, 1e30, -1e-8):
        assert typed(float, fine, "rate") == fine


@pytest.mark.parametrize("value", [math.inf, -math.inf, "inf", "1e400"])
def test_numbers_of_functions_end(value: object) -> None:
    def objective(*, beta: float = 1.0) -> None: ...

    with pytest.raises(UserError, match=r"objective x: beta is -?inf; expected a number that ends"):
        keywords(objective, {"beta": value}, "objective x")


def test_a_count_that_is_too_large_is_told_its_end() -> None:
    with pytest.raises(UserError, match=r"^count is 2000000000; expected at most 1000000000$"):
        Example(count=2 * 10**9)


def test_what_came_is_shown_in_short() -> None:
    with pytest.raises(UserError) as told:
        typed(float, "9" * 10_000 + "x", "rate")
    assert len(str(told.value)) < 120


# One word for nothing, and short messages ----

NOTHING = ["null", "none", "None", "NULL", " null ", "~", "[]", "{}", None, [], (), {}]


@pytest.mark.parametrize("word", NOTHING, ids=map(repr, NOTHING))
@pytest.mark.parametrize(
    ("kind", "empty"),
    [
        (int | None, None),
        (str | None, None),
        (tuple[str, ...], ()),
        (dict[str, str], {}),
        (tuple[str, ...] | dict[str, str], ()),
    ],
)
def test_all_words_for_nothing_mean_the_same(kind, empty, word):
    found = typed(kind, word, "x")
    assert (found, type(found)) == (empty, type(empty))


@pytest.mark.parametrize("kind", [int, float, bool])
@pytest.mark.parametrize("word", NOTHING, ids=map(repr, NOTHING))
def test_what_may_not_be_empty_is_refused(kind, word):
    with pytest.raises(UserError, match=r"^x is .*; expected"):
        typed(kind, word, "x")


def test_text_that_may_not_be_empty_may_be_that_word():
    assert typed(str, "none", "x") == "none"


@pytest.mark.parametrize("word", ["null", "none", "[]"])
@pytest.mark.parametrize(
    "name", ["held_out_rewards", "evaluation_prompts", "judges", "validation_data", "columns", "max_train_steps", "refiner"]
)
def test_nothing_from_the_command_line(name, word):
    from palate.runs.recipe import OPTIONS, load

    recipe = load("miniature-dpo", overrides([f"--{name}", word]))
    assert not getattr(getattr(recipe, OPTIONS[name]), name)


def test_messages_show_the_beginning_of_what_is_long():
    for value in ("x" * 10_000, ["y" * 10_000], {"z" * 10_000: 1}, "two\nlines" * 100):
        with pytest.raises(UserError) as caught:
            typed(int, value, "x")
        assert len(str(caught.value)) < 160
        assert "\n" not in str(caught.value)


def test_of_many_names_the_nearest_three_are_named():
    names = [f"judge-number-{i}" for i in range(42)]
    assert nearest("judge-numbr-7", names) == (
        " (did you mean 'judge-number-7'? the nearest of 42 are judge-number-7, judge-number-37, judge-number-27)"
    )
    assert nearest("b", ["a", "c"]) == " (choose from a, c)"
    assert len(nearest("x" * 5000, ["y" * 5000] * 50)) < 300
    assert len(nearest("x" * 100_000, names)) < 200


def test_numbers_that_python_does_not_write_are_told():
    assert short(10**5000) == short(-(10**5000), quoted=False) == short([10**5000]) == "a very large number"


@pytest.mark.parametrize(("kind", "value"), [(str, "a\udcff"), (str | None, "a\0b"), (tuple[str, ...], ["a", "\udcff"])])
def test_texts_that_no_file_or_path_can_hold(kind, value):
    with pytest.raises(UserError, match=r"output_dir is .*, which is no valid text: expected Unicode"):
        typed(kind, value, "output_dir")
    assert typed(str, "\U0001f600 \u00fc", "output_dir") == "\U0001f600 \u00fc"
