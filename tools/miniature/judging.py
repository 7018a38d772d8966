"""Builder of the miniature judges: the eye of the raters, a contrastive CLIP, two preference judges, an aesthetic head."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palate.base.files import write_atomically
from palate.miniature.captions import ATTRIBUTES, Scene, caption, scene_of
from tools.miniature import scenes
from tools.miniature.base_model import CONTEXT, SEED, build_tokenizer, picture_set, pixels, say, train
from tools.miniature.raters import Eye, Rater, crowd

VOTED_PAIRS = 9000
HELD_OUT_STEPS = 1800
HELD_OUT_SHAPE = {"width": 80, "layers": 4, "patch": 8, "projection": 64}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def soften(x: Tensor, generator: torch.Generator) -> Tensor:
    """Blend pictures with their 3 x 3 mean by a random amount: decoded latents are softer than renders."""
    amount = 0.7 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return torch.lerp(x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1), amount)


def build_eye(work: Path, folder: Path) -> None:
    images, _, labels, appeal = picture_set(work, "shots", SEED, 24_000)
    torch.manual_seed(SEED + 2)
    eye = Eye()

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (64,), generator=generator)
        logits, looks = eye(soften(images[rows].float() / 255, generator))
        parts = eye.split(logits).values()
        return sum((F.cross_entropy(p, labels[rows, i]) for i, p in enumerate(parts)), 8 * F.mse_loss(looks, appeal[rows]))

    train(work, "eye", eye, loss_of, steps=1800, learning_rate=2e-3, seed=SEED + 2)
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in eye.state_dict().items()}, folder / "model.safetensors")
    test, _, truth, looks = picture_set(work, "test-shots", SEED + 90, 2000)
    with torch.no_grad():
        logits, seen = eye(test.float() / 255)
    hits = torch.stack([p.argmax(1) == truth[:, i] for i, p in enumerate(eye.split(logits).values())], 1).float()
    say(f"eye: attributes {hits.mean(0).tolist()} appeal correlation {np.corrcoef(seen, looks)[0, 1]:.3f}")


def voted_pairs(work: Path, name: str, seed: int, count: int, raters: list[Rater]) -> tuple[Tensor, list[str], Tensor]:
    """Pairs of renders for one prompt with the share of ``raters`` preferring the first, judged by the renderer's truth.

    Returns pictures ``(n, 2, 3, 64, 64)`` uint8, captions, labels ``(n,)``.
    """
    path = work / f"{name}.pt"
    if not path.exists():
        say(f"rendering {count} voted pairs for {name}")
        both, captions, labels = [], [], []
        for index in range(count):
            rng = np.random.default_rng([seed, index])
            asked = scenes.random_scene(rng)
            taken = [scenes.shoot(near_miss(asked, rng), rng, flaw_share=0.55) for _ in range(2)]
            follow = [np.mean([a == b for a, b in zip(t.shown.labels(), asked.labels(), strict=True)]) for t in taken]
            looks = [t.appeal for t in taken]
            votes = []
            for rater in raters:
                worth = rater.worth(np.asarray(looks), np.asarray(follow), "general")
                votes.append(rater.vote(worth[0], worth[1], rng))
            both.append(pixels(taken))
            captions.append(caption(asked, rng))
            labels.append(float(np.mean(votes)))
        record = {"pixels": torch.stack(both), "captions": captions, "labels": torch.tensor(labels)}
        write_atomically(path, functools.partial(torch.save, record))
    record = torch.load(path, weights_only=True)
    return record["pixels"], record["captions"], record["labels"]


def near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene itself, or with one or two attributes changed."""
    changes = int(rng.choice([0, 1, 2], p=[0.55, 0.3, 0.15]))
    for name in rng.choice(list(ATTRIBUTES), size=changes, replace=False):
        others = [v for v in ATTRIBUTES[name] if v != getattr(scene, name)]
        scene = replace(scene, **{str(name): str(rng.choice(others))})
    return scene


