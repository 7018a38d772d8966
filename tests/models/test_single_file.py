"""Single files in the layout of the original code: what the refusal advises makes a folder with the same weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from palate.base.errors import UserError
from palate.models.families import check_model

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
WHOLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def weights(part: Path) -> dict[str, torch.Tensor]:
    (file,) = part.glob("*.safetensors")
    return load_file(file)


def unet(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of one layer a block: two places a block going down, and two going up."""
    made = {}
    for name, tensor in found.items():
        part, _, end = name.rpartition(".")
        block = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
        if block is None:
            made[f"model.diffusion_model.{WHOLE[part]}.{end}"] = tensor
            continue
        side, kind, inner = block[1], block[3], block[5]
        i, j = int(block[2] or 0), int(block[4])
        if kind == "resnets":
            for ours, theirs in RESNET.items():
                inner = inner.replace(f"{ours}.", f"{theirs}.")
        attends = f"up_blocks.{i}.attentions.0.norm.weight" in found
        place = {
            ("down", "resnets"): f"input_blocks.{2 * i + j + 1}.0.{inner}",
            ("down", "attentions"): f"input_blocks.{2 * i + j + 1}.1.{inner}",
            ("down", "downsamplers"): f"input_blocks.{2 * i + 2}.0.op.{end}",
            ("mid", "resnets"): f"middle_block.{2 * j}.{inner}",
            ("mid", "attentions"): f"middle_block.1.{inner}",
            ("up", "resnets"): f"output_blocks.{2 * i + j}.0.{inner}",
            ("up", "attentions"): f"output_blocks.{2 * i + j}.1.{inner}",
            ("up", "upsamplers"): f"output_blocks.{2 * i + 1}.{1 + attends}.conv.{end}",
        }[side, kind]
        made[f"model.diffusion_model.{place}"] = tensor
    return made


def vae(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {}
    last = max(int(name.split(".")[2]) for name in found if name.startswith("decoder.up_blocks"))
    for name, tensor in found.items():
        new = re.sub(r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block", name)
        new = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", new)
        new = re.sub(r"decoder\.up_blocks\.(\d)\.resnets", lambda m: f"decoder.up.{last - int(m[1])}.block", new)
        new = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{last - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = new.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        made[f"first_stage_model.{new}"] = tensor
    return made


def clip(found: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in found.items()}


def open_clip(found: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in found.items():
        new = name.removeprefix("text_model.")
        for ours, theirs in OPEN_CLIP.items():
            new = new.replace(ours, theirs)
        if new == "text_projection.weight":
            new, tensor = "text_projection", tensor.T
        if found_part := re.fullmatch(r"(.*attn)\.([qkv])_proj\.(\w+)", new):
            if found_part[2] != "q":
                continue
            tensor = torch.cat([found[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            new = f"{found_part[1]}.in_proj_{found_part[3]}"
        made[prefix + new] = tensor
    return made


def single_file(folder: Path, path: Path) -> None:
    parts = {**unet(weights(folder / "unet")), **vae(weights(folder / "vae"))}
    if (folder / "text_encoder_2").is_dir():
        parts |= clip(weights(folder / "text_encoder"), "conditioner.embedders.0.transformer.")
        parts |= open_clip(weights(folder / "text_encoder_2"), "conditioner.embedders.1.model.")
    else:
        parts |= clip(weights(folder / "text_encoder"), "cond_stage_model.transformer.")
    save_file({name: tensor.contiguous() for name, tensor in parts.items()}, path)


@pytest.mark.parametrize(
    ("family", "kind"), [("model_dir", "StableDiffusionPipeline"), ("sdxl_dir", "StableDiffusionXLPipeline")]
)
def test_the_advice_makes_a_folder_of_a_single_file(family, kind, request, tmp_path):
    folder, file = request.getfixturevalue(family), tmp_path / "merge.safetensors"
    single_file(folder, file)
    with pytest.raises(UserError, match="is a single file") as refused:
        check_model(str(file))
    (advice,) = re.findall('python -c "(.*?)"', str(refused.value))
    assert kind in advice
    # As it is told for want of a network.
    exec(advice.replace(f"{str(file)!r})", f"{str(file)!r}, config={str(folder)!r})").replace("FOLDER", str(tmp_path / "made")))
    assert check_model(str(tmp_path / "made")) == kind
    for part in folder.glob("*/*.safetensors"):
        before, after = load_file(part), load_file(tmp_path / "made" / part.relative_to(folder))
        assert set(after) == set(before), part
        assert all(torch.equal(after[name], before[name]) for name in before), part


def test_other_files_in_place_of_a_model(tmp_path):
    save_file({"unet.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"PK")
    for name, said in (("style.safetensors", r"is a LoRA.*--lora"), ("old.ckpt", r"single file.*of SDXL: StableDiffusionXL")):
        with pytest.raises(UserError, match=said):
            check_model(str(tmp_path / name))
