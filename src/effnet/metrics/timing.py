"""Timing of functions, and the conditions of the measurement. torch is imported only where it is needed.

Functions to compare run in turn in one process, round after round, so that a disturbance affects all of them; the
figure is the median.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from effnet.arch.spec import InputSpec, NetworkSpec, NumericPolicy
from effnet.data.image import views
from effnet.fields import positive_int, write_count
from effnet.machine import Machine, load_average, this_machine
from effnet.progress import SILENT, Progress
from effnet.runtime.select import Selection, open_session, select
from effnet.weights.arrays import AnyArray
from effnet.weights.bundle import Bundle, BundleConfig
from effnet.weights.layouts import COUNTER, NATIVE

if TYPE_CHECKING:
    from torch import Tensor

TURN, CALLS = 0.08, 200  # a turn of short calls: duration in seconds, and most calls
RUNS, WARMUP = 15, 3  # for a network with single images
FEWEST, MOST, ENOUGH = 7, 30, 20.0  # default: as many rounds as fit into 20 seconds, at least 7, at most 30
LAYOUTS = ("NCHW", "channels_last")  # memory formats of images


@dataclass(frozen=True)
class Timing:
    """The times of all runs of one function."""

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median, which a disturbed run does not change much."""
        return 1e3 * statistics.median(self.seconds)

    @property
    def mean_ms(self) -> float:
        """The mean, which includes disturbed runs."""
        return 1e3 * statistics.fmean(self.seconds)

    @property
    def stdev_ms(self) -> float:
        """The sample's standard deviation; 0 for a single run."""
        return 1e3 * statistics.stdev(self.seconds) if len(self.seconds) > 1 else 0.0

    @property
    def spread_ms(self) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        if len(self.seconds) == 1:
            return self.median_ms, self.median_ms
        tenths = statistics.quantiles(self.seconds, n=10, method="inclusive")
        return 1e3 * tenths[0], 1e3 * tenths[-1]

    def to_dict(self) -> dict[str, Any]:
        """The statistics and the number of runs."""
        low, high = self.spread_ms
        values = {"median_ms": self.median_ms, "p10_ms": low, "p90_ms": high}
        return values | {"mean_ms": self.mean_ms, "stdev_ms": self.stdev_ms, "runs": len(self.seconds)}