def new_clip(vocab_size: int, *, width: int, layers: int, patch: int, projection: int):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    special = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
    text = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        projection_dim=projection,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=scenes.SIZE,
        patch_size=patch,
        projection_dim=projection,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=projection))


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Taught(nn.Module):
    """A CLIP model with throw-away heads that read the attributes of both towers: they teach it where to look."""

    def __init__(self, clip: nn.Module, projection: int):
        super().__init__()
        self.clip = clip
        values = sum(map(len, ATTRIBUTES.values()))
        self.image_head, self.text_head = nn.Linear(projection, values), nn.Linear(projection, values)


def attribute_loss(logits: Tensor, labels: Tensor) -> Tensor:
    parts = Eye.split(logits).values()
    return torch.stack([F.cross_entropy(p, labels[:, i]) for i, p in enumerate(parts)]).mean()


def save_clip(clip, folder: Path) -> None:
    import json

    build_tokenizer(folder)
    clip.half().save_pretrained(folder)
    clip.float()
    size = clip.config.vision_config.image_size
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": size},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": size, "width": size},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": MEAN,
                "image_std": STD,
                "do_convert_rgb": True,
            },
            indent=2,
        )
    )


def token_ids(folder: Path, captions: list[str]) -> Tensor:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def build_clip(work: Path, folder: Path) -> None:
    """Contrastive training on picture and caption, as CLIP's, with attribute heads beside."""
    build_tokenizer(folder)
    images, captions, labels, _ = picture_set(work, "shots", SEED, 24_000)
    asked = torch.tensor([scene_of(c).labels() for c in captions])
    ids = token_ids(folder, captions)
    torch.manual_seed(SEED + 3)
    model = Taught(new_clip(int(ids.max()) + 1, width=96, layers=3, patch=8, projection=96), 96)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (96,), generator=generator)
        x = normalised(soften(images[rows].float() / 255, generator))
        out = model.clip(input_ids=ids[rows], pixel_values=x)
        # Pictures of scenes that a caption also fits are no negatives.
        same = (asked[rows][:, None] == labels[rows][None]).all(-1).float() + torch.eye(len(rows))
        target = (same > 0).float()
        logits = out.logits_per_text
        contrast = -(logits.log_softmax(1) * target / target.sum(1, keepdim=True)).sum(1).mean()
        contrast = contrast - (logits.T.log_softmax(1) * target.T / target.T.sum(1, keepdim=True)).sum(1).mean()
        heads = attribute_loss(model.image_head(10 * out.image_embeds), labels[rows])
        heads = heads + attribute_loss(model.text_head(10 * out.text_embeds), asked[rows])
        return 0.5 * contrast + heads

    train(work, "clip", model, loss_of, steps=1500, learning_rate=1e-3, seed=SEED + 3)
    save_clip(model.clip, folder)


def build_preference(work: Path, folder: Path, *, start: Path | None, seed: int, pairs: str, steps: int, **shape: int) -> None:
    """A preference judge in PickScore's form: softmax over exp(scale) * cosine of the two pictures of a prompt."""
    from transformers import CLIPModel

    build_tokenizer(folder)
    images, captions, label = voted_pairs(work, pairs, seed, VOTED_PAIRS, crowd(5, seed=seed))
    ids = token_ids(folder, captions)
    asked = torch.tensor([scene_of(c).labels() for c in captions])
    torch.manual_seed(seed)
    clip = CLIPModel.from_pretrained(start, dtype=torch.float32) if start else new_clip(int(ids.max()) + 1, **shape)
    model = Taught(clip, clip.config.projection_dim)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (56,), generator=generator)
        x = soften(images[rows].flatten(0, 1).float() / 255, generator)
        out = model.clip(input_ids=ids[rows], pixel_values=normalised(x))
        picture = out.image_embeds.view(len(rows), 2, -1)
        score = model.clip.logit_scale.exp() * torch.einsum("bkd,bd->bk", picture, out.text_embeds)
        wanted = torch.stack([label[rows], 1 - label[rows]], 1)
        preference = -(wanted * score.log_softmax(1)).sum(1).mean()
        return preference + 0.3 * attribute_loss(model.text_head(10 * out.text_embeds), asked[rows])

    train(work, folder.name, model, loss_of, steps=steps, learning_rate=7e-4, seed=seed)
    save_clip(model.clip, folder)
    accuracy(work, folder)


