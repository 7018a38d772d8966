"""Functions of the user's own: what reads as one score for each picture is read, all else is refused by name."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from palate.base.errors import UserError
from palate.data.prompts import Prompt
from palate.judges.guard import AnswerError, Guarded, JudgeError, read_answer
from palate.judges.reward import RewardError
from palate.judges.server import serve_judge
from palate.judges.stream import score_files, score_stream
from palate.judges.weighted import Weighted
from palate.names.judges import find_judges
from palate.names.rewards import find_rewards
from palate.online.bundle import RewardBundle

NUMBERS = [0.5, -1.0, 2.0]
BF16, GRAD = {"dtype": torch.bfloat16}, {"requires_grad": True}


@pytest.mark.parametrize(
    "answer",
    [
        NUMBERS,
        tuple(NUMBERS),
        np.array(NUMBERS),
        np.array(NUMBERS, dtype=object),
        np.array(NUMBERS, dtype=np.float16)[:, None],
        [[x] for x in NUMBERS],
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS, **BF16),
        torch.tensor(NUMBERS, **GRAD),
        torch.tensor(NUMBERS, dtype=torch.float64)[:, None],
        [torch.tensor(x) for x in NUMBERS],
        [torch.tensor(x, **BF16) for x in NUMBERS],
        [torch.tensor(x, **GRAD) for x in NUMBERS],
        [torch.tensor([x], dtype=torch.float16) for x in NUMBERS],
        [0.5, torch.tensor(-1.0, **BF16), np.float32(2)],
        [np.float64(x) for x in NUMBERS],
        (torch.tensor(NUMBERS, **GRAD), {"why": "so"}),
        (NUMBERS, None),
    ],
    ids=range(18),
)
def test_what_reads_as_three_numbers(answer):
    found, _ = read_answer(answer, 3)
    assert (found.dtype, found.shape) == (torch.float32, (3,))
    assert found.tolist() == NUMBERS


@pytest.mark.parametrize("answer", [(0.25, 0.5), (np.float32(0.25), torch.tensor(0.5, **BF16)), [0.25, 0.5]])
def test_two_numbers_of_two_pictures_are_their_scores(answer):
    assert read_answer(answer, 2)[0].tolist() == [0.25, 0.5]


@pytest.mark.parametrize("answer", [0.25, torch.tensor(0.25), (0.25, {"a": 1}), [0.25], (torch.tensor([0.25]), [1, 2])])
def test_one_number_of_one_picture(answer):
    assert read_answer(answer, 1)[0].tolist() == [0.25]


def test_a_tensor_keeps_its_gradient():
    x = torch.tensor(NUMBERS, requires_grad=True)
    read_answer(2 * x, 3)[0].sum().backward()
    assert x.grad.tolist() == [2.0] * 3


async def waited_for():
    return NUMBERS


def test_what_is_masked_is_no_score():
    found, _ = read_answer(np.ma.array(NUMBERS, mask=[False, True, False]), 3)
    assert found.tolist() == pytest.approx([0.5, float("nan"), 2.0], nan_ok=True)


@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore")  # of what PyTorch is about to leave out
def test_tensors_of_other_layouts(kind):
    assert read_answer(getattr(torch.tensor(NUMBERS)[:, None], kind)(), 3)[0].tolist() == NUMBERS
    quantised = torch.quantize_per_tensor(torch.tensor(NUMBERS), 0.5, 10, torch.quint8)
    assert read_answer(quantised, 3)[0].tolist() == NUMBERS


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "returned nothing"),
        ((None, {}), "returned nothing"),
        ({"scores": NUMBERS}, "returned a dict ('scores')"),
        (({f"k{i}": NUMBERS for i in range(9)}, {}), "returned a dict ('k0', 'k1', 'k2', ...)"),
        ("good", "returned str, which does not read as numbers"),
        (["a", "b", "c"], "returned list, which does not read as numbers"),
        ([1.0, None, 2.0], "returned list, which does not read as numbers"),
        (torch.zeros(2), "returned scores of shape (2,) where (3,) was expected"),
        ([0.1] * 4, "returned scores of shape (4,)"),
        (torch.zeros(3, 3), "returned scores of shape (3, 3)"),
        ((0.1, 0.2), "returned scores of shape ()"),
        ([[1.0, 2.0], [3.0], [4.0]], "returned list, which does not read as numbers"),
        ([torch.zeros(2)] * 3, "returned scores of shape (3, 2)"),
        (torch.zeros(3, dtype=torch.complex64), "returned complex numbers"),
        ((x for x in NUMBERS), "returned generator, which does not read as numbers"),
        (object(), "returned object, which does not read as numbers"),
        ([10**400] * 3, "returned list, which does not read as numbers"),
        (torch.zeros(3, device="meta"), "without values"),
        (waited_for(), "is async"),
    ],
    ids=range(19),
)
def test_what_does_not_is_refused(answer, said):
    with pytest.raises(AnswerError) as caught:
        read_answer(answer, 3)
    assert said in str(caught.value)


# Every door ----

BAD = {
    "raises": (
        "{p: 1 for p in ('cat', 'dog')}[prompts[-1]]",
        "raised KeyError: 'bird': picture 2 of 3 (prompt 'bird')",
    ),
    "leaves": ("sys.exit('no weights')", "called sys.exit('no weights'): picture 0 of 3 (prompt 'cat')"),
    "cancels": ("raise asyncio.CancelledError('too late')", "raised CancelledError: too late: picture 0 of 3 (prompt 'cat')"),
    "closes": ("raise GeneratorExit", "raised GeneratorExit: GeneratorExit: picture 0 of 3"),
    "short": ("return [0.5]", "returned scores of shape (1,) where (3,) was expected: pictures 0 to 2, of which the first"),
    "named": ("return {'score': 1}", "returned a dict ('score')"),
    "none": ("pass", "returned nothing"),
    "spoils": (
        "torch.set_default_dtype(torch.float16); return [0.5] * len(prompts)",
        "set torch's default dtype to float16, and so that of all else here",
    ),
}
PROMPTS = ["cat", "dog", "bird"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of functions, by the name that recipes use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    name = f"own_{tmp_path.name}".replace("-", "_")
    functions = "".join(f"def {n}(images, prompts):\n    {body}\n" for n, (body, _) in BAD.items())
    more = "def fine(images, prompts):\n    images.zero_()\n    return [0.5] * len(prompts)\n"
    (tmp_path / f"{name}.py").write_text("import asyncio, sys, torch\n" + functions + more)
    return name


def loads(count=3):
    return [(lambda: torch.rand(1, 3, 8, 8), prompt) for prompt in PROMPTS[:count]]


@pytest.mark.parametrize("function", BAD)
def test_a_judge_that_fails_is_named_with_prompt_and_picture(module, function):
    name, said = f"{module}:{function}", BAD[function][1]
    judge = find_judges([name])[name].load()
    with pytest.raises(JudgeError) as caught:
        list(score_stream(judge, loads(), batch_size=3, workers=1))
    assert f"judge {name} {said}" in str(caught.value)
    assert caught.value.row == (2 if function == "raises" else 0)
    total = f"2*{name} + jpeg_compressibility"
    with pytest.raises(UserError, match=f"judge {name} "):
        find_judges([total])[total].load()(torch.rand(3, 3, 8, 8), PROMPTS)
    bundle = RewardBundle({name: find_rewards([name])[name].load()})
    with pytest.raises(RewardError, match=f"reward {name} .*image"):
        bundle.submit(torch.rand(3, 3, 8, 8), [Prompt(p) for p in PROMPTS]).result()


def test_a_list_is_read_at_every_door_and_pictures_are_copies(module):
    name = f"{module}:fine"
    judge, images = find_judges([name])[name].load(), torch.ones(3, 3, 8, 8)
    assert [found for _, found in score_stream(judge, loads(), batch_size=2, workers=1)] == [0.5] * 3
    assert Weighted([(2.0, judge)])(images, PROMPTS).tolist() == [1.0] * 3
    bundle = RewardBundle({"a": find_rewards([name])[name].load(), "b": lambda x, p: x.mean(dim=(1, 2, 3))})
    raw = bundle.submit(images, [Prompt(p) for p in PROMPTS]).result().raw
    assert (raw["a"].tolist(), raw["b"].tolist()) == ([0.5] * 3, [1.0] * 3)
    assert images.min() == 1
    from PIL import Image

    from palate.judges.remote import Identity

    with serve_judge(judge, Identity(name), port=0) as server:
        assert server.scores([Image.new("RGB", (8, 8))], ["x"]) == {"scores": [0.5]}


def test_a_judge_without_a_name_is_guarded_too(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = list(score_files(lambda images, prompts: [0.5], [(tmp_path / "a.png", "x")]))
    assert found == [(0, 0.5)]
    with pytest.raises(JudgeError, match=r"the judge returned nothing: picture 0 \(prompt 'x'\)"):
        list(score_files(lambda images, prompts: None, [(tmp_path / "a.png", "x")]))


@pytest.mark.parametrize("prompt", ["x" * 5000, "two\nlines"])
def test_messages_are_one_short_line(prompt):
    def judge(images, prompts):
        raise ValueError("a\nlong\nstory " * 500)

    with pytest.raises(JudgeError) as caught:
        Guarded(judge, "my:judge")(torch.zeros(2, 3, 8, 8), [prompt] * 2)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 350


def test_what_a_function_sets_of_torch_is_put_back_and_blamed_on_it_alone(module):
    torch.set_default_dtype(torch.float64)  # of the program around it
    try:
        assert find_judges([f"{module}:fine"])[f"{module}:fine"].load()(torch.rand(1, 3, 8, 8), ["x"]).tolist() == [0.5]
        for _ in range(2):
            with pytest.raises(JudgeError, match="set torch's default dtype to float16"):
                find_judges([f"{module}:spoils"])[f"{module}:spoils"].load()(torch.rand(1, 3, 8, 8), ["x"])
            assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
