from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.data.prompts import DRAWS, LISTS, Prompt, PromptSampler, built_in, from_function, read_prompts


def test_text_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red boat\r\n\n  a \u2028 blue boat \na red boat\n{red|blue} car\n".encode())
    expected = ["a red boat", "a \u2028 blue boat", "a red boat", "{red|blue} car"]
    assert read_prompts(path) == [Prompt(text) for text in expected]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_jsonl(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"prompt": "a red boat", "tag": "boats"}\n\n{"prompt": " ein Schloß "}\n', encoding="utf-8")
    assert read_prompts(str(path)) == [Prompt("a red boat", None, {"tag": "boats"}), Prompt("ein Schloß")]


def test_negative_prompt_and_metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a", "negative": "blur", "metadata": {"answers": ["one"]}, "tag": 1}\n'
        '{"prompt": "b", "negative_prompt": ""}\n'
    )
    assert read_prompts(path) == [Prompt("a", "blur", {"tag": 1, "answers": ["one"]}), Prompt("b", "", {})]


def test_seeds_and_sizes(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "seed": 7, "width": 64, "height": 96}\n{"prompt": "b", "seed": 3.0}\n{"prompt": "c"}\n')
    a, b, c = read_prompts(path)
    assert (a.seed, a.shape, a.metadata) == (7, Shape(96, 64), {})
    assert (b.seed, b.shape, c.seed) == (3, None, None)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "no prompts"),
        ("a.txt", b"\n  \n", "no prompts"),
        ("a.txt", b"caf\xe9\n", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt": \n', "line 3: not a JSON object"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n', r"line 1: 'prompt' must be.*columns: text"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', "line 2: 'prompt' must be a non-empty string, found 3"),
        ("a.jsonl", b'{"prompt": " "}\n', "non-empty"),
        ("a.jsonl", b'{"prompt": "x", "negative": 3}\n', "line 1: 'negative' must be a string, found 3"),
        ("a.jsonl", b'{"prompt": "x", "seed": -1}\n', "line 1: 'seed' must be a whole number from 0 to"),
        ("a.jsonl", b'{"prompt": "x", "seed": true}\n', "found True"),
        ("a.jsonl", b'{"prompt": "x", "seed": 1.5}\n', "found 1.5"),
        ("a.jsonl", b'{"prompt": "x", "metadata": "y"}\n', "line 1: 'metadata' must be an object, found 'y'"),
        ("a.jsonl", rb'{"prompt": "x \ud83d"}', "line 1: holds a text that is not valid Unicode"),
        ("a.jsonl", rb'{"prompt": "x", "metadata": {"of": ["\ud83d"]}}', "line 1: holds a text that is not valid Unicode"),
        ("a.json", b'["x",\n "y"]\n', "convert it to JSONL"),
        ("a.tsv", b"Prompt\tCategory\nx\ty\n", "is a table"),
    ],
)
def test_errors(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompts(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path)


def test_built_in_lists():
    found = {name: [prompt.text for prompt in built_in(name)] for name in LISTS}
    assert {name: len(texts) for name, texts in found.items()} == {
        "animals": 45,
        "imagenet-animals": 398,
        "animal-activities": 135,  # 45 animals, 3 activities
        "counting": 154,  # 2 to 8 of 22 animals
    }
    assert all(len(set(texts)) == len(texts) for texts in found.values())
    assert found["animals"][:3] == ["cat", "dog", "horse"]
    assert found["imagenet-animals"][0] == "tench, Tinca tinca"
    assert found["imagenet-animals"][-1] == "puffer, pufferfish, blowfish, globefish"
    assert "an ant riding a bike" in found["animal-activities"]
    wolves = next(prompt for prompt in built_in("counting") if prompt.text == "four wolves")
    assert wolves.metadata["answers"] == ["four", "wolf"]
    with pytest.raises(UserError, match=r"no list of prompts 'animal' .did you mean 'animals'"):
        built_in("animal")


def test_a_function_that_returns_a_list():
    made = from_function(lambda: ["a", ("b", {"n": 1}), Prompt("c", "blur")], "mine:f")
    assert made == [Prompt("a"), Prompt("b", None, {"n": 1}), Prompt("c", "blur")]


def test_a_function_that_draws_one():
    import random

    def draw():
        return random.choice(["a cat", "a dog"]), {"n": random.random()}

    random.seed(5)
    own = random.Random(5)
    first, second = from_function(draw, "mine:f"), from_function(draw, "mine:f")
    assert first == second  # from one fixed state
    # And the caller's is left alone (but for the few numbers that the type checker of the tests takes).
    assert random.random() in [own.random() for _ in range(10)]
    assert len(first) == DRAWS
    assert len({p.metadata["n"] for p in first}) == DRAWS
    assert 400 < sum(p.text == "a cat" for p in first) < 600


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ([], "made no prompts"),
        (3, "raised TypeError"),
        (["a", 3], "made 3; expected a text"),
        (["a", " "], "made ' '"),
        (["\ud83d"], "made a text"),
    ],
)
def test_functions_that_do_not_fit(made, words):
    with pytest.raises(UserError, match=f"mine:f {words}"):
        from_function(lambda: made, "mine:f")


# Drawing --------------------------------------------------------------------------------------------------------------------

LIST = [Prompt(str(i)) for i in range(7)]


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 4))
def test_every_round_can_be_drawn_again(round, groups, size):
    sampler = PromptSampler(LIST, 3)
    drawn = sampler.draw(round, groups, size)
    assert drawn == PromptSampler(LIST, 3).draw(round, groups, size)
    assert len(drawn) == groups * size
    assert drawn[::size] == sampler.draw(round, groups)
    assert all(drawn[i] == drawn[i // size * size] for i in range(len(drawn)))


@given(st.integers(1, 20), st.integers(0, 5))
def test_every_prompt_is_drawn_as_often_as_any_other(groups, seed):
    sampler = PromptSampler(LIST, seed)
    drawn = [p.text for round in range(7) for p in sampler.draw(round, groups)]  # groups whole passes
    assert {drawn.count(p.text) for p in LIST} == {groups}
    for start in range(0, len(drawn), 7):
        assert len(set(drawn[start : start + 7])) == 7


def test_seeds_and_passes_differ():
    orders = {tuple(p.text for p in PromptSampler(LIST, seed).draw(r, 7)) for seed in range(3) for r in range(3)}
    assert len(orders) == 9
    with pytest.raises(UserError, match="no prompts"):
        PromptSampler([], 0)
