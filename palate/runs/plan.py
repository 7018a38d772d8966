"""What a recipe will take of memory, time and disk, counted before it is run: no weights are read, and nothing is trained."""

# torch types fake tensors in part only.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from palate.base.errors import UserError, said
from palate.base.machine import Peak, device, device_memory, is_main, processes, resident, tell
from palate.base.options import POSITIVE, Count, check_ranges
from palate.online.options import Arithmetic
from palate.runs.idle import idle_line
from palate.runs.loading import at_home, denoiser_of, drawing_of, policy_of, shape_of
from palate.runs.methods import bind_space
from palate.runs.ready import bytes_a_row, checkpoints_bytes, free, rows_of
from palate.runs.recipe import OPTIONS, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch import Tensor, nn

    from palate.diffusion.denoising import Noised
    from palate.models.denoiser import Denoiser
    from palate.models.latent import Latent
    from palate.models.policy import Policy

GB = 1e9
UNCOUNTED = 0.1
"""Of a card: left to CUDA itself, its kernels' workspaces and the gaps between allocations, which nobody has measured here."""
WORTH_COUNTING = 10**8
"""Parameters: smaller networks fit everywhere, and counting them would take longer than their first steps."""
STATES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "adafactor": 0.0}
"""Bytes that an optimizer keeps of each trained number: two in float32, or in 8 bits with a scale for each 256."""
WEIGHTS = ("frozen weights", "frozen copy, old policy", "trained weights")
"""Parts that are there whenever the model is."""


Row = dict[str, "tuple[torch.Size, torch.dtype]"]
"""The conditioning of one picture: shape, without the batch, and precision of each tensor."""


@dataclass(frozen=True)
class Needs:
    """Bytes of device memory of one process, by part, and floating-point operations."""

    held: dict[str, float]
    """All through training: weights, their gradients, what the optimizer keeps."""
    passes: float
    """Activations and what else a forward and backward pass of one micro-batch needs, at its highest."""
    update: float
    """What the optimizer's update needs for a moment."""
    drawing: float
    """What drawing pictures needs beside the weights and what the optimizer keeps: the VAE's weights, activations. 0 if none
    are drawn."""
    encoding: dict[str, float]
    """Before training, while the network waits in main memory."""
    step_operations: float
    """Of one micro-batch."""
    picture_operations: float
    text_operations: float
    row: Row
    latents: int
    """Numbers of a picture's."""
    whole: dict[str, float] | None = None
    """Of a process that holds a part: what is held by one that holds everything."""
    gathered: float = 0.0
    """And the most of other processes' parts that a pass has beside its own."""

    def stages(self) -> dict[str, dict[str, float]]:
        """What is in memory one after the other, by part."""
        passes = {"gathered of others": self.gathered, "activations": self.passes}
        moment = max(passes, {"update": self.update}, key=lambda parts: sum(parts.values()))
        if self.whole is None:
            drawing = {"the same weights": sum(self.held.values())}
        else:  # the parts, and in the first process, which draws alone, the finished model
            drawing = {"the same parts": sum(self.held[part] for part in (*WEIGHTS, "gradients"))}
            drawing["the whole model"] = sum(self.whole[part] for part in WEIGHTS)
        drawing = {**drawing, "VAE, activations": self.drawing} if self.drawing else {}
        return {"training": {**self.held, **moment}, "drawing": drawing, "encoding": self.encoding}

    @property
    def training(self) -> float:
        """The most that updates need."""
        return sum(self.stages()["training"].values())

    @property
    def sampling(self) -> float:
        """The most that drawing needs, online or for sample pictures."""
        return sum(self.stages()["drawing"].values())

    @property
    def peak(self) -> float:
        return max(sum(parts.values()) for parts in self.stages().values())


