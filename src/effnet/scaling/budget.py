"""A budget: what a network may cost at most, and which of its sizes are fixed.

The paper's equation 2 limits memory and multiply-adds, but the paper uses only the second. Here both apply, as do
limits on parameters, training memory, file size and latency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from effnet import native
from effnet.arch.blocks import Shape
from effnet.arch.cost import total_cost
from effnet.arch.memory import OPTIMIZERS, file_bytes, inference_memory, training_memory
from effnet.arch.segments import Keep
from effnet.arch.spec import LARGEST_FACTOR, NetworkSpec
from effnet.console import Amount, given
from effnet.errors import ArgumentError, UnknownNameError
from effnet.fields import (
    BYTES,
    COUNTS,
    SECONDS,
    one_of,
    parse_bytes,
    parse_count,
    parse_seconds,
    positive_float,
    positive_int,
    set_field,
    write_amount,
)
from effnet.machine import Precision, choose_precision

SMALLEST_RESOLUTION = 32  # pixels, where the last map is one pixel
RESOURCES = ("macs", "params", "memory", "train_memory", "file_size")  # computed by formulas
UNITS: dict[str, Any] = {"macs": COUNTS, "params": COUNTS, "latency": SECONDS}
UNITS |= dict.fromkeys(("memory", "train_memory", "file_size"), BYTES)
PARSERS: dict[str, Callable[[str, Any], float]] = {"macs": parse_count, "params": parse_count}
PARSERS |= dict.fromkeys(("memory", "train_memory", "file_size"), parse_bytes) | {"latency": parse_seconds}
PARSERS |= dict.fromkeys(("batch", "resolution", "max_resolution"), positive_int)
PARSERS |= dict.fromkeys(("width", "depth"), positive_float)
TRAINING = {"optimizer": "rmsprop", "ema": True, "precision": None, "keep": None}  # what training memory depends on


@dataclass(frozen=True)
class Budget:
    """What a network may cost at most, and which of its sizes are fixed.

    Amounts are numbers (counts, bytes, seconds) or text with a unit, which construction converts to numbers.

    Raises:
        ArgumentError: a value is outside its range, contradicts another, or nothing is limited.
    """

    macs: Amount | None = None
    """Most multiply-adds per image: 1G, 390M."""
    params: Amount | None = None
    """Most parameters: 10M."""
    memory: Amount | None = None
    """Most inference memory (weights, one image and its feature maps, fp32): 100MB, 100MiB."""
    train_memory: Amount | None = None
    """Most memory of a training step with --batch images: 8GB."""
    batch: int | None = None
    """Images per training step, for --train-memory."""
    file_size: Amount | None = None
    """Largest weight file: 10MB."""
    latency: Amount | None = None
    """Longest time for one image on this machine: 20ms. Timing the networks takes a minute."""
    resolution: int | None = None
    """Fix the resolution in pixels."""
    width: float | None = None
    """Fix the width factor, relative to the baseline's table."""
    depth: float | None = None
    """Fix the depth factor, relative to the baseline's table."""
    max_resolution: int | None = None
    """Largest resolution in pixels."""
    optimizer: str = "rmsprop"
    """For --train-memory: rmsprop, sgd, momentum, adam or adamw."""
    ema: Annotated[bool, Parameter(negative="--no-ema", show_default=False)] = True
    """For --train-memory: keep a moving average of the weights."""
    precision: Precision | None = None
    """For --train-memory: precision of the feature maps. Default: the faster one on this processor."""
    keep: Annotated[str | Keep | None, Parameter(metavar="LEVEL", show_choices=False)] = None
    """For --train-memory: what is kept for the backward pass: activations, convolutions, depthwise or bottlenecks; the
    rest is recomputed. Default: everything is kept."""

    def __post_init__(self) -> None:
        for name, parse in PARSERS.items():
            if getattr(self, name) is not None:
                set_field(self, name, parse(name, getattr(self, name)))
        for name in ("width", "depth"):
            if (getattr(self, name) or 0) > LARGEST_FACTOR:
                raise ArgumentError(name, getattr(self, name), f"must be at most {LARGEST_FACTOR}.")
        self._check_training()
        if not self.limits and self.latency is None:
            raise ArgumentError("budget", "nothing", f"must limit something: {', '.join(RESOURCES)} or latency.")
        largest = self.max_resolution
        for name in ("resolution", "max_resolution"):
            if (getattr(self, name) or SMALLEST_RESOLUTION) < SMALLEST_RESOLUTION:
                raise ArgumentError(name, getattr(self, name), f"must be at least {SMALLEST_RESOLUTION} pixels.")
        if self.resolution and largest and self.resolution > largest:
            raise ArgumentError("resolution", self.resolution, f"is more than `max_resolution` (={largest}).")

    def _check_training(self) -> None:
        keep = None if self.keep is None else Keep.parse(self.keep)
        if self.precision is not None:
            one_of("precision", self.precision, Precision)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)
        if (self.batch is None) != (self.train_memory is None):
            name, lacks = ("batch", "train_memory") if self.train_memory is None else ("train_memory", "batch")
            raise ArgumentError(name, getattr(self, name), f"needs `{lacks}` too: how much memory for how many images.")
        for name, default in TRAINING.items():
            if self.train_memory is None and getattr(self, name) != default:
                raise ArgumentError(name, getattr(self, name), "belongs to `train_memory`, which is not limited.")
        if self.train_memory is not None and self.precision is None:
            set_field(self, "precision", choose_precision(kernels=native.trains())[0])
        set_field(self, "keep", keep)

    @property
    def limits(self) -> dict[str, int]:
        """The limits on what formulas compute, by their names in RESOURCES."""
        return {name: getattr(self, name) for name in RESOURCES if getattr(self, name) is not None}

    @property
    def counted(self) -> tuple[str, ...]:
        """The resources that can be computed for a network; training memory only with a batch."""
        return tuple(name for name in RESOURCES if name != "train_memory" or self.batch)

    def to_options(self) -> dict[str, Any]:
        """The fields that differ from their defaults, with amounts as on a command line: 1G, 8GB, 20ms."""
        values = given(self)
        values |= {name: write_amount(values[name], units) for name, units in UNITS.items() if name in values}
        return values if self.keep is None else values | {"keep": Keep.parse(self.keep).name.lower()}


def count_resources(network: NetworkSpec | Shape, budget: Budget, names: tuple[str, ...] = RESOURCES) -> dict[str, int]:
    """What a network, or each of many, needs of the named resources; training memory only with a batch."""
    shape = network.shape if isinstance(network, NetworkSpec) else network
    price = total_cost(shape)
    settings: dict[str, Any] = {name: getattr(budget, name) for name in ("batch", *TRAINING)}
    plan = settings.pop("keep")
    counts: dict[str, Callable[[], int]] = {
        "macs": lambda: price.macs,
        "params": lambda: price.params,
        "memory": lambda: inference_memory(shape),
        "train_memory": lambda: training_memory(shape, plan=plan, **settings).peak,
        "file_size": lambda: file_bytes(shape),
    }
    return {name: counts[name]() for name in names if name != "train_memory" or budget.batch}
