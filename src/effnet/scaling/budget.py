"""A budget: what a network may cost at most, and what a network costs of it.

The paper's equation 2 has a limit on memory and one on multiply-adds, and uses the second alone. Here both bind, and
parameters, training memory, file size and latency beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from effnet.arch.blocks import Shape
from effnet.arch.cost import total_cost
from effnet.arch.memory import OPTIMIZERS, Keep, file_bytes, inference_memory, training_memory
from effnet.arch.spec import LARGEST_FACTOR, NetworkSpec
from effnet.errors import ArgumentError, UnknownNameError
from effnet.fields import one_of, parse_bytes, parse_count, parse_seconds, positive_float, positive_int
from effnet.machine import Precision

SMALLEST_RESOLUTION = 32  # pixels; the last map is then one pixel
RESOURCES = ("macs", "params", "memory", "train_memory", "file_size")  # priced by formula
TRAINING = {"optimizer": "rmsprop", "ema": True, "precision": "fp32", "keep": None}  # what training memory depends on


@dataclass(frozen=True)
class Budget:
    """What a network may cost at most, and what is settled beforehand. Amounts are numbers or as people write them.

    Attributes:
        macs: multiply-adds per image: "1G", "390M".
        params: learned numbers: "10M".
        memory: bytes of inference: weights, one image and the feature maps beside them, fp32: "100MB", "100MiB".
        train_memory: bytes of a training step of `batch` images with all that training holds.
        file_size: bytes of the file of weights.
        latency: seconds for one image on this machine: "20ms", .02.
        batch: images per training step.
        optimizer, ema, precision, keep: how it is trained; see effnet.arch.memory.training_memory.
        resolution, width, depth: fixed values; width and depth count from the baseline's rows.
        max_resolution: the resolution does not grow beyond it.
    """

    macs: int | str | None = None
    params: int | str | None = None
    memory: int | str | None = None
    train_memory: int | str | None = None
    file_size: int | str | None = None
    latency: float | str | None = None
    batch: int | None = None
    optimizer: str = "rmsprop"
    ema: bool = True
    precision: Precision = "fp32"
    keep: Keep | str | None = None
    resolution: int | None = None
    width: float | None = None
    depth: float | None = None
    max_resolution: int | None = None

    def __post_init__(self) -> None:
        """Turn amounts into numbers and check everything.

        Raises:
            ArgumentError: a value is outside its range, contradicts another, or there is no limit at all.
        """
        parsers: dict[str, Callable[[str, Any], float]] = {"macs": parse_count, "params": parse_count}
        parsers |= dict.fromkeys(("memory", "train_memory", "file_size"), parse_bytes) | {"latency": parse_seconds}
        parsers |= dict.fromkeys(("batch", "resolution", "max_resolution"), positive_int)
        parsers |= dict.fromkeys(("width", "depth"), positive_float)
        for name, parse in parsers.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse(name, getattr(self, name)))
        for name in ("width", "depth"):
            if (getattr(self, name) or 0) > LARGEST_FACTOR:
                raise ArgumentError(name, getattr(self, name), f"must be at most {LARGEST_FACTOR}.")
        self._check_training()
        if not self.limits and self.latency is None:
            raise ArgumentError("budget", "nothing", f"must limit something: {', '.join(RESOURCES)} or latency.")
        if self.max_resolution is not None and self.max_resolution < SMALLEST_RESOLUTION:
            raise ArgumentError(
                "max_resolution", self.max_resolution, f"must be at least {SMALLEST_RESOLUTION} pixels."
            )
        if self.resolution and self.max_resolution and self.resolution > self.max_resolution:
            raise ArgumentError(
                "resolution", self.resolution, f"is more than `max_resolution` (={self.max_resolution})."
            )

    def _check_training(self) -> None:
        keep = None if self.keep is None else Keep.parse(self.keep)
        one_of("precision", self.precision, Precision)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)
        if (self.batch is None) != (self.train_memory is None):
            given, missing = ("batch", "train_memory") if self.train_memory is None else ("train_memory", "batch")
            raise ArgumentError(given, getattr(self, given), f"needs `{missing}`: how much memory for how many images.")
        for name, usual in TRAINING.items():
            if self.train_memory is None and getattr(self, name) != usual:
                raise ArgumentError(name, getattr(self, name), "belongs to `train_memory`, which is not limited.")
        object.__setattr__(self, "keep", keep)

    @property
    def limits(self) -> dict[str, int]:
        """The limits that are priced by formula, under the names of RESOURCES."""
        return {name: getattr(self, name) for name in RESOURCES if getattr(self, name) is not None}

    @property
    def priced(self) -> tuple[str, ...]:
        """The resources that can be told of a network: training memory only for a batch."""
        return tuple(name for name in RESOURCES if name != "train_memory" or self.batch)


def tell(network: NetworkSpec | Shape, budget: Budget, names: tuple[str, ...] = RESOURCES) -> dict[str, int]:
    """What a network, or each of many, costs of the named resources; training memory only for a batch."""
    shape = network.shape if isinstance(network, NetworkSpec) else network
    price = total_cost(shape)
    prices: dict[str, Callable[[], int]] = {
        "macs": lambda: price.macs,
        "params": lambda: price.params,
        "memory": lambda: inference_memory(shape),
        "train_memory": lambda: _training(shape, budget),
        "file_size": lambda: file_bytes(shape),
    }
    return {name: prices[name]() for name in names if name != "train_memory" or budget.batch}


def _training(shape: Shape, budget: Budget) -> int:
    how: dict[str, Any] = {name: getattr(budget, name) for name in TRAINING}
    return training_memory(shape, cast(int, budget.batch), plan=how.pop("keep"), **how).peak
