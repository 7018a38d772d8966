from __future__ import annotations

import dataclasses
import hashlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shards import entries, spoil

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.data.cache import TensorCache
from palate.data.encode import Encoders as Needed
from palate.data.encode import encode, encode_pairs
from palate.data.encoded import EncodedPairs, EncodedPictures
from palate.data.images import decode, framed, framing
from palate.data.items import EncodedPair, Items
from palate.data.pairs import LikedPicture, PreferencePair


def picture(seed: int, width: int = 24, height: int = 16) -> bytes:
    stream = BytesIO()
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


P = [picture(seed) for seed in range(5)]
PAIRS = [
    PreferencePair("a", P[0], P[1], 1.0, source="f, row 1"),
    PreferencePair("b", P[2], P[0], 0.2, weight=3.0, source="f, row 2"),
    PreferencePair("a", P[3], P[3], 0.5, source="f, row 3"),
]


class Encoders:
    """A linear "VAE" (mean of 8 x 8 blocks keeps neither scale nor place secret) and a text encoder that counts letters."""

    def __init__(self) -> None:
        self.pictures: list[int] = []
        self.prompts: list[str] = []

    def images(self, pixels):
        self.pictures.append(len(pixels))
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def text(self, prompts):
        self.prompts += prompts
        numbers = torch.tensor([[float(ord(p[0])), len(p)] for p in prompts])
        return {"embeds": numbers[:, None].expand(-1, 3, -1), "ids": numbers.long()}

    def needed(self, **changed) -> Needed:
        """What encoding needs, with some of it changed."""
        return dataclasses.replace(Needed(self.images, self.text, "vae 1", "text 1", told), **changed)

    def encode(self, items, folder, **options) -> EncodedPairs | EncodedPictures:
        changed = {name: options.pop(name) for name in NEEDED & options.keys()}
        return encode(items, self.needed(**changed), **{**defaults(folder), **options})


SQUARE = Shape.square(16)
NEEDED = {field.name for field in dataclasses.fields(Needed)}


def told(size, shape, position, *, flip):
    return {"framing": framing(size, shape, position, flip=flip)}


def defaults(folder) -> dict:
    return {"cache": TensorCache(folder), "shapes": [SQUARE], "progress": False}


def latent(data: bytes, flip: bool = False) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(framed(decode(data), SQUARE, flip=flip)[None], 8)[0]


def test_batch_holds_winners_first(tmp_path):
    encoded = Encoders().encode(PAIRS, tmp_path)
    assert len(encoded) == 3
    assert encoded.prompts == ["a", "b", "a"]
    seeds = torch.tensor([5, 6])
    batch = encoded.batch([1, 0], seeds)
    # Pair 1 has label 0.2 for its first picture: its second one wins with 0.8.
    expected = torch.stack([latent(P[0]), latent(P[0]), latent(P[2]), latent(P[1])])
    assert torch.allclose(batch.latents, expected, atol=1e-6)
    assert torch.allclose(batch.label, torch.tensor([0.8, 1.0]))
    assert torch.equal(batch.weight, torch.tensor([3.0, 1.0]))
    assert torch.equal(batch.seeds, seeds)
    # Rows as those of the latents: both winners, then both losers.
    assert torch.equal(batch.cond["ids"], torch.tensor([[98, 1], [97, 1], [98, 1], [97, 1]]))
    assert batch.cond["embeds"].shape == (4, 3, 2)


