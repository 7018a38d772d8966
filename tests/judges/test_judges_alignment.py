"""Judges that ask a vision model: a tiny random LLaVA, a scripted endpoint, and BERTScore against its authors' formula."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from palate.base.errors import UserError
from palate.judges import check_judge, load_judge
from palate.judges.alignment import AnswerScore, DescriptionScore, read_questions
from palate.judges.bertscore import BertScore
from palate.judges.vision import LocalVision, VisionOptions
from palate.names.judges import find_judges

WORDS = ["a", "red", "blue", "house", "tower", "tree", "and", "the", "image", "contains", "Yes", "No", "is", "this"]


def word_tokenizer(*special: str):
    """Whole words only, between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        extra_special_tokens={"image_token": special[0]} if special else {},
    )


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.5,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def authors_recall(folder, candidate: str, reference: str, layers: int) -> float:
    """bert_score's greedy matching, one pair at a time: states of a hidden layer, weight 0 for what begins and ends."""
    from transformers import AutoTokenizer, BertModel

    model, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    states = []
    for text in (candidate, reference):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            hidden = model(**ids, output_hidden_states=True).hidden_states[layers][0]
        states.append(hidden / hidden.norm(dim=-1, keepdim=True))
    similarity = states[0] @ states[1].T
    weight = torch.ones(len(states[1]))
    weight[0] = weight[-1] = 0
    return float((similarity.max(dim=0).values * weight / weight.sum()).sum())


def test_recall_is_the_authors(bert_dir):
    said = ["a red house", "the image contains a blue tower and a tree", "No", "  a house ", "a " * 40]
    meant = ["the image contains a red house", "a blue tower", "Yes", "a house", "a red tree"]
    score = BertScore.load(bert_dir, "cpu", 2)
    expected = [authors_recall(bert_dir, s, m, 2) for s, m in zip(said, meant, strict=True)]
    assert max(expected) - min(expected) > 0.05
    assert score.recall(said, meant).tolist() == pytest.approx(expected, abs=1e-5)
    assert score.recall(["a house"], ["a house"]).item() == pytest.approx(1)
    assert not score.recall(["a house"], ["a house"]).requires_grad  # frozen, whoever asks


def test_recall_of_nothing_is_nothing(bert_dir):
    score = BertScore.load(bert_dir, "cpu", 3)
    assert score.recall(["", "a"], ["a", ""]).tolist() == [0, 0]
    with pytest.raises(UserError, match="layer is 9; the text encoder has 3"):
        BertScore.load(bert_dir, "cpu", 9)


