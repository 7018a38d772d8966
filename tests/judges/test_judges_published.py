"""HPS and ImageReward against independent transcriptions of the published networks, at tiny size with random weights."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from palate.base.errors import UserError
from palate.data.images import to_tensor
from palate.judges import load_judge, score
from palate.judges.aesthetic import find_head, load_head
from palate.judges.hps import repaired
from palate.judges.pictures import CLIP_MEAN, CLIP_STD, Preprocess
from palate.judges.weights import affine, read_weights

HEADS = Path(__file__).resolve().parents[3] / "shared" / "data" / "aesthetic"
heads = pytest.mark.skipif(not HEADS.is_dir(), reason="the published aesthetic heads: put them into ../shared/data/aesthetic")
W, D, LAYERS, PATCH, SIDE = 32, 24, 2, 8, 32  # width, embedding, layers, patch, side of the tiny CLIP
PROMPTS = ["a red house", "a blue tower and a red house and a tree", "a tree", "water"]


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


IMAGES = [picture(0), picture(1), picture(2, (32, 32)), picture(3, (30, 70))]


# HPS ------------------------------------------------------------------------------------------------------------------------


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=generator)


def open_clip_weights(vocab: int, context: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    state = {
        "positional_embedding": draw(g, context, W),
        "text_projection": draw(g, W, D),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": draw(g, vocab, W),
        "ln_final.weight": 1 + draw(g, W),
        "ln_final.bias": draw(g, W),
        "visual.class_embedding": draw(g, W),
        "visual.positional_embedding": draw(g, (SIDE // PATCH) ** 2 + 1, W),
        "visual.proj": draw(g, W, D),
        "visual.conv1.weight": draw(g, W, 3, PATCH, PATCH),
    }
    for norm in ("visual.ln_pre", "visual.ln_post"):
        state |= {f"{norm}.weight": 1 + draw(g, W), f"{norm}.bias": draw(g, W)}
    for tower in ("transformer", "visual.transformer"):
        for layer in range(LAYERS):
            at = f"{tower}.resblocks.{layer}"
            for name, shape in {
                "attn.in_proj_weight": (3 * W, W),
                "attn.in_proj_bias": (3 * W,),
                "attn.out_proj.weight": (W, W),
                "attn.out_proj.bias": (W,),
                "mlp.c_fc.weight": (2 * W, W),
                "mlp.c_fc.bias": (2 * W,),
                "mlp.c_proj.weight": (W, 2 * W),
                "mlp.c_proj.bias": (W,),
                "ln_1.bias": (W,),
                "ln_2.bias": (W,),
            }.items():
                state[f"{at}.{name}"] = draw(g, *shape)
            state |= {f"{at}.ln_1.weight": 1 + draw(g, W), f"{at}.ln_2.weight": 1 + draw(g, W)}
    return state


def norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def open_clip_tower(x: Tensor, state: dict[str, Tensor], tower: str, causal: bool) -> Tensor:
    """Residual attention blocks as open_clip has them, with torch's own multi-head attention of one matrix."""
    for layer in range(LAYERS):
        at = f"{tower}.resblocks.{layer}"
        y = norm(x, state, f"{at}.ln_1").transpose(0, 1)
        mask = torch.full((len(y), len(y)), -math.inf).triu(1) if causal else None
        x = x + F.multi_head_attention_forward(
            y,
            y,
            y,
            W,
            2,
            state[f"{at}.attn.in_proj_weight"],
            state[f"{at}.attn.in_proj_bias"],
            None,
            None,
            False,
            0.0,
            state[f"{at}.attn.out_proj.weight"],
            state[f"{at}.attn.out_proj.bias"],
            training=False,
            need_weights=False,
            attn_mask=mask,
        )[0].transpose(0, 1)
        y = F.gelu(F.linear(norm(x, state, f"{at}.ln_2"), state[f"{at}.mlp.c_fc.weight"], state[f"{at}.mlp.c_fc.bias"]))
        x = x + F.linear(y, state[f"{at}.mlp.c_proj.weight"], state[f"{at}.mlp.c_proj.bias"])
    return x