def test_pictures_of_different_sizes_carry_their_own_framing(tmp_path):
    wide, tall = picture(7, width=48, height=24), picture(8, width=20, height=32)
    seeds = torch.arange(20)
    for label in (1.0, 0.0):
        encoded = Encoders().encode([PreferencePair("a", wide, tall, label)], tmp_path, random_flip=True)
        for seed in seeds:
            batch = encoded.batch([0], seed[None])
            first, second = batch.cond["framing"] if label else batch.cond["framing"].flip(0)
            # Height and width; the middle square begins (48 - 24) / 2 * 16 / 24 = 8 from the left in the resized picture, and
            # (32 - 20) / 2 * 16 / 20 = 4.8 from the top; the side is 16.
            assert first.tolist() == [24, 48, 0, 8, 16, 16]
            assert second.tolist() == [32, 20, 5, 0, 16, 16]
    encoded = Encoders().encode([PreferencePair("a", wide, wide, 1.0)], tmp_path, center_crop=False, random_flip=True)
    found = {encoded.batch([0], seed[None]).cond["framing"][0, 3].item() for seed in seeds}
    # A crop at 0 <= left <= 16 of the resized picture, 32 wide, lies 16 - left from the left of the mirrored one.
    assert len(found) == 2
    assert sum(found) == 16


def test_a_batch_holds_the_picture_conditions_that_the_model_names(tmp_path):
    def area(size, shape, position, *, flip):
        return {"area": torch.tensor(float(size[0] * size[1])), "mirrored": torch.tensor(flip)}

    seeds = torch.tensor([5])
    batch = Encoders().encode(PAIRS, tmp_path / "two", picture_conditions=area).batch([0], seeds)
    assert set(batch.cond) == {"embeds", "ids", "area", "mirrored"}
    assert batch.cond["area"].tolist() == [24 * 16] * 2
    batch = Encoders().encode(PAIRS, tmp_path / "none", picture_conditions=lambda *_, flip: {}).batch([0], seeds)
    assert set(batch.cond) == {"embeds", "ids"}


def test_entries_of_the_cache_keep_their_keys(tmp_path):
    """Caches that are there already are used on."""
    encoded = Encoders().encode(PAIRS[:1], tmp_path)
    (item,) = encoded.items
    common = {"dtype": "float32", "version": 2}
    assert item.text == TensorCache.key(kind="text", model="text 1", prompt="a", **common)
    digest = hashlib.sha256(P[0]).hexdigest()
    how = {"resolution": 16, "crop": (0.5, 0.5), "flip": False, **common}
    assert item.winner == (TensorCache.key(kind="latents", model="vae 1", image=digest, **how),)
    assert set(encoded.cache.get(item.winner[0])) == {"latents", "framing"}


@settings(max_examples=25)
@given(label=st.floats(0, 1), pair_seed=st.integers(0, 2**63 - 1))
def test_swapping_pictures_and_label_changes_nothing(tmp_path_factory, label, pair_seed):
    folder, seeds = tmp_path_factory.mktemp("cache"), torch.tensor([pair_seed])
    there = Encoders().encode([PreferencePair("a", P[0], P[1], label)], folder, random_flip=True).batch([0], seeds)
    back = Encoders().encode([PreferencePair("a", P[1], P[0], 1 - label)], folder, random_flip=True).batch([0], seeds)
    assert 0.5 <= there.label.item() <= 1
    assert there.label.item() == pytest.approx(max(label, 1 - label))
    assert torch.allclose(there.label, back.label)
    if there.label.item() > 0.5:
        assert torch.equal(there.latents, back.latents)


def test_each_picture_and_prompt_is_encoded_once(tmp_path):
    encoders = Encoders()
    encoders.encode(PAIRS, tmp_path, batch_size=3)
    assert encoders.pictures == [3, 1]  # four different pictures in six places, three at a time
    assert encoders.prompts == ["a", "b"]


def test_second_run_encodes_nothing_and_gives_the_same(tmp_path):
    first = Encoders().encode(PAIRS, tmp_path, random_flip=True)
    again = Encoders()
    second = again.encode(PAIRS, tmp_path, random_flip=True)
    assert again.pictures == []
    assert again.prompts == []
    seeds = torch.arange(3)
    assert torch.equal(first.batch([0, 1, 2], seeds).latents, second.batch([0, 1, 2], seeds).latents)


def test_a_stopped_run_continues(tmp_path):
    class Stopped(Encoders):
        def images(self, pixels):
            if self.pictures:
                raise KeyboardInterrupt
            return super().images(pixels)

    with pytest.raises(KeyboardInterrupt):
        Stopped().encode(PAIRS, tmp_path, batch_size=2)
    rest = Encoders()
    rest.encode(PAIRS, tmp_path, batch_size=2)
    assert sum(rest.pictures) == 2  # two of four were done


