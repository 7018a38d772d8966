"""Base beside tuned model: drawn, judged, reported."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from palate.base.errors import UserError
from palate.base.machine import tell, versions
from palate.data.prompts import Prompt
from palate.evaluation.folders import SHOWN_PROMPTS, read_run
from palate.miniature import prompt_lists, world
from palate.models.files import weights_of
from palate.names.judges import score_folders
from palate.runs.assembly import Assembled, assemble, not_edited
from palate.runs.card import write_card
from palate.runs.idle import idle_line
from palate.runs.loading import at_home, denoiser_of, drawing_of
from palate.runs.methods import SpaceOptions
from palate.runs.recipe import Recipe, load
from palate.runs.sections import EvaluationOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import nn

    from palate.evaluation.manifest import Picture
    from palate.models.denoiser import Denoiser
    from palate.models.drawing import Drawing
    from palate.models.policy import Policy
    from palate.models.refiner import Refiner


def evaluate(recipe: Recipe, *, command: str = "") -> None:
    """Compare base and tuned model of a finished run again, in its folder.

    recipe: of the run, with other options of the comparison, and for what lies elsewhere by now. The card tells how the weights
    were made, so it follows the run's own.
    """
    recipe = at_home(recipe)
    out = Path(recipe.training.output_dir)
    ran = load(str(out / "recipe.yaml"))
    shown = read_run(out).get(SHOWN_PROMPTS, [])  # damaged, it is told now and not after the drawing
    found = assemble(recipe)
    found = found.showing([Prompt(text) for text in shown])
    if not found.compared:
        raise UserError(f"{out}/recipe.yaml names no prompts; add --evaluation_prompts FILE")
    for told in (not_edited(found.compared), idle_line(recipe, EvaluationOptions)):
        if told:
            tell(told)
    weights = weights_of(out)
    from palate.models.lora import load_lora, tuned
    from palate.models.policy import twin

    denoiser = denoiser_of(recipe)
    base = twin(denoiser.network, share=True)
    if recipe.policy.pretrained_lora is not None:
        load_lora(denoiser, base, recipe.policy.pretrained_lora, texts=recipe.policy.train_text_encoder)
    compare_models(found, denoiser, base, tuned(denoiser, weights), command)
    write_card(out, dataclasses.replace(ran, evaluation=recipe.evaluation), denoiser)


class Samples:
    """Pictures of the validation prompts during training: the same seeds every time, base beside tuned."""

    def __init__(self, recipe: Recipe, prompts: Sequence[Prompt], denoiser: Denoiser, policy: Policy):
        self.options, self.prompts, self.denoiser, self.policy = recipe.evaluation, prompts, denoiser, policy
        self.drawing = drawing_of(recipe, denoiser)
        self.out = Path(recipe.training.output_dir)
        self.folder = self.out / "samples"
        self.base: list[Image] = []
        if prompts:
            with denoiser.encoding():
                denoiser.remember([text for p in prompts for text in (p.text, p.negative) if text is not None])

    def _generate(self, network: nn.Module) -> list[Image]:
        return self.denoiser.generate(
            [p.text for p in self.prompts],
            [(self.options.evaluation_seed + i) % 2**64 if p.seed is None else p.seed for i, p in enumerate(self.prompts)],
            self.drawing,
            negatives=[p.negative for p in self.prompts],
            shapes=[p.shape for p in self.prompts],
            network=network,
        )

    def draw(self, step: int) -> Path | None:
        """Draw them after so many steps, if there are prompts, and write the report anew; the path of the pictures."""
        from palate.evaluation.report import chapter_of, write_report

        drawn = self._draw(step) if self.prompts else None
        try:
            write_report(self.out / "report.html", [chapter_of(self.out)])
        except UserError as error:  # a page is not worth a run
            tell(f"report.html is not written yet: {error}")
        return drawn

    def _draw(self, step: int) -> Path:
        from palate.evaluation.grid import before_after_grid

        self.base = self.base or self._generate(self.policy.frozen)
        tuned = self._generate(self.policy.trainable_module) if step else self.base
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:06d}.png"
        before_after_grid([p.text for p in self.prompts], self.base, tuned, path, columns=4)
        self.denoiser.release()
        return path


def compare_models(found: Assembled, denoiser: Denoiser, base: nn.Module, tuned: nn.Module, command: str) -> None:
    """Draw the evaluation prompts with both networks, let the judges, if there are any, score them, and write what came out
    into the run's folder.

    command: what was typed; told where no training has told its own.
    """
    from PIL.Image import open as open_image

    from palate.evaluation.folders import compare_folders, write_result
    from palate.evaluation.generation import plan
    from palate.evaluation.grid import before_after_grid
    from palate.evaluation.report import chapter_of, write_report

    recipe, out, began = found.recipe, found.out, time.monotonic()
    options = recipe.evaluation
    planned = plan(found.compared, model="", images_per_prompt=options.images_per_prompt)
    own = [prompt.seed is not None for prompt in found.compared for _ in range(options.images_per_prompt)]
    planned = [
        p if has else dataclasses.replace(p, seed=(options.evaluation_seed + i) % 2**64)
        for i, (p, has) in enumerate(zip(planned, own, strict=True))
    ]
    prompts = [p.prompt for p in planned]
    pictures, refiner, drawing = {}, None, drawing_of(recipe, denoiser)
    with denoiser.encoding():
        denoiser.remember([text for p in planned for text in (p.prompt, p.negative) if text is not None])
    if options.refiner is not None:
        from palate.models.families import load_refiner

        precision, device = recipe.training.mixed_precision, str(denoiser.device)
        refiner = load_refiner(options.refiner, start=options.refiner_start, mixed_precision=precision, device=device)
    sides, drawn = [out / "evaluation" / side for side in ("base", "tuned")], {}
    for folder, network in zip(sides, (base, tuned), strict=True):
        drawn[folder] = _drawn(recipe, denoiser, network, refiner, planned, drawing, folder)
    _put(out, {folder: new for folder, new in drawn.items() if new is not None})
    for folder in sides:
        pictures[folder.name] = [open_image(folder / p.file).convert("RGB") for p in planned]
    del refiner
    denoiser.release()  # room for the judges
    shown = _first_of_each(prompts, 12)
    before_after_grid(
        [prompts[i] for i in shown],
        [pictures["base"][i] for i in shown],
        [pictures["tuned"][i] for i in shown],
        out / "before_after.png",
        columns=4,
    )
    if not found.judges:
        (out / "metrics.json").unlink(missing_ok=True)  # of other pictures
        write_report(out / "report.html", [chapter_of(out)])
        tell(
            f"drew before and after in {time.monotonic() - began:.0f} s; see {out / 'report.html'}. For a win rate: "
            f"palate evaluate {out} --evaluation_prompts partiprompts --judges '[pickscore]'"
        )
        return
    score_folders(found.judges.values(), sides, device=denoiser.device, progress=sys.stderr.isatty())
    own = recipe.online.train_prompts is not None or recipe.data.train_data in world.PAIRS
    unseen = own and options.evaluation_prompts in prompt_lists.UNSEEN  # of other data it is not known
    trained_on = list(recipe.online.rewards) if recipe.online.train_prompts is not None else []
    result = compare_folders(sides, judges=list(found.judges), trained_on=trained_on, unseen=unseen, who="the aligned model")
    method = f"{recipe.objective['name']} in {_space_name(recipe.space)} space"
    title = f"{Path(recipe.model.pretrained_model_name_or_path).name}, aligned by {method}"
    # run.json tells the command of a training; the weights may also have come without it.
    extra = {"title": title} if (out / "run.json").is_file() else {"title": title, "command": command}
    write_result(out / "metrics.json", result, extra)
    write_report(out / "report.html", [chapter_of(out)])
    tell(f"compared in {time.monotonic() - began:.0f} s; see {out / 'report.html'}")
    print(result.versus[0].headline)


def _drawn(
    recipe: Recipe,
    denoiser: Denoiser,
    network: nn.Module,
    refiner: Refiner | None,
    pictures: list[Picture],
    drawing: Drawing,
    folder: Path,
) -> Path | None:
    """The pictures of one side in a folder beside ``folder``; None if that holds just these, of the same weights."""
    from palate.evaluation.generation import drawn_by, generate, holds, settings
    from palate.models.parts import sketch

    options, side = recipe.evaluation, folder.name
    pictures = [dataclasses.replace(p, model=side) for p in pictures]
    told = settings(denoiser, drawing, seed=options.evaluation_seed, versions=versions())
    model = {"name": side, "base": recipe.model.pretrained_model_name_or_path, "refiner": options.refiner}
    model["weights"] = sketch(network)
    if refiner is None and holds(folder, pictures, told, model):
        tell(f"{len(pictures)} pictures of the {side} model are there")
        return None
    tell(f"generating {len(pictures)} pictures of the {side} model")
    partial = folder.with_name(f".{side}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    generate(
        drawn_by(denoiser, drawing, network=network, refiner=refiner),
        pictures,
        partial,
        settings=told,
        model=model,
        batch_size=drawing.batch_size,
        progress=sys.stderr.isatty(),
    )
    return partial


def _put(out: Path, drawn: dict[Path, Path]) -> None:
    """New pictures in the place of old ones, of both sides at once: what is stopped before leaves two sides that belong
    together, and no numbers of others beside them."""
    if drawn:
        (out / "metrics.json").unlink(missing_ok=True)
    for folder, new in drawn.items():
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def _first_of_each(prompts: list[str], limit: int) -> list[int]:
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(prompt, index)
    return list(first.values())[:limit]


def _space_name(space: SpaceOptions) -> str:
    parts = space if isinstance(space, list) else [space]
    return " + ".join(p["name"] for p in parts)
