"""How a run's steps are computed: decided by rules from fixed facts, not by timing.

The facts are the processor and its cores, the network's closed-form costs, the image sizes, the recipe and the user's
settings. So the same command on the same machine gives identical bits, and the first step starts at once.

precision   bf16 where it is faster: with effnet's kernels on AVX-512; with torch's modules on AMX, and for large images
            on AMD's AVX-512 BF16; on CUDA GPUs since Ampere; fp16 on older ones; else fp32
recompute   nothing, unless --train-memory is given
part        images per forward pass: the whole batch, or the largest share of it that fits in --train-memory, or in the
            memory of the machine or GPU
workers     processes that load images, if an estimate says that they save a tenth of the time; for a GPU, one per core
            except one
threads     one per core without a worker
kernels     for depthwise convolutions: see models.depthwise
float32     TF32 on a GPU, unless the run is in fp32
allocator   the process keeps freed memory from step to step if there is enough: see keep_freed_memory
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet import machine
from effnet.arch.cost import cost
from effnet.arch.memory import gpu_memory, training_memory
from effnet.arch.recompute import RecomputePlan, find_plan
from effnet.arch.segments import Keep, uses_kernels
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.machine import StepPrecision
from effnet.training.recipe import Recipe
from effnet.training.settings import STAGES, Settings

OPTIMIZER = {"adamw": "adamw", "sgd": "momentum", "rmsprop": "rmsprop"}  # their names in arch.memory
SMALLEST_PART = 8  # images; batch statistics of fewer are too noisy, so a recompute plan is tried first
USABLE = 0.75  # share of the machine's memory; the rest is for torch, the workers and other programs
LIBRARIES = 600 * 2**20  # bytes that even a minimal training takes; matters in small machines and containers
USABLE_GPU = 0.9  # share of a GPU's memory; the rest is for CUDA and for fragmentation

# Processor time in seconds on one core, measured on a busy Xeon (AVX-512). Only the ratios matter.
MAC_SECONDS = {True: 5e-11, False: 1e-10}  # per multiply-add of a training step: effnet's kernels, torch's modules
STEP_OVER_FORWARD = 3  # multiply-adds of a step, relative to a forward pass
IMAGE_SECONDS = 3e-4  # per image, whatever its size; threads cannot share this work
DECODED_SECONDS = 5e-9  # per pixel of the file
CROP_SECONDS = {
    "none": 8e-9,
    "autoaugment": 23e-9,
    "randaugment": 38e-9,
    "trivialaugment": 26e-9,
}  # per pixel
LEAST_SAVED = 0.1  # share of a step's time; the estimate is about this accurate
WORKER_BYTES = 400 * 10**6  # of a process that loads images: torch and prepared batches; Lite0, 32 images at 224 px
START_SECONDS = 10  # that workers take to import torch; they must save more than that
MOST_WORKERS, MOST_WORKERS_GPU = 8, 24
HELD = 1.35  # memory of a process that keeps what it freed, relative to the forecast: B0 at 224 px, 16 and 64 images
# Arguments of glibc's mallopt(), and glibc's defaults
TRIM_THRESHOLD, MMAP_MAX = -1, -4
USUAL_TRIM_THRESHOLD, USUAL_MMAP_MAX = 128 * 1024, 65536
LEAST_BF16 = 160  # px from which torch's modules use bf16 without AMX: see precision_for


@dataclass(frozen=True)
class Execution:
    """How the steps of a run are computed."""

    precision: StepPrecision
    part: int  # images per process and forward pass
    parts: int  # forward passes per step, whose gradients accumulate
    recompute: dict[str, str] | None  # what each segment of the network keeps; None: everything
    threads: int
    workers: int
    forecast_bytes: int  # memory of a step, with weights and optimizer states
    float32: str = "highest"  # float32 matmul precision in torch's terms; "high" is TF32 on a GPU

    @property
    def plan(self) -> RecomputePlan | None:
        """What each segment of the network keeps for the backward pass; None: everything."""
        return None if self.recompute is None else RecomputePlan.from_dict(self.recompute)


@dataclass(frozen=True)
class Images:
    """Number and size of a run's images, which determine the cost of loading them."""

    count: int  # in the training split
    side: int  # median of the shorter sides of the files, in pixels


