"""A first look at a model's folder: parts that cannot work together are refused before any weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from palate.base.errors import UserError
from palate.models import whole
from palate.models.families import load_denoiser, load_drawer, load_refiner
from palate.models.parts import Source
from palate.runs.models import check_refiner_fits

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tmp_path):
    """Copies a model's folder and changes a part's configuration."""

    def of(folder, part: str = "", **changes) -> Path:
        shutil.copytree(folder, made := tmp_path / "changed")
        if part:
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            path = made / part / name
            config = {**json.loads(path.read_text()), **changes}
            path.write_text(json.dumps({k: v for k, v in config.items() if v is not Ellipsis}))
        return made

    return of


@pytest.fixture
def no_weights(monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Source, "read", loaded)


def refused(folder, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_denoiser(str(folder), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SAMPLERS = [
    *(
        "DDIM",
        "DDPM",
        "PNDM",
        "LMSDiscrete",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "KDPM2Discrete",
        "DEISMultistep",
    ),
    *("KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "LCM", "TCD"),
]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_samplers_that_draw(copied, model_dir, monkeypatch, kind):
    class ReadError(Exception):
        pass

    def loaded(*_, **__):
        raise ReadError

    monkeypatch.setattr(Source, "read", loaded)
    with pytest.raises(ReadError):
        load_denoiser(str(copied(model_dir, "scheduler", _class_name=f"{kind}Scheduler")))


CONFIGS = [
    ("scheduler", {"_class_name": "MySamplerScheduler"}, "is a MySamplerScheduler, a class that diffusers"),
    ("scheduler", {"_class_name": "DDIMSchedular"}, "(the nearest: DDIMScheduler, "),
    ("scheduler", {"_class_name": "AutoencoderKL"}, "is an AutoencoderKL, a class that diffusers"),
    ("scheduler", {"_class_name": ...}, "of no class"),
    ("scheduler", {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "mine"}, "cannot be made: mine is not"),
    ("scheduler", {"_class_name": "RePaintScheduler"}, "takes no step (RePaintScheduler.step() missing"),
    ("scheduler", {"_class_name": "ScoreSdeVeScheduler"}, "has noise levels of its own"),
    ("scheduler", {"_class_name": "EDMEulerScheduler"}, "has noise levels of its own: write one that draws pictures"),
    ("scheduler", {"_class_name": "DDIMInverseScheduler"}, "goes from pictures to noise"),
    ("scheduler", {"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ("scheduler", {"rescale_betas_zero_snr": True}, "tells nothing of it"),
    ("vae", {"_class_name": "AutoencoderTiny"}, "is an AutoencoderTiny; it is for previews; expected an AutoencoderKL"),
    ("vae", {"_class_name": "AsymmetricAutoencoderKL"}, "is an AsymmetricAutoencoderKL; expected an AutoencoderKL"),
    ("vae", {"latent_channels": 16}, "takes 4 channels, and latents of its VAE have 16"),
    ("unet", {"_class_name": "UNetMotionModel"}, "is a UNetMotionModel; expected a UNet2DConditionModel"),
    ("unet", {"in_channels": 9}, "is of a model for inpainting: it takes 9 channels, and latents of its VAE have 4"),
    ("unet", {"in_channels": 8}, "is of a model for editing by instructions"),
    ("unet", {"in_channels": 6}, "takes 6 channels, and latents"),
    ("unet", {"out_channels": 8}, "gives 8 channels"),
    ("unet", {"cross_attention_dim": 1024}, "attends to 1024 numbers a token"),
    ("unet", {"cross_attention_dim": [16, 20]}, "numbers a token"),
    ("text_encoder", {"model_type": "t5"}, "is a text encoder of kind t5; expected CLIP's"),
    ("text_encoder", {"hidden_size": 24}, "numbers a token"),
]


@pytest.mark.parametrize(("part", "changes", "message"), CONFIGS, ids=[message[:40] for *_, message in CONFIGS])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_parts_that_do_not_fit(no_weights, copied, model_dir, sdxl_dir, family, part, changes, message):
    folder = {"sd": model_dir, "sdxl": sdxl_dir}[family]
    assert message in refused(copied(folder, part, **changes))


OF_ONE_FAMILY = [
    ("sd", "unet", {"addition_embed_type": "text_time"}, "wants a condition beside the text (text_time)"),
    ("sd", "unet", {"class_embed_type": "projection"}, "wants a condition beside the text (projection)"),
    ("sdxl", "unet", {"addition_embed_type": None}, "takes nothing beside the text"),
    (
        "sdxl",
        "unet",
        {"projection_class_embeddings_input_dim": 5 * 8 + 10},
        "takes 50 numbers beside the text, ",
    ),
    ("sdxl", "text_encoder_2", {"projection_dim": 12}, "(12 of the text encoder)"),
]


@pytest.mark.parametrize(("family", "part", "changes", "message"), OF_ONE_FAMILY)
def test_conditions_that_do_not_fit(no_weights, copied, model_dir, sdxl_dir, family, part, changes, message):
    folder = {"sd": model_dir, "sdxl": sdxl_dir}[family]
    assert message in refused(copied(folder, part, **changes))


def test_a_network_of_no_size(copied, model_dir):
    assert "tells no sample_size (None)" in refused(copied(model_dir, "unet", sample_size=None))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_parts_without_weights(no_weights, copied, model_dir, part):
    folder = copied(model_dir)
    (path,) = (folder / part).glob("*.safetensors")
    path.unlink()
    assert f"{part}/ holds no weights" in refused(folder)


def test_a_tokenizer_of_another_model(copied, model_dir):
    folder = copied(model_dir, "text_encoder", vocab_size=100)
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("token_embedding.weight"))
    save_file({**weights, name: weights[name][:100].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="words, and its text encoder knows 100"):
        load_denoiser(str(folder)).fingerprint()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(copied, model_dir, part, value):
    folder = copied(model_dir)
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    name = max(weights)
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{part} of .* holds NaN or infinity \\(1 of its weights"):
        load_denoiser(str(folder)).fingerprint()


# Variants ------------------------------------------------------------


def as_variant(folder: Path, *parts: str, variant: str = "fp16", keep: bool = False) -> None:
    for part in parts:
        for path in (folder / part).glob("*.safetensors"):
            if ".fp16." not in path.name:
                (shutil.copy if keep else shutil.move)(path, path.with_name(path.name.replace(".", f".{variant}.")))


PARTS = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize("parts", [("unet",), ("vae",), ("text_encoder",), ("unet", "text_encoder"), PARTS])
def test_a_variant_where_a_part_has_one_and_plain_files_where_not(copied, model_dir, parts):
    folder = copied(model_dir)
    as_variant(folder, *parts)
    assert "add --variant fp16" in refused(folder)
    found, plain = load_denoiser(str(folder), variant="fp16"), load_denoiser(str(model_dir))
    assert found.fingerprint() == plain.fingerprint()
    kept = plain.network.state_dict()
    assert all(torch.equal(t, kept[n]) for n, t in found.network.state_dict().items())


def test_a_variant_that_nobody_has(no_weights, copied, model_dir):
    folder = copied(model_dir)
    assert refused(folder, variant="fp16").endswith("has files of variant fp16: leave out --variant")
    as_variant(folder, "unet", variant="non_ema", keep=True)
    assert "variant fp16" in refused(folder, variant="fp16")


def test_advice_is_for_what_has_no_plain_files(copied, model_dir):
    folder = copied(model_dir)
    as_variant(folder, "unet", variant="non_ema", keep=True)
    (folder / UNET).write_bytes(b"damaged")
    assert "variant" not in refused(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(
    ("name", "sharded"),
    [
        ("diffusion_pytorch_model{}.safetensors", False),
        ("diffusion_pytorch_model{}-00001-of-00002.safetensors", True),
        ("diffusion_pytorch_model-00001-of-00002{}.safetensors", True),
        ("diffusion_pytorch_model{}.bin", False),
    ],
)
def test_files_of_a_variant_are_known_by_their_names(variant, name, sharded):
    middle = f".{variant}" if variant else ""
    named, index = name.format(middle), f"diffusion_pytorch_model.safetensors.index{middle}.json"
    assert (whole.variant_of(named), whole.variant_of(index)) == (variant or "", variant or "")
    names = ["config.json", "openvino_model.bin", named, *([index] if sharded else [])]
    assert whole.found_by_name(names, "unet", "unet of x", variant) == ((index, True) if sharded else (named, False))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_what_is_found_by_no_name_is_told(part):
    of_both = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    wrong = next(stem for name, stem in of_both.items() if name != part)
    with pytest.raises(
        UserError, match=f"has its weights in {wrong}.safetensors, but {of_both[part]}.safetensors is looked for"
    ):
        whole.found_by_name([f"{wrong}.safetensors"], part, "x", None)
    with pytest.raises(UserError, match=f"lacks {of_both[part]}.safetensors.index.json, which tells what "):
        whole.found_by_name([f"{of_both[part]}-00001-of-00002.safetensors"], part, "x", None)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/weights.safetensors")


DAMAGES = [
    (cut, "is damaged (Error while deserializing header"),
    (lambda path: path.write_bytes(b""), "is empty"),
    (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "is a pointer of Git LFS"),
    (dead_link, "is a link to '/nowhere/weights.safetensors', which does not exist"),
    (lambda path: (path.unlink(), path.mkdir()), "is a folder; expected a file of weights"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:20] for _, message in DAMAGES])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_files_are_found_before_any_weights_are_read(no_weights, copied, model_dir, part, damage, message):
    folder = copied(model_dir)
    (path,) = (folder / part).glob("*.safetensors")
    damage(path)
    told = refused(folder)
    assert f"{part} of {folder} cannot be loaded: {path.name} {message}" in told
    assert len(told.replace(str(folder), "")) < 200


def test_a_lost_shard_is_found_before_any_weights_are_read(copied, model_dir, monkeypatch):
    from diffusers import UNet2DConditionModel

    folder = copied(model_dir)
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / UNET).unlink()
    network.save_pretrained(folder / "unet", max_shard_size="100KB")
    load_denoiser(str(folder))
    monkeypatch.setattr(Source, "read", None)
    first, *_, last = sorted((folder / "unet").glob("*.safetensors"))
    last.unlink()
    count = int(last.stem[-5:])
    assert f"lacks 1 of the {count} files that {UNET[5:]}.index.json names, the first is {last.name}" in refused(folder)
    assert first.is_file()


def test_parts_of_different_variants(no_weights, copied, model_dir):
    """Files of one variant can be asked for; the advice leads out."""
    folder = copied(model_dir)
    as_variant(folder, "unet")
    as_variant(folder, "vae", variant="bf16")
    assert "add --variant fp16" in refused(folder)
    assert "alone: rename those of one to plain names, without .bf16" in refused(folder, variant="fp16")


# The refiner, and families that only draw ------------------------------------------------------------


REFINERS = [
    ("unet", {"in_channels": 9}, "takes 9 channels"),
    ("unet", {"_class_name": "UNet2DModel"}, "expected a UNet2DConditionModel"),
    ("unet", {"cross_attention_dim": 20}, "attends to 20 numbers a token, and its text encoder gives 12"),
    (
        "unet",
        {"projection_class_embeddings_input_dim": 6 * 8 + 10},
        "and its pipeline gives 50",
    ),
    ("text_encoder_2", {"model_type": "t5"}, "kind t5"),
    ("scheduler", {"_class_name": "Mine"}, "a class that diffusers"),
]


@pytest.mark.parametrize(("part", "changes", "message"), REFINERS)
def test_a_refiner_whose_parts_do_not_fit_is_refused_before_training(
    no_weights, copied, sdxl_dir, refiner_dir, part, changes, message
):
    check_refiner_fits(str(refiner_dir), str(sdxl_dir))
    folder = str(copied(refiner_dir, part, **changes))
    for check in (lambda: check_refiner_fits(folder, str(sdxl_dir)), lambda: load_refiner(folder)):
        with pytest.raises(UserError) as caught:
            check()
        assert message in str(caught.value)


def test_a_refiner_without_weights(no_weights, copied, sdxl_dir, refiner_dir):
    folder = copied(refiner_dir)
    (folder / UNET).unlink()
    with pytest.raises(UserError, match="unet/ holds no weights"):
        check_refiner_fits(str(folder), str(sdxl_dir))


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
@pytest.mark.parametrize("damage", ["not finite", "cut short"])
def test_a_refiner_whose_weights_are_damaged_is_refused_before_training(
    no_weights, copied, sdxl_dir, refiner_dir, part, damage
):
    folder = copied(refiner_dir)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point())
    if damage == "not finite":
        tensors[name].view(-1)[-1] = float("inf")
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(
        UserError, match=f"{part} of .* holds NaN or infinity" if damage == "not finite" else "cannot be loaded"
    ):
        check_refiner_fits(str(folder), str(sdxl_dir))


HUB_FILES = {
    "unet of owner/model has its weights in model.safetensors, but diffusion_pytorch_model.safetensors is looked for": [
        *("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "unet/model.safetensors"),
    ],
    "vae of owner/model lacks diffusion_pytorch_model.safetensors.index.json": [
        *("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    ],
    "unet/ holds no weights": ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "unet/config.json"],
    "unet of owner/model cannot be loaded: it has no plain weights; its files are of variant fp16: add --variant fp16": [
        *("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ],
}


class FakeApi:
    """A hub that lists files, or fails."""

    listed: list[str] | None = None

    def list_repo_files(self, *_, **__) -> list[str]:
        if self.listed is None:
            raise ConnectionError("no list")
        return self.listed


@pytest.fixture
def hub_lists(monkeypatch):
    def lists(names: list[str] | None) -> None:
        monkeypatch.setattr(FakeApi, "listed", names)
        monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)

    return lists


@pytest.mark.parametrize("message", HUB_FILES)
def test_the_files_of_a_hub_are_looked_at_before_any_is_fetched(hub_lists, message):
    hub_lists(HUB_FILES[message])
    with pytest.raises(UserError) as caught:
        Source("owner/model", "cpu").check_files(["unet", "vae", "text_encoder"])
    assert message in str(caught.value)


def test_a_hub_that_lists_nothing_refuses_nothing(hub_lists):
    hub_lists(None)
    Source("owner/model", "cpu").check_files(["unet", "vae"])


def test_a_family_that_only_draws_needs_a_known_scheduler(copied, model_dir):
    folder = copied(model_dir, "scheduler", _class_name="Mine")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "LatentConsistencyModelPipeline"))
    with pytest.raises(UserError, match="is a Mine, a class that diffusers"):
        load_drawer(str(folder))


@pytest.mark.parametrize("kind", ["flux", "klein"])
def test_a_flow_of_patches_whose_network_takes_other_latents(no_weights, copied, flow_dir, kind):
    """The network takes patches of four latents; one for inpainting or control takes more."""
    folder = flow_dir(kind)
    wanted = json.loads((folder / "transformer" / "config.json").read_text())["in_channels"]
    assert f"takes {6 * wanted} channels" in refused(copied(folder, "transformer", in_channels=6 * wanted))