@pytest.fixture(scope="module")
def llava_dir(tmp_path_factory):
    """A LLaVA model of random weights: the published architecture, a chat template and a processor."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = word_tokenizer("<image>")
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=16, patch_size=8),
            text_config=LlamaConfig(**tower, vocab_size=len(tokenizer), num_key_value_heads=2, pad_token_id=0),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_vqascore_is_the_probability_of_yes(llava_dir):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    judge = load_judge("vqascore", llava_dir, dtype="float32", batch_size=2)
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a red house", "a tree", "a blue tower and a tree and a house"]
    found = judge(x, prompts)
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava_dir).eval(), AutoProcessor.from_pretrained(llava_dir)
    for row, prompt in enumerate(prompts):  # one at a time, so without padding
        picture = Image.fromarray((x[row] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        text = f'<image> Does this figure show "{prompt}"? Please answer Yes or No.'
        inputs = processor(images=picture, text=text, return_tensors="pt")
        with torch.no_grad():
            shares = model(**inputs).logits[0, -1].softmax(-1)
        assert found[row].item() == pytest.approx(shares[processor.tokenizer.convert_tokens_to_ids("Yes")].item(), rel=1e-3)
    assert found.std() > 1e-4


def test_descriptions_and_answers_of_a_local_model(llava_dir, bert_dir, tmp_path):
    vision = LocalVision.load(llava_dir, "cpu", VisionOptions(dtype="float32", batch_size=2, max_tokens=5))
    x = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    said = vision.answer(x, ["is this a house"] * 3)
    assert said == [vision.answer(x[i : i + 1], ["is this a house"])[0] for i in range(3)]
    assert all(set(text.split()) <= set(WORDS) for text in said)
    name = f"vlm_bertscore:{llava_dir}?bert={bert_dir}&layer=2&dtype=float32&max_tokens=5"
    scores = find_judges([name])[name].load()(x, ["a red house"] * 3)
    described = vision.answer(x, ["Answer concisely: what is going on in this image?"] * 3)
    expected = BertScore.load(bert_dir, "cpu", 2).recall(described, ["The image contains a red house"] * 3)
    torch.testing.assert_close(scores, expected)


class Scripted:
    """Answers by colour: what a perfect vision model would say of a plain picture."""

    def __init__(self):
        self.asked = []

    def answer(self, images, questions):
        self.asked += list(questions)
        return ["It is red" if image[0].mean() > 0.5 else "It is blue" for image in images]

    def yes(self, images, questions):
        return images[:, 0].mean(dim=(1, 2))


def test_share_of_questions_answered_as_expected(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [("a red cat", ["What colour?", "What animal?"], ["red", "cat"]), ("blue", ["What colour?"], ["blue"])]
    lines = [json.dumps(dict(zip(("prompt", "questions", "answers"), row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    vision = Scripted()
    judge = AnswerScore(vision, read_questions(path))
    x = torch.stack([torch.ones(3, 4, 4), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)])
    assert judge(x, ["a red cat", "a red cat", "blue"]).tolist() == [0.5, 0, 1]
    assert vision.asked == ["What colour?", "What animal?"] * 2 + ["What colour?"]
    with pytest.raises(UserError, match="no questions about the prompt 'dog'"):
        judge(x[:1], ["dog"])
    path.write_text('{"prompt": "a", "questions": ["b"], "answers": []}\n')
    with pytest.raises(UserError, match="line 1: as many answers"):
        read_questions(path)


@pytest.fixture
def endpoint():
    """An OpenAI-compatible endpoint with one model; ``seen`` holds its requests, ``say`` what it answers."""
    seen: list[dict] = []
    say: dict = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"data": [{"id": "tiny-vl"}]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(request | {"path": self.path, "key": self.headers.get("Authorization")})
            url = request["messages"][0]["content"][0]["image_url"]["url"]
            picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
            red = picture.convert("RGB").resize((1, 1)).getpixel((0, 0))[0] > 127
            if say:
                return self.reply(dict(say))
            likely = [
                {"token": "Yes", "logprob": math.log(0.75 if red else 0.25)},
                {"token": " Yes", "logprob": math.log(0.125)},
            ]
            choice = {"message": {"content": " a red house " if red else "No"}}
            if request.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": "Yes", "top_logprobs": [*likely, {"token": "No", "logprob": -9}]}]}
            return self.reply({"choices": [choice]})

        def reply(self, content):
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen, say
    server.shutdown()
    server.server_close()


X = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])


def test_an_endpoint_answers_as_a_model_here_would(endpoint, bert_dir, monkeypatch):
    url, seen, _ = endpoint
    monkeypatch.setenv("PALATE_API_KEY", "k")
    name = f"vqascore:{url}#tiny-vl"
    judge = find_judges([name])[name].load()
    assert judge(X, ["a red house", "a tree"]).tolist() == pytest.approx([0.875, 0.375])
    assert {request["path"] for request in seen} == {"/v1/chat/completions"}
    asked = sorted(request["messages"][0]["content"][1]["text"] for request in seen)
    assert asked[0] == 'Does this figure show "a red house"? Please answer Yes or No.'
    assert all(r["model"] == "tiny-vl" and r["temperature"] == 0 and r["max_tokens"] == 1 for r in seen)
    assert {request["key"] for request in seen} == {"Bearer k"}
    described = load_judge("vlm_bertscore", url, bert=str(bert_dir), layer=2)
    assert isinstance(described, DescriptionScore)
    expected = BertScore.load(bert_dir, "cpu", 2).recall(["a red house", "No"], ["The image contains a red house"] * 2)
    torch.testing.assert_close(described(X, ["a red house"] * 2), expected)


def test_an_endpoint_that_talks_nonsense(endpoint):
    url, _, say = endpoint
    judge = load_judge("vqascore", url)
    for nonsense in ({"choices": []}, {"error": "x"}, {"choices": [{"logprobs": {"content": []}}]}):
        say.clear()
        say.update(nonsense)
        with pytest.raises(UserError, match="expected choices"):
            judge(X, ["a", "b"])
    say.clear()
    say.update({"choices": [{"message": {"content": "Yes"}}]})
    with pytest.raises(UserError, match="no log probabilities"):
        judge(X, ["a", "b"])
    with pytest.raises(UserError, match="one prompt per picture"):
        judge(X, ["a"])


def test_mistakes_are_named(endpoint, tmp_path):
    url = endpoint[0]
    with pytest.raises(UserError, match=r"has no model 'tiny-vi' .did you mean 'tiny-vl'"):
        find_judges([f"vqascore:{url}#tiny-vi"])
    with pytest.raises(UserError, match=r"needs \?questions="):
        find_judges([f"vlm_strict:{url}"])
    with pytest.raises(UserError, match="needs the folder"):
        find_judges(["vqascore"])
    with pytest.raises(UserError, match=r"has no config\.json"):
        find_judges([f"vqascore:{tmp_path}"])
    with pytest.raises(UserError, match="does not answer"):
        find_judges(["vqascore:http://127.0.0.1:9/v1"])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vqascore", {"layer": 0}, "judge vqascore: layer is 0; expected 1 to 1000"),
        ("vqascore", {"retries": -1}, "judge vqascore: retries is -1; expected 0 to 1000"),
        ("vqascore", {"dtype": "float8"}, "dtype is 'float8'"),
        ("vlm_strict", {}, "needs .questions="),
        ("vlm_strict", {"questions": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
        ("vlm_bertscore", {"bert": "./nowhere"}, "no folder ./nowhere; expected that of a text encoder"),
        ("remote", {"batch_size": 0}, "judge remote: batch_size is 0; expected 1 to 65536"),
        ("vqascore", {"layers": 2}, "has no option 'layers' .did you mean 'layer'"),
    ],
)
def test_what_is_refused_before_weights_are_read_is_refused_by_loading_too(endpoint, kind, options, message):
    for begin in (check_judge, load_judge):
        with pytest.raises(UserError, match=message):
            begin(kind, endpoint[0], **options)
