"""The policy, its reference and its features on a tiny real Stable Diffusion."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from palate.base.errors import UserError
from palate.base.shapes import Shape
from palate.diffusion.denoising import Conditioning, draw
from palate.models.adapters import is_adapter
from palate.models.drawing import Drawing
from palate.models.families import load_denoiser
from palate.models.lora import tuned
from palate.models.policy import Policy
from palate.runs import recipe as recipes
from palate.runs.loading import policy_of
from palate.spaces import perceptual


@pytest.fixture
def load(model_dir):
    return lambda **options: load_denoiser(str(model_dir), **options)


@pytest.fixture
def batch():
    """x (3, 4, 16, 16), times, conditioning."""
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 4, 16, 16, generator=g), torch.randn(3, 40, 16, generator=g)
    return x, torch.tensor([1, 500, 999]), Conditioning({"encoder_hidden_states": text})


def disturb(policy: Policy, size: float = 0.05) -> None:
    """What training does, without training."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += size * torch.randn(parameter.shape, generator=g)


def test_a_fresh_policy_is_its_reference_and_stays_beside_it(load, batch):
    for kind in ("lora", "full"):
        base = load()
        expected = base.predict(base.network, *batch)
        policy = Policy(base, kind=kind, rank=4)
        assert torch.equal(policy(*batch), expected)
        assert torch.equal(policy.reference(*batch), expected)
        disturb(policy)
        assert not torch.equal(policy(*batch), expected)
        assert torch.equal(policy.reference(*batch), expected)
        assert not policy.reference(*batch).requires_grad
        assert policy(*batch).requires_grad


def test_an_old_policy_is_a_second_lora_and_nothing_more(load, batch):
    policy = Policy(load(), rank=4)
    names = set(policy.state_dict())
    disturb(policy)
    before = policy(*batch)
    policy.track_old(0.9)
    assert set(policy.state_dict()) == names | {f"old/{name}" for name in names}
    assert torch.equal(policy.old(*batch), before)
    disturb(policy)
    assert torch.equal(policy.old(*batch), before)
    policy.advance_old()
    followed = policy.old(*batch)
    assert not torch.equal(followed, before)
    with torch.no_grad():  # all but the LoRA is the policy's own
        policy.denoiser.network.conv_in.weight.add_(0.1)
    assert not torch.equal(policy.old(*batch), followed)
    assert not policy.old(*batch).requires_grad
    with pytest.raises(UserError, match="use train_method lora"):
        Policy(load(), kind="full").track_old(0.9)
    with pytest.raises(UserError, match=r"the decay of the old policy is 1\.5"):
        policy.track_old(1.5)


def test_the_reference_of_a_lora_costs_no_memory(load):
    denoiser = load()
    count = sum(1 for _ in denoiser.network.parameters())
    policy = Policy(denoiser, rank=4)
    own = {p.data_ptr() for p in policy.trainable_module.parameters()}
    assert {p.data_ptr() for p in policy.frozen.parameters()} <= own
    assert sum(1 for _ in policy.frozen.parameters()) == count
    assert not any(p.requires_grad for p in policy.frozen.parameters())
    trained = list(policy.parameters())
    assert trained
    assert all(".lora_" in name for name in policy.state_dict())
    assert {p.dtype for p in trained} == {torch.float32}


def test_the_reference_of_full_training_is_a_copy(load):
    policy = Policy(load(), kind="full")
    own = {p.data_ptr() for p in policy.trainable_module.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in policy.frozen.parameters())


@pytest.mark.parametrize(
    ("kind", "alpha", "layers"),
    [("lora", None, "attention"), ("lora", 2.0, "attention"), ("lora", 2.0, "all"), ("full", None, "attention")],
)
def test_what_is_saved_reloads_at_the_trained_strength(load, batch, tmp_path, kind, alpha, layers):
    policy = Policy(load(), kind=kind, rank=4, lora_alpha=alpha, lora_layers=layers)
    disturb(policy)
    path = policy.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if kind == "lora":
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["lora_adapter_metadata"])
        assert header["unet.lora_alpha"] == (4 if alpha is None else alpha)
        assert header["unet.r"] == 4
    again = load()
    torch.testing.assert_close(again.predict(tuned(again, path), *batch), policy(*batch), rtol=0, atol=0)