def hps_pixels(image: Image.Image) -> Tensor:
    """Longest side to SIDE, black to a square, then normalised; resized channel by channel as floats by PIL."""
    scale = SIDE / max(image.size)
    size = tuple(round(n * scale) for n in image.size)
    channels = np.asarray(image, dtype=np.float32) / 255
    small = [np.asarray(Image.fromarray(channels[..., c]).resize(size, Image.Resampling.BICUBIC)) for c in range(3)]
    square = np.zeros((3, SIDE, SIDE), dtype=np.float32)
    left, top = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    square[:, top : top + size[1], left : left + size[0]] = np.stack(small)
    return (torch.from_numpy(square) - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def hps(state: dict[str, Tensor], tokenizer, images, prompts) -> Tensor:
    x = F.conv2d(torch.stack([hps_pixels(i) for i in images]), state["visual.conv1.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, W), x], 1) + state["visual.positional_embedding"]
    x = open_clip_tower(norm(x, state, "visual.ln_pre"), state, "visual.transformer", causal=False)
    seen = F.normalize(norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"], dim=-1)
    context = len(state["positional_embedding"])
    rows = [tokenizer(p, truncation=True, max_length=context).input_ids for p in prompts]
    ids = torch.tensor([row + [0] * (context - len(row)) for row in rows])  # open_clip pads with 0
    y = open_clip_tower(state["token_embedding.weight"][ids] + state["positional_embedding"], state, "transformer", causal=True)
    last = norm(y, state, "ln_final")[torch.arange(len(ids)), ids.argmax(dim=-1)]
    return (seen * F.normalize(last @ state["text_projection"], dim=-1)).sum(-1)


@pytest.fixture(scope="module")
def hps_dir(tmp_path_factory, tokenizer_dir):
    from transformers import CLIPConfig, CLIPTokenizer

    folder = tmp_path_factory.mktemp("hps")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=20)
    tokenizer.save_pretrained(folder / "tokenizer")
    state = open_clip_weights(len(tokenizer), 20)
    for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"epoch": 1, "state_dict": state}, folder / name)
    tower = {"hidden_size": W, "intermediate_size": 2 * W, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    CLIPConfig(
        text_config=tower | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "hidden_act": "gelu"},
        vision_config=tower | {"image_size": SIDE, "patch_size": PATCH, "hidden_act": "gelu"},
        projection_dim=D,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["hpsv2", "hpsv2.1"])
def test_hps_is_the_open_clip_network(hps_dir, kind):
    judge = load_judge(kind, hps_dir)
    state = torch.load(hps_dir / "HPS_v2_compressed.pt", weights_only=True)["state_dict"]
    expected = hps(state, judge.clip.tokenizer, IMAGES, PROMPTS)
    assert expected.std() > 0.02
    torch.testing.assert_close(score(judge, IMAGES, PROMPTS), expected, atol=1e-5, rtol=1e-5)


def test_hps_shows_the_whole_picture_between_black_bars():
    # 40 x 20 (h x w) to 8 x 4: two black columns at either side.
    x = Preprocess(8, (8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), whole=True)(torch.ones(1, 3, 40, 20))
    torch.testing.assert_close(x[0, 0].sum(0), torch.tensor([0.0, 0, 8, 8, 8, 8, 0, 0]))
    assert Preprocess(8, (8, 8), whole=True)(torch.ones(1, 3, 300, 1)).shape == (1, 3, 8, 8)


def test_hps_saved_by_transformers_scores_alike(hps_dir, tmp_path):
    judge = load_judge("hpsv2", hps_dir)
    judge.clip.model.save_pretrained(tmp_path)
    judge.clip.tokenizer.save_pretrained(tmp_path)
    torch.testing.assert_close(score(load_judge("hpsv2", tmp_path), IMAGES, PROMPTS), score(judge, IMAGES, PROMPTS))


REPAIRED = [
    ("a corgi’s head", "a corgi's head"),
    ("“l’été” in neon", '"l\'été" in neon'),
    ("a caf\u00c3\u00a9", "a café"),
    ("fish &amp; chips", "fish & chips"),
    ("fish &amp;amp; chips", "fish & chips"),
    ("&lt;3", "<3"),
    ("ﬁne ｔｅｘｔ", "fine text"),
    ("  a tree \n", "a tree"),
    ("猫 и кот 🐈", "猫 и кот 🐈"),
]


@pytest.mark.parametrize(("prompt", "read"), REPAIRED)
def test_hps_reads_text_as_its_published_code_repairs_it(hps_dir, prompt, read):
    assert repaired(prompt) == read
    judge = load_judge("hpsv2", hps_dir)
    torch.testing.assert_close(score(judge, IMAGES[:1], [prompt]), score(judge, IMAGES[:1], [read]), atol=0, rtol=0)


def test_one_folder_as_two_kinds_is_read_by_each_in_its_own_way(hps_dir, tmp_path):
    judge = load_judge("hpsv2", hps_dir)
    judge.clip.model.save_pretrained(tmp_path)
    judge.clip.tokenizer.save_pretrained(tmp_path)
    hps, clipscore = load_judge("hpsv2", tmp_path), load_judge("clipscore", tmp_path)
    assert hps.clip is clipscore.clip
    curly, straight = "a tree’s house", "a tree's house"
    assert score(hps, IMAGES[:1], [curly]) == score(hps, IMAGES[:1], [straight])
    assert score(clipscore, IMAGES[:1], [curly]) != score(clipscore, IMAGES[:1], [straight])


# ImageReward ----------------------------------------------------------------------------------------------------------------

V, B, HIDDEN = 128, 32, 48  # width of the vision transformer (two heads of 64), width of BERT, its MLP


def imagereward_weights(vocab: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(g, rows, columns) / 2, draw(g, rows)

    def norm_layer(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(g, width), draw(g, width)

    seen, read = "blip.visual_encoder", "blip.text_encoder"
    state[f"{seen}.cls_token"], state[f"{seen}.pos_embed"] = draw(g, 1, 1, V), draw(g, 1, (SIDE // 16) ** 2 + 1, V)
    state[f"{seen}.patch_embed.proj.weight"], state[f"{seen}.patch_embed.proj.bias"] = draw(g, V, 3, 16, 16), draw(g, V)
    norm_layer(f"{seen}.norm", V)
    for layer in range(LAYERS):
        at = f"{seen}.blocks.{layer}"
        norm_layer(f"{at}.norm1", V)
        norm_layer(f"{at}.norm2", V)
        for name, rows, columns in (("attn.qkv", 3 * V, V), ("attn.proj", V, V), ("mlp.fc1", V, V), ("mlp.fc2", V, V)):
            linear(f"{at}.{name}", rows, columns)
    state[f"{read}.embeddings.position_ids"] = torch.arange(64)[None]
    state[f"{read}.embeddings.word_embeddings.weight"] = draw(g, vocab, B)
    state[f"{read}.embeddings.position_embeddings.weight"] = draw(g, 64, B)
    norm_layer(f"{read}.embeddings.LayerNorm", B)
    for layer in range(LAYERS):
        for part, width in (("attention", B), ("crossattention", V)):
            at = f"{read}.encoder.layer.{layer}.{part}"
            linear(f"{at}.self.query", B, B)
            linear(f"{at}.self.key", B, width)
            linear(f"{at}.self.value", B, width)
            linear(f"{at}.output.dense", B, B)
            norm_layer(f"{at}.output.LayerNorm", B)
        linear(f"{read}.encoder.layer.{layer}.intermediate.dense", HIDDEN, B)
        linear(f"{read}.encoder.layer.{layer}.output.dense", B, HIDDEN)
        norm_layer(f"{read}.encoder.layer.{layer}.output.LayerNorm", B)
    for index, (rows, columns) in {0: (8, B), 2: (4, 8), 4: (1, 4)}.items():
        linear(f"mlp.layers.{index}", rows, columns)
    linear("blip.vision_proj", 3, V)  # of BLIP's other tasks
    return state


def lin(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None] == 0, -math.inf)
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def imagereward(state: dict[str, Tensor], tokenizer, images, prompts, heads: int = 4) -> Tensor:
    """The published ``score``, in its own names and with its own padding to 35 tokens."""
    x = torch.cat([Preprocess(SIDE, (SIDE, SIDE))(to_tensor([i])) for i in images])
    seen = "blip.visual_encoder"
    x = F.conv2d(x, state[f"{seen}.patch_embed.proj.weight"], state[f"{seen}.patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([state[f"{seen}.cls_token"].expand(len(x), 1, V), x], 1) + state[f"{seen}.pos_embed"]
    for layer in range(LAYERS):
        at = f"{seen}.blocks.{layer}"
        q, k, v = lin(norm(x, state, f"{at}.norm1", 1e-6), state, f"{at}.attn.qkv").chunk(3, -1)
        x = x + lin(attend(q, k, v, 2), state, f"{at}.attn.proj")
        y = F.gelu(lin(norm(x, state, f"{at}.norm2", 1e-6), state, f"{at}.mlp.fc1"))
        x = x + lin(y, state, f"{at}.mlp.fc2")
    x = norm(x, state, f"{seen}.norm", 1e-6)
    text = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    read = "blip.text_encoder"
    y = state[f"{read}.embeddings.word_embeddings.weight"][text.input_ids]
    y = y + state[f"{read}.embeddings.position_embeddings.weight"][:35]
    y = norm(y, state, f"{read}.embeddings.LayerNorm", 1e-12)
    for layer in range(LAYERS):
        for part, source, mask in (("attention", None, text.attention_mask), ("crossattention", x, None)):
            at = f"{read}.encoder.layer.{layer}.{part}"
            source = y if source is None else source
            q, k, v = (lin(z, state, f"{at}.self.{n}") for z, n in ((y, "query"), (source, "key"), (source, "value")))
            y = norm(y + lin(attend(q, k, v, heads, mask), state, f"{at}.output.dense"), state, f"{at}.output.LayerNorm", 1e-12)
        at = f"{read}.encoder.layer.{layer}"
        z = lin(F.gelu(lin(y, state, f"{at}.intermediate.dense")), state, f"{at}.output.dense")
        y = norm(y + z, state, f"{at}.output.LayerNorm", 1e-12)
    z = y[:, 0]
    for index in (0, 2, 4):
        z = lin(z, state, f"mlp.layers.{index}")
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def imagereward_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "house", "tower", "tree", "and"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.save(imagereward_weights(len(words)), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({"num_attention_heads": 4, "layer_norm_eps": 1e-12}))
    return folder


def test_imagereward_is_the_published_network(imagereward_dir):
    judge = load_judge("imagereward", imagereward_dir)
    long = "a red house and " * 20  # cut at 35 tokens
    prompts = [PROMPTS[0], "a tree", long, "something unknown"]
    expected = imagereward(torch.load(imagereward_dir / "ImageReward.pt", weights_only=True), judge.tokenizer, IMAGES, prompts)
    assert expected.std() > 0.05
    torch.testing.assert_close(score(judge, IMAGES, prompts), expected, atol=1e-4, rtol=1e-4)
    one = score(judge, IMAGES, prompts, batch_size=1)
    torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)


# Gradients, heads, mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hpsv2", "imagereward"])
def test_gradient_with_respect_to_the_picture(kind, hps_dir, imagereward_dir):
    judge = load_judge(kind, hps_dir if kind == "hpsv2" else imagereward_dir)
    x = (0.2 + 0.6 * torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))).requires_grad_()
    judge(x, ["a red house"]).sum().backward()
    step = 0.003 * x.grad / x.grad.abs().max()
    with torch.no_grad():
        rise = judge(x + step, ["a red house"]) - judge(x - step, ["a red house"])
    torch.testing.assert_close(rise, 2 * (x.grad * step).sum()[None], rtol=0.05, atol=1e-4)


@heads
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("v2_l14", "sac+logos+ava1-l14-linearMSE.pth"),
        ("v1_l14", "sa_0_4_vit_l_14_linear.pth"),
        ("v1_b32", "sa_0_4_vit_b_32_linear.pth"),
        ("v1_b16", "sa_0_4_vit_b_16_linear.pth"),
    ],
)
def test_the_heads_that_come_along_are_the_published_ones(name, file):
    weight, bias = load_head(name)
    state = torch.load(HEADS / file, weights_only=True, map_location="cpu")
    x = F.normalize(torch.randn(5, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    expected = x
    for key in sorted((k for k in state if k.endswith("weight")), key=lambda k: int(k.split(".")[1]) if "." in k else 0):
        expected = F.linear(expected, state[key].double(), state[key.replace("weight", "bias")].double())
    torch.testing.assert_close(x.float() @ weight + bias, expected[:, 0].float(), atol=1e-5, rtol=1e-5)


def test_a_published_head_goes_with_the_model_it_was_made_for(tmp_path):
    def config(width, patch, **more):
        (tmp_path / "config.json").write_text(
            json.dumps({"projection_dim": width, "vision_config": {"patch_size": patch, **more}})
        )

    config(768, 14)
    assert (find_head("aesthetic", tmp_path), find_head("aesthetic_v1", tmp_path)) == ("v2_l14", "v1_l14")
    config(512, 16)
    assert find_head("aesthetic_v1", tmp_path) == "v1_b16"
    with pytest.raises(UserError, match=r"none was published .*width 512"):
        find_head("aesthetic", tmp_path)
    config(768, 14, hidden_act="gelu")  # LAION's own ViT-L/14, with other embeddings
    with pytest.raises(UserError, match="gelu"):
        find_head("aesthetic", tmp_path)
    torch.save({"weight": torch.ones(1, 3), "bias": torch.ones(1)}, tmp_path / "aesthetic_head.pth")
    assert find_head("aesthetic", tmp_path) == tmp_path / "aesthetic_head.pth"


def test_weights_that_are_more_than_tensors_are_not_opened(tmp_path):
    class Surprise:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    torch.save({"state_dict": Surprise()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "bad.pt")
    assert not (tmp_path / "opened").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "cut.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no weights by name"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(UserError, match="layer before it writes 2"):
        affine(
            {"layers.0.weight": torch.ones(2, 3), "layers.0.bias": torch.ones(2), "layers.1.weight": torch.ones(1, 5)}, tmp_path
        )


def test_missing_files_are_named(hps_dir, imagereward_dir, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"has no HPS_v2\.1_compressed\.pt .*hf download xswu/HPSv2"):
        load_judge("hpsv2.1", tmp_path)
    with pytest.raises(UserError, match=r"has no ImageReward\.pt \(1\.8 GB\); run 'hf download THUDM/ImageReward"):
        load_judge("imagereward", tmp_path)
    (tmp_path / "HPS_v2_compressed.pt").symlink_to(hps_dir / "HPS_v2_compressed.pt")
    with pytest.raises(UserError, match=r"has no tokenizer.*laion/CLIP-ViT-H-14"):
        load_judge("hpsv2", tmp_path)
    (tmp_path / "tokenizer").symlink_to(hps_dir / "tokenizer")
    with pytest.raises(UserError, match="is no ViT-H/14"):
        load_judge("hpsv2", tmp_path)
    torch.save(torch.load(imagereward_dir / "ImageReward.pt") | {"blip.visual_encoder.new": torch.ones(1)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").symlink_to(imagereward_dir / "vocab.txt")
    (tmp_path / "tokenizer").unlink()
    with pytest.raises(UserError, match="unknown weight new"):
        load_judge("imagereward", tmp_path)


SAMPLE = HEADS.parent / "preferences" / "imagereward-sample"


@pytest.mark.skipif(
    "IMAGEREWARD_FOLDER" not in os.environ, reason="the published ImageReward weights: name their folder in IMAGEREWARD_FOLDER"
)
def test_real_imagereward_scores_what_its_readme_prints():
    judge = load_judge("imagereward", os.environ["IMAGEREWARD_FOLDER"])
    images = [Image.open(SAMPLE / f"{i}.webp") for i in range(1, 5)]
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    assert score(judge, images, [prompt] * 4).tolist() == pytest.approx([0.58, 0.27, -1.41, -2.03], abs=0.03)
