"""Prompts and seeds as A1111, ComfyUI and SwarmUI write them into pictures, worked out by hand."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from palate.data.metadata import Drawn, parameters, plain_words, read_drawn, workflow

A1111 = (
    "a (red:1.3) boat, ((calm)) sea <lora:boats:0.8>\nsecond line\n"
    "Negative prompt: blurry, [ugly]\n"
    'Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 12345, Size: 512x768, Model hash: abc, Model: dream_8, Hashes: "b: 1"'
)
SWARM = {"sui_image_params": {"prompt": "a cat", "negativeprompt": "dog", "model": "Official/sd_xl.safetensors", "seed": 7}}


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


GRAPH = {
    "4": node("CheckpointLoaderSimple", ckpt_name="sub\\dream.safetensors"),
    "10": node("LoraLoader", model=["4", 0], clip=["4", 1], lora_name="boats"),
    "6": node("CLIPTextEncode", text="a red boat", clip=["10", 1]),
    "7": node("CLIPTextEncode", text="blurry", clip=["10", 1]),
    "5": node("EmptyLatentImage", width=64, height=64),
    "3": node("KSampler", seed=2**63, model=["10", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]),
    "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
    "9": node("SaveImage", images=["8", 0]),
}
BOAT = Drawn("a red boat", "blurry", 2**63, "dream")


def test_a1111_tells_prompt_negative_seed_and_model():
    assert parameters(A1111) == Drawn("a red boat, calm sea second line", "blurry, ugly", 12345, "dream_8")


@pytest.mark.parametrize("text", ["", "Screenshot", "a boat\nNegative prompt: x", "{}", "{", "[1]", '{"sui_image_params": 3}'])
def test_what_is_no_record_says_nothing(text):
    assert parameters(text) is None
    assert workflow(text) is None


def test_swarm_tells_in_json():
    assert parameters(json.dumps(SWARM)) == Drawn("a cat", "dog", 7, "sd_xl")


def test_a_workflow_is_followed_from_its_first_sampler():
    assert workflow(json.dumps(GRAPH)) == BOAT
    second = node("KSampler", seed=1, model=["4", 0], positive=["20", 0], negative=["7", 0], latent_image=["3", 0])
    more = {**GRAPH, "1": second, "20": node("CLIPTextEncode", text="another", clip=["4", 1])}
    assert workflow(json.dumps(more)) == BOAT


def test_words_come_through_other_nodes_and_guiders():
    graph = {
        "1": node("UNETLoader", unet_name="flux.sft"),
        "2": node("PrimitiveString", value="a boat"),
        "3": node("CLIPTextEncodeFlux", clip_l=["2", 0], t5xxl=["2", 0], clip=["9", 0]),
        "4": node("FluxGuidance", conditioning=["3", 0], guidance=3.5),
        "5": node("BasicGuider", model=["1", 0], conditioning=["4", 0]),
        "6": node("RandomNoise", noise_seed=11),
        "7": node("SamplerCustomAdvanced", noise=["6", 0], guider=["5", 0], latent_image=["8", 0]),
        "8": node("EmptySD3LatentImage", width=64),
        "9": node("DualCLIPLoader"),
    }
    assert workflow(json.dumps(graph)) == Drawn("a boat", None, 11, "flux")


def test_a_negative_that_is_zeroed_has_no_words():
    graph = {**GRAPH, "7": node("ConditioningZeroOut", conditioning=["6", 0])}
    found = workflow(json.dumps(graph))
    assert found is not None
    assert found.negative is None


def test_a_circle_ends():
    graph = {**GRAPH, "6": node("ConditioningSetArea", conditioning=["6", 0]), "4": node("Merge", model=["10", 0])}
    found = workflow(json.dumps(graph))
    assert found is not None
    assert (found.prompt, found.model) == ("", None)


VALUES = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.sampled_from(["1", "2", "3", 0, 1]), max_size=3))
KEYS = st.sampled_from(["positive", "negative", "latent_image", "seed", "model", "text", "guider", "conditioning", "noise"])


@given(st.dictionaries(st.sampled_from("123"), st.dictionaries(KEYS, VALUES, max_size=6), max_size=3))
def test_any_workflow_is_read_or_says_nothing(graph):
    workflow(json.dumps({name: node("KSampler", **inputs) for name, inputs in graph.items()}))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a boat", "a boat"),
        ("a (boat:1.2), (((sea)))", "a boat, sea"),
        (r"a boat \(1990\), [grey]", "a boat (1990), grey"),
        ("[cat:dog:0.5] and [cow|horse]", "[cat:dog:0.5] and [cow|horse]"),
        ("boat BREAK sea", "boat, sea"),
        ("boat, <lora:a_b:0.5>, <lyco:c:1>, sea", "boat, sea"),
        ("a <b> c", "a <b> c"),
        ("(a (nested:1.1) one:0.9)", "a nested one"),
        ("(:1.2)", ""),
    ],
)
def test_plain_words(prompt, words):
    assert plain_words(prompt) == words


@given(st.text(alphabet="ab ()[]:,.1<>\\", max_size=30))
def test_plain_words_come_to_rest(prompt):
    words = plain_words(prompt)
    assert "  " not in words
    assert words == words.strip()


def test_each_kind_of_file(tmp_path):
    """The same record in PNG's texts, in a JPEG's comment in either order of bytes, and as ComfyUI's tags of a WebP."""
    image = Image.new("RGB", (8, 8))
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", json.dumps(GRAPH))
    image.save(tmp_path / "a.png", pnginfo=texts)
    assert read_drawn(tmp_path / "a.png") == BOAT
    for name, coding in (("b.jpg", "utf-16-be"), ("c.jpg", "utf-16-le")):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode(coding)
        image.save(tmp_path / name, exif=exif)
        assert read_drawn(tmp_path / name) == parameters(A1111)
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(GRAPH)
    image.save(tmp_path / "d.webp", exif=exif)
    assert read_drawn(tmp_path / "d.webp") == BOAT


def test_pictures_that_say_nothing_or_are_none(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    (tmp_path / "b.png").write_bytes(buffer.getvalue()[:30])
    (tmp_path / "c.png").write_bytes(b"")
    assert [read_drawn(tmp_path / name) for name in ("a.png", "b.png", "c.png", "gone.png")] == [None] * 4
