"""From a data set and a model to a trained bundle in a run's folder; and resuming an interrupted run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from effnet import machine
from effnet.data.dataset import Dataset
from effnet.data.shards import absolute, text_of
from effnet.errors import ArgumentError, TrainingError
from effnet.fields import check_path, write_count
from effnet.files import hold_lock, new_run, sweep
from effnet.models.efficientnet import EfficientNet
from effnet.progress import SILENT, Progress
from effnet.training.device import callers_torch, number_formats, seed_draws
from effnet.training.execution import (
    SMALLEST_PART,
    WORKER_BYTES,
    Execution,
    Images,
    check_main_guard,
    check_workers,
    choose_execution,
    keep_freed_memory,
)
from effnet.training.fabric import Fabric
from effnet.training.initial_network import InitialNetwork, find_initial_network, fit_classifier
from effnet.training.learner import Learner, class_weights
from effnet.training.loop import Loop, time_budget
from effnet.training.processes import make_fabric, together
from effnet.training.recipe import Recipe, read_recipe
from effnet.training.result import Result, finish
from effnet.training.run_folder import (
    ARGS,
    BEST,
    LAST,
    PREVIOUS,
    RUNS,
    RunPlan,
    check_inputs,
    check_resumed,
    is_unborn,
    load_checkpoint,
    read_split,
    write_split,
)
from effnet.training.settings import Settings
from effnet.weights.bundle import is_bundle

FEW = 500  # training images below which another recipe is recommended
SMALLEST_BATCH = 16  # down to which a recipe's batch is halved for small data
# Options that change the memory of a step, so that another run's execution cannot be reused
OTHER_STEP = {"model", "init", "resolution", "stem_stride", "train_memory", "device", "sync_bn", "compile"}


@callers_torch()
def train(
    data: str | Path,
    model: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    *,
    out: str | Path | None = None,
    like: str | Path | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> Result:
    """Train a network on a folder of images or a manifest, and evaluate it.

    The same call with the same seed gives the same weights to the bit on the same machine, unless `minutes` are given.

    Args:
        data: a folder with a sub-folder for each class, split into train, val and test or not, or a manifest.
        model: a variant, a bundle, a spec.yaml, or a weight file; by default "lite0".
        recipe: "finetune" (default), "few", "scratch", "paper", a YAML file, or a Recipe.
        out: the run's folder; by default runs/train/DATA-MODEL.
        like: the folder of a run whose settings, recipe, precision, threads and workers are reused, except for
            arguments given here.
        progress: receives steps and epochs.
        options: fields of Settings (minutes, train_memory, resolution ...) and of Recipe (epochs, batch, lr ...).

    Returns:
        The run's folder, with a bundle in `best`, and how good it is.

    Raises:
        DataError, ArgumentError, TrainingError, CheckpointError: the run cannot start or continue.
        Interrupted: a KeyboardInterrupt, raised after the run was saved.
    """
    started = time.monotonic()
    if model is not None:
        options["model"] = str(model)
    other = None if like is None else RunPlan.read(like)[0]
    settings, full_recipe = sort_settings(recipe, options, other)
    check_main_guard(settings.workers or 0)
    if settings.tensorboard and find_spec("tensorboard") is None:
        raise ArgumentError("tensorboard", True, "needs TensorBoard; install it with: pip install tensorboard")
    check_path("data", data)
    path = text_of(absolute(data))
    fabric = make_fabric(settings)
    progress = progress if fabric.is_global_zero else SILENT
    name = f"{Path(path).resolve().stem}-{Path(settings.model).name.removesuffix('.yaml')}"
    new_folder = new_run(out, RUNS, name, (LAST, PREVIOUS), is_unborn) if fabric.is_global_zero else nullcontext(Path())
    with together(fabric), new_folder as new:
        folder: Path = fabric.broadcast(new)
        # Every process, and a resumed run, reads the splits from there, to get the same images in the same order.
        classes = write_split(path, settings, folder, progress) if fabric.is_global_zero else ()
        dataset = read_split(path, folder, fabric.broadcast(classes))
        base = machine.resident_memory()
        seed_draws(settings.seed, fabric.device)
        start = find_initial_network(settings, full_recipe, dataset, progress)
        like_execution = other.execution if other and not OTHER_STEP & set(options) else None
        plan = make_plan(path, settings, full_recipe, dataset, start, fabric.world_size, like_execution)
        for note in (*start.notes, *_advice(plan, full_recipe.batch, len(dataset.subset("train")), start.trained)):
            progress.message(note)
        torch.set_num_threads(plan.execution.threads)
        learner = _learner(start.network, plan, dataset)
        if full_recipe.linear_probe and fabric.is_global_zero:  # the others copy rank 0's weights
            images = dataset.subset("train")
            learner.to(fabric.device)
            accuracy, seen = fit_classifier(learner, images, batch=plan.execution.part, progress=progress)
            progress.message(f"the classifier was fitted to {seen} images and gets {accuracy:.1%} of them right")
        plan = fabric.broadcast(_fit_schedule(plan, dataset, progress, started))
        if fabric.is_global_zero:
            plan.write(folder)
    with together(fabric, folder), _lock(folder, fabric), _computing(fabric, plan):
        loop = Loop(fabric, plan, learner, dataset, folder, progress, started)
        loop.run()
        return finish(loop, base)


@callers_torch()
def resume(
    folder: str | Path, *, data: str | Path | None = None, workers: int | None = None, progress: Progress = SILENT
) -> Result:
    """Go on with an interrupted run, with its original arguments.

    With another number of processes, each step has the same images; see `share_again`.

    Args:
        folder: the run's folder.
        data: where the images are, if they were moved.
        workers: another number of processes that load images, which does not change the weights.
        progress: receives steps and epochs.

    Raises:
        TrainingError: the folder has no run or no intact checkpoint, its files were edited, images are missing, or the
            processes do not divide the batch.
    """
    started = time.monotonic()
    folder = Path(folder)
    plan, began = RunPlan.read(folder)
    check_main_guard(plan.execution.workers if workers is None else workers)
    fabric = make_fabric(plan.settings)
    progress, world = progress if fabric.is_global_zero else SILENT, fabric.world_size
    with together(fabric, folder), _lock(folder, fabric), _computing(fabric, plan):
        fabric.barrier()  # all must find the same files
        state, problem = load_checkpoint(folder)
        check_inputs(state["inputs"], plan, folder)
        if data is not None:
            plan = dataclasses.replace(plan, data=text_of(absolute(data)))
        if workers is not None:
            check_workers(workers, WORKER_BYTES, world)
            plan = dataclasses.replace(plan, execution=dataclasses.replace(plan.execution, workers=workers))
        dataset = read_split(plan.data, folder, plan.classes)
        began_as = plan
        plan = share_again(plan, world)
        if world != state["processes"]:
            progress.message(describe_share(began_as, plan, state["processes"]))
        for difference in check_resumed(plan, folder, began, dataset):
            progress.message(difference)
        if problem:
            progress.message(f"{problem}: the previous checkpoint is used")
        if state["rows"] and not is_bundle(folder / BEST):
            if state["done"] >= 1:
                raise TrainingError(f"{folder / BEST} is gone, and no epoch is left to replace it")
            progress.message(f"{folder / BEST} is gone: the best of the remaining epochs will replace it")
            state |= {"best": -1.0, "since_best": 0}
        base = machine.resident_memory()
        learner = _learner(EfficientNet(plan.spec, policy=plan.policy), plan, dataset)
        loop = Loop(fabric, plan, learner, dataset, folder, progress, started)
        loop.restore(state)
        progress.message(f"going on after {write_count(loop.step, 'step')}, {loop.done:.0%} of the training")
        loop.run()
        return finish(loop, base)


@contextmanager
def _computing(fabric: Fabric, plan: RunPlan) -> Iterator[None]:
    """Sets memory allocation and number formats while a run is computed and evaluated."""
    memory = keep_freed_memory(plan.execution, plan.settings, world=fabric.world_size)
    with memory, number_formats(fabric.device, plan.execution.precision):
        yield


@contextmanager
def _lock(folder: Path, fabric: Fabric) -> Iterator[None]:
    """Lock a run against other programs, and remove what a killed one left; only rank 0 does."""
    with hold_lock(folder / ARGS) if fabric.is_global_zero else nullcontext():
        if fabric.is_global_zero:
            sweep(folder)
        yield


def sort_settings(
    recipe: str | Path | Recipe | None, named: dict[str, Any], like: RunPlan | None = None
) -> tuple[Settings, Recipe]:
    """Settings and recipe from their fields' values by name; None means not given.

    Raises:
        ArgumentError: a name is unknown, or a value outside its range.
    """
    fields = {field.name for field in dataclasses.fields(Settings)}
    own: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for name, value in named.items():
        if value is not None:
            (own if name in fields else changes)[name] = value
    if "minutes" in own and "epochs" in changes:
        raise ArgumentError("minutes", own["minutes"], f"excludes --epochs (={changes['epochs']}): give one of them.")
    # Epochs or a batch given by the user or by another run switch off the recipe's adaptation to small data.
    for name, rule in (("epochs", "least_steps"), ("batch", "epoch_steps")):
        if name in changes:
            changes.setdefault(rule, 0)
    if like is None:
        return Settings(**own), read_recipe(recipe or "finetune", **changes)
    used: dict[str, Any] = {name: getattr(like.execution, name) for name in ("precision", "workers", "threads")}
    if "epochs" in changes:
        used["minutes"] = None
    settings = dataclasses.replace(like.settings, **{**used, **own})
    if recipe is not None:
        return settings, read_recipe(recipe, **changes)
    return settings, read_recipe(dataclasses.replace(like.recipe, epoch_steps=0), **changes)


def batch_for(recipe: Recipe, images: int, world: int) -> int:
    """The effective batch: the recipe's, or less if there are few images.

    Raises:
        TrainingError: there are fewer images than processes.
    """
    batch = recipe.batch
    while batch > SMALLEST_BATCH and images // batch < recipe.epoch_steps:
        batch //= 2
    batch = min(batch, images)
    unit = world * (SMALLEST_PART if batch < recipe.batch and batch >= world * SMALLEST_PART else 1)
    batch = batch // unit * unit
    if not batch:
        raise TrainingError(f"{images} images cannot be shared among {world} processes")
    return batch


def make_plan(
    data: str,
    settings: Settings,
    recipe: Recipe,
    dataset: Dataset,
    start: InitialNetwork,
    world: int,
    like: Execution | None = None,
) -> RunPlan:
    """The plan of a run, with the recipe's own number of steps; `like` is another run's execution."""
    count, spec = len(dataset.subset("train")), start.network.spec
    recipe = dataclasses.replace(recipe, batch=batch_for(recipe, count, world))
    return RunPlan(
        data=data,
        settings=settings,
        recipe=recipe,
        spec=spec,
        policy=start.network.policy,
        input=start.input,
        classes=dataset.classes,
        source=start.source,
        data_sha256=dataset.digest,
        processes=world,
        execution=choose_execution(spec, recipe, settings, Images(count, start.image_side), world=world, like=like),
        steps=max(1, recipe.least_steps, round(recipe.epochs * (count // recipe.batch))),
    )


def share_again(plan: RunPlan, world: int) -> RunPlan:
    """The plan of a run that goes on with another number of processes, each step with the same images.

    If possible, the images per forward pass stay the same, and with them batch statistics and random draws.

    Raises:
        TrainingError: `world` does not divide the batch.
        ArgumentError: each would get too few images.
    """
    before, batch = plan.execution, plan.recipe.batch
    if world == plan.processes:
        return plan
    if batch % world:
        able = ", ".join(str(number) for number in range(1, batch + 1) if batch % number == 0)
        raise TrainingError(f"the run's batch of {batch} images does not divide among {world} processes: take {able}")
    settings = dataclasses.replace(plan.settings, precision=before.precision, workers=before.workers)
    like = dataclasses.replace(before, parts=batch // world // before.part)
    execution = choose_execution(plan.spec, plan.recipe, settings, Images(1, 1), world=world, like=like)
    return dataclasses.replace(plan, processes=world, execution=execution)


def describe_share(began: RunPlan, now: RunPlan, last: int) -> str:
    """What changes if a run that used `last` processes goes on with another number."""
    stays = f"the batch of {now.recipe.batch}, the learning rate and the order of the images stay"
    before, part = share_again(began, last).execution.part, now.execution.part
    if part == before:
        changes = "the weights may differ in their last digits, running statistics are those of rank 0's images"
    elif now.recipe.bn_momentum:
        changes = f"batch statistics and random draws are of {part} instead of {before} images"
    else:
        changes = f"random draws are of {part} instead of {before} images"
    return f"{now.processes} instead of {last} processes: {stays}; {changes}"


def _advice(plan: RunPlan, batch: int, images: int, trained: bool) -> Iterator[str]:
    """Advice about a plan for a recipe's `batch`."""
    if images < FEW and plan.recipe.name == "finetune" and trained:
        yield f"only {images} training images: --recipe few changes pretrained weights less"
    if plan.recipe.batch != batch:
        among = f" for {plan.processes} processes" if plan.processes > 1 else ""
        yield f"{images} images{among}: a batch of {plan.recipe.batch} instead of {batch}"
    parts = plan.execution.parts
    if parts > 1 and plan.settings.train_memory is None:
        yield f"a batch of {plan.recipe.batch} does not fit in this machine's memory: it is split into {parts} parts"


def _fit_schedule(plan: RunPlan, dataset: Dataset, progress: Progress, started: float) -> RunPlan:
    """The plan with an estimate of the steps that fit a time budget, and a limit on those of the classifier."""
    if budget := time_budget(plan, dataset):
        progress.message("--minutes follows the clock, so the run is not reproducible to the bit; with --epochs it is")
        used, per_step = time.monotonic() - started, plan.guess_step_seconds()
        steps = int((budget.end(per_step) - used) / per_step)
        if steps < 1:
            progress.message(f"{plan.settings.minutes} minutes are too short: reading the images took {used:.0f} s")
        plan = dataclasses.replace(plan, steps=max(1, steps))
    share = min(plan.recipe.head_first, plan.recipe.head_steps / plan.steps)
    return dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, head_first=share))


def _learner(network: EfficientNet, plan: RunPlan, data: Dataset) -> Learner:
    network.to(memory_format=torch.channels_last)
    weights = class_weights(data.subset("train").counts) if plan.recipe.class_weights else None
    return Learner(network, plan.recipe, plan.input, weights, frozen=plan.settings.freeze).train()
