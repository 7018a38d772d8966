"""A tiny random Stable Diffusion and SDXL, a tiny random judge and sixteen votes: all that the tests of the whole job share."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from skipped import not_tested
from tiny_models import BETAS, LIMIT, tiny_t5_tokenizer, tiny_text, tiny_unet, tiny_vae

from benchmarks.processes import start
from palate.miniature.captions import caption
from tests.forked import write_client
from tools.miniature import scenes
from tools.miniature.base_model import build_tokenizer

ROOT = Path(__file__).parents[1]
# A busy machine is no failure, and the same tree gives the same answer: `pytest --hypothesis-profile searching` draws others.
hypothesis.settings.register_profile("searching", deadline=None)
hypothesis.settings.register_profile("palate", deadline=None, derandomize=True)
hypothesis.settings.load_profile("palate")
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # bitsandbytes would compile its functions of the CPU for each shape anew
torch.set_num_threads(1)  # for models as small as these, threads cost more than they save


def pytest_unconfigure(config):
    """The last line of all: what was not tested, and what would let it be."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if told := not_tested([str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped]):
        reporter.write_line(told)


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory):
    """A program that runs scripts and ``-m palate`` without the time of imports: :mod:`tests.forked`."""
    folder = tmp_path_factory.mktemp("served")
    address, program = str(folder / "socket"), folder / "python"
    alone = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "critical"}
    environment = {**os.environ, **alone, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, "-m", "tests.forked", address]
    with subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        write_client(program, address)
        yield program
        process.kill()


@pytest.fixture
def first_of():
    """Inside what it returns this process takes itself for the first of so many; what others would send is never there."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    @contextlib.contextmanager
    def running(count):
        dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()

    return running


@pytest.fixture
def in_two_processes():
    """Starts a command in two processes, as ``accelerate launch`` does.

    What it returns waits for them, at most so many seconds each, and tells exit status and standard error of both.
    """
    workers: list[subprocess.Popen[str]] = []

    def begin(command, cwd=None):
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        workers.extend(start(list(map(str, command)), 2, cwd=cwd, environment=alone))

        def finished(timeout):
            said = [worker.communicate(timeout=timeout)[1] for worker in workers]
            return [(worker.returncode, errors) for worker, errors in zip(workers, said, strict=True)]

        finished.workers = workers
        return finished

    yield begin
    for worker in workers:
        worker.kill()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A ``StableDiffusionPipeline`` folder with random weights: 16 x 16 x 4 latents of 64 x 64 pictures."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=LIMIT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(tiny_text(tokenizer, 16))
        vae = tiny_vae()
        unet = tiny_unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=16,
        )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A ``StableDiffusionXLPipeline`` folder with random weights: 16 x 16 x 4 latents of 64 x 64 pictures."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    first = CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=LIMIT)
    second = CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=LIMIT, pad_token="!")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = tiny_vae(scaling_factor=0.13025)
        unet = tiny_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=16 + 12,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 10,
        )
        encoders = CLIPTextModel(tiny_text(first, 16)), CLIPTextModelWithProjection(tiny_text(second, 12, projection_dim=10))
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def refiner_dir(tmp_path_factory, sdxl_dir) -> Path:
    """A ``StableDiffusionXLImg2ImgPipeline`` folder as SDXL's refiner has it: the second text encoder alone, five time ids."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("refiner") / "tiny-refiner"
    base = StableDiffusionXLPipeline.from_pretrained(sdxl_dir, add_watermarker=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        unet = UNet2DConditionModel.from_config(
            {**base.unet.config, "cross_attention_dim": 12, "projection_class_embeddings_input_dim": 5 * 8 + 10}
        )
    StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=unet,
        scheduler=base.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A ``StableDiffusion3Pipeline`` folder with random weights: 16 x 16 x 4 latents of 64 x 64 pictures, shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tokenizer, words = CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=LIMIT), tiny_t5_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=40,
            pooled_projection_dim=24,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)  # zero at first, and nothing would depend on the prompt
        vae = tiny_vae(shift_factor=0.0609, scaling_factor=1.5305)
        encoders = [CLIPTextModelWithProjection(tiny_text(tokenizer, width, projection_dim=12)) for width in (16, 12)]
        third = T5EncoderModel(T5Config(vocab_size=len(words), d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=words,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_without_t5(tmp_path_factory, sd3_dir) -> Path:
    """The same as people keep it to save 10 GB: ``model_index.json`` names no third encoder."""
    folder = shutil.copytree(sd3_dir, tmp_path_factory.mktemp("models") / "tiny-sd3-small")
    index = folder / "model_index.json"
    absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **absent}))
    for part in absent:
        shutil.rmtree(folder / part)
    return folder