@pytest.mark.parametrize(
    "change",
    [
        {"image_fingerprint": "vae 2"},
        {"shapes": [Shape.square(24)]},
        {"shapes": [Shape(16, 24)]},
        {"shapes": [Shape(24, 16)]},
        {"dtype": torch.bfloat16},
        {"center_crop": False},
    ],
)
def test_nothing_stale_is_reused(tmp_path, change):
    Encoders().encode(PAIRS, tmp_path)
    again = Encoders()
    again.encode(PAIRS, tmp_path, **change)
    assert sum(again.pictures) >= 4


def test_new_text_encoder_leaves_pictures_alone(tmp_path):
    Encoders().encode(PAIRS, tmp_path)
    again = Encoders()
    again.encode(PAIRS, tmp_path, text_fingerprint="text 2")
    assert again.pictures == []
    assert again.prompts == ["a", "b"]


def test_flip_adds_only_the_mirrored_variants(tmp_path):
    Encoders().encode(PAIRS, tmp_path)
    again = Encoders()
    again.encode(PAIRS, tmp_path, random_flip=True)
    assert sum(again.pictures) == 4


def test_both_pictures_of_a_pair_are_mirrored_together_half_of_the_time(tmp_path):
    encoded = Encoders().encode(PAIRS, tmp_path, random_flip=True)
    seeds = torch.arange(-200, 200)
    batch = encoded.batch([0] * 400, seeds)
    mirrored = 0
    for row in range(400):
        flip = torch.allclose(batch.latents[row], latent(P[0], flip=True), atol=1e-6)
        assert torch.allclose(batch.latents[row], latent(P[0], flip=flip), atol=1e-6)
        assert torch.allclose(batch.latents[400 + row], latent(P[1], flip=flip), atol=1e-6)
        mirrored += flip
    assert 160 < mirrored < 240  # four standard deviations: 200 +- 4 * 10
    # A pair's variant depends on its own seed, not on the batch.
    alone = encoded.batch([0], seeds[7:8])
    assert torch.equal(alone.latents, batch.latents[[7, 407]])


def test_without_random_flip_nothing_is_mirrored(tmp_path):
    batch = Encoders().encode(PAIRS, tmp_path).batch([0] * 20, torch.arange(20))
    assert torch.allclose(batch.latents[:20], latent(P[0]).expand(20, -1, -1, -1), atol=1e-6)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), flip_seed=st.integers(0, 1000))
def test_random_crop_is_shared_and_reproducible(tmp_path_factory, seed, flip_seed):
    folder, seeds = tmp_path_factory.mktemp("cache"), torch.tensor([flip_seed])
    pairs = [PreferencePair("a", P[0], P[0], 1.0)]  # two copies: the same crop gives the same latents
    batch = Encoders().encode(pairs, folder, center_crop=False, random_flip=True, seed=seed).batch([0], seeds)
    assert torch.equal(batch.latents[0], batch.latents[1])
    again = Encoders()
    repeated = again.encode(pairs, folder, center_crop=False, random_flip=True, seed=seed).batch([0], seeds)
    assert again.pictures == []
    assert torch.equal(batch.latents, repeated.latents)


def test_random_crops_differ_between_seeds(tmp_path):
    found = [
        Encoders().encode(PAIRS[:1], tmp_path, center_crop=False, seed=seed).batch([0], torch.tensor([0])).latents
        for seed in range(3)
    ]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_a_drawn_square_is_the_same_of_both_pictures_of_a_pair(tmp_path):
    def ramp(width: int, height: int) -> bytes:
        array = np.zeros((height, width, 3), dtype=np.uint8)
        array[..., 0] = np.linspace(0, 255, width)[None]
        stream = BytesIO()
        Image.fromarray(array).save(stream, "PNG")
        return stream.getvalue()

    # One scene at two sizes and 3 : 1: squares at the same place show the same part, up to resampling.
    pair = PreferencePair("a", ramp(192, 64), ramp(96, 32), 1.0)
    winner, loser = Encoders().encode([pair], tmp_path, center_crop=False).batch([0], torch.tensor([0])).latents
    assert (winner - loser).abs().max() < 0.06


