from __future__ import annotations

import re
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.base.errors import UserError
from palate.data.prompts import Prompt
from palate.judges import load_judge
from palate.judges.reward import RewardError, from_function, from_judge
from palate.miniature import world
from palate.online import bundle
from palate.online.bundle import RewardBundle

PROMPTS = [Prompt(text) for text in ("a cat", "a dog", "a bird", "a fish")]


def images(b=4, seed=0):
    return torch.rand(b, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def redness(images, prompts):
    return 1000 * images[:, 0].mean(dim=(1, 2)) + 5


# Laws ----------------------------------------------------------------------------------------------------------------------


def test_one_reward_is_passed_on():
    x = images()
    found = RewardBundle({"b": brightness}, {"b": -2}).submit(x, PROMPTS).result()
    torch.testing.assert_close(found.total, -2 * brightness(x, PROMPTS))
    torch.testing.assert_close(found.raw["b"], brightness(x, PROMPTS))
    assert found.info == {}


def test_several_are_standardised_by_hand():
    # Scores 1, 3 and 10, 50: means 2 and 30, population deviations 1 and 20, so -1, 1 each; weights 1 and 0.5.
    made = RewardBundle({"a": lambda i, p: torch.tensor([1.0, 3.0]), "b": lambda i, p: torch.tensor([50.0, 10.0])}, {"b": 0.5})
    found = made.submit(images(2), PROMPTS[:2]).result()
    torch.testing.assert_close(found.total, torch.tensor([-1 + 0.5, 1 - 0.5]))
    # Then 5, 7: over 1, 3, 5, 7 the mean is 4, the deviation sqrt(5).
    made.rewards["a"] = lambda i, p: torch.tensor([5.0, 7.0])
    made.weights["b"] = 0.0
    found = made.submit(images(2), PROMPTS[:2]).result()
    torch.testing.assert_close(found.total, torch.tensor([1.0, 3.0]) / 5**0.5)


def test_levels_of_rounds_are_on_one_scale():
    # First 1, 3 and 0, 0: means 2 and 0, deviations 1 and 0, which counts as 1. Weights 1 and 0.5.
    made = RewardBundle({"a": lambda i, p: torch.tensor([1.0, 3.0]), "b": lambda i, p: torch.tensor([0.0, 0.0])}, {"b": 0.5})
    made.submit(images(2), PROMPTS[:2]).result()
    assert made.level({"a": 2.0, "b": 0.0}) == 0
    # A plateau of 6 (for a) stays at 6 - 2 = 4 however often it is reached; its total sinks towards 0.
    made.rewards["a"] = lambda i, p: torch.tensor([5.0, 7.0])
    totals = [float(made.submit(images(2), PROMPTS[:2]).result().total.mean()) for _ in range(3)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1] + 0.1
    assert made.level({"a": 6.0, "b": 0.0}) == 4
    assert made.level({"a": 6.0, "b": 1.0}) == 4.5
    again = RewardBundle(made.rewards, {"b": 0.5})
    again.load_state_dict(made.state_dict())
    assert again.level({"a": 6.0, "b": 1.0}) == 4.5
    alone = RewardBundle({"b": brightness}, {"b": -2})
    assert alone.level({"b": 3.0}) == -6


def test_constant_reward_adds_nothing():
    made = RewardBundle({"a": brightness, "b": lambda i, p: torch.full((len(i),), 7.0)})
    x = images()
    alone = brightness(x, PROMPTS)
    expected = (alone - alone.mean()) / alone.std(correction=0)
    torch.testing.assert_close(made.submit(x, PROMPTS).result().total, expected, rtol=1e-4, atol=1e-4)


@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 100))
@settings(max_examples=25)
def test_a_round_does_not_depend_on_its_batches(cuts, seed):
    x, n = images(sum(cuts), seed), sum(cuts)
    prompts = [Prompt(str(i)) for i in range(n)]
    whole = RewardBundle({"b": brightness, "r": redness}, {"r": 0.2})
    cut = RewardBundle({"b": brightness, "r": redness}, {"r": 0.2})
    expected = whole.submit(x, prompts).result()
    start, pending = 0, []
    for size in cuts:
        pending.append(cut.submit(x[start : start + size], prompts[start : start + size]))
        start += size
    found = cut.collect(pending)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(torch.cat([p.result().total for p in pending]), found.total, rtol=0, atol=0)
    for name, state in cut.state_dict().items():
        assert state == pytest.approx(whole.state_dict()[name], rel=1e-6, abs=1e-9)


