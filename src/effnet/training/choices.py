"""What is chosen by measuring before the first step, and used again by a resumed run and by every process.

Precision follows from the processor (machine.precision). The plan and the size of a part follow from the memory
forecast. Threads, worker processes and the number of steps follow from timing the run's own network on its own
images for a few seconds; the weights are put back afterwards.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from effnet import machine
from effnet.arch.memory import Keep, training_memory
from effnet.arch.recompute import RecomputePlan, find_plan
from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.augment import Augment
from effnet.data.loader import Loader, Order, TrainingImages, may_start_unasked
from effnet.errors import ArgumentError, TrainingError
from effnet.machine import Precision
from effnet.models.efficientnet import EfficientNet
from effnet.training.module import Learner
from effnet.training.recipe import Recipe
from effnet.training.settings import Settings

OPTIMIZER = {"adamw": "adamw", "sgd": "momentum", "rmsprop": "rmsprop"}  # as arch.memory calls them
SMALLEST_PART = 8  # images: batch statistics over fewer are too noisy, so memory is sought in a plan first
ROUNDS = 3  # timed steps of each contestant
LOADING = 0.1  # of a step's time: loading that takes less is not worth a process beside torch's threads
READY = 24  # images that are loaded to time loading
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")
LESS = "give a limit with --train-memory, or a smaller --batch or --resolution"


@dataclass(frozen=True)
class Choices:
    """How the steps are computed."""

    precision: Precision
    part: int  # images that a process puts through the network at once
    parts: int  # of them one after another in a step
    plan: dict[str, str] | None  # what each part of the network keeps; None: everything
    threads: int
    workers: int
    forecast_bytes: int  # of a step, weights and states included
    step_seconds: float  # measured, loading included
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for args.yaml."""
        return asdict(self) | {"reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Choices:
        """What `to_dict` wrote."""
        return cls(**{**values, "reasons": tuple(values["reasons"])})

    def apply(self, network: EfficientNet) -> None:
        """Make the network compute as chosen."""
        network.recompute(read_plan(self.plan))


def read_plan(values: dict[str, str] | None) -> RecomputePlan | None:
    """A plan from the names of its levels."""
    return None if values is None else RecomputePlan.from_dict(values)


def augment_of(recipe: Recipe, see: InputSpec) -> Augment:
    """How a recipe changes images."""
    return Augment(see, recipe.crop_area, recipe.crop_ratio, recipe.flip, recipe.augmentation)


def fit_memory(
    spec: NetworkSpec, recipe: Recipe, settings: Settings, precision: Precision, world: int
) -> tuple[int, RecomputePlan | None, int]:
    """Images at once, plan and forecast in bytes, for the recipe's batch within the memory limit.

    Parts stay as large as they can be: a plan costs a little time, a smaller part costs batch statistics.

    Raises:
        ArgumentError: the batch does not divide among the processes, or not even one image fits.
    """
    share, rest = divmod(recipe.batch, world)
    if rest:
        raise ArgumentError("batch", recipe.batch, f"must be a multiple of {world}, the number of processes.")
    how: dict[str, Any] = {
        "optimizer": OPTIMIZER[recipe.optimizer],
        "ema": recipe.ema > 0,
        "precision": precision,
    }

    def forecast(part: int, plan: RecomputePlan | None) -> int:
        return training_memory(spec, part, plan=plan, **how).peak

    limit = settings.train_memory
    sizes = [share // parts for parts in range(1, share + 1) if share % parts == 0]
    if limit is None or forecast(share, None) <= limit:
        return share, None, forecast(share, None)
    planned = not settings.sync_bn  # whose statistics a plan cannot compute again
    for part in sorted(sizes, key=lambda size: (size < SMALLEST_PART, -size)):
        try:
            plan = find_plan(spec, limit, part, **how) if planned else None
        except ArgumentError:
            continue
        if forecast(part, plan) <= limit:
            return part, plan, forecast(part, plan)
    least = forecast(1, RecomputePlan.uniform(spec, Keep.BOTTLENECKS) if planned else None)
    raise ArgumentError("train_memory", limit, f"is too little for {spec.name}: one image takes {least:,} bytes.")


def choose(
    learner: Learner,
    images: TrainingImages,
    recipe: Recipe,
    settings: Settings,
    *,
    precision: Precision,
    world: int,
    step: Callable[[Learner, Loader], None],
) -> Choices:
    """Measure and choose.

    Args:
        learner: the network with its loss, on its device; its state is the same afterwards.
        images: what it will learn from.
        recipe: its batch.
        settings: limits, and choices that the user made.
        precision: the number format.
        world: processes that train together, on this machine.
        step: computes one step's gradients from the loader's first images.

    Raises:
        TrainingError: memory runs out in every step that is tried.
    """
    network, spec = learner.network, learner.network.spec
    part, plan, forecast = fit_memory(spec, recipe, settings, precision, world)
    order = Order(len(images), recipe.batch, part, settings.seed, 0, world)
    loader = Loader(images, order, 0)
    cores = max(1, machine.this_machine().cores // world)
    threads = settings.threads or cores
    state = copy.deepcopy(learner.state_dict())
    reasons: list[str] = []

    def timed(threads: int, plan: RecomputePlan | None, rounds: int = ROUNDS) -> float:
        torch.set_num_threads(threads)
        network.recompute(plan)
        step(learner, loader)
        return min(_seconds(lambda: step(learner, loader)) for _ in range(rounds))

    torch.set_num_threads(threads)

    def tried(plan: RecomputePlan | None) -> float | None:
        try:
            return timed(threads, plan)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return None

    def forecast_of(plan: RecomputePlan | None) -> int:
        optimizer = OPTIMIZER[recipe.optimizer]
        return training_memory(spec, part, optimizer=optimizer, ema=recipe.ema > 0, precision=precision, plan=plan).peak

    taken = tried(plan)
    if taken is None:
        plan = leaner(plan, spec)
        forecast = forecast_of(plan)
        reasons.append("memory ran out in the first step that was tried: each step keeps less and computes more")
        taken = tried(plan)
    elif plan is None and not settings.sync_bn and not _other_norms(network):
        other_plan = RecomputePlan.uniform(spec, Keep.ACTIVATIONS)
        other = timed(threads, other_plan)
        reasons.append(f"a step that keeps activations alone takes {other / taken:.2f} of one that keeps everything")
        if other < taken:
            plan, taken, forecast = other_plan, other, forecast_of(other_plan)
    if taken is None:
        raise TrainingError(f"memory ran out before the first step: {LESS}")
    count = min(READY, len(images))
    images[(0, 0)]
    loading = _seconds(lambda: [images[(0, place)] for place in range(count)]) / count * recipe.batch / world
    # step() loads as well, from the same loader
    computing = max(taken - loading, taken / 10)
    workers = settings.workers
    if workers is None:
        workers, threads, taken = _share(
            cores, threads, settings, computing, loading, lambda t: timed(t, plan, 2) - loading
        )
        reasons.append(
            f"loading a step's images takes {loading:.2f} s beside {computing:.2f} s of computing: "
            f"worker processes {workers}, threads {threads}"
        )
    learner.load_state_dict(state)
    learner.zero_grad(set_to_none=True)
    torch.set_num_threads(threads)
    return Choices(
        precision=precision,
        part=part,
        parts=order.parts,
        plan=None if plan is None else plan.to_dict(),
        threads=threads,
        workers=workers,
        forecast_bytes=forecast,
        step_seconds=taken,
        reasons=tuple(reasons),
    )


def stricter(choices: Choices, spec: NetworkSpec) -> Choices:
    """The same with a plan that keeps less, for a device whose memory ran out."""
    return replace(choices, plan=leaner(read_plan(choices.plan), spec).to_dict())


def leaner(plan: RecomputePlan | None, spec: NetworkSpec) -> RecomputePlan:
    """A plan that keeps less than this one."""
    lowest = min(plan.keeps.values()) if plan else Keep.ACTIVATIONS
    return RecomputePlan.uniform(spec, Keep.CONVOLUTIONS if lowest > Keep.CONVOLUTIONS else Keep.BOTTLENECKS)


def ran_out(error: RuntimeError) -> bool:
    """Whether memory ran out, on a processor or a GPU."""
    return any(words in str(error).lower() for words in OUT_OF_MEMORY)


def _share(
    cores: int, threads: int, settings: Settings, computing: float, loading: float, timed: Callable[[int], float]
) -> tuple[int, int, float]:
    """Worker processes, torch's threads and seconds of a step, by what was measured."""
    alone = computing + loading
    if cores == 1 or loading < LOADING * computing or not may_start_unasked():
        return 0, threads, alone
    workers = min(cores - 1, max(1, round(cores * loading / alone)))
    fewer = settings.threads or cores - workers
    beside = max(timed(fewer), loading / workers)
    return (workers, fewer, beside) if beside < alone else (0, threads, alone)


def _other_norms(network: EfficientNet) -> bool:
    """Whether a normalisation is none that a plan can compute again."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return not norms or any(type(norm) is not nn.BatchNorm2d for norm in norms)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