def test_encoders_see_the_squares(tmp_path):
    seen = []

    def remember(pixels):
        seen.append(pixels)
        return pixels

    Encoders().encode(PAIRS[:1], tmp_path, encode_images=remember)
    assert torch.equal(seen[0], torch.stack([framed(decode(data), SQUARE) for data in P[:2]]))


def test_dtype_of_what_is_kept(tmp_path):
    big = picture(7, width=24, height=2051)  # a side that float16 has not

    def numbers(size, resolution, position, *, flip):
        return {"size": torch.tensor([float(side) for side in size])}

    pairs = [PreferencePair("a", P[0], big, 1.0)]
    options = {"dtype": torch.float16, "picture_conditions": numbers}
    with pytest.raises(UserError, match="times as long"):
        Encoders().encode(pairs, tmp_path, **options)
    encoded = Encoders().encode([PreferencePair("a", P[0], picture(7, 2051, 300), 1.0)], tmp_path, **options)
    kept = encoded.cache.get(encoded.items[0].winner[0])
    assert (kept["latents"].dtype, kept["size"].dtype) == (torch.float16, torch.float32)
    batch = encoded.batch([0], torch.tensor([0]))
    assert batch.cond["size"].tolist() == [[24, 16], [2051, 300]]
    # What is read is float32 again, and what was kept to the last bit.
    assert batch.latents.dtype == batch.cond["embeds"].dtype == torch.float32
    assert torch.equal(batch.latents[0], latent(P[0]).half().float())
    assert batch.cond["ids"].dtype == torch.int64
    assert batch.label.dtype == batch.weight.dtype == torch.float32


def test_nan_is_refused_and_not_kept(tmp_path):
    with pytest.raises(UserError, match=r"f, row 1.*NaN.*float32"):
        Encoders().encode(PAIRS, tmp_path, encode_images=lambda pixels: torch.full((len(pixels), 4, 2, 2), torch.nan))
    with pytest.raises(UserError, match=r"infinity in latents as torch\.float16"):
        Encoders().encode(PAIRS, tmp_path, encode_images=lambda pixels: pixels * 1e6, dtype=torch.float16)
    assert not entries(tmp_path)


def test_the_run_that_reads_a_damaged_entry_tells_and_the_next_mends_it(tmp_path):
    spoil(tmp_path, Encoders().encode(PAIRS, tmp_path).items[0].winner[0])
    first, second = Encoders(), Encoders()
    encoded = first.encode(PAIRS, tmp_path)
    assert first.pictures == []  # it is there, and nobody has read it
    with pytest.raises(UserError, match=r"f, row 1.*missing or damaged: run again"):
        encoded.batch([0], torch.tensor([0]))
    encoded = second.encode(PAIRS, tmp_path)
    assert second.pictures == [1]
    assert torch.equal(encoded.batch([0], torch.tensor([0])).latents[0], latent(P[0]))


def test_all_damaged_entries_are_mended_by_one_more_run(tmp_path):
    before = Encoders().encode(PAIRS, tmp_path)
    pictures = {key for pair in before.items for key in (*pair.winner, *pair.loser)}
    for key in pictures:
        spoil(tmp_path, key, "text")
    with pytest.raises(UserError, match=rf"damaged, and {len(pictures) - 1} more: run again"):
        before.batch([0], torch.tensor([0]))
    again = Encoders()
    encoded = again.encode(PAIRS, tmp_path)
    assert sum(again.pictures) == len(pictures)
    encoded.batch([0, 1], torch.tensor([0, 1]))


