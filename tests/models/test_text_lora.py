"""A LoRA of the text encoders beside that of the network: begins as the model, learns, and is read alike by all programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_policy import disturb

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.diffusion.denoising import Conditioning
from palate.models import layouts
from palate.models.drawing import Drawing
from palate.models.families import load_denoiser
from palate.models.kohya import save_kohya
from palate.models.lora import put_loras, tuned
from palate.models.policy import Policy

PROMPTS = ["a red boat", "two trees by a lake"]
DRAWING = Drawing(2, 4.0, Shape(32, 32), 2)


@pytest.fixture(params=["sd", "sdxl"])
def folder(request):
    return str(request.getfixturevalue("model_dir" if request.param == "sd" else "sdxl_dir"))


def told(denoiser, prompts=PROMPTS) -> Conditioning:
    """A batch's conditioning, as it comes from the cache, and its tokens."""
    with torch.no_grad():
        return Conditioning({**denoiser.encode_prompts(prompts).tensors, **denoiser.words()(prompts)})


def given(denoiser):
    shape = (len(PROMPTS), *denoiser.latent_shape(Shape(32, 32)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 700]), told(denoiser)


def trained(folder: str, **options) -> Policy:
    policy = Policy(load_denoiser(folder), rank=2, texts=True, lora_layers="all", **options)
    disturb(policy, 0.3)
    return policy


@torch.no_grad()
def said(policy: Policy, batch):
    policy.trainable_module.eval()
    return policy(*batch)


def drawn(denoiser, network=None) -> np.ndarray:
    found = denoiser.generate(PROMPTS, [1, 2], DRAWING, network=network)
    return np.stack([np.asarray(image) for image in found]).astype(int)


def test_it_begins_as_the_model_and_text_encoders_learn(folder):
    policy = Policy(load_denoiser(folder), rank=2, texts=True)
    batch = given(policy.denoiser)
    torch.testing.assert_close(said(policy, batch), policy.reference(*batch), rtol=1e-5, atol=1e-6)
    policy.trainable_module.train()
    policy(*batch).square().mean().backward()
    grads = {name: p.grad for name, p in policy.trainable_module.named_parameters() if p.requires_grad}
    parts = {name.split(".")[2] for name in grads if name.startswith("reading.")}
    assert parts == {"text_encoder"} | ({"text_encoder_2"} if "sdxl" in folder else set()) or len(parts) == len(
        policy.denoiser.texts
    )
    for part in parts:  # of fresh matrices the second is zero, so that only it has a gradient
        assert any(g is not None and g.any() for name, g in grads.items() if f".{part}." in name and "lora_B" in name)
    assert all(".lora_" in name for name in grads)


def test_the_reference_and_the_models_own_encoders_stay(folder):
    policy = trained(folder)
    batch = given(policy.denoiser)
    before = policy.reference(*batch)
    disturb(policy, 0.5)
    assert torch.equal(policy.reference(*batch), before)
    assert torch.equal(told(policy.denoiser).tensors["encoder_hidden_states"], batch[2].tensors["encoder_hidden_states"])
    assert not torch.allclose(said(policy, batch), before, atol=1e-3)


def test_the_words_decide_what_the_policy_says(folder):
    """Other tokens, another output; what the cache holds of the prompts does not matter but for no prompt at all."""
    policy = trained(folder)
    x, t, cond = given(policy.denoiser)
    expected = said(policy, (x, t, cond))
    cached = {n: c for n, c in cond.tensors.items() if not n.startswith("tokens")}
    tokens = {n: c for n, c in cond.tensors.items() if n.startswith("tokens")}
    wrong = Conditioning({**{n: c.flip(0) for n, c in cached.items()}, **tokens})
    assert torch.equal(said(policy, (x, t, wrong)), expected)
    other = Conditioning({**cached, **{n: c.flip(0) for n, c in tokens.items()}})
    assert not torch.allclose(said(policy, (x, t, other)), expected)
    with pytest.raises(ValueError, match="needs the tokens"):
        policy(x, t, Conditioning(cached))


def test_no_prompt_is_what_stands_for_it(folder):
    denoiser = load_denoiser(folder)
    nothing = denoiser.no_words(denoiser.words())
    empty = denoiser.words()([""])
    for name, tokens in nothing.items():
        assert bool((tokens < 0).all()) == denoiser.zeros_for_empty_prompt
        assert denoiser.zeros_for_empty_prompt or torch.equal(tokens, empty[name])
    policy = trained(folder)
    blank = Conditioning({**denoiser.unconditional().tensors, **nothing})
    x, t, _ = given(denoiser)
    found = said(policy, (x[:1], t[:1], blank))
    if denoiser.zeros_for_empty_prompt:  # zeros reach the network as they are
        assert torch.isfinite(found).all()