def accuracy(work: Path, folder: Path) -> float:
    """Accuracy on pairs of renders it has not seen, against the renderer's truth; the truth's ties are left out."""
    from transformers import CLIPModel

    images, captions, label = voted_pairs(work, "test-pairs", SEED + 91, 1500, crowd(9, seed=91))
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids, right, judged = token_ids(folder, captions), 0.0, 0
    with torch.no_grad():
        for rows in torch.arange(len(images)).split(100):
            out = clip(input_ids=ids[rows], pixel_values=normalised(images[rows].flatten(0, 1).float() / 255))
            score = torch.einsum("bkd,bd->bk", out.image_embeds.view(len(rows), 2, -1), out.text_embeds)
            clear = label[rows] != 0.5
            right += float(((score[:, 0] > score[:, 1]) == (label[rows] > 0.5))[clear].sum())
            judged += int(clear.sum())
    say(f"{folder.name}: accuracy {right / judged:.4f} on {judged} unseen pairs")
    return right / judged


def build_aesthetic(work: Path, clip_folder: Path, folder: Path) -> None:
    """A linear head on L2-normalised image embeddings of the miniature CLIP, on a scale of 1 to 10 (LAION v1's form)."""
    import shutil

    from safetensors.torch import save_file
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    images, _, _, appeal = picture_set(work, "shots", SEED, 24_000)
    x, y = picture_embeddings(clip, images[:8000]), 1 + 9 * appeal[:8000]
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    ridge = 1e-5 * len(x) * torch.eye(design.shape[1])
    weight = torch.linalg.solve(design.T @ design + ridge, design.T @ y)
    shutil.copytree(clip_folder, folder, dirs_exist_ok=True)
    save_file(
        {"weight": weight[:-1][None].contiguous(), "bias": weight[-1:].contiguous()}, folder / "aesthetic_head.safetensors"
    )
    aesthetic_correlation(work, folder)


def aesthetic_correlation(work: Path, folder: Path) -> float:
    """Correlation of the aesthetic judge with the renderer's truth about unseen renders."""
    from safetensors.torch import load_file
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    head = load_file(folder / "aesthetic_head.safetensors")
    test, _, _, truth = picture_set(work, "test-shots", SEED + 90, 2000)
    guess = picture_embeddings(clip, test) @ head["weight"][0] + head["bias"]
    found = float(np.corrcoef(guess, truth)[0, 1])
    say(f"aesthetic: correlation with the truth {found:.3f}")
    return found


@torch.no_grad()
def picture_embeddings(clip, images: Tensor) -> Tensor:
    """L2-normalised projected embeddings ``(n, d)`` of uint8 pictures."""
    anything = torch.full((1, 2), clip.config.text_config.eos_token_id)
    parts = [clip(input_ids=anything, pixel_values=normalised(x.float() / 255)).image_embeds for x in images.split(200)]
    return torch.cat(parts)


@torch.no_grad()
def caption_accuracy(work: Path, folder: Path) -> float:
    """How often the caption of an unspoilt render scores above the same caption with one attribute changed."""
    from transformers import CLIPModel

    clip, right, total = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), 0, 1000
    taken, good, wrong = [], [], []
    for index in range(total):
        rng = np.random.default_rng([SEED + 92, index])
        scene = scenes.random_scene(rng)
        name = str(rng.choice(list(ATTRIBUTES)))
        other = replace(scene, **{name: str(rng.choice([v for v in ATTRIBUTES[name] if v != getattr(scene, name)]))})
        taken.append(scenes.shoot(scene, rng, flaw_share=0.0, wrong_share=0.0))
        good.append(caption(scene))
        wrong.append(caption(other))
    images, ids = pixels(taken), token_ids(folder, good + wrong)
    for rows in torch.arange(total).split(100):
        x = normalised(images[rows].float() / 255)
        scores = [
            (out.image_embeds * out.text_embeds).sum(1)
            for out in (clip(input_ids=ids[rows + shift], pixel_values=x) for shift in (0, total))
        ]
        right += int((scores[0] > scores[1]).sum())
    say(f"{folder.name}: right caption preferred in {right / total:.3f} of {total}")
    return right / total