def test_statistics_equal_numpy_over_all_batches():
    made = RewardBundle({"b": brightness, "r": redness})
    seen = [images(b, seed) for seed, b in enumerate((1, 4, 3, 2))]
    for x in seen:
        made.submit(x, PROMPTS[: len(x)]).result()
    scores = np.concatenate([redness(x, None).double().numpy() for x in seen])
    assert made.statistics["r"].mean == pytest.approx(scores.mean(), rel=1e-12)
    assert made.statistics["r"].std == pytest.approx(scores.std(), rel=1e-12)


def test_resumes_exactly():
    def run(made, seeds):
        return [made.submit(images(seed=s), PROMPTS).result().total for s in seeds]

    whole = RewardBundle({"b": brightness, "r": redness})
    expected = run(whole, range(4))[2:]
    first, second = RewardBundle({"b": brightness, "r": redness}), RewardBundle({"b": brightness, "r": redness})
    run(first, range(2))
    second.load_state_dict(first.state_dict())
    for found, wanted in zip(run(second, range(2, 4)), expected, strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(UserError, match=r"trained on rewards b, r, this run on b$"):
        RewardBundle({"b": brightness}).load_state_dict(first.state_dict())


def test_runs_beside_the_caller_in_order():
    go, order = threading.Event(), []

    def slow(images, prompts):
        assert go.wait(10)
        order.append(prompts[0].text)
        return brightness(images, prompts)

    before = set(threading.enumerate())
    made = RewardBundle({"slow": slow})
    pending = [made.submit(images(1, seed), [PROMPTS[seed]]) for seed in range(4)]
    assert order == []  # all four were handed in while the first waits
    go.set()
    later = pending[3].result()
    assert order == ["a cat", "a dog", "a bird", "a fish"]
    torch.testing.assert_close(later.total, brightness(images(1, 3), None))
    (worker,) = {t for t in threading.enumerate() if t.name == "rewards"} - before
    made.close()
    assert not worker.is_alive()


def test_rewards_are_asked_without_gradients_in_whatever_thread():
    def differentiable(images, prompts):
        assert not torch.is_grad_enabled()
        assert not images.requires_grad
        return brightness(images, prompts)

    for timeout in (None, 20):  # with a limit each call has a thread of its own
        found = RewardBundle({"d": differentiable}, timeout=timeout).submit(images().requires_grad_(), PROMPTS).result()
        assert not found.total.requires_grad
    assert torch.is_grad_enabled()


def test_what_a_reward_reads_of_its_own_gradient_stays_there():
    """A reward may want gradients inside, of a guidance say: those it enables itself."""

    def inner(images, prompts):
        with torch.enable_grad():
            x = images.clone().requires_grad_()
            brightness(x, prompts).sum().backward()
            return x.grad.sum(dim=(1, 2, 3)) + 0 * brightness(x, prompts)

    found = RewardBundle({"i": inner}).submit(images(), PROMPTS).result()
    torch.testing.assert_close(found.total, torch.ones(4))
    assert not found.total.requires_grad


def test_with_all_processes():
    # Another process that saw the same scores: the mean stays, and the number of images doubles.
    made = RewardBundle({"d": brightness, "r": redness}, gather=lambda scores: torch.cat([scores, scores]))
    found = made.submit(images(), PROMPTS).result()
    assert made.state_dict()["d"][0] == 8
    assert found.total.shape == (4,)


def test_a_reward_lets_gradients_through_where_its_caller_wants_them():
    judge = load_judge("clipscore", world.checkpoint("mini-clip"))
    texts = ["a red house", "a tree"]
    prompts = [Prompt(text) for text in texts]
    for reward in (from_judge(judge), from_function(lambda images, prompts, metadata: judge(images, prompts))):
        x = (0.2 + 0.6 * torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).requires_grad_()
        reward(x, prompts).sum().backward()
        assert all(float(gradient.abs().max()) > 0 for gradient in x.grad)
        step = 0.001 * x.grad / x.grad.abs().max()
        with torch.no_grad():
            rise = judge(x + step, texts) - judge(x - step, texts)
        torch.testing.assert_close(rise, 2 * (x.grad * step).sum(dim=(1, 2, 3)), rtol=0.05, atol=1e-3)


# Failures -------------------------------------------------------------------------------------------------------------------


def failing(reward, **options):
    with pytest.raises(RewardError) as caught:
        RewardBundle({"mine": reward}, **options).submit(images(), PROMPTS).result()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_reward_that_raises_names_the_image(tmp_path):
    def picky(images, prompts):
        if any(p.text == "a bird" for p in prompts):
            raise KeyError("bird")
        return brightness(images, prompts)

    told = failing(picky, folder=tmp_path)
    assert told.startswith("reward mine raised KeyError: 'bird': image 2 of 4 (prompt 'a bird', saved as ")
    assert (tmp_path / "reward-mine.png").is_file()


def test_a_reward_that_raises_only_on_the_batch():
    def crowded(images, prompts):
        if len(images) > 1:
            raise ValueError("too\nmany")
        return brightness(images, prompts)

    assert failing(crowded) == "reward mine raised ValueError: too many: images 0 to 3, of which the first (prompt 'a cat')"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "returned nothing: images 0 to 3"),
        ((None, {}), "returned nothing"),
        (torch.zeros(3), r"returned scores of shape \(3,\) where \(4,\) was expected"),
        (torch.zeros(4, 2), r"shape \(4, 2\)"),
        (1.0, r"shape \(\)"),
        ("good", "returned str, which does not read as numbers"),
        ([1, 2, float("nan"), 4], r"returned nan: image 2 of 4 \(prompt 'a bird'\)"),
        (np.array([1, -np.inf, 1, 1]), r"returned -inf: image 1 of 4 \(prompt 'a dog'\)"),
    ],
)
def test_bad_answers(answer, words):
    assert re.search(words, failing(lambda images, prompts: answer))


