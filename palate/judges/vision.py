"""Models that look at a picture and answer a question: on this machine, or behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from palate.base.errors import UserError, nearest
from palate.base.options import SECONDS, Batch, at_least
from palate.data.images import encoded, to_pictures
from palate.judges.http import ask
from palate.judges.weights import DTYPES, Options, model_in, reading

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

Said = TypeVar("Said", str, float)


@dataclass(frozen=True, kw_only=True)
class VisionOptions(Options):
    """How a vision model is run or asked."""

    model: str = ""
    """Name at an endpoint; its only one unless given."""
    dtype: str = "bfloat16"
    """Of a model on this machine."""
    batch_size: Batch = 4
    """Pictures seen at once on this machine."""
    max_tokens: Annotated[int, at_least(1, 10**5)] = 128
    """Of an answer."""
    concurrency: Annotated[int, at_least(1, 256)] = 4
    """Requests to an endpoint at a time."""
    timeout: Annotated[float, SECONDS] = 120.0
    """Seconds that an endpoint may take."""
    retries: Annotated[int, at_least(0, 1000)] = 4


@runtime_checkable
class VisionModel(Protocol):
    """One question a picture, ``(b, 3, h, w)`` in [0, 1]; greedy answers."""

    def answer(self, images: Float[Tensor, "b 3 h w"], questions: Sequence[str]) -> list[str]: ...

    def yes(self, images: Float[Tensor, "b 3 h w"], questions: Sequence[str]) -> Float[Tensor, " b"]:
        """Probability that the answer begins with the token "Yes", float32 on the CPU."""
        ...


class LocalVision:
    """Any of transformers' image-text models whose processor has a chat template, such as Qwen2.5-VL or SmolVLM."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, options: VisionOptions):
        self.model, self.processor, self.options = model.eval().requires_grad_(False), processor, options
        self.processor.tokenizer.padding_side = "left"  # so that the last position of every row is its last token
        self.yes_token = processor.tokenizer.encode("Yes", add_special_tokens=False)[0]

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, options: VisionOptions) -> LocalVision:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = model_in(AutoModelForImageTextToText.from_pretrained, folder, DTYPES[options.dtype], use_safetensors=True)
        processor = reading(folder, lambda: AutoProcessor.from_pretrained(folder, local_files_only=True))
        if not getattr(processor, "chat_template", None):
            raise UserError(f"{folder} has no chat template, so it is unknown how to ask it; take a model that has one")
        return cls(model.to(device), processor, options)

    def answer(self, images: Float[Tensor, "b 3 h w"], questions: Sequence[str]) -> list[str]:
        def of(inputs: BatchFeature) -> list[str]:
            written = self.model.generate(**inputs, max_new_tokens=self.options.max_tokens, do_sample=False)
            new = written if self.model.config.is_encoder_decoder else written[:, inputs["input_ids"].shape[1] :]
            return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

        return self._in_batches(images, questions, of)

    def yes(self, images: Float[Tensor, "b 3 h w"], questions: Sequence[str]) -> Float[Tensor, " b"]:
        def of(inputs: BatchFeature) -> list[float]:
            found = self.model.generate(
                **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            return found.logits[0].float().softmax(dim=-1)[:, self.yes_token].tolist()

        return torch.tensor(self._in_batches(images, questions, of), dtype=torch.float32)

    def _in_batches(self, images: Tensor, questions: Sequence[str], work: Callable[[BatchFeature], list[Said]]) -> list[Said]:
        found: list[Said] = []
        for start in range(0, len(questions), self.options.batch_size):
            rows = slice(start, start + self.options.batch_size)
            talks = [
                [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
                for picture, question in zip(to_pictures(images[rows]), questions[rows], strict=True)
            ]
            inputs = self.processor.apply_chat_template(
                talks,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
            found += work(inputs.to(self.model.device, dtype=self.model.dtype))
        return found


class Endpoint:
    """A vision model behind ``URL/chat/completions``: vLLM, Ollama, LM Studio, hosted ones.

    Pictures go as JPEG of quality 95 in base64. The key is what the environment variable ``PALATE_API_KEY`` holds.
    """

    def __init__(self, url: str, model: str, options: VisionOptions):
        self.url, self.model, self.options = url.rstrip("/"), model, options

    def answer(self, images: Float[Tensor, "b 3 h w"], questions: Sequence[str]) -> list[str]:
        def text(choice: dict[str, Any]) -> str:
            content = choice["message"]["content"]
            if not isinstance(content, str):
                raise TypeError
            return content.strip()

        return self._each(images, questions, text, max_tokens=self.options.max_tokens)

    def yes(self, images: Float[Tensor, "b 3 h w"], questions: Sequence[str]) -> Float[Tensor, " b"]:
        def share(choice: dict[str, Any]) -> float:
            if not choice.get("logprobs"):
                raise UserError(f"{self.url} gives no log probabilities, which VQAScore needs; vLLM does, or give a folder")
            first = choice["logprobs"]["content"][0]["top_logprobs"]
            # What is not among the likeliest 20 counts as 0.
            return sum(math.exp(token["logprob"]) for token in first if token["token"].strip() == "Yes")

        found = self._each(images, questions, share, max_tokens=1, logprobs=True, top_logprobs=20)
        return torch.tensor(found, dtype=torch.float32)

    def _each(
        self, images: Tensor, questions: Sequence[str], read: Callable[[dict[str, Any]], Said], **asked: int
    ) -> list[Said]:
        def one(file: bytes, question: str) -> Said:
            picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(file).decode()}"}}
            talk = [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
            content = {"model": self.model, "messages": talk, "temperature": 0, **asked}
            answer = ask(f"{self.url}/chat/completions", content, timeout=self.options.timeout, retries=self.options.retries)
            try:
                return read(answer["choices"][0])
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
                raise UserError(
                    f"{self.url} answers {str(answer)[:120]}; expected choices with a message, as OpenAI's endpoint gives them"
                ) from None

        with ThreadPoolExecutor(self.options.concurrency) as pool:
            return list(pool.map(one, encoded(images, "JPEG", quality=95), questions))


def find_model(url: str, wanted: str) -> str:
    """The model to ask at an endpoint: the one wanted, or the only one; raises ``UserError`` if it is not there."""
    answer = ask(f"{url.rstrip('/')}/models", timeout=10.0, retries=1)
    try:
        known = [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError):
        raise UserError(f"{url} lists no models (it answers {str(answer)[:120]}); expected a URL such as .../v1") from None
    if wanted in known:
        return wanted
    if not wanted and len(known) == 1:
        return known[0]
    which = f"has no model {wanted!r}" if wanted else "has several models; write one behind the URL as #model"
    raise UserError(f"{url} {which}{nearest(wanted, known)}")