def test_an_entry_that_has_gone_is_told_and_encoded_anew(tmp_path):
    Encoders().encode(PAIRS[:1], tmp_path / "one")
    encoded = EncodedPairs(Encoders().encode(PAIRS, tmp_path).items, TensorCache(tmp_path / "one"))
    encoded.batch([0], torch.tensor([0]))
    with pytest.raises(UserError, match=r"f, row 2.*missing or damaged, and 2 more: run again"):
        encoded.batch([1], torch.tensor([0]))
    again = Encoders()
    encoded = again.encode(PAIRS, tmp_path / "one")
    assert sum(again.pictures) == 2
    encoded.batch([0, 1, 2], torch.tensor([0, 1, 2]))


def test_errors_at_the_door(tmp_path):
    encoders = Encoders()
    with pytest.raises(UserError, match="multiple of 8"):
        encoders.encode(PAIRS, tmp_path, shapes=[Shape.square(20)])
    with pytest.raises(UserError, match="batch_size"):
        encoders.encode(PAIRS, tmp_path, batch_size=0)
    with pytest.raises(UserError, match="no preference pairs"):
        encoders.encode([], tmp_path)
    with pytest.raises(UserError, match=r"f, row 9.*not a picture"):
        encoders.encode([PreferencePair("a", b"text", P[0], 1.0, source="f, row 9")], tmp_path)


def test_without_ties(tmp_path):
    encoded = Encoders().encode(PAIRS, tmp_path)
    assert [pair.source for pair in encoded.without_ties().items] == ["f, row 1", "f, row 2"]
    assert len(encoded) == 3
    with pytest.raises(UserError, match="ties"):
        Encoders().encode(PAIRS[2:], tmp_path).without_ties()


def keys_only(prompts: list[str], cache: TensorCache | None = None) -> EncodedPairs:
    key = TensorCache.key
    pairs = [EncodedPair(p, key(), (key(w=1),), (key(l=1),), 1.0, 1.0, str(i)) for i, p in enumerate(prompts)]
    return EncodedPairs(Items.of(pairs), cache or TensorCache("nowhere"))


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["a", "A", " a ", "b", "c", "d", "e e", "e  E"]), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(),
)
def test_split_shares_no_prompt_and_loses_no_pair(prompts, fraction, seed):
    encoded = keys_only(prompts)
    groups = {" ".join(p.split()).lower() for p in prompts}
    if len(groups) < 2:
        with pytest.raises(UserError, match="two different prompts"):
            encoded.split(fraction, seed)
        return
    train, held_out = encoded.split(fraction, seed)
    sides = [{" ".join(p.split()).lower() for p in side.prompts} for side in (train, held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0]
    assert sides[1]
    assert sorted(int(pair.source) for side in (train, held_out) for pair in side.items) == list(range(len(prompts)))
    again = encoded.split(fraction, seed)
    assert [[*side.items] for side in again] == [[*train.items], [*held_out.items]]


def test_split_holds_out_about_the_fraction():
    encoded = keys_only([f"p{i // 4}" for i in range(400)])
    train, held_out = encoded.split(0.1, seed=0)
    assert (len(train), len(held_out)) == (360, 40)
    assert encoded.split(0.1, seed=1)[1].prompts != held_out.prompts


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_split_wants_a_fraction(fraction):
    with pytest.raises(UserError, match="between 0 and 1"):
        keys_only(["a", "b"]).split(fraction, 0)


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(), st.integers(0, 1000))
def test_order_is_a_permutation_of_its_seed_and_epoch(count, seed, epoch):
    encoded = keys_only(["a"] * count)
    order = encoded.order(seed, epoch)
    assert sorted(order) == list(range(count))
    assert order == encoded.order(seed, epoch)