def test_it_is_read_back_exactly_and_continued(folder, tmp_path):
    policy = trained(folder, lora_alpha=4.0)
    batch = given(policy.denoiser)
    expected = said(policy, batch)
    file = policy.save(tmp_path)
    other = load_denoiser(folder)
    with torch.no_grad():
        torch.testing.assert_close(other.predict(tuned(other, file), *batch), expected, rtol=1e-5, atol=1e-5)
    going_on = Policy(load_denoiser(folder), pretrained_lora=file, texts=True)
    torch.testing.assert_close(said(going_on, batch), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(going_on.reference(*batch), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="changes a text encoder"):
        Policy(load_denoiser(folder), pretrained_lora=file)
    again = trained(folder, lora_alpha=4.0, seed=3)
    again.load_state_dict(policy.state_dict())
    assert torch.equal(said(again, batch), expected)


def test_a_lora_of_the_network_gets_text_encoders_to_learn_with(folder, tmp_path):
    before = Policy(load_denoiser(folder), rank=2)
    disturb(before, 0.3)
    file = before.save(tmp_path)
    policy = Policy(load_denoiser(folder), pretrained_lora=file, texts=True)
    batch = given(policy.denoiser)
    torch.testing.assert_close(said(policy, batch), policy.reference(*batch), rtol=1e-5, atol=1e-5)
    assert any(name.startswith("reading.") for name in policy.state_dict())


def pipeline_of(folder: str, denoiser):
    import diffusers

    return getattr(diffusers, denoiser.card.pipeline).from_pretrained(folder).to("cpu")


@torch.no_grad()
def by_diffusers(pipeline) -> torch.Tensor:
    encoded = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    pooled = [encoded[2]] if len(encoded) == 4 else []
    return torch.cat([part.flatten() for part in (encoded[0], *pooled)])


@torch.no_grad()
def by_palate(denoiser, network) -> torch.Tensor:
    encoded = denoiser._prompts_of(network)
    encoded.add(PROMPTS)
    return torch.cat([tensor.flatten() for tensor in encoded[PROMPTS].tensors.values()])


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_reads_the_same_prompts_and_draws_the_same_network(folder, tmp_path, layout):
    policy = trained(folder, lora_alpha=4.0)
    denoiser, network = policy.denoiser, policy.trainable_module.eval()
    batch = given(denoiser)
    expected = said(policy, batch)
    file = (
        policy.save(tmp_path) if layout == "diffusers" else save_kohya(denoiser, network, tmp_path / "k.safetensors", about={})
    )
    names = list(load_file(file))
    starts = {
        "diffusers": ("text_encoder.text_model.", "text_encoder_2.text_model."),
        "kohya": ("lora_te1_text_model_", "lora_te2_"),
    }
    wanted = starts[layout][: len(denoiser.texts)]
    wanted = ("lora_te_text_model_encoder_layers_0_",) if layout == "kohya" and len(denoiser.texts) == 1 else wanted
    assert all(any(name.startswith(start) for name in names) for start in wanted)
    pipeline = pipeline_of(folder, denoiser)
    before = by_diffusers(pipeline)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    torch.testing.assert_close(by_diffusers(pipeline), by_palate(denoiser, network), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_diffusers(pipeline), before, atol=1e-2)
    read = denoiser._told(network, batch[2])
    plain = Conditioning({name: x for name, x in read.tensors.items() if not name.startswith("tokens")})
    with torch.no_grad():
        found = denoiser.predict(pipeline.unet.eval(), batch[0], batch[1], plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # And so do we, beside the model as it is.
    fresh = load_denoiser(folder)
    put_loras(fresh, fresh.network, [(file, 1.0)])
    assert np.abs(drawn(fresh) - drawn(denoiser, network)).max() <= 1


def test_a_pipeline_has_it_merged(folder, tmp_path):
    policy = trained(folder)
    expected = drawn(policy.denoiser, policy.trainable_module)
    base = drawn(policy.denoiser, policy.frozen)
    assert np.abs(expected - base).max() > 3
    with pytest.raises(UserError, match="use --format pipeline"):
        layouts.save_network(policy.trainable_module, tmp_path / "unet")
    layouts.save_pipeline(policy.denoiser, policy.trainable_module, tmp_path / "merged")
    assert np.abs(drawn(load_denoiser(str(tmp_path / "merged"))) - expected).max() <= 1


def test_a_family_without(flow_dir):
    denoiser = load_denoiser(str(flow_dir("zimage")))
    assert not denoiser.text_targets
