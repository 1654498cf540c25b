"""A data set and a model -> a trained bundle in a run's folder; and the same for a run that was interrupted."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import time
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effnet import machine
from effnet.errors import ArgumentError, MissingExtraError, TrainingError
from effnet.fields import parse_bytes
from effnet.machine import Precision
from effnet.training.recipe import Recipe, read_recipe
from effnet.training.settings import Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from effnet.data.dataset import Dataset
    from effnet.training.choices import Choices
    from effnet.training.finish import Result
    from effnet.training.listener import Listener
    from effnet.training.prepare import Plan
    from effnet.training.schedule import Budget

VALIDATION_SHARE = (
    3.0  # an image in training takes as long as this many in validation: forward, and twice that backward
)
FEW = 500  # images to learn from, below which another recipe is advised
PART = 8  # images: a batch that was made smaller is a multiple, so that it can go through in parts
SMALLEST_BATCH = 16  # to which a recipe's own batch is halved for small data
ENDING = 8.0  # seconds of pictures and files


def train(
    data: str | Path,
    model: str | Path = "lite0",
    recipe: str | Path | Recipe = "finetune",
    *,
    out: str | Path | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Result:
    """Train a network on a folder of images or a manifest, and evaluate it.

    Args:
        data: a folder with a sub-folder for each class, split into train, val and test or not, or a manifest.
        model: a variant ("lite0"), a bundle, a spec.yaml, or a file of weights.
        recipe: "finetune", "few", "scratch", "paper", a YAML file, or a Recipe.
        out: the run's folder; by default runs/train/ and a name.
        listener: who is told how it goes.
        settings: fields of Settings (minutes, train_memory, resolution ...) and of Recipe (epochs, batch, lr ...).

    Returns:
        The run's folder, with a bundle in `best`, and how good it is.

    Raises:
        DataError, ArgumentError, TrainingError, CheckpointError: it cannot begin or go on, and why.
    """
    started = time.monotonic()
    asked, cooked = sort_settings(str(data), str(model), recipe, settings)
    if asked.tensorboard and find_spec("tensorboard") is None:
        raise ArgumentError("tensorboard", True, "needs TensorBoard; install it with: pip install tensorboard")
    fabric, loop = _fabric(asked, asked.precision)
    from effnet.training import run
    from effnet.training.finish import finish

    told = _told(fabric, listener)
    name = f"{Path(data).resolve().stem}-{Path(model).name.removesuffix('.yaml')}"
    folder: Path = fabric.broadcast(run.new_folder(out, name) if fabric.is_global_zero else Path())
    with run.undone(folder):
        plan, learner, dataset, budget, base = _prepared(fabric, asked, cooked, folder, told, started)
    going = loop.Loop(fabric, plan, learner, dataset, folder, told, started, budget)
    going.run()
    return finish(going, base)


def _prepared(
    fabric: Fabric, asked: Settings, cooked: Recipe, folder: Path, told: Listener, started: float
) -> tuple[Plan, Any, Dataset, Budget | None, int]:
    """Everything that comes before the first step; and the memory that the process held before there was a network."""
    from effnet.training import prepare, run, start

    classes: tuple[str, ...] = ()
    if fabric.is_global_zero:
        classes, words = prepare.split(asked, folder, partial(told.counted, "comparing the images"))
        if words:
            told.said(words)
    # every process, and a resumed run, reads it from there: the same images in the same order
    dataset = prepare.read_split(asked, folder, fabric.broadcast(classes))
    base = machine.resident_memory()
    fabric.seed_everything(asked.seed, verbose=False)
    begun = start.begin(asked, cooked, dataset)
    for words in begun.words:
        told.said(words)
    count = len(dataset.part("train"))
    if count < FEW and cooked.name == "finetune" and begun.trained:
        told.said(f"{count} images to learn from: --recipe few changes less of what the weights know")
    batch = batch_for(cooked, count, fabric.world_size)
    if batch != cooked.batch:
        told.said(f"{count} images: a batch of {batch} in place of {cooked.batch}")
    cooked = dataclasses.replace(cooked, batch=batch)
    learner = _learner(begun.network, cooked, asked, begun.see, dataset)
    plan = prepare.Plan(
        settings=asked,
        recipe=cooked,
        spec=begun.network.spec,
        policy=begun.network.policy,
        see=begun.see,
        classes=dataset.classes,
        source=begun.source,
        digest=dataset.digest,
        world=fabric.world_size,
        choices=_choices(fabric, learner, dataset, cooked, asked, begun.see),
        steps=1,
    )
    for words in plan.choices.reasons:
        told.said(words)
    if cooked.probe and fabric.is_global_zero:  # the others take over rank 0's weights
        from effnet.training.probe import fit_classifier

        progress = partial(told.counted, "fitting the classifier")
        right, seen = fit_classifier(learner, dataset.part("train"), batch=plan.choices.part, progress=progress)
        told.said(f"a classifier fitted to the features of {seen} images names {right:.1%} of them rightly")
    budget = _budget(plan, dataset)
    used = time.monotonic() - started
    steps = fabric.broadcast(plan_steps(plan, count, budget, used))
    first = min(cooked.head_first, cooked.head_steps / steps)
    plan = dataclasses.replace(plan, steps=steps, recipe=dataclasses.replace(cooked, head_first=first))
    if budget is not None and used + plan.steps * plan.choices.step_seconds > budget.seconds:
        told.said(f"{asked.minutes} minutes are too short: reading and measuring took {used:.0f} s of them")
    if fabric.is_global_zero:
        plan.write(folder)
        run.link_latest(folder)
    return plan, learner, dataset, budget, base


def resume(folder: str | Path, *, listener: Listener | None = None) -> Result:
    """Go on with a run that was interrupted, with the arguments that it was begun with.

    Raises:
        TrainingError: there is no run, it has no whole checkpoint, or images are gone.
    """
    started = time.monotonic()
    from effnet.files import restore_folder
    from effnet.models.efficientnet import EfficientNet
    from effnet.training import prepare
    from effnet.training.checkpoint import load_checkpoint
    from effnet.training.finish import finish
    from effnet.training.run import BEST

    folder = Path(folder)
    restore_folder(folder / BEST)
    plan, began = prepare.Plan.read(folder)
    fabric, loop = _fabric(plan.settings, plan.choices.precision)
    told = _told(fabric, listener)
    data = prepare.read_split(plan.settings, folder, plan.classes)
    for words in prepare.check_resumed(plan, folder, began, data, fabric.world_size):
        told.said(f"{words}; the result may differ from an undisturbed run's in its last digits")
    state, complaint = load_checkpoint(folder)
    if complaint:
        told.said(f"{complaint}: the checkpoint before it is used")
    base = machine.resident_memory()
    learner = _learner(EfficientNet(plan.spec, policy=plan.policy), plan.recipe, plan.settings, plan.see, data)
    budget = _budget(plan, data)
    going = loop.Loop(fabric, plan, learner, data, folder, told, started, budget)
    going.restore(state)
    told.said(f"going on after step {going.step:,} of {going.horizon.total:,}")
    going.run()
    return finish(going, base)


def sort_settings(data: str, model: str, recipe: str | Path | Recipe, given: dict[str, Any]) -> tuple[Settings, Recipe]:
    """What belongs to the settings, and the recipe with the rest.

    Raises:
        ArgumentError: a name is unknown, or a value outside its range.
    """
    fields = {field.name for field in dataclasses.fields(Settings)}
    own = {name: value for name, value in given.items() if name in fields and value is not None}
    rest = {name: value for name, value in given.items() if name not in fields and value is not None}
    if "train_memory" in own:
        own["train_memory"] = parse_bytes("train_memory", own["train_memory"])
    settings = Settings(data=str(Path(data).absolute()), model=model, **own)
    if settings.minutes is not None and "epochs" in rest:
        raise ArgumentError("minutes", settings.minutes, f"excludes --epochs (={rest['epochs']}): give one of them.")
    for name, rule in (("epochs", "least_steps"), ("batch", "epoch_steps")):
        if name in rest:
            rest.setdefault(rule, 0)
    return settings, read_recipe(recipe, **rest)


def plan_steps(plan: Plan, images: int, budget: Any, used: float) -> int:
    """Steps of the run: of its epochs, or as many as fit into the time that is left."""
    if budget is not None:
        return max(1, int(budget.steps(used, plan.choices.step_seconds)))
    return max(1, plan.recipe.least_steps, round(plan.recipe.epochs * (images // plan.recipe.batch)))


def _fabric(settings: Settings, precision: str) -> tuple[Fabric, Any]:
    """Processes, device and precision; and the loop's module, which needs the extra."""
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

        from effnet.training import loop
    except ImportError as error:
        raise MissingExtraError("training", "train") from error
    from effnet.training.prepare import environment

    chosen = machine.precision(settings.device).value if precision == "auto" else precision
    _, world, local = environment()
    kind, _, index = settings.device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device", settings.device, "is not there: torch sees no GPU.")
    # rank 0 alone splits the data, measures and evaluates, and the others wait for it
    several = DDPStrategy(
        process_group_backend="cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timedelta(days=7)
    )
    fabric = Fabric(
        accelerator="gpu" if kind == "cuda" else kind,
        devices=local if world > 1 else [int(index)] if index else 1,
        num_nodes=max(1, world // local),
        strategy=several if world > 1 else "auto",
        precision="bf16-mixed" if chosen == "bf16" else "32-true",
    )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # which tells of every process
    fabric.launch()
    if world > 1:
        atexit.register(_leave)
    return fabric, loop


def _leave() -> None:
    """End the process group's threads while Python still runs: one that outlives it aborts the process at its exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _told(fabric: Fabric, listener: Listener | None) -> Listener:
    """The listener on rank 0, nobody on the others."""
    from effnet.training.listener import Silent

    return listener if listener is not None and fabric.is_global_zero else Silent()


def batch_for(recipe: Recipe, images: int, world: int) -> int:
    """The effective batch: the recipe's, or less where there are few images.

    Raises:
        TrainingError: there are fewer images than processes.
    """
    batch = recipe.batch
    while batch > SMALLEST_BATCH and images // batch < recipe.epoch_steps:
        batch //= 2
    batch = min(batch, images)
    unit = world * (PART if batch < recipe.batch and batch >= world * PART else 1)
    batch = batch // unit * unit
    if not batch:
        raise TrainingError(f"{images} images cannot be shared among {world} processes")
    return batch


def _learner(network: Any, recipe: Recipe, settings: Settings, see: Any, data: Dataset) -> Any:
    from effnet.training.module import Learner, class_weights

    network.to(memory_format=torch.channels_last)
    weights = class_weights(data.part("train").counts) if recipe.class_weights else None
    return Learner(network, recipe, see, weights, frozen=settings.freeze).train()


def _choices(fabric: Fabric, learner: Any, data: Dataset, recipe: Recipe, settings: Settings, see: Any) -> Choices:
    """What rank 0 measures, on every process."""
    from effnet.data.loader import TrainingImages
    from effnet.training import choices
    from effnet.training.loop import seed_step

    precision: Precision = "bf16" if str(fabric._precision.precision).startswith("bf16") else "fp32"
    images = TrainingImages(data.part("train"), choices.augment_of(recipe, see), settings.seed)
    device = fabric.device
    learner.to(device)

    def step(learner: Any, loader: Any) -> None:
        parts = loader.epoch(0)
        for number, (pixels, labels) in zip(range(loader.order.parts), parts, strict=False):
            seed_step(settings.seed, 0, number, 0)
            with fabric.autocast():
                loss, _ = learner(pixels.to(device), labels.to(device), False)
            loss.backward()
        learner.zero_grad(set_to_none=True)

    chosen: Any = None
    if fabric.is_global_zero:
        chosen = choices.choose(
            learner, images, recipe, settings, precision=precision, world=fabric.world_size, step=step
        )
    result: Choices = fabric.broadcast(chosen)
    return result


def _budget(plan: Plan, data: Dataset) -> Budget | None:
    """The time budget, with an estimate of what validation and the end take."""
    from effnet.training.schedule import Budget

    if plan.settings.minutes is None:
        return None
    per_image = plan.choices.step_seconds / plan.recipe.batch * plan.world / VALIDATION_SHARE
    val, test = (len(data.part(split)) if split in data.splits else 0 for split in ("val", "test"))
    validation = per_image * val / plan.world
    ending = per_image * (val + test) + ENDING
    return Budget(60 * plan.settings.minutes, validation, ending, len(data.part("train")) // plan.recipe.batch)