@pytest.fixture(scope="session")
def flow_dir(tmp_path_factory, tokenizer_dir):
    """Folders of the other families of rectified flow by their kind, each made when it is first asked for."""
    import tiny_flow

    base, made = tmp_path_factory.mktemp("flows"), {}
    makers = {
        "zimage": tiny_flow.zimage,
        "zimage-turbo": lambda folder: tiny_flow.zimage(folder, shift=3.0),
        "klein": tiny_flow.klein,
        "klein-distilled": lambda folder: tiny_flow.klein(folder, is_distilled=True),
        "flux": lambda folder: tiny_flow.flux(folder, tokenizer_dir),
        "schnell": lambda folder: tiny_flow.flux(folder, tokenizer_dir, guidance_embeds=False),
    }

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = makers[kind](base / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory) -> Path:
    """Sixteen votes, the unspoilt picture of a scene against a spoilt one, as ``metadata.jsonl``; eight prompts."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = []
    for row in range(16):
        if row % 2 == 0:
            scene = scenes.random_scene(rng)
            prompt = caption(scene, rng)
        for side, share in (("chosen", 0.0), ("rejected", 1.0)):
            scenes.shoot(scene, rng, flaw_share=share, wrong_share=0.0).image.save(folder / f"{row}-{side}.png")
        lines.append({"prompt": prompt, "chosen": f"{row}-chosen.png", "rejected": f"{row}-rejected.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def judge_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A ``CLIPModel`` folder with random weights, as PickScore is saved."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("judge") / "tiny-judge"
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=LIMIT)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LIMIT, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=tower | ends | text, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16
            )
        )
        for parameter in model.parameters():  # the initial weights are so small that all pictures would score alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    rng = np.random.default_rng(1)
    path.write_text("".join(caption(scenes.random_scene(rng), rng) + "\n" for _ in range(4)))
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Shared by all tests, so that the sixteen pairs are encoded once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def palate(tmp_path, model_dir, pairs_dir, cache_dir, capsys, monkeypatch):
    """Runs a verb in ``tmp_path``; ``train`` and ``plan`` get the tiny world and ``quick.yaml`` unless told otherwise.

    Returns the exit code and what was printed on standard output and standard error.
    """
    from palate.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text(QUICK)

    def run(verb: str, *words: object, **options: object) -> tuple[int, str, str]:
        if verb in ("train", "plan"):
            tiny = {"pretrained_model_name_or_path": model_dir, "train_data": pairs_dir, "cache_dir": cache_dir}
            options = {**tiny, "output_dir": "out", "max_train_steps": 3, **options}
            words = words or ("quick.yaml",)
        given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
        capsys.readouterr()
        code = main([verb, *map(str, words), *given])
        return code, *capsys.readouterr()

    return run


QUICK = """\
training: {train_batch_size: 4, learning_rate: 1e-3, logging_steps: 1, checkpointing_steps: 2}
policy: {rank: 4}
evaluation:
  num_inference_steps: 3
  validation_prompts: [a red house on the left, a blue tower]
"""