def count(recipe: Recipe, *, single: bool = False, gpu: bool | None = None, together: int | None = None) -> Needs:
    """Count what one process needs, by the code that trains, on tensors without contents.

    Args:
        single: it learns from single pictures.
        gpu: as on a GPU, where autocast computes more in float32; as on this machine unless given.
        together: how many processes train; as many as there are unless given.

    Raises:
        UserError: a mistake in the recipe, or configurations that cannot be had.
    """
    import torch

    from palate.models.outline import Counter, empty, without_contents
    from palate.training.sharded import gathered

    parts = (processes() if together is None else together) if recipe.training.shard_model else 1
    gpu = device() != "cpu" if gpu is None else gpu
    denoiser = cast("Latent", denoiser_of(recipe, outline="shapes"))
    policy = policy_of(recipe, denoiser)
    if recipe.method.names("old"):
        policy.track_old(1.0)
    shape, drawing = shape_of(recipe, denoiser), drawing_of(recipe, denoiser)
    with without_contents(gpu=gpu):
        empty(policy.modules)
        denoiser.use("cpu")
        for weight in policy.parameters():  # of an earlier micro-batch
            weight.grad = torch.empty_like(weight)
        there, whole = held(policy, recipe, parts), held(policy, recipe)
        of_others = gathered(policy.modules) if parts > 1 else 0.0
        with torch.no_grad(), Counter() as texts:
            encoded = denoiser.encode_prompts(["a picture"])
        weights = sum(bytes_of(text.pair[1]) for text in denoiser.texts)
        vae = bytes_of(denoiser.vae.module)
        pixels = torch.empty(1, 3, shape.height, shape.width)
        with torch.no_grad(), Counter(denoiser.vae.module.parameters()) as pictures:
            denoiser.encode_images(pixels)
        framed = denoiser.picture_conditions((shape.width, shape.height), shape, (0.5, 0.5), flip=False)
        row = {name: (x.shape[1:], x.dtype) for name, x in encoded.tensors.items()}
        row |= {name: (x.shape, x.dtype) for name, x in framed.items()}
        if recipe.policy.train_text_encoder:
            row |= {name: (x.shape[1:], x.dtype) for name, x in denoiser.words()(["a picture"]).items()}
        run = work(recipe, policy, denoiser, row, single=single)
        weights_there = [p for module in policy.modules for p in module.parameters()]
        with Counter([*weights_there, *(p.grad for p in policy.parameters() if p.grad is not None)]) as passes:
            run()
        drawn = _drawing(recipe, policy, denoiser, row, drawing.batch_size, everywhere=parts > 1)
    trained = there["trained weights"]
    return Needs(
        there,
        float(passes.peak),
        trained if recipe.training.optimizer != "adamw_8bit" else 0.0,
        vae + drawn if drawn or parts == 1 else 0.0,
        {"text encoders": weights, "VAE": vae, "activations": max(float(pictures.peak), texts.peak - weights)},
        float(passes.operations),
        float(pictures.operations),
        float(texts.operations),
        row,
        math.prod(denoiser.latent_shape(shape)),
        whole if parts > 1 else None,
        of_others,
    )


def held(policy: Policy, recipe: Recipe, parts: int = 1) -> dict[str, float]:
    """Bytes that are there all through training, by part.

    parts: into which the model is cut up; those of the first process, which has most.
    """
    from palate.training.sharded import in_part

    def size(weights: Iterable[Tensor]) -> float:
        return float(sum(in_part(p, parts) * p.element_size() for p in weights))

    trained = list(policy.parameters())
    own = {id(p): p for p in policy.trainable_module.parameters()}
    beside = {id(p): p for module in policy.modules for p in module.parameters() if id(p) not in own}
    return {
        "frozen weights": size(p for p in own.values() if not p.requires_grad),
        "frozen copy, old policy": size(beside.values()),
        "trained weights": size(trained),
        "gradients": size(trained),
        "optimizer": _state_bytes(recipe, trained, sum(in_part(p, parts) for p in trained)),
        "average": size(trained) if recipe.training.ema_decay is not None else 0.0,
    }