@pytest.mark.parametrize("answer", [[1, 2, 3, 4], np.arange(1.0, 5), np.arange(1.0, 5)[:, None], torch.arange(1, 5).half()])
def test_answers_that_read_as_numbers(answer):
    found = RewardBundle({"mine": lambda images, prompts: answer}).submit(images(), PROMPTS).result()
    assert found.raw["mine"].tolist() == [1, 2, 3, 4]
    assert found.raw["mine"].dtype == torch.float32


def test_a_picture_that_is_not_finite_is_not_scored():
    x = images()
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(RewardError, match=r"the model made a picture that is not finite: image 1 of 4 \(prompt 'a dog'\)"):
        RewardBundle({"b": brightness}).submit(x, PROMPTS).result()


def test_no_free_memory_says_what_to_lower(tmp_path):
    asked = []

    def large(images, prompts):
        asked.append(len(images))
        raise torch.OutOfMemoryError("CUDA out of memory")

    message = failing(large, retries=2, folder=tmp_path)
    assert "reward" in message
    assert "no free memory for 4 pictures at once: lower sample_batch_size" in message
    assert asked == [4]


def test_retries(monkeypatch):
    monkeypatch.setattr(bundle, "PAUSE", 0.001)
    calls = []

    def flaky(images, prompts):
        calls.append(len(images))
        if len(calls) < 3:
            raise ConnectionError("busy")
        return brightness(images, prompts)

    found = RewardBundle({"f": flaky}, retries=2).submit(images(), PROMPTS).result()
    torch.testing.assert_close(found.total, brightness(images(), None))
    assert calls == [4, 4, 4]
    calls.clear()
    assert "raised ConnectionError: busy" in failing(flaky, retries=1)