@dataclass(frozen=True)
class Conditions:
    """What a time depends on besides the network; batch, layout and dtype are None if several are timed."""

    threads: int
    versions: tuple[str, ...]  # torch 2.14.1
    batch: int | None = None
    layout: str | None = None
    dtype: str | None = None
    machine: Machine = field(default_factory=this_machine)
    load: float | None = field(default_factory=load_average)  # system load of the last minute; None on Windows

    @classmethod
    def now(cls, batch: int, layout: str, *libraries: str) -> Conditions:
        """The conditions of torch in fp32 with its current number of threads, and the versions of `libraries`."""
        import torch

        versions = tuple(f"{name} {import_module(name).__version__}" for name in ("torch", *libraries))
        return cls(torch.get_num_threads(), versions, batch, layout, "float32")

    @property
    def crowded(self) -> bool:
        """Whether programs and threads outnumber the cores, so that torch's threads wait for the slowest."""
        return self.load is not None and self.threads + self.load > self.machine.cores + 0.5

    @property
    def warning(self) -> str:
        """A warning about a busy machine; empty if it was quiet."""
        if not self.crowded:
            return ""
        advice = "" if self.threads == 1 else ", or with --threads 1"
        return (
            f"Other programs were busy before this began (load {self.load:.1f}), so the times may be too long, some "
            f"more than others: measure again when it is quiet{advice}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The conditions as plain values."""
        details = {name: value for name in ("batch", "dtype", "layout") if (value := getattr(self, name)) is not None}
        busy = {"load": self.load, "crowded": self.crowded}
        versions = {"versions": list(self.versions)}
        return {"machine": self.machine.to_dict(), "threads": self.threads, **details, **busy, **versions}

    def __str__(self) -> str:
        pieces = [write_count(self.threads, "thread")]
        pieces += [] if self.batch is None else [f"batch {self.batch}"]
        pieces += [detail for detail in (self.dtype, self.layout) if detail]
        load = [] if self.load is None else [f"load {self.load:.1f} before"]
        return f"{self.machine}\n{', '.join((*pieces, *self.versions, *load))}"


def random_images(batch: int, resolution: int, channels: int = 3, *, layout: str = "channels_last") -> Tensor:
    """Images (N, channels, H, W) float32, normally distributed, in one of LAYOUTS."""
    import torch

    images = torch.randn(batch, channels, resolution, resolution)
    return images.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else images


def time_network(spec: NetworkSpec, selection: Selection | None = None, *, runs: int = RUNS) -> Timing:
    """Time a network with random weights, which take as long as trained ones, on single images.

    By default the rules of `runtime.select` choose the backend.

    Raises:
        ArgumentError: `runs` is not a positive whole number.
        MissingExtraError: the engine is not installed.
    """
    bundle = random_bundle(spec)
    image = views(bundle.config.input, 1)
    with open_session(bundle, selection or select(spec, batch=1)) as session:
        return measure(lambda: session(image), runs=runs, warmup=WARMUP)


def random_bundle(spec: NetworkSpec) -> Bundle:
    """A network with random weights by He's rule, always the same, for images of its resolution."""
    random, weights = np.random.default_rng(0), dict[str, AnyArray]()
    for name, shape in NATIVE.shapes(spec).items():
        if name.endswith(COUNTER):
            weights[name] = np.zeros(shape, np.int64)
        elif len(shape) == 1:
            weights[name] = np.full(shape, name.endswith((".weight", ".running_var")), np.float32)
        else:
            scale = np.float32(math.sqrt(2 / math.prod(shape[1:])))
            weights[name] = random.standard_normal(shape, np.float32) * scale
    input_spec = InputSpec(spec.resolution, spec.resolution).with_channels(spec.in_channels)
    return Bundle(BundleConfig(spec, NumericPolicy(), input_spec), weights)


def measure(function: Callable[[], object], *, runs: int | None = None, warmup: int = 2) -> Timing:
    """Time one function; see `time_rounds` for the other arguments."""
    return time_rounds(lambda: [seconds(function)], runs=runs, warmup=warmup)[0]


def measure_in_turn(
    functions: Mapping[str, Callable[[], object]],
    *,
    runs: int | None = None,
    warmup: int = 2,
    progress: Progress = SILENT,
) -> dict[str, Timing]:
    """Time every function once per round; see `time_rounds` for the other arguments."""

    def run_round() -> list[float]:
        return [seconds(function) for function in functions.values()]

    return dict(zip(functions, time_rounds(run_round, runs=runs, warmup=warmup, progress=progress), strict=True))


def time_rounds(
    turn: Callable[[], Sequence[float]],
    *,
    runs: int | None = None,
    warmup: int = 2,
    progress: Progress = SILENT,
    task: str = "rounds",
) -> list[Timing]:
    """Run rounds and collect the times of each function; if torch is loaded, without autograd.

    Args:
        turn: one round; returns the seconds of each function.
        runs: timed rounds; by default as many as fit into 20 seconds, at least 7 and at most 30.
        warmup: rounds before them, which allocate memory and choose kernels.
        progress, task: counts rounds, under that name.

    Raises:
        ArgumentError: `runs` or `warmup` is not a positive whole number.
    """
    rounds = None if runs is None else positive_int("runs", runs)
    warmup = positive_int("warmup", warmup)
    torch: Any = sys.modules.get("torch")
    with torch.inference_mode() if torch else nullcontext():
        once = [seconds(turn) for _ in range(warmup)][-1]  # the first one also allocates
        rounds = rounds or min(MOST, max(FEWEST, int(ENOUGH / once)))
        times = []
        for number in range(1, rounds + 1):
            times.append(turn())
            progress.update(task, number, rounds)
    return [Timing(taken) for taken in zip(*times, strict=True)]


def time_turn(function: Callable[[], object]) -> float:
    """Median seconds of as many calls as fit into TURN, after one call to warm up threads and caches."""
    function()
    times = [seconds(function)]
    while sum(times) < TURN and len(times) < CALLS:
        times.append(seconds(function))
    return statistics.median(times)


def seconds(function: Callable[[], object]) -> float:
    """The time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