def test_saving_again_replaces_and_a_full_disk_keeps_what_was_there(load, tmp_path, monkeypatch):
    for kind in ("lora", "full"):
        policy = Policy(load(), kind=kind, rank=4)
        folder = tmp_path / kind
        policy.save(folder)
        disturb(policy)
        path = policy.save(folder)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(policy.denoiser, "save_lora", full)
        monkeypatch.setattr(policy.denoiser.network, "save_pretrained", full)
        with pytest.raises(UserError, match=r"cannot be written.*No space left"):
            policy.save(folder)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert path.exists()


def test_the_same_weights_make_the_same_file(load, tmp_path):
    policy = Policy(load(), rank=2)
    config = policy.trainable_module.peft_config["default"]
    modules, files = sorted(config.target_modules), []
    for turn in range(6):  # as often, for safetensors shuffles its two metadata at every saving
        config.target_modules = [*modules[turn % 4 :], *modules[: turn % 4]]
        files.append(policy.save(tmp_path / str(turn)))
    assert len({file.read_bytes() for file in files}) == 1


def test_layers_are_named_in_one_order_in_every_process(load, tmp_path):
    policy = Policy(load(), rank=2, lora_layers="all")
    assert isinstance(policy.trainable_module.peft_config["default"].target_modules, set)  # in an order of this process
    with safe_open(policy.save(tmp_path), "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])["unet.target_modules"]
    assert told == sorted(told)


def test_lora_on_all_layers_reaches_convolutions(load):
    names = {n.split(".lora_A")[0].split(".")[-1] for n in Policy(load(), lora_layers="all").state_dict() if "lora_A" in n}
    assert {"to_q", "conv1", "conv2", "proj_in", "time_emb_proj"} <= names
    attention = {n.split(".lora_A")[0].split(".")[-1] for n in Policy(load()).state_dict() if "lora_A" in n}
    assert attention == {"to_q", "to_k", "to_v", "0"}


@pytest.mark.parametrize("space", ["mid", "all"])
def test_a_continued_lora_starts_as_its_own_reference(load, batch, tmp_path, space):
    first = Policy(load(), rank=4, lora_alpha=2.0, lora_layers="all")
    disturb(first)
    first.save(tmp_path / "first")
    plain = load()
    expected, base = first(*batch), plain.predict(plain.network, *batch)
    policy = Policy(load(), pretrained_lora=tmp_path / "first")
    assert policy.rank == 4
    assert torch.equal(policy(*batch), expected)
    assert torch.equal(policy.reference(*batch), expected)
    before = policy.features(*batch, space)
    disturb(policy)
    assert torch.equal(policy.reference(*batch), expected)
    assert all(torch.equal(a, b) for a, b in zip(policy.features(*batch, space), before, strict=True))
    assert all(is_adapter(name) for name in policy.state_dict())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    frozen = dict(policy.frozen.named_parameters())
    assert not any(p.requires_grad for p in frozen.values())
    for name, own in policy.trainable_module.named_parameters():
        assert (own.data_ptr() == frozen[name].data_ptr()) == (not is_adapter(name))
    # What is saved is the whole change, for a plain pipeline too.
    path = policy.save(tmp_path / "second")
    again = load()
    again.pipeline().load_lora_weights(str(path.parent), weight_name=path.name)
    assert torch.equal(again.predict(again.network, *batch), policy(*batch))
    assert not torch.equal(policy(*batch), expected)
    assert not torch.equal(expected, base)


def test_a_lora_in_kohyas_layout_is_continued_at_its_strength(load, batch, tmp_path):
    from diffusers.utils import convert_state_dict_to_kohya

    first = Policy(load(), rank=4, lora_alpha=2.0)
    disturb(first)
    kohya = convert_state_dict_to_kohya({f"unet.{name.replace('.default', '')}": t for name, t in first.state_dict().items()})
    named = {name.replace("unet.", "unet_", 1): tensor for name, tensor in kohya.items()}
    kohya = {name: torch.tensor(2.0) if name.endswith("alpha") else tensor.contiguous() for name, tensor in named.items()}
    assert any(name.startswith("lora_unet_down_blocks_0") for name in kohya)
    save_file(kohya, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(Policy(load(), pretrained_lora=tmp_path / "kohya.safetensors")(*batch), first(*batch))


def test_loras_that_cannot_be_continued_are_told_in_one_line(load, tmp_path):
    def refused(message, path, **options):
        with pytest.raises(UserError, match=message) as error:
            Policy(load(), pretrained_lora=path, **options)
        assert "\n" not in str(error.value)

    def changed(name, change):
        weights = change(load_file(path))
        save_file({n: t.contiguous() for n, t in weights.items()}, tmp_path / name)
        return tmp_path / name

    path = Policy(load(), rank=4).save(tmp_path / "fine")
    refused("no LoRA at", tmp_path / "nowhere")
    refused("no LoRA at .*expected a .safetensors file", tmp_path)
    (tmp_path / "text.safetensors").write_text("no")
    refused("no readable safetensors file", tmp_path / "text.safetensors")
    refused("holds no LoRA", changed("plain.safetensors", lambda w: {"weight": torch.zeros(2)}))
    refused("not trained here", changed("te.safetensors", lambda w: {**w, "text_encoder.a.lora_A.weight": torch.zeros(2, 2)}))
    elsewhere = changed(
        "xl.safetensors",
        lambda w: {
            **w,
            "unet.down_blocks.9.to_q.lora_A.weight": torch.zeros(4, 8),
            "unet.down_blocks.9.to_q.lora_B.weight": torch.zeros(8, 4),
        },
    )
    refused("cannot be put into|found their layer", elsewhere)
    larger = changed("large.safetensors", lambda w: {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in w.items()})
    refused("cannot be put into", larger)
    refused("train_method full", path, kind="full")


def test_weights_of_another_rank_are_refused(load):
    with pytest.raises(UserError, match="rank 8"):
        Policy(load(), rank=8).load_state_dict(Policy(load(), rank=4).state_dict())


def test_the_seed_decides_the_first_weights_and_leaves_the_global_generator_alone(load):
    torch.manual_seed(3)
    first = Policy(load(), rank=4, seed=5).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    again, other = (Policy(load(), rank=4, seed=s).state_dict() for s in (5, 6))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


# Features --------------------------------------------------------------------------------------------------------------


def test_features_are_the_activations_of_a_forward_pass(load, batch):
    denoiser = load()
    policy = Policy(denoiser, rank=4)
    disturb(policy)
    seen: list[torch.Tensor] = []
    unet = policy.frozen
    blocks: list[nn.Module] = [unet.conv_in, *unet.down_blocks, unet.mid_block]
    for block in blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    policy.reference(*batch)
    expected, seen[:] = list(seen), []
    for layers, wanted in (("all", expected), ("last_down", expected[-2:-1]), ("mid", expected[-1:])):
        found = policy.features(*batch, layers)
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_features_of_half_precision_weights_are_computed_in_float32(load, batch):
    for precision in ("fp16", "bf16"):
        policy = Policy(load(mixed_precision=precision), rank=4)
        half = policy.features(*batch, "all")
        assert {f.dtype for f in half} == {torch.float32}
        policy.frozen.float()
        for a, b in zip(half, policy.features(*batch, "all"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_step_of_perception_survives_half_precision_weights(load, batch):
    # One step back moves the latents by about 0.005 of a difference between outputs that is itself a hundredth.
    x, t, cond = batch
    policy = Policy(load(mixed_precision="bf16"), rank=4)
    nudge = 5e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    moved = policy.features(x + nudge, t, cond, "mid")[0] - policy.features(x, t, cond, "mid")[0]
    policy.frozen.double()
    exact64 = Conditioning({k: v.double() for k, v in cond.tensors.items()})

    def double(x):
        """The same features in float64, from a plain forward pass."""
        seen = []
        hook = policy.frozen.mid_block.register_forward_hook(lambda _m, _i, out: seen.append(out))
        policy.reference(x.double(), t, exact64)
        hook.remove()
        return seen[0]

    exact = double(x + nudge) - double(x)
    assert float((moved - exact).norm() / exact.norm()) < 0.02


def test_gradients_do_not_depend_on_checkpointing(load, batch):
    x, _, cond = batch
    found = []
    for checkpointing in (False, True):
        policy = Policy(load(), rank=4, gradient_checkpointing=checkpointing)
        disturb(policy)
        space = perceptual(policy.features, policy.schedule, layers="mid")
        noised = draw(policy.schedule, x, cond, torch.arange(3), t_min=1)
        embed = space(noised)
        residual = embed(policy(noised.xt, noised.t, noised.cond)) - embed(noised.target)
        (1e6 * residual.square().mean()).backward()
        found.append({n: p.grad for n, p in policy.trainable_module.named_parameters() if p.requires_grad})
        assert not any(p.grad is not None for p in policy.frozen.parameters())
    plain, again = found
    assert any(g.abs().max() > 0 for g in plain.values())
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-5, atol=1e-7)


def test_gradients_reach_the_latents_through_features(load, batch):
    x, t, cond = batch
    policy = Policy(load(), rank=4)
    found = []
    for checkpointing in (False, True):
        x = x.detach().requires_grad_()
        out = policy.denoiser.features(policy.frozen, x, t, cond, "last_down", gradient_checkpointing=checkpointing)[0]
        found.append(torch.autograd.grad(out.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
    assert found[0].abs().max() > 0


# The denoiser ----------------------------------------------------------------------------------------------------------


def test_encoders_leave_memory_and_come_back(load):
    denoiser = load()
    before = denoiser.encode_prompts(["a red house"]).tensors["encoder_hidden_states"]
    latents = denoiser.encode_images(torch.zeros(1, 3, 64, 64))
    gone = [weakref.ref(denoiser.vae.module), weakref.ref(denoiser.texts[0].pair[1])]
    denoiser.release()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert torch.equal(denoiser.encode_prompts(["a red house"]).tensors["encoder_hidden_states"], before)
    assert torch.equal(denoiser.encode_images(torch.zeros(1, 3, 64, 64)), latents)


def test_sampling_needs_no_text_encoder_once_prompts_are_remembered(load):
    denoiser = load()
    denoiser.remember(["a red house"])
    denoiser.release()
    drawing = Drawing(num_inference_steps=2, guidance_scale=2.0, shape=Shape.square(64))
    assert len(denoiser.generate(["a red house"], [0], drawing)) == 1
    assert not denoiser.texts[0].loaded
    with pytest.raises(ValueError, match="2 seeds"):
        denoiser.generate(["a red house"], [0, 1], drawing)


def test_a_picture_depends_on_its_prompt_and_seed_alone(load):
    denoiser = load()
    drawing = Drawing(num_inference_steps=3, guidance_scale=3.0, shape=Shape.square(64))
    prompts, seeds = ["a red house", "a blue tower", "a tree"], [1, 2, 3]
    together = denoiser.generate(prompts, seeds, drawing)
    alone = denoiser.generate(prompts[1:2], seeds[1:2], drawing)[0]
    difference = torch.tensor([a - b for a, b in zip(together[1].tobytes(), alone.tobytes(), strict=True)])
    assert difference.abs().max() <= 1  # a batch of another size may be summed in another order
    assert together[0].tobytes() != together[2].tobytes()


def test_encoding_and_prompts_equal_those_of_diffusers(load, model_dir):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model_dir)
    pipeline.vae.requires_grad_(False)  # as ours: torch rounds otherwise where weights take gradients, even under no_grad
    denoiser = load()
    prompts = ["a red house", "a very long prompt " * 30]
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        x = torch.rand(2, 3, 64, 64) * 2 - 1
        z = pipeline.vae.encode(x).latent_dist.mean * pipeline.vae.config.scaling_factor
        back = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
    assert torch.equal(denoiser.encode_prompts(prompts).tensors["encoder_hidden_states"], expected)
    torch.testing.assert_close(denoiser.encode_images(x), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(denoiser.decode(z), (back / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-6)
    assert denoiser.default_resolution == 64
    assert denoiser.cut_prompts([*prompts, *prompts]) == (1, 40)


def test_fingerprints_tell_encoders_apart(load, model_dir, tmp_path):
    import shutil

    from diffusers import AutoencoderKL

    first = load().fingerprint()
    assert load().fingerprint() == first
    shutil.copytree(model_dir, tmp_path / "other")
    vae = AutoencoderKL.from_pretrained(model_dir, subfolder="vae")
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-3
    vae.save_pretrained(tmp_path / "other" / "vae")
    other = load_denoiser(str(tmp_path / "other")).fingerprint()
    assert other["text"] == first["text"]
    assert other["vae"] != first["vae"]


def test_what_cannot_be_loaded_is_said_in_one_line(model_dir, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(model_dir, folder)
        change(folder)
        with pytest.raises(UserError) as refused:
            load_denoiser(str(folder)).fingerprint()
        assert "\n" not in str(refused.value)
        return str(refused.value)

    def only_fp16(folder):
        for path in folder.rglob("*model.safetensors"):
            path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))

    def lacks_a_weight(folder):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        weights.pop("conv_in.weight")
        save_file(weights, path)

    def cut(folder):
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])

    assert "--variant fp16" in broken("fp16", only_fp16)
    assert load_denoiser(str(tmp_path / "fp16"), variant="fp16").fingerprint()
    assert "conv_in.weight" in broken("lacks", lacks_a_weight)
    assert "vae" in broken("cut", cut)
    assert "tokenizer" in broken("words", lambda folder: shutil.rmtree(folder / "tokenizer"))
    assert "text_encoder" in broken("text", lambda folder: shutil.rmtree(folder / "text_encoder"))
    assert "cannot be loaded" in broken("scheduler", lambda folder: shutil.rmtree(folder / "scheduler"))


def test_the_caller_decides_whether_gradients_flow_through_encoders(load):
    denoiser = load()
    pictures = torch.rand(1, 3, 16, 16) * 2 - 1
    for encode, given in ((denoiser.encode_images, pictures), (denoiser.decode, denoiser.encode_images(pictures))):
        given = given.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(encode(given).square().sum(), given)
        assert gradient.isfinite().all()
        assert gradient.any()
        with torch.no_grad():
            assert not encode(given).requires_grad
    words = denoiser.texts[0].pair[1].get_input_embeddings().weight.requires_grad_()
    encoded = denoiser.encode_prompts(["a red house"]).tensors["encoder_hidden_states"]
    assert torch.autograd.grad(encoded.square().sum(), words)[0].any()


def test_blocks_that_repeat_are_compiled_in_every_network(load, model_dir, monkeypatch):
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    policy = Policy(load())
    policy.compile_blocks()
    policy.track_old(1.0)  # also where it comes later
    blocks = [m for network in policy.modules for m in network.modules() if type(m).__name__ in network._repeated_blocks]
    assert len(policy.modules) == 3
    assert len(blocks) > 6
    assert {id(block) for block in blocks} == {id(block) for block in compiled}
    compiled.clear()
    recipe = recipes.build({"model": {"pretrained_model_name_or_path": str(model_dir)}, "policy": {"compile": True}})
    policy_of(recipe, load(outline="shapes", device="meta"))  # of which only the arithmetic is counted
    assert not compiled
    policy_of(recipe, load())
    assert compiled
    monkeypatch.setattr(type(policy.trainable_module), "_repeated_blocks", [])
    with pytest.raises(UserError, match="does not say which of its blocks repeat; leave it out"):
        policy.compile_blocks()