def test_timeout(monkeypatch):
    monkeypatch.setattr(bundle, "PAUSE", 0.001)
    began, hang, calls = time.monotonic(), threading.Event(), []

    def slow(images, prompts):
        calls.append(1)
        hang.wait(20)

    told = failing(slow, timeout=0.05, retries=1)
    hang.set()
    assert told == "reward mine gave no answer within 0.05 s: images 0 to 3, of which the first (prompt 'a cat')"
    assert len(calls) == 2
    assert time.monotonic() - began < 10
    x = images()
    torch.testing.assert_close(
        RewardBundle({"b": brightness}, timeout=20).submit(x, PROMPTS).result().total, brightness(x, None)
    )


def test_a_failure_concerns_its_batch_alone():
    made = RewardBundle({"p": lambda images, prompts: None if prompts[0].text == "a dog" else brightness(images, prompts)})
    pending = [made.submit(images(1), [p]) for p in PROMPTS[:3]]
    assert pending[0].result().total.shape == (1,)
    with pytest.raises(RewardError, match="a dog"):
        pending[1].result()
    assert pending[2].result().total.shape == (1,)


def test_refused_at_once():
    with pytest.raises(UserError, match="no rewards are given"):
        RewardBundle({})
    with pytest.raises(UserError, match="positive number of seconds"):
        RewardBundle({"b": brightness}, timeout=0)
    with pytest.raises(ValueError, match="4 images came with 3 prompts"):
        RewardBundle({"b": brightness}).submit(images(), PROMPTS[:3])


# Functions from elsewhere --------------------------------------------------------------------------------------------------


def test_a_function_gets_what_the_peers_pass():
    seen = {}

    def score(images, prompts, metadata):
        seen.update(prompts=prompts, metadata=metadata, dtype=images.dtype, shape=tuple(images.shape))
        images.zero_()
        metadata[0]["spoilt"] = True
        return torch.ones(len(images)), {"note": "kept"}

    x, asked = images(2), [Prompt("a cat", metadata={"answers": ["cat"]}), Prompt("a dog")]
    made = RewardBundle({"f": from_function(score), "b": brightness})
    found = made.submit(x, asked).result()
    assert seen["prompts"] == ("a cat", "a dog")
    assert seen["metadata"][1] == {}
    assert (seen["dtype"], seen["shape"]) == (torch.float32, (2, 3, 8, 8))
    assert found.info == {"f": [{"note": "kept"}]}
    torch.testing.assert_close(found.raw["b"], brightness(images(2), None))  # though the function blackened its copy
    assert asked[0].metadata == {"answers": ["cat"]}


def in_the_style_of_ddpo():
    """An independent transcription of the peers' way: a factory, uint8 pixels, numpy scores, an empty info."""
    import io

    from PIL import Image

    def score(images, prompts, metadata):
        pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().transpose(0, 2, 3, 1)
        sizes = []
        for picture in pixels:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, format="JPEG", quality=95)
            sizes.append(len(file.getvalue()) / 1000)
        return -np.array(sizes), {}

    return score


class Scorer:
    def __init__(self, device):
        self.device = device

    def __call__(self, images, prompts, metadata):
        return [float(len(p)) for p in prompts]


def test_factories_and_classes():
    x = images()
    made = RewardBundle(
        {
            "peer": from_function(in_the_style_of_ddpo),
            "ours": from_judge(load_judge("jpeg_compressibility")),
            "judge": from_function(lambda images, prompts: [len(p) for p in prompts]),
            "class": from_function(Scorer, device="cpu"),
        }
    )
    found = made.submit(x, PROMPTS).result()
    assert torch.equal(found.raw["peer"], found.raw["ours"])
    assert found.raw["judge"].tolist() == found.raw["class"].tolist() == [5, 5, 6, 6]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda images: 1, r"takes \(images\); expected \(images, prompts, metadata\)"),
        (lambda: 3, "takes no argument and made a int"),
        (lambda: sys.exit("no weights"), r"called sys.exit\('no weights'\): it is called once, without pictures"),
        (lambda: {}["weights"], "raised KeyError: 'weights'"),
        (lambda: lambda a: a, "takes no argument and made a function"),
    ],
)
def test_functions_that_do_not_fit(function, words):
    with pytest.raises(UserError, match=words):
        from_function(function, name="mine:f")