def choose_execution(
    spec: NetworkSpec, recipe: Recipe, settings: Settings, images: Images, *, world: int, like: Execution | None = None
) -> Execution:
    """How `world` processes train `spec` at the run's resolution on this machine; explicit `settings` are kept.

    `like` is the execution of another run of the same network; its parts and plan are reused if the batch is the same.

    Raises:
        ArgumentError: the processes do not divide the batch, or not even one image, or not all workers, fit in memory.
    """
    kernels = trains_by_kernels(spec, recipe, settings)
    precision = precision_for(spec, settings.device, kernels) if settings.precision == "auto" else settings.precision
    cores = max(1, machine.this_machine().cores // processes_here(world))
    workers = settings.workers
    if workers is None:
        shared = Images(images.count // world, images.side)
        workers = choose_workers(spec, recipe, settings, shared, cores=cores, kernels=kernels)
        free = 1 - USABLE if settings.device == "cpu" else USABLE  # of the memory; on a CPU steps may take the rest
        workers = min(workers, most_workers(int(WORKER_BYTES / free), world))
    check_workers(workers, WORKER_BYTES, world)
    fewest = smallest_part(spec, recipe, settings.freeze)
    if like is not None and like.part * like.parts * world == recipe.batch and like.part >= fewest:
        part, plan = like.part, like.plan
    else:
        part, plan = fit_memory(spec, recipe, settings, precision, world)
    return Execution(
        precision=precision,
        part=part,
        parts=recipe.batch // world // part,
        recompute=None if plan is None else plan.to_dict(),
        threads=settings.threads or max(1, cores - workers),
        workers=workers,
        forecast_bytes=_forecast(spec, recipe, settings, precision)(part, plan),
        float32=float32_of(precision) if settings.device.startswith("cuda") else "highest",
    )


def processes_here(world: int) -> int:
    """How many of a training's `world` processes run on this machine, according to torchrun."""
    return min(world, int(os.environ.get("LOCAL_WORLD_SIZE") or world))


def trains_by_kernels(spec: NetworkSpec, recipe: Recipe, settings: Settings) -> bool:
    """Whether effnet's kernels compute a run's steps: on a CPU, without synchronised batch statistics."""
    theirs = settings.device != "cpu" or settings.sync_bn or settings.compile
    return not theirs and recipe.bn_momentum > 0 and uses_kernels(spec)


def float32_of(precision: StepPrecision) -> str:
    """The precision of float32 matmuls on a GPU in torch's terms: "highest" in an fp32 run, else "high" (TF32)."""
    return "highest" if precision == "fp32" else "high"


def guess_step_seconds(spec: NetworkSpec, recipe: Recipe, settings: Settings, cores: int) -> float:
    """A rough estimate of a step's time with the whole batch on this many cores."""
    each = STEP_OVER_FORWARD * cost(spec).macs * MAC_SECONDS[trains_by_kernels(spec, recipe, settings)]
    return each * recipe.batch / cores


def precision_for(spec: NetworkSpec, device: str, kernels: bool) -> StepPrecision:
    """The machine's fast precision; with torch's modules fp32 for small images unless the processor has AMX.

    `benchmarks/training.py rules` on a Xeon with AVX-512 BF16, B0, 8 images: with effnet's kernels bf16 took 0.84,
    0.89, 0.87 and 0.98 of fp32's time at 224, 128, 64 and 32 px; with torch's modules 0.99, 1.11, 1.02 and 1.09, so
    there that processor always gets fp32. On an EPYC Zen 5 torch's bf16 took 0.82 at 224 px (16 images); small images
    were not timed there.
    """
    tiles = "amx_bf16" in machine.this_machine().features
    if device == "cpu" and not kernels and not tiles and spec.resolution < LEAST_BF16:
        return "fp32"
    return machine.choose_precision(device, kernels=kernels)[0]


def choose_workers(
    spec: NetworkSpec, recipe: Recipe, settings: Settings, images: Images, *, cores: int, kernels: bool
) -> int:
    """The number of processes that load images, which makes a step shortest; 0 if they save little.

    Without workers, all threads alternate between loading and training: (c + l) / threads seconds for an image that
    takes c to train on and l to load on one core; but Python's part of l does not run in parallel. With w workers,
    training and loading run in parallel: max(c / (cores - w), l / w). So training on a CPU rarely uses any. A GPU,
    whose c is short and which would wait for images, gets many.
    """
    if cores == 1 or not workers_are_safe():
        return 0
    load = DECODED_SECONDS * images.side**2 * 4 / 3  # photos are 4:3
    load += CROP_SECONDS[recipe.augmentation] * spec.resolution**2
    on_cpu = settings.device == "cpu"
    train = STEP_OVER_FORWARD * cost(spec).macs * MAC_SECONDS[kernels] if on_cpu else 0.0

    def seconds(workers: int) -> float:
        threads = settings.threads or cores - workers
        if workers:
            return max(train / threads, (load + IMAGE_SECONDS) / workers)
        return (train + load) / (threads if on_cpu else 1) + IMAGE_SECONDS

    most = min(cores - 1, MOST_WORKERS if on_cpu else MOST_WORKERS_GPU)
    best = min(range(1, most + 1), key=seconds)
    run = seconds(0) * images.count * recipe.epochs if settings.minutes is None else 60 * settings.minutes
    saved = 1 - seconds(best) / seconds(0)
    return best if saved > LEAST_SAVED and saved * run > START_SECONDS else 0


def workers_are_safe() -> bool:
    """Whether worker processes may be started by default: each of them imports the program's main file again.

    A script without `if __name__ == "__main__":` would start over in each. The effnet command and notebooks are safe.
    """
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is None or Path(file).parent.name == "effnet" or Path(file).stem == "effnet"


def most_workers(each: int, world: int = 1) -> int:
    """How many processes of `each` bytes this machine's memory holds for each of a training's `world` processes."""
    memory = machine.this_machine().memory_bytes
    return sys.maxsize if memory is None else max(1, memory // processes_here(world) // each)


def check_workers(workers: int, each: int, world: int = 1) -> None:
    """Raise ArgumentError if the memory does not hold `workers` processes of `each` bytes; see `most_workers`."""
    if workers > (most := most_workers(each, world)):
        rule = f"must be at most {most} on this machine: each process takes about {each / 10**9:.1f} GB of memory."
        raise ArgumentError("workers", workers, rule)


def check_main_guard(workers: int) -> None:
    """Check that worker processes can be started, before anything is written.

    Raises:
        ArgumentError: each of the `workers` processes would run the program's main file again, including this call; or
            this is such a process.
    """
    main = sys.modules["__main__"]
    name = str(getattr(main, "__file__", ""))
    spec = getattr(main, "__spec__", None)
    again = bool(name) and not (spec and spec.name.endswith("__main__"))  # a package's __main__.py does not run again
    try:
        guarded = "__name__" in Path(name).read_text(encoding="utf-8") if again else True
    except (OSError, ValueError):
        guarded = not name.startswith("<")  # standard input, which other processes cannot read
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing's own check
        workers, guarded = workers or 1, False
    if workers and not guarded:
        rule = 'starts processes, and each runs {} again: put its code below `if __name__ == "__main__":`.'
        raise ArgumentError("workers", workers, rule.format(Path(name).name))


def fit_memory(
    spec: NetworkSpec, recipe: Recipe, settings: Settings, precision: StepPrecision, world: int
) -> tuple[int, RecomputePlan | None]:
    """The images per forward pass, and the recompute plan, with which the recipe's batch fits the memory limit.

    Parts stay as large as possible: recomputing costs a little time, smaller parts make batch statistics noisier.
    Without --train-memory the limit is the memory of the machine or GPU, and nothing is recomputed.

    Raises:
        ArgumentError: the processes do not divide the batch, it is too small for batch statistics, or not even the
            smallest part fits.
    """
    share, rest = divmod(recipe.batch, world)
    if rest:
        raise ArgumentError("batch", recipe.batch, f"must be a multiple of {world}, the number of processes.")
    check_batch(spec, recipe, settings.freeze, share)
    wanted = None if settings.train_memory is None else int(settings.train_memory)
    planned = wanted is not None and not settings.sync_bn  # synchronised statistics cannot be recomputed
    limit = wanted
    if wanted is None and settings.device == "cpu":
        limit = _usable_memory(world)
    if wanted is None and (memory := machine.device_memory(settings.device)):
        limit = int(USABLE_GPU * memory)
    options, forecast = _memory_options(spec, recipe, settings, precision), _forecast(spec, recipe, settings, precision)
    if limit is None or forecast(share, None) <= limit:
        return share, None
    fewest = smallest_part(spec, recipe, settings.freeze)
    sizes = [size for size in range(fewest, share + 1) if share % size == 0]
    for part in sorted(sizes, key=lambda size: (size < SMALLEST_PART, -size)):
        try:
            beside = forecast(part, None) - training_memory(spec, part, **options).peak
            plan = find_plan(spec, limit - beside, part, **options) if planned else None
        except ArgumentError:
            continue
        if forecast(part, plan) <= limit:
            return part, plan
    if wanted is None:
        return sizes[0], None  # the system may still swap
    least = forecast(sizes[0], RecomputePlan.uniform(spec, Keep.BOTTLENECKS))
    images = "one image takes" if sizes[0] == 1 else f"{sizes[0]} images at once take"
    raise ArgumentError("train_memory", wanted, f"is too little for {spec.name}: {images} {least:,} bytes.")


@contextmanager
def keep_freed_memory(execution: Execution, settings: Settings, *, world: int) -> Iterator[bool]:
    """Let glibc keep freed memory while steps run, if there is enough and no --train-memory; yields whether it does.

    By default glibc returns large maps to the system at once and gets fresh pages, which the system zeroes: 722,000
    page faults per step of B0 at 224 px with 64 images, and 1.46 times the processor time (fp32, the compiled kernels,
    one core of a Xeon with AVX-512). Keeping them took 1.26 times the memory. With 16 images a step took .98 of the
    time, and the memory was the same.
    """
    libc = _glibc()
    usable = _usable_memory(world)
    enough = usable is not None and HELD * execution.forecast_bytes <= usable
    if libc is None or not enough or settings.device != "cpu" or settings.train_memory is not None:
        yield False
        return
    try:
        yield bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1))
    finally:
        libc.mallopt(MMAP_MAX, USUAL_MMAP_MAX)
        libc.mallopt(TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)
        libc.malloc_trim(0)


def _usable_memory(world: int) -> int | None:
    """Bytes that the steps of each process may take on a machine without a GPU; None if its memory is unknown."""
    if (memory := machine.this_machine().memory_bytes) is None:
        return None
    each = memory // processes_here(world)
    return int(min(USABLE * each, each - LIBRARIES))


def _glibc() -> Any:
    """The C library, if it is glibc and no environment variable configures its allocator."""
    set_by_user = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return None if set_by_user or platform.libc_ver()[0] != "glibc" else ctypes.CDLL(None)


def smallest_part(spec: NetworkSpec, recipe: Recipe, freeze: int = 0) -> int:
    """Fewest images per forward pass: two if the batch statistics of one image would be of a single value.

    That is so if the last map has one pixel, its batch normalisation is not frozen, and the recipe computes statistics.
    """
    return 2 if spec.final_size == 1 and recipe.bn_momentum and freeze < STAGES else 1


def check_batch(spec: NetworkSpec, recipe: Recipe, freeze: int, share: int) -> None:
    """Raise ArgumentError if the `share` of a batch that each process gets is smaller than the smallest part."""
    if share < (fewest := smallest_part(spec, recipe, freeze)):
        rule = f"is too few: at {spec.resolution} px the last map is one pixel, and batch statistics need {fewest}."
        raise ArgumentError("batch", share, rule)


def _forecast(
    spec: NetworkSpec, recipe: Recipe, settings: Settings, precision: StepPrecision
) -> Callable[[int, RecomputePlan | None], int]:
    """A function from images per forward pass and a recompute plan to the bytes of a step on the run's device."""
    options = _memory_options(spec, recipe, settings, precision)

    def bytes_of(part: int, plan: RecomputePlan | None) -> int:
        memory = training_memory(spec, part, **options, plan=plan)
        return gpu_memory(spec, part, memory) if settings.device.startswith("cuda") else memory.peak

    return bytes_of


def _memory_options(spec: NetworkSpec, recipe: Recipe, settings: Settings, precision: StepPrecision) -> dict[str, Any]:
    return {
        "optimizer": OPTIMIZER[recipe.optimizer],
        "ema": recipe.ema > 0,
        "precision": precision,
        "kernels": trains_by_kernels(spec, recipe, settings),
    }
