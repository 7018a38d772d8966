"""Recipes: what they mean, and that they come back as they were written."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from palate.base.errors import UserError
from palate.base.options import is_nothing, parse
from palate.diffusion.denoising import Fit, Pair
from palate.runs import library, recipe
from palate.runs.help import train_help
from palate.runs.recipe import Recipe
from palate.runs.sections import DataOptions, EvaluationOptions, ModelOptions


@pytest.fixture
def written(tmp_path):
    def write(text: str):
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("name", library.built_in())
def test_every_built_in_recipe_loads_and_says_what_it_is(name):
    made = recipe.load(name)
    assert made == recipe.build(made.as_dict())
    first = library.find(name).read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


def test_names_of_options_are_unique():
    hints = typing.get_type_hints(Recipe)
    names = [f.name for s in recipe.SECTIONS if dataclasses.is_dataclass(hints[s]) for f in dataclasses.fields(hints[s])]
    assert [name for name, count in Counter([*names, *recipe.SECTIONS]).items() if count > 1] == []
    assert set(recipe.OPTIONS) == set(names)


def test_an_empty_recipe_is_the_defaults(written):
    assert recipe.load(written("")) == Recipe() == recipe.build({})
    assert recipe.load(written("training:\nobjective:\n")) == Recipe()
    assert Recipe().objective == {"name": "dpo", "beta": 5000.0}
    assert Recipe().space == {"name": "latent"}


def test_plain_words_mean_what_they_say(written):
    made = recipe.load(
        written(
            "training: {mixed_precision: no, learning_rate: 1e-4, output_dir: 2024-01-01}\n"
            "objective: sft\nspace: perceptual\nmodel: {revision: 12}\npolicy: {gradient_checkpointing: true}"
        )
    )
    assert made.training.mixed_precision == "no"
    assert made.training.learning_rate == 1e-4
    assert made.training.output_dir == "2024-01-01"
    assert made.model.revision == "12"
    assert made.policy.gradient_checkpointing is True
    assert made.objective == {"name": "sft"}
    assert made.space == {
        "name": "perceptual",
        "layers": "last_down",
        "normalise": False,
        "target_time": "previous",
        "steps_back": 1,
    }


def test_a_question_mark_inside_brackets_belongs_to_its_word():
    text = "[pickscore:models/a b?dtype=bfloat16, 'b?c', {remote:http://x/?timeout=3&retries=1: 0.5}]"
    found = parse(text, "here")
    assert found == ["pickscore:models/a b?dtype=bfloat16", "b?c", {"remote:http://x/?timeout=3&retries=1": 0.5}]


def test_overrides(written):
    path = written("objective: {name: dpo, beta: 7}\ntraining: {seed: 3}\nspace: [{name: latent}]")
    assert recipe.load(path).objective["beta"] == 7
    same = recipe.load(path, {"rank": 8, "policy.lora_alpha": "4", "max_train_steps": "1e3", "validation_prompts": "a: b"})
    assert (same.policy.rank, same.policy.lora_alpha, same.training.max_train_steps) == (8, 4.0, 1000)
    assert same.evaluation.validation_prompts == ("a: b",)
    assert recipe.load(path, {"objective.beta": "9"}).objective["beta"] == 9
    assert recipe.load(path, {"objective": "dpo"}).objective["beta"] == 7
    # The name counts first, whatever the order.
    cpo = {"objective.bc_weight": 2, "objective.beta": 3, "objective": "cpo"}
    assert recipe.load(path, cpo).objective == {"name": "cpo", "beta": 3, "bc_weight": 2}
    assert recipe.load(path, {"space": "latent"}).space == {"name": "latent"}
    assert recipe.load(path, {"max_grad_norm": "null"}).training.max_grad_norm is None
    with pytest.raises(UserError, match="space is a list"):
        recipe.load(path, {"space.layers": "mid"})


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))  # no option takes others


@given(st.lists(TEXT.filter(bool), max_size=3), st.floats(1e-12, 50), TEXT, st.dictionaries(TEXT, TEXT))
@example([], 1.0, " None", {})
@settings(max_examples=30)
def test_what_is_written_reads_the_same(tmp_path_factory, prompts, rate, revision, columns):
    made = Recipe(
        model=ModelOptions(revision=None if is_nothing(revision) else revision),  # what may be empty holds no word for nothing
        data=DataOptions(columns=columns),
        training=recipe.TrainOptions(learning_rate=rate),
        evaluation=EvaluationOptions(validation_prompts=tuple(prompts)),
    )
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    recipe.write(made, path)
    assert recipe.load(str(path)) == made


@pytest.mark.parametrize("text", ["no", "yes", "on", "1e5", "1e-4", "2024-01-01", "null", "0x10", "[a", "a: b", "~", "1_000"])
def test_words_that_look_like_something_else_stay_words(tmp_path, text):
    made = Recipe(evaluation=EvaluationOptions(validation_prompts=(text,)))
    recipe.write(made, tmp_path / "r.yaml")
    assert recipe.load(str(tmp_path / "r.yaml")) == made


def test_an_objective_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_objectives.py").write_text(
        "from __future__ import annotations\n"
        "from palate.diffusion.denoising import Fit, Pair\n"
        "def hinge(policy: Pair[Fit], *, slope: float = 2.0, steps=3):\n"
        "    return slope * steps * (policy.w.error - policy.l.error)\n"
        "def plain(policy: Fit): return policy.error\n"
    )
    monkeypatch.chdir(tmp_path)
    own = recipe.build({"objective": {"name": "own_objectives:hinge", "slope": "1e1"}}).method
    assert own.evidence == "pairs"
    pair = Pair(Fit(torch.full((2, 3), 2.0)), Fit(torch.zeros(2, 3)))
    assert torch.equal(own.function(pair), torch.full((2,), 120.0))
    assert recipe.build({"objective": "own_objectives:plain"}).method.evidence == "samples"
    made = recipe.build({"objective": {"name": "own_objectives:hinge", "steps": "4"}})
    assert made.objective == {"name": "own_objectives:hinge", "slope": 2.0, "steps": 4}


def test_help_tells_every_option_and_what_it_means():
    text = train_help(everything=True)
    for name in recipe.OPTIONS:
        start = text.index(f"  --{name}")
        below = text[start:].splitlines()[1]
        assert below.startswith(" " * 8), f"{name} is not explained"
    assert max(map(len, text.splitlines())) <= 128


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "cdpo", "label_smoothing": 0.5}, "label_smoothing is 0.5; expected"),
        ({"name": "sdpo", "mu": 1.5}, "mu is 1.5; expected"),
        ({"name": "dspo", "weight": 2}, "weight is 2.0; expected"),
        ({"name": "mapo", "s": 0}, "s is 0.0; expected"),
    ],
)
def test_values_that_an_objective_refuses_are_refused_with_the_recipe(objective, message):
    with pytest.raises(UserError, match=re.escape(message)):
        recipe.build({"objective": objective})


def test_an_automatic_beta_is_kept_as_a_word_until_it_is_chosen():
    made = recipe.load("miniature-dpo", {"objective.beta": "auto"})
    assert made.objective == {"name": "dpo", "beta": "auto"}
    assert recipe.build({"objective": {"name": "cpo", "beta": "auto", "bc_weight": 1}}).objective["beta"] == "auto"
    function = made.method.function
    assert made.method.auto_beta
    nothing = Pair(Fit(torch.zeros(1, 1)), Fit(torch.zeros(1, 1)))
    assert function(nothing, nothing, torch.ones(1)).isnan()
    assert function(nothing, nothing, torch.ones(1), beta=1.0).isfinite()
    with pytest.raises(UserError, match="objective orpo has no option 'beta'"):
        recipe.build({"objective": {"name": "orpo", "beta": "auto"}})


def test_draws_that_return_are_for_pairs_and_objectives_that_read_errors():
    assert recipe.build({"training": {"draws_per_pair": 4}}).training.draws_per_pair == 4
    recipe.build({"objective": {"name": "cpo", "beta": 500, "bc_weight": 1}, "training": {"draws_per_pair": 4}})
    with pytest.raises(
        UserError, match="the objective reads the residual of the reference, but draws_per_pair keeps its error"
    ):
        recipe.build({"objective": "dspo", "training": {"draws_per_pair": 4}})
    online = {"online": {"train_prompts": "miniature-seen"}, "objective": "ddpo_is"}
    with pytest.raises(UserError, match="draws_per_pair is for pairs that return in every epoch"):
        recipe.build({**online, "training": {"draws_per_pair": 4}})


@pytest.mark.parametrize(
    "options", [{"objective": {"name": "ddpo_is"}, "online": {"train_prompts": "animals"}}, {"policy": {"compile": True}}]
)
def test_what_does_not_go_with_parts_on_each_process(options):
    with pytest.raises(UserError, match="shard_model does not go with"):
        recipe.build({**options, "training": {"shard_model": True}})