def _state_bytes(recipe: Recipe, trained: Sequence[nn.Parameter], numbers: int) -> float:
    """What the optimizer keeps of so many numbers, those of whole weights unless it is AdamW."""
    name = recipe.training.optimizer
    if name == "adafactor":  # of a weight the means over each of its last two axes, of a vector all
        shapes = [p.shape for p in trained]
        return 4.0 * sum(s.numel() if len(s) < 2 else s.numel() // s[-1] + s.numel() // s[-2] for s in shapes)
    return numbers * STATES[name] if name in STATES else numbers * _tried(recipe)


def _tried(recipe: Recipe) -> float:
    """Bytes a number that an optimizer of the user's own keeps, of a matrix that it updates once."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from palate.training.optimizers import make_optimizer

    with unset_fake_temporarily():
        weight = nn.Parameter(torch.zeros(128, 128))
        optimizer = make_optimizer([weight], recipe.training)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        return sum(x.numel() * x.element_size() for x in kept) / weight.numel()


def work(recipe: Recipe, policy: Policy, denoiser: Latent, row: Row, *, single: bool = False) -> Callable[[], None]:
    """The forward and backward pass of one micro-batch, of numbers that mean nothing.

    Args:
        row: of one picture.
        single: it learns from single pictures.
    """
    import torch

    from palate.online.trajectories import Guided
    from palate.training.fits import MODELS, measured_fits

    evidence, online = recipe.method.evidence, recipe.online
    models = ["policy", *(name for name in MODELS[1:] if recipe.method.names(name))]
    if evidence == "trajectories" and online.kl_weight:
        models.append("reference")
    both = evidence == "pairs" or (online.train_prompts is None and not single and recipe.method.names("label"))
    guided = online.train_prompts is not None and online.trained_scale != 1
    acting: Any = Guided(policy, online.trained_scale) if guided else policy
    rows = recipe.training.train_batch_size * (2 if both else 1)
    noised = _noised(recipe, policy, denoiser, row, rows, guided=guided)
    # Where another random time would be drawn, which needs contents, the step before costs the same.
    parts = recipe.space if isinstance(recipe.space, list) else [recipe.space]
    parts = [{**part, "target_time": "previous"} if part["name"] == "perceptual" else part for part in parts]
    space = bind_space(parts if isinstance(recipe.space, list) else parts[0], policy)

    def run() -> None:
        with _autocast(recipe, policy):
            fits = measured_fits(acting, space, noised, models)
            loss = torch.stack([fits[name].error.sum() for name in models]).sum()
        loss.backward()

    return run


def _noised(recipe: Recipe, policy: Policy, denoiser: Latent, row: Row, rows: int, *, guided: bool = False) -> Noised:
    import torch

    from palate.diffusion.denoising import Conditioning, Noised
    from palate.diffusion.sampling import NEGATIVE

    x = torch.randn(rows, *denoiser.latent_shape(shape_of(recipe, denoiser)))
    cond = {name: _rows(*of, rows) for name, of in row.items()}
    if guided:
        cond |= {NEGATIVE + name: tensor for name, tensor in cond.items()}
    t = policy.schedule.at_share(torch.full((rows,), 0.5, dtype=torch.float64))
    return Noised(x, x, x, t, Conditioning(cond), x, torch.zeros(rows, dtype=torch.long), x)


def _rows(shape: torch.Size, dtype: torch.dtype, rows: int) -> Tensor:
    import torch

    from palate.models.outline import LONG

    made = torch.randn(rows, *shape) if dtype.is_floating_point else torch.full((rows, *shape), LONG)
    return made.to(dtype)


def drawing_of_one(
    recipe: Recipe, policy: Policy, denoiser: Latent, row: Row, pictures: int = 1, guidance: float = 5.0
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A pass of the network as drawing takes one for each step, and the decoding at its end."""
    import torch

    from palate.training.fits import device_of

    noised = _noised(recipe, policy, denoiser, row, pictures * (2 if guidance != 1 else 1)).to(device_of(policy))

    def network() -> object:
        with torch.no_grad(), _autocast(recipe, policy):
            return policy(noised.xt, noised.t, noised.cond)

    def decode() -> object:
        with torch.no_grad():
            return denoiser.vae.decode(noised.xt[:pictures])

    return network, decode


def _drawing(recipe: Recipe, policy: Policy, denoiser: Latent, row: Row, shown: int, *, everywhere: bool) -> float:
    """Activations of drawing, of the network or of the VAE, whichever are more; 0 if nothing is drawn.

    everywhere: all processes take the same passes, so none draws while it trains.
    """
    from palate.models.outline import Counter

    online, evaluation = recipe.online, recipe.evaluation
    drawings: list[tuple[int, float]] = []
    if evaluation.evaluation_prompts or (evaluation.validation_prompts and not everywhere):
        drawings.append((shown, evaluation.guidance_scale))
    if online.train_prompts is not None:
        drawings.append((online.sample_batch_size, online.sample_guidance_scale))
    most = 0
    weights = [*policy.trainable_module.parameters(), *denoiser.vae.module.parameters()]
    for pictures, guidance in drawings:
        for run in drawing_of_one(recipe, policy, denoiser, row, pictures, guidance):
            with Counter(weights) as counter:
                run()
            most = max(most, counter.peak)
    return float(most)


def _autocast(recipe: Recipe, policy: Policy) -> contextlib.AbstractContextManager[object]:
    import torch

    from palate.models.denoiser import DTYPES
    from palate.training.fits import device_of

    precision = recipe.training.mixed_precision
    return contextlib.nullcontext() if precision == "no" else torch.autocast(device_of(policy).type, DTYPES[precision])


def bytes_of(module: nn.Module) -> float:
    """Of a module's parameters."""
    return float(sum(p.numel() * p.element_size() for p in module.parameters()))


# What a plan tells ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanOptions:
    """What is planned for."""

    memory: Annotated[float, POSITIVE] | None = None
    """Gigabytes of the card that it is planned for; those of the device at hand unless given."""
    processes: Count | None = None
    """How many ``accelerate launch`` will start, one on each card; as many as it has started unless given."""
    measure: bool = False
    """Time three steps here, and see what memory they take, on random weights of the model's shape."""

    def __post_init__(self) -> None:
        check_ranges(self)


def plan(recipe: Recipe, options: PlanOptions) -> list[str]:
    """What a run will take, in lines.

    Raises:
        UserError: a mistake in the recipe or its data, or configurations that cannot be had.
    """
    from palate.data.pairs import Reader
    from palate.runs.evidence import readers_of

    recipe = at_home(recipe)
    together = options.processes or processes()
    if options.measure and recipe.training.shard_model and together > 1:
        raise UserError(
            f"measure runs the whole model in one process, and with shard_model each of {together} holds a part: leave one of "
            "the two out"
        )
    readers, missing = list[Reader](), list[str]()
    if recipe.online.train_prompts is None:
        try:
            readers = readers_of(recipe)
        except UserError as error:  # what is planned for need not be there yet
            missing = [f"data, of which the size is left out: {error}"]
    single = bool(readers) and readers[0].single
    needs = count(recipe, single=single, gpu=True if options.memory is not None else None, together=together)
    card = device_memory() if options.memory is None else options.memory * GB
    idle = idle_line(recipe)
    lines = [idle] if idle else []
    lines += [*memory_lines(needs), *_judge_lines(recipe), *_fit_lines(recipe, needs, card, together, single=single)]
    if recipe.training.shard_model and together == 1:
        lines.append("  of one process, which holds everything: tell by --processes how many shard_model has to share it")
    seconds = None
    if options.measure:
        seconds, peak = tried(recipe, needs, single=single)
        lines.append(f"measured on {device()}: {seconds:.3g} s a micro-batch, {peak / GB:.2f} GB at most in training")
    rows = rows_of(readers)
    # Of a card that is not here there is no rate.
    rate = matrix_rate if options.memory is None else None
    lines += _time_lines(recipe, needs, rows, seconds, rate, together, single=single)
    return [*lines, *_disk_lines(recipe, needs, rows, single=single), *missing]


def foretell(recipe: Recipe, denoiser: Denoiser, *, single: bool = False) -> float | None:
    """Tell, at the start of a run, what it is counted to take, and return the bytes of training; None of a small network."""
    if not is_main() or sum(p.numel() for p in denoiser.network.parameters()) < WORTH_COUNTING:
        return None
    try:
        needs = count(recipe, single=single)
    except Exception as error:  # of a family, an objective or a space of the user's own, which may do anything
        tell(f"memory was not counted beforehand: {type(error).__name__}: {said(error)}")
        return None
    tell("\n".join([*memory_lines(needs), *_judge_lines(recipe)]))
    if needs.peak > (card := device_memory()):
        tell(
            f"warning: {device()} has {card / GB:.1f} GB, and {needs.peak / GB:.1f} are counted: 'palate plan' with the same "
            "options tells what makes it fit"
        )
    return needs.training


def memory_lines(needs: Needs) -> list[str]:
    """What is in memory one after the other, by part, in GB."""
    lines = ["memory of one process, GB"]
    for name, of in needs.stages().items():
        if any(of.values()):
            told = ", ".join(f"{part} {size / GB:.2f}" for part, size in of.items() if size)
            lines.append(f"  {name:9} {sum(of.values()) / GB:6.2f}   {told}")
    if needs.whole is not None:
        whole = sum(needs.whole[part] for part in WEIGHTS)
        lines.append(f"  before it is cut up, the model lies in main memory: {whole / GB:.2f} in each process")
    return lines


def _judge_lines(recipe: Recipe) -> list[str]:
    """Rewards whose weights lie on the same card all through training, with the size of those that are published."""
    from palate.judges import KINDS

    if recipe.online.train_prompts is None:
        return []
    beside = []
    for name in (*recipe.online.rewards, *recipe.online.held_out_rewards):
        kind, _, place = name.partition(":")
        known = KINDS.get(kind)
        if known is None or (known.place != "nothing" and not place.startswith("http")):
            beside.append(f"{name} ({known.size})" if known and known.size and not place else name)
    return [f"  rewards on the same card come on top: {', '.join(beside)}"] if beside else []


def _fit_lines(recipe: Recipe, needs: Needs, card: float, together: int, *, single: bool) -> list[str]:
    room = card * (1 - UNCOUNTED)
    fits = f"at most {needs.peak / GB:.1f} GB, of {card / GB:.1f} GB"
    if needs.peak <= room:
        return [f"  it fits: {fits}"]
    lines = [f"  it does not fit: {fits}, of which a tenth is left to what is not counted"]
    given: dict[str, object] = {}
    for change in _remedies(recipe, together):
        given |= change
        try:
            smaller = count(_with(recipe, given), single=single, gpu=True, together=together)
        except UserError as error:  # such as a package that is missing
            lines.append(f"       ?   {_words(given)}: {error}")
            continue
        lines.append(f"  {smaller.peak / GB:6.1f}   {_words(given)}")
        if smaller.peak <= room:
            return lines
    return [*lines, "  no option here makes it fit: take a lower resolution, a lower rank or a smaller model"]


def _remedies(recipe: Recipe, together: int) -> list[dict[str, object]]:
    """What makes a run smaller, what costs least first; each on top of those before it."""
    training, found = recipe.training, list[dict[str, object]]()
    batch = training.train_batch_size
    if recipe.evaluation.evaluation_batch_size > 1:
        found.append({"evaluation_batch_size": 1})
    if recipe.online.train_prompts is not None and recipe.online.sample_batch_size > 1:
        found.append({"sample_batch_size": 1})
    if batch > 1:
        more = {"gradient_accumulation_steps": batch * training.gradient_accumulation_steps}
        found.append({"train_batch_size": 1, **({} if recipe.online.train_prompts is not None else more)})
    if not recipe.policy.gradient_checkpointing:
        found.append({"gradient_checkpointing": True})
    parts = {"shard_model": True, **({} if training.optimizer == "adamw" else {"optimizer": "adamw"})}
    if together > 1 and not training.shard_model and training.optimizer in STATES and _goes_with(recipe, parts):
        found.append(parts)
    elif training.optimizer == "adamw" and not training.shard_model:
        found.append({"optimizer": "adamw_8bit" if recipe.policy.train_method == "lora" else "adafactor"})
    if recipe.policy.train_method == "lora" and training.mixed_precision != "no":
        found += [{"quantize": kind} for kind in (("int8", "nf4") if recipe.model.quantize is None else ())]
    return found


def _goes_with(recipe: Recipe, change: dict[str, object]) -> bool:
    try:
        _with(recipe, change)
    except UserError:
        return False
    return True


def _words(given: dict[str, object]) -> str:
    return " ".join(f"--{name} {str(value).lower()}" for name, value in given.items())


def _with(recipe: Recipe, given: dict[str, object]) -> Recipe:
    sections: dict[str, dict[str, object]] = {}
    for name, value in given.items():
        sections.setdefault(OPTIONS[name], {})[name] = value
    return dataclasses.replace(
        recipe, **{section: dataclasses.replace(getattr(recipe, section), **values) for section, values in sections.items()}
    )


def _time_lines(
    recipe: Recipe,
    needs: Needs,
    rows: int,
    seconds: float | None,
    rate: Callable[[str], float] | None,
    together: int,
    *,
    single: bool,
) -> list[str]:
    """Times, or operations where they are not known.

    seconds: of a micro-batch, measured here.
    rate: operations a second in a precision, of the device that it is planned for.
    together: processes that share the work.
    """
    training, online = recipe.training, recipe.online
    passes, updates = training.gradient_accumulation_steps, training.max_train_steps
    if online.train_prompts is not None:
        arithmetic = Arithmetic.of(online, recipe.method.evidence)
        passes = arithmetic.accumulation(training.train_batch_size, together)
        updates = arithmetic.total(online.rounds, updates)
    elif updates is None and rows:
        updates = math.ceil(training.num_train_epochs * rows / (training.train_batch_size * passes * together))

    def told(operations: float, precision: str) -> str:
        counted = f"{operations:.2g} operations"
        return counted if rate is None else f"{counted}, {_duration(operations / rate(precision))} or more"

    shared = f" in each of {together} processes" if together > 1 else ""
    lines = ["time" if rate is None else f"time; at least that of as many operations in products of matrices on {device()}"]
    if rows:
        pictures = (1 if single else 2) * (2 if recipe.data.random_flip else 1)
        encoding = rows * (pictures * needs.picture_operations + needs.text_operations)
        lines.append(f"  encoding about {rows} rows, once{shared}: {told(encoding / together, 'no')}")
    number, shape = updates or 1, f"{passes} x {training.train_batch_size}"
    work = told(number * passes * needs.step_operations, training.mixed_precision)
    work = work if seconds is None else f"{_duration(number * passes * seconds)}, as measured"
    lines.append(f"  training, {number} update{'s' * (number != 1)} of {shape}{shared}: {work}")
    if needs.whole is not None:
        lines.append("  gathering parts of other processes comes on top: not counted")
    if online.train_prompts is not None:
        lines.append("  drawing what it learns from, and asking rewards, come on top: not counted")
    return lines


def _duration(seconds: float) -> str:
    """
    >>> _duration(0.5), _duration(90), _duration(7200), _duration(360000)
    ('0.5 s', '1.5 min', '2 h', '4.2 days')
    """
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= (1.5 if name != "min" else 1) * size:
            return f"{seconds / size:.2g} {name}"
    return f"{seconds:.2g} s"


def _disk_lines(recipe: Recipe, needs: Needs, rows: int, *, single: bool) -> list[str]:
    training = recipe.training
    found = [
        (
            "checkpoints and the result",
            training.output_dir,
            float(checkpoints_bytes(recipe, int((needs.whole or needs.held)["trained weights"] / 4))),
        )
    ]
    if rows:
        text = sum(math.prod(shape) for name, (shape, _) in needs.row.items())
        found.insert(
            0, ("the cache", recipe.data.cache_dir, float(rows * bytes_a_row(recipe, needs.latents, text, single=single)))
        )
    told = [
        f"  {name:26} {size / GB:6.2f}   in {folder}, where {free(folder) / GB:.1f} are free" for name, folder, size in found
    ]
    return ["disk, GB", *told]


def matrix_rate(mixed_precision: str) -> float:
    """Floating-point operations a second of a product of two large matrices on the device at hand."""
    import torch

    from palate.models.denoiser import DTYPES

    where = device()
    side = 8192 if where != "cpu" else 1024
    one = torch.ones(side, side, device=where, dtype=DTYPES[mixed_precision])
    best = min([timed(lambda: one @ one) for _ in range(4)][1:])
    return 2 * side**3 / best


def tried(
    recipe: Recipe,
    needs: Needs,
    *,
    single: bool = False,
    repeats: int = 3,
    change: Callable[[Policy], object] = lambda policy: None,
) -> tuple[float, float]:
    """Seconds and the most bytes of a micro-batch on the device at hand, on random weights of the model's shape.

    change: what is done to the policy before.
    """
    from palate.training.optimizers import make_optimizer

    denoiser = cast("Latent", denoiser_of(recipe, outline="random"))
    policy = policy_of(recipe, denoiser)
    if recipe.method.names("old"):
        policy.track_old(1.0)
    change(policy)
    # Of a process all is told, also what is no tensor.
    beside = 0.0 if device() != "cpu" else resident() - sum(held(policy, recipe)[part] for part in WEIGHTS)
    optimizer = make_optimizer(list(policy.parameters()), recipe.training)
    run = work(recipe, policy, denoiser, needs.row, single=single)
    run()
    optimizer.step()
    peak = Peak()
    seconds = [timed(run) for _ in range(repeats)]
    optimizer.step()
    return statistics.median(seconds), peak.bytes() - beside


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, the device being waited for."""
    _wait()
    began = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
