"""Under which conditions torch was timed: machine, threads, batch, memory layout, versions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from effnet.errors import ArgumentError
from effnet.fields import positive_int
from effnet.machine import Machine, load_average, this_machine

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Conditions:
    """What a time depends on beside the network."""

    machine: Machine
    threads: int
    batch: int
    layout: str
    versions: tuple[str, ...]  # torch 2.14.1
    load: float | None  # the system's average over the minute before: programs that wanted to run; None on Windows
    dtype: str = "float32"

    @classmethod
    def now(cls, batch: int, layout: str, *libraries: str) -> Conditions:
        """This machine, torch's present number of threads, and the versions of torch and of other `libraries`."""
        versions = tuple(f"{name} {import_module(name).__version__}" for name in ("torch", *libraries))
        return cls.of(torch.get_num_threads(), batch, layout, versions)

    @classmethod
    def of(cls, threads: int, batch: int, layout: str, versions: tuple[str, ...], dtype: str = "float32") -> Conditions:
        """This machine now, with whatever computes on it."""
        return cls(this_machine(), threads, batch, layout, versions, load_average(), dtype)

    @property
    def crowded(self) -> bool:
        """Whether there were more programs and threads than cores: torch's threads then wait for the slowest."""
        return self.machine.crowded(self.threads, self.load)

    def to_dict(self) -> dict[str, Any]:
        """The facts under the names of the attributes."""
        values = {name: getattr(self, name) for name in ("threads", "batch", "dtype", "layout", "load")}
        return {"machine": self.machine.to_dict(), **values, "versions": list(self.versions)}

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return "\n".join(
            (str(self.machine), ", ".join((threads, f"batch {self.batch}", self.dtype, self.layout, *self.versions)))
        )


def random_images(batch: int, resolution: int, channels: int = 3, *, layout: str = "channels_last") -> Tensor:
    """Images (N, channels, H, W) float32, normally distributed, in one of LAYOUTS."""
    return torch.randn(batch, channels, resolution, resolution).contiguous(memory_format=LAYOUTS[layout])


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Torch with that many threads, and with its former number afterwards; None: as it is.

    Raises:
        ArgumentError: `threads` is no positive whole number, or more than the machine's cores.
    """
    if threads is None:
        yield
        return
    before, cores = torch.get_num_threads(), os.cpu_count() or 1
    if positive_int("threads", threads) > cores:
        raise ArgumentError("threads", threads, f"must be at most {cores}, the cores of this machine.")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