def test_orders_of_epochs_and_seeds_differ():
    encoded = keys_only(["a"] * 100)
    orders = [tuple(encoded.order(seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_batch_refuses_counts_that_differ():
    with pytest.raises(ValueError, match="2 indices and 1 seeds"):
        keys_only(["a"] * 3).batch([0, 1], torch.tensor([0]))


def test_records_are_frozen(tmp_path):
    batch = Encoders().encode(PAIRS, tmp_path).batch([0], torch.tensor([0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.label = torch.ones(1)


LIKES = [
    LikedPicture("a", P[0], 1.0, source="f, row 1"),
    LikedPicture("b", P[1], 0.0, weight=3.0, source="f, row 2"),
    LikedPicture("a", P[2], 0.25, source="f, row 3"),
]


def test_single_pictures(tmp_path):
    encoded = Encoders().encode(LIKES, tmp_path)
    assert isinstance(encoded, EncodedPictures)
    seeds = torch.tensor([5, 6])
    batch = encoded.batch([2, 1], seeds)
    assert torch.allclose(batch.latents, torch.stack([latent(P[2]), latent(P[1])]), atol=1e-6)
    assert (batch.label.tolist(), batch.weight.tolist(), batch.seeds.tolist()) == ([0.25, 0.0], [1.0, 3.0], [5, 6])
    assert batch.cond["ids"].tolist() == [[97, 1], [98, 1]]
    assert batch.cond["framing"].shape == (2, 6)
    assert [item.source for item in encoded.liked().items] == ["f, row 1", "f, row 3"]
    with pytest.raises(UserError, match="disliked"):
        Encoders().encode(LIKES[1:2], tmp_path).liked()
    with pytest.raises(UserError, match="single pictures, not pairs"):
        encode_pairs(iter(LIKES), Encoders().needed(), **defaults(tmp_path))
    train, held_out = encoded.split(0.3, 0)
    assert {*train.prompts}.isdisjoint(held_out.prompts)


def test_single_pictures_and_pairs_share_the_cache(tmp_path):
    Encoders().encode(PAIRS, tmp_path)
    again = Encoders()
    again.encode(LIKES, tmp_path)
    assert again.pictures == []  # P[0], P[1], P[2] are there from the pairs
    assert again.prompts == []


def test_mirrored_single_pictures(tmp_path):
    encoded = Encoders().encode(LIKES[:1], tmp_path, random_flip=True)
    rows = encoded.batch([0] * 40, torch.arange(40)).latents
    expected = latent(P[0]), latent(P[0], flip=True)
    sides = [next(k for k in (0, 1) if torch.allclose(row, expected[k], atol=1e-6)) for row in rows]
    assert 8 < sum(sides) < 32


def test_what_shares_a_prompt_is_left_out(tmp_path):
    encoded = Encoders().encode(PAIRS, tmp_path)
    assert encoded.without_prompts([" A "]).prompts == ["b"]
    with pytest.raises(UserError, match="no prompt that the validation data has not"):
        encoded.without_prompts(["a", "B"])


def test_pictures_of_different_sizes_make_one_batch(tmp_path):
    sizes = [(24, 16), (40, 40), (9, 33)]
    data = [picture(seed, *size) for seed, size in enumerate(sizes)]
    encoded = Encoders().encode(
        [PreferencePair("a", data[0], data[1], 1.0), PreferencePair("b", data[2], data[0], 1.0)], tmp_path
    )
    batch = encoded.batch([0, 1], torch.tensor([1, 2]))
    assert batch.latents.shape == (4, 3, 2, 2)
    # Winners first; each with its own height and width.
    assert batch.cond["framing"][:, :2].tolist() == [[16, 24], [33, 9], [40, 40], [16, 24]]


def test_accents_count_as_one_however_they_are_encoded(tmp_path):
    encoded = keys_only(["caf\u00e9", "cafe\u0301", "tea"])
    assert sorted(map(len, encoded.split(0.4, 0))) == [1, 2]


@pytest.mark.parametrize(("resolution", "at_once"), [(16, [4]), (512, [2, 2]), (768, [1, 1, 1, 1])])
def test_large_pictures_are_encoded_a_few_at_a_time(tmp_path, resolution, at_once):
    """The pairs hold four different pictures; 2 * 512^2 = 2^19 pixels are the most at once."""
    encoders = Encoders()
    encoders.encode(PAIRS, tmp_path, shapes=[Shape.square(resolution)])
    assert encoders.pictures == at_once
