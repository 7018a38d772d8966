"""Does the picture show what was asked for? Three judges that ask a vision model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError, short
from palate.base.hub import is_hub_id, snapshot
from palate.base.jsonl import read_lines
from palate.base.options import at_least
from palate.judges.bertscore import BertScore
from palate.judges.pictures import one_each
from palate.judges.vision import Endpoint, LocalVision, VisionModel, VisionOptions, find_model

if TYPE_CHECKING:
    from palate.judges import Judge

SHOWS = 'Does this figure show "{prompt}"? Please answer Yes or No.'
DESCRIBE = "Answer concisely: what is going on in this image?"
CONTAINS = "The image contains {prompt}"
BERT = "microsoft/deberta-xlarge-mnli"
BERT_LAYER = 40  # of 48; the layer the authors of BERTScore chose for this encoder

Questions = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""Prompt -> questions and, as many, the words their answers must contain."""


class VqaScore:
    """P("Yes") to 'Does this figure show "{prompt}"?', 0 to 1 (Lin et al. 2024, "VQAScore", Eq. 1)."""

    def __init__(self, vision: VisionModel):
        self.vision = vision

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        one_each(images, prompts)
        return self.vision.yes(images, [SHOWS.format(prompt=p) for p in prompts]).to(images.device)


class DescriptionScore:
    """BERTScore recall of "The image contains {prompt}" in the model's description (Black et al. 2023, DDPO, sec. 5.2)."""

    def __init__(self, vision: VisionModel, bert: BertScore):
        self.vision, self.bert = vision, bert

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        one_each(images, prompts)
        said = self.vision.answer(images, [DESCRIBE] * len(prompts))
        return self.bert.recall(said, [CONTAINS.format(prompt=p) for p in prompts]).to(images.device)


class AnswerScore:
    """Share of a prompt's questions whose expected word occurs in the answer, as DDPO's code counts (upper and lower case)."""

    def __init__(self, vision: VisionModel, questions: Questions):
        self.vision, self.questions = vision, questions

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        one_each(images, prompts)
        if unknown := [p for p in prompts if p not in self.questions]:
            raise UserError(f"there are no questions about the prompt {short(unknown[0])}; add it to the file of questions")
        rows = [(i, q, a) for i, p in enumerate(prompts) for q, a in zip(*self.questions[p], strict=True)]
        said = self.vision.answer(images[[i for i, _, _ in rows]], [q for _, q, _ in rows])
        hits, asked = torch.zeros(len(prompts)), torch.zeros(len(prompts))
        for (i, _, wanted), reply in zip(rows, said, strict=True):
            hits[i] += wanted in reply
            asked[i] += 1
        return (hits / asked).to(images.device)


def read_questions(path: Path) -> Questions:
    """From JSONL, ``{"prompt": ..., "questions": [...], "answers": [...]}`` a line; raises ``UserError`` with the line."""
    found = {}
    for number, row in read_lines(path, expected="JSONL with prompt, questions, answers"):
        try:
            prompt, questions, answers = (row[key] for key in ("prompt", "questions", "answers"))
            if not questions or len(questions) != len(answers) or not all(isinstance(t, str) for t in [*questions, *answers]):
                raise ValueError("as many answers as questions are needed, at least one, all texts")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error}; expected prompt, questions, answers") from error
        found[str(prompt)] = (tuple(questions), tuple(answers))
    if not found:
        raise UserError(f"{path} holds no questions; expected JSONL with prompt, questions, answers")
    return found


@dataclass(frozen=True, kw_only=True)
class Options(VisionOptions):
    """Of the vision model, and of what reads its answers."""

    questions: str = ""
    """File of ``vlm_strict``, as :func:`read_questions` reads it."""
    bert: str = BERT
    """Folder or hub id of the text encoder of ``vlm_bertscore``."""
    layer: Annotated[int, at_least(1, 1000)] = BERT_LAYER
    """Of that encoder, whose states are compared."""


def prepare(kind: str, place: Path | str, options: Options) -> Callable[[str | torch.device], Judge]:
    """Around a folder in transformers' layout, or an endpoint's URL (ending in ``/v1`` as a rule) with its ``model``."""
    if kind == "vlm_strict" and not options.questions:
        raise UserError("judge vlm_strict needs ?questions=FILE.jsonl with prompt, questions and answers")
    questions = read_questions(Path(options.questions).expanduser()) if kind == "vlm_strict" else {}
    see = _vision(place, options)
    if kind == "vqascore":
        return lambda device: VqaScore(see(device))
    if kind == "vlm_strict":
        return lambda device: AnswerScore(see(device), questions)
    bert = _bert_folder(options.bert)
    return lambda device: DescriptionScore(see(device), BertScore.load(bert, device, options.layer))


def _vision(place: Path | str, options: VisionOptions) -> Callable[[str | torch.device], VisionModel]:
    """What loads the model of a folder, or asks that of an endpoint, once it is known to be there."""
    if isinstance(place, str):
        endpoint = Endpoint(place, find_model(place, options.model), options)
        return lambda _: endpoint
    if not (place / "config.json").is_file():
        raise UserError(f"{place} has no config.json; expected the folder of an image-text model of transformers")
    return lambda device: LocalVision.load(place, device, options)


def _bert_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(name):
        raise UserError(f"no folder {name}; expected that of a text encoder for ?bert=")
    short = f"models/{name.split('/')[-1]}"
    how = f"Without a network, run 'hf download {name} --local-dir {short}' where there is one, copy it here, add ?bert={short}"
    return snapshot(name, ("*.json", "*.txt", "*.safetensors", "pytorch_model.bin"), otherwise=how)
