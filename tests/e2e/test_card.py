"""The model card of a run, and what is pushed to a hub; the hub is a double."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from palate.base.errors import UserError
from palate.cli import main
from palate.models.families import load_denoiser
from palate.runs import recipe as recipes
from palate.runs.card import write_card

KOHYA = "pytorch_lora_weights_kohya.safetensors"


class Hub:
    """Stands for ``huggingface_hub.HfApi``; remembers what it was asked."""

    def __init__(self):
        self.known, self.full, self.calls = True, False, []

    def __call__(self):
        return self

    def whoami(self):
        if not self.known:
            raise ValueError("Token is required, but no token found")

    def create_repo(self, repo, **options):
        assert options == {"exist_ok": True, "private": True}
        return f"https://hub.example/{repo}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        if self.full:
            raise OSError("507 Insufficient Storage")
        found = {p.relative_to(folder_path).as_posix() for pattern in allow_patterns for p in Path(folder_path).glob(pattern)}
        self.calls.append((repo_id, sorted(found)))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def parts(path: Path) -> tuple[dict, str]:
    _, front, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_tells_what_was_measured_and_how_to_use_it(palate, hub, judge_dir, prompts_file, tmp_path):
    extra = {"judges": f"[pickscore:{judge_dir}]", "evaluation_prompts": prompts_file, "max_train_steps": 1}
    code, _, err = palate("train", push_to_hub="me/house", **extra)
    assert code == 0, err
    assert "pushed to https://hub.example/me/house" in err
    pushed = ["README.md", "before_after.png", "pytorch_lora_weights.safetensors", KOHYA]
    assert hub.calls == [("me/house", pushed)]
    front, text = parts(tmp_path / "out" / "README.md")
    assert front["library_name"] == "diffusers"
    assert {"lora", "stable-diffusion", "dpo"} <= set(front["tags"])
    assert "base_model" not in front  # a folder of this machine is none
    measured = json.loads(Path("out/metrics.json").read_text())
    assert measured["headline"].replace(f"{judge_dir.parent}/", "") in text
    rate = measured["comparisons"][0]["win_rate"]
    assert f"{rate['wins']} / {rate['ties']} / {rate['losses']}" in text
    assert "![the same prompts and seeds before and after](before_after.png)" in text
    assert "seeds | training 0, evaluation 1234 |" in text
    assert "torch 2." in text
    assert str(tmp_path) not in text
    assert str(judge_dir.parent) not in text  # no folder of this machine either

    # The snippet is Python that says what plain diffusers needs.
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert 'StableDiffusionPipeline.from_pretrained("path/to/tiny-sd"' in snippet
    assert '"a red house on the left"' in snippet

    code, said, _ = palate("export", "out", push_to_hub="me/again")
    assert (code, said) == (0, "pushed to https://hub.example/me/again\n")
    assert hub.calls[1] == ("me/again", pushed)
    assert palate("export", "out", format="kohya", output="one.safetensors", push_to_hub="me/k")[0] == 0
    assert hub.calls[2] == ("me/k", ["one.safetensors"])


def test_the_card_of_all_weights_that_were_not_compared(palate, tmp_path, sdxl_dir):
    options = {"train_method": "full", "max_train_steps": 1, "validation_prompts": "[]"}
    assert palate("train", pretrained_model_name_or_path=sdxl_dir, **options)[0] == 0
    front, text = parts(tmp_path / "out" / "README.md")
    assert "lora" not in front["tags"]
    assert "stable-diffusion-xl" in front["tags"]
    assert "Not compared yet." in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    assert "UNet2DConditionModel" in text
    assert KOHYA not in text


def test_the_card_of_a_continued_lora_tells_its_own_rank(palate, tmp_path):
    options = {"max_train_steps": 1, "validation_prompts": "[]", "objective.beta": "auto"}
    assert palate("train", rank=2, output_dir="first", **options)[0] == 0
    assert palate("train", rank=4, pretrained_lora="first", **options)[0] == 0
    text = parts(tmp_path / "out" / "README.md")[1]
    assert "a LoRA of rank 2, continued from another" in text
    chosen = json.loads(Path("out/run.json").read_text())["chosen"]["beta"]
    assert f"beta auto, which chose {chosen:g}" in text


@pytest.mark.parametrize(
    ("objective", "told"),
    [("dpo", "14 pairs"), ("kto", "14 pairs, each as a liked and a disliked picture"), ("sft", "14 pairs, their winners")],
)
def test_the_card_tells_what_of_pairs_was_learned(palate, tmp_path, objective, told):
    assert palate("train", objective=objective, max_train_steps=1, validation_prompts="[]")[0] == 0
    assert f"| trained on | {told} |" in parts(tmp_path / "out" / "README.md")[1]


def test_the_card_of_online_training(palate, tmp_path, prompts_file):
    options = {
        "train_prompts": prompts_file,
        "samples_per_round": 4,
        "sample_num_steps": 2,
        "updates_per_round": 2,
        "rounds": 1,
    }
    rewards = {"rewards": "{jpeg_compressibility: 0.5, 'own:flat': 1}", "train_batch_size": 2}
    (tmp_path / "own.py").write_text("def flat(images, prompts, metadata):\n    return [0.0] * len(prompts)\n")
    tiny = {"max_train_steps": None, "train_data": None, "cache_dir": None, "objective": "ddpo_is", "validation_prompts": "[]"}
    code, _, errors = palate("train", **options, **rewards, **tiny)
    assert code == 0, errors
    text = parts(tmp_path / "out" / "README.md")[1]
    assert "aligned with rewards by ddpo_is" in text
    for row in (
        "| data | the model's own pictures of 4 prompts of prompts.txt |",
        "| rewards | jpeg_compressibility 0.5, own:flat 1 |",
        "| rounds | 1 of 4 pictures |",
        "| batch | 4 steps of pictures an update, 2 at once |",
    ):
        assert row in text
    assert "epochs" not in text.split("## Training")[1].split("<details>")[0]


def test_what_cannot_be_pushed_is_told_before_training(palate, hub, tmp_path):
    assert "expected owner/name" in palate("train", push_to_hub="house")[2]
    hub.known = False
    code, _, err = palate("train", push_to_hub="me/house")
    assert code == 2
    assert "Set HF_TOKEN" in err
    assert not (tmp_path / "out").exists()
    hub.known, hub.full = True, True
    code, _, err = palate("train", push_to_hub="me/house", max_train_steps=1, validation_prompts="[]")
    assert code == 2
    assert "palate export out --push_to_hub me/house" in err.splitlines()[-1]
    assert (tmp_path / "out" / "README.md").is_file()
    assert "palate export needs --format" in palate("export", "out", output="x")[2]
    assert "is not the folder of a finished run" in palate("export", str(tmp_path), push_to_hub="me/x")[2]


def test_a_damaged_note_of_the_run_is_told(tmp_path, capsys, model_dir):
    denoiser = load_denoiser(str(model_dir))
    recipe = recipes.load("miniature-dpo", {"output_dir": str(tmp_path)})
    (tmp_path / "run.json").write_text('{"versions": {"tor')
    with pytest.raises(UserError, match=r"run\.json cannot be read .*; mend it, or delete it"):
        write_card(tmp_path, recipe, denoiser)
    assert not (tmp_path / "README.md").exists()
    recipes.write(recipe, tmp_path / "recipe.yaml")
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "run.json cannot be read" in capsys.readouterr().err
    (tmp_path / "run.json").unlink()  # a missing one is none: the card tells what is known
    assert "| versions |" not in write_card(tmp_path, recipe, denoiser).read_text()
