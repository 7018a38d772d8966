"""Ranges and choices that options say in their annotations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from palate.base.errors import UserError, nearest
from palate.base.options import NOT_NEGATIVE, POSITIVE, Count, OneOf, Range, check_ranges, checked, overrides, ranges, typed
from palate.online.options import OnlineOptions
from palate.runs.sections import DataOptions, EvaluationOptions, PolicyOptions
from palate.training.options import TrainOptions

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


@pytest.mark.parametrize("kind", [DataOptions, PolicyOptions, OnlineOptions, TrainOptions, EvaluationOptions])
def test_every_bound_of_a_recipe_is_checked(kind: type) -> None:
    for name, admitted in ranges(kind).items():
        outside = "no such word" if isinstance(admitted, OneOf) else "-1"
        with pytest.raises(UserError, match=f"^{name} is "):
            checked(kind, {name: outside}, "palate train")


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
