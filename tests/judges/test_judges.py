"""Judges against independent transcriptions of their model cards, on tiny random CLIP models."""

from __future__ import annotations

import io
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from palate.base.errors import UserError
from palate.data.images import to_tensor
from palate.judges import load_judge, score
from palate.judges.aesthetic import load_head
from palate.judges.clip import load_clip
from palate.judges.jpeg import jpeg_compressibility, jpeg_incompressibility
from palate.judges.pictures import Preprocess

WIDTH = 16
HEADS = Path(__file__).resolve().parents[3] / "shared" / "data" / "aesthetic"
heads = pytest.mark.skipif(not HEADS.is_dir(), reason="the published aesthetic heads: put them into ../shared/data/aesthetic")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A CLIP model of random weights in transformers' layout, its tokenizer inside, with a v2 aesthetic head."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    words = [*letters, *(c + "</w>" for c in letters), "ca", "cat</w>", "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    CLIPTokenizer.from_pretrained(path, model_max_length=12).save_pretrained(path)
    tower = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 12}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **text, **ends},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=WIDTH,
        )
    )
    # The initial weights are so small that all embeddings would be alike.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    sizes = (WIDTH, 8, 4, 1)
    state = {}
    for index, (a, b) in zip((0, 2, 3), pairwise(sizes), strict=True):
        layer = nn.Linear(a, b)
        state |= {f"layers.{index}.weight": layer.weight.detach(), f"layers.{index}.bias": layer.bias.detach()}
    save_file(state, path / "aesthetic_head.safetensors")
    return path


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture, (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


IMAGES = [picture(i) for i in range(4)]
PROMPTS = ["a cat", "a dog and a cat", "dog", "a cat on a dog on a cat on a dog on a cat on a dog on a cat"]


def model_card(folder: Path, images, prompts) -> torch.Tensor:
    """PickScore's model card with transformers' own processor: normalised features, times the logit scale."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    text = tokenizer(prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        image_embs = model.get_image_features(pixel_values=pixels).pooler_output
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(**text).pooler_output
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        return (model.logit_scale.exp() * (text_embs @ image_embs.T)).diagonal()


def test_pickscore_is_the_model_card_s(folder):
    expected = model_card(folder, IMAGES, PROMPTS)
    found = score(load_judge("pickscore", folder), IMAGES, PROMPTS)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)  # transformers rounds to 8 bits after its resize
    square = [picture(i, (32, 32)) for i in range(4)]  # nothing to resize, nothing to round
    found = score(load_judge("pickscore", folder), square, PROMPTS)
    torch.testing.assert_close(found, model_card(folder, square, PROMPTS), atol=1e-4, rtol=0)


def test_clipscore_is_100_cos(folder):
    # exp(logit_scale_init_value = 2.6592) = 14.285, so pickscore / 14.285 = cos = clipscore / 100.
    pick, clip = (score(load_judge(kind, folder), IMAGES, PROMPTS) for kind in ("pickscore", "clipscore"))
    torch.testing.assert_close(clip / 100, pick / 14.2849, rtol=1e-4, atol=1e-6)


def test_scores_do_not_depend_on_the_batch(folder):
    judge = load_judge("pickscore", folder)
    images = [*IMAGES, picture(9, (32, 32)), picture(10, (64, 33))]
    prompts = [*PROMPTS, "a", "cat"]
    one = torch.cat([score(judge, [i], [p]) for i, p in zip(images, prompts, strict=True)])
    torch.testing.assert_close(score(judge, images, prompts, batch_size=3), one, atol=1e-5, rtol=1e-5)
    assert score(judge, [], []).shape == (0,)


def test_tokenizer_in_a_subfolder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        if (tmp_path / "clip" / name).exists():
            shutil.move(tmp_path / "clip" / name, tmp_path / "clip" / "tokenizer" / name)
    torch.testing.assert_close(
        score(load_judge("pickscore", tmp_path / "clip"), IMAGES, PROMPTS),
        score(load_judge("pickscore", folder), IMAGES, PROMPTS),
    )


@pytest.mark.parametrize("kind", ["pickscore", "clipscore", "aesthetic"])
def test_gradient_with_respect_to_the_picture(folder, kind):
    judge = load_judge(kind, folder)
    x = (0.2 + 0.6 * torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))).requires_grad_()
    judge(x, ["a cat"]).sum().backward()
    gradient = x.grad
    step = 0.01 * gradient / gradient.abs().max()
    with torch.no_grad():
        rise = judge(x + step, ["a cat"]) - judge(x - step, ["a cat"])
    torch.testing.assert_close(rise, 2 * (gradient * step).sum()[None], rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("size", [(150, 97), (97, 150), (64, 96), (832, 1216), (1216, 832)])
def test_preprocessing_is_transformers_own(size):
    """PickScore's, of any shape. 224 of 327 rows begin at 51, or they are those of another picture by one grey level a row."""
    from transformers import CLIPImageProcessor

    side = 224 if max(size) > 1000 else 32
    large = picture(3, size)
    ours = Preprocess(size=side, crop=(side, side), floor=True)(to_tensor([large]))
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    theirs = processor(images=[large], return_tensors="pt")["pixel_values"]
    # One grey level is 1 / 255 / 0.26 = 0.015 after normalising; transformers rounds to grey levels.
    torch.testing.assert_close(ours, theirs, atol=0.016, rtol=0)


def test_a_crop_between_two_pixels_begins_where_the_original_has_it():
    """Rows tell their number: of 7 the middle 4 begin at 1.5, that is at 1 for transformers and at 2 for torchvision."""
    rows = torch.arange(7.0).reshape(1, 1, 7, 1).expand(1, 3, 7, 4) / 10
    plain = {"size": 4, "crop": (4, 4), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for floor, first in ((True, 0.1), (False, 0.2)):
        assert Preprocess(**plain, floor=floor)(rows)[0, 0, 0, 0].item() == pytest.approx(first)


@settings(max_examples=20)
@given(st.integers(8, 90), st.integers(8, 90))
def test_preprocessing_of_any_size(h, w):
    x = torch.rand(1, 3, h, w).round()
    y = Preprocess(size=24, crop=(20, 24), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(x)
    assert y.shape == (1, 3, 20, 24)
    assert y.min() >= 0
    assert y.max() <= 1


def test_preprocessor_config_is_read(tmp_path):
    config = {"size": {"shortest_edge": 40}, "crop_size": 32, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert Preprocess.load(tmp_path, 224) == Preprocess(40, (32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 20, "crop_size": 32}))
    with pytest.raises(UserError, match="exceeds"):
        Preprocess.load(tmp_path, 224)


def test_aesthetic_is_the_sequential_head(folder):
    """The original is an nn.Sequential of linear layers and dropout on the normalised embedding."""
    state = load_file(folder / "aesthetic_head.safetensors")
    net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Linear(4, 1)).eval()
    net.load_state_dict({k.removeprefix("layers."): v for k, v in state.items()})
    clip, pixels = load_clip(folder, "aesthetic"), Preprocess(32, (32, 32))(to_tensor(IMAGES))
    with torch.no_grad():
        tokens = clip.tokenizer(["a"], return_tensors="pt")
        embedding = clip.model(**tokens, pixel_values=pixels).image_embeds
        expected = net(embedding)[:, 0]
    torch.testing.assert_close(score(load_judge("aesthetic", folder), IMAGES, PROMPTS), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clip.embed_images(pixels), embedding, atol=1e-6, rtol=1e-5)


def test_head_worked_by_hand(tmp_path):
    # Layer 0: (x, y) -> (x + 2y + 1, 3x - 1); layer 2: 2a - b + 0.5 = 2x + 4y + 2 - 3x + 1 + 0.5 = -x + 4y + 3.5
    state = {
        "layers.0.weight": torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
        "layers.0.bias": torch.tensor([1.0, -1.0]),
        "layers.2.weight": torch.tensor([[2.0, -1.0]]),
        "layers.2.bias": torch.tensor([0.5]),
    }
    torch.save(state, tmp_path / "head.pth")
    weight, bias = load_head(tmp_path / "head.pth")
    assert weight.tolist() == [-1, 4]
    assert bias.item() == 3.5


@heads
@pytest.mark.parametrize(
    ("name", "norm", "bias"),
    [("sac+logos+ava1-l14-linearMSE.pth", 17.996, 5.2366), ("sa_0_4_vit_l_14_linear.pth", 28.44, 3.529)],
)
def test_laion_heads(name, norm, bias):
    weight, b = load_head(HEADS / name)
    assert weight.shape == (768,)
    assert weight.norm().item() == pytest.approx(norm, abs=5e-3)
    assert b.item() == pytest.approx(bias, abs=5e-4)


def test_jpeg_size():
    images = [picture(0), Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))]
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    found = score(load_judge("jpeg_incompressibility"), images, ["", ""])
    assert found.tolist() == pytest.approx(sizes)
    assert found[1] > found[0]
    x = to_tensor(images)
    assert torch.equal(jpeg_compressibility(x, ["", ""]), -jpeg_incompressibility(x, ["", ""]))


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="did you mean 'pickscore'"):
        load_judge("pikscore", folder)
    with pytest.raises(UserError, match=r"hf download yuvalkirstain/PickScore_v1 .*3\.9 GB.* pickscore:models/PickScore_v1"):
        load_judge("pickscore")
    with pytest.raises(UserError, match="no folder"):
        load_judge("pickscore", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_judge("pickscore", tmp_path)
    with pytest.raises(UserError, match="one prompt per picture"):
        score(load_judge("jpeg_compressibility"), IMAGES, ["one"])

    clip = tmp_path / "clip"
    shutil.copytree(folder, clip)
    (clip / "aesthetic_head.safetensors").unlink()
    with pytest.raises(UserError, match="no aesthetic head"):
        load_judge("aesthetic", clip)
    save_file({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, clip / "aesthetic_head.safetensors")
    with pytest.raises(UserError, match="width 7"):
        load_judge("aesthetic", clip)
    weights = load_file(clip / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"visual_projection\.weight"):
        load_judge("pickscore", clip)
