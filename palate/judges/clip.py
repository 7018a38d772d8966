"""Judges in CLIP's layout: the score is a cosine between the embeddings of picture and prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from palate.base.errors import UserError, nearest
from palate.judges.kinds import tokenizer_folder
from palate.judges.pictures import Preprocess, one_each
from palate.judges.weights import DTYPES, Options, model_in, reading

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

KINDS = ("clipscore", "pickscore", "hpsv2", "hpsv2.1")
REMEMBERED = 10_000
"""Prompts whose embeddings are kept: 40 MB at most."""


class Clip:
    """A frozen CLIP model with its tokenizer: embeddings of pictures and prompts, shared by the judges made of it.

    A prompt is embedded once, however many pictures are judged by it.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        # An unset limit of a tokenizer is a huge number; the text tower has a position for each token it can read.
        self.max_length = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def image_size(self) -> int:
        """Pixels of a side of the pictures it reads."""
        return self.model.config.vision_config.image_size

    def embed_images(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d"]:
        """L2-normalised, float32; differentiable. Without a pass through the text half."""
        pixels = pixels.to(self.device, self.model.dtype)
        features = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()  # what is remembered outlives the graph of a call
    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        """L2-normalised, float32, cut at the tokenizer's limit (77 tokens in the published models); without gradient."""
        found = {prompt: self._known[prompt] for prompt in prompts if prompt in self._known}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            # Padded to the longest only: the text tower is causal and read at its end token, so padding changes nothing.
            text = self.tokenizer(part, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
            ids, mask = text.input_ids.to(self.device), text.attention_mask.to(self.device)
            pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
            features = F.normalize(self.model.text_projection(pooled).float(), dim=-1)
            found |= dict(zip(part, features, strict=True))
        for prompt in new:
            self._known[prompt] = found[prompt]
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return torch.stack([found[prompt] for prompt in prompts])


_shared: WeakValueDictionary[tuple[str, ...], Clip] = WeakValueDictionary()


def shared_clip(make: Callable[[], Clip], *key: object) -> Clip:
    """The model made earlier under the same key, as long as a judge uses it: two judges of one folder load it once."""
    name = tuple(map(str, key))
    found = _shared.get(name)
    if found is None:
        found = _shared[name] = make()
    return found


def load_clip(folder: Path, kind: str, device: str | torch.device = "cpu", dtype: str = "float32") -> Clip:
    """From a folder in transformers' layout; weights must be safetensors and complete. Shared by judges of one folder."""
    words = check_clip(folder, kind)

    def make() -> Clip:
        from transformers import CLIPModel

        model = model_in(CLIPModel.from_pretrained, folder, DTYPES[dtype], use_safetensors=True)
        return Clip(model.to(device), load_tokenizer(words))

    return shared_clip(make, folder.resolve(), device, dtype)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return reading(folder, lambda: CLIPTokenizer.from_pretrained(folder, local_files_only=True))


def check_clip(folder: Path, kind: str) -> Path:
    """The folder of the tokenizer; raises ``UserError`` if a file is missing, without reading any weights."""
    for names in (("config.json",), ("model.safetensors", "model.safetensors.index.json")):
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"{folder} has no {' or '.join(names)}; expected a CLIP model saved by transformers (save_pretrained)"
            )
    return clip_tokenizer(kind, folder)


def clip_tokenizer(kind: str, folder: Path) -> Path:
    return tokenizer_folder(kind, folder, "vocab.json", "merges.txt")


class ClipJudge:
    """PickScore, HPS or CLIPScore.

    - ``pickscore``: exp(logit_scale) * cos, about 18 to 24 (Kirstain et al. 2023, "Pick-a-Pic", Eq. 1 and model card).
    - ``hpsv2``, ``hpsv2.1``: cos, about 0.2 to 0.35 (Wu et al. 2023, "Human Preference Score v2"); its tables print 100 cos.
    - ``clipscore``: 100 * cos, neither clamped at 0 nor with a prefix to the prompt, about 20 to 35. Other conventions of
      the same name: 2.5 * max(cos, 0) (Hessel et al. 2021, Eq. 1), 100 * max(cos, 0) (torchmetrics).

    Prompts are cut at the tokenizer's limit (77 for the published models).

    read: what a prompt becomes before the tokenizer reads it.
    """

    def __init__(self, kind: str, clip: Clip, preprocess: Preprocess, read: Callable[[str], str] = str):
        if kind not in KINDS:
            raise UserError(f"unknown CLIP judge {kind!r}{nearest(kind, KINDS)}")
        self.clip, self.preprocess, self.read = clip, preprocess, read
        self.scale = {"pickscore": float(clip.model.logit_scale.exp()), "clipscore": 100.0}.get(kind, 1.0)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.score_pixels(self.preprocess(images.to(self.clip.device)), prompts)

    def score_pixels(self, pixels: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """As a call, of pictures that are already preprocessed."""
        one_each(pixels, prompts)
        return self.scale * (self.clip.embed_images(pixels) * self.clip.embed_texts(list(map(self.read, prompts)))).sum(dim=-1)


def prepare(kind: str, place: Path, options: Options) -> Callable[[str | torch.device], ClipJudge]:
    """From a folder that ``save_pretrained`` of transformers wrote."""
    check_clip(place, kind)

    def load(device: str | torch.device) -> ClipJudge:
        clip = load_clip(place, kind, device, options.dtype)
        return ClipJudge(kind, clip, Preprocess.load(place, clip.image_size, floor=kind == "pickscore"))

    return load
