"""A run's device: how its number formats are set, how images come to it, and how much of its memory is taken.

What is here matters off the CPU; on it every function does nothing.

formats     float32 where autocast leaves it: TF32 unless the run is in fp32 (`float32_of`), cuDNN's kernels by its own
            rule and only those that give the same bits again, so that a resumed run can equal an undisturbed one
images      pinned by the loader, and copied on a stream of their own into two buffers in turn, while the network
            computes on the other one: see Feed
compiling   `torch.compile` of the network in place, so that the names of its tensors stay
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effnet.machine import StepPrecision
from effnet.runtime.torch import to_device
from effnet.training.execution import float32_of

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the others compute in float32
BUFFERS = 2


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed what the network draws in a step: dropout, stochastic depth, mixing."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer
    else:
        torch.manual_seed(seed)  # of every device


@contextmanager
def number_formats(device: torch.device, precision: StepPrecision) -> Iterator[None]:
    """While steps run on a CUDA GPU, float32 as `float32_of` says, and only kernels that repeat their bits."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    torch.set_float32_matmul_precision(float32_of(precision))
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = precision != "fp32", False, True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[1:]


class Feed:
    """Brings parts of a batch to the device.

    On a CUDA GPU a part is copied while the network computes on the one before: on a stream of its own, into one of
    BUFFERS buffers, once the steps that read that buffer are over. So copies take the memory of two parts, however far
    the processor is ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda: Any = torch.cuda
        self.stream = cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.read: list[Any] = []  # events: what was read from each buffer is computed
        self.turn = 0

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and labels on the device; they are valid until the part after the next is asked for."""
        if self.stream is None:
            return to_device(pixels, self.device), to_device(labels, self.device)
        cuda: Any = torch.cuda
        compute = cuda.current_stream(self.device)
        if self.buffers:
            self.read[self.turn].record(compute)  # all that reads the part before is already in line
            self.turn = (self.turn + 1) % len(self.buffers)
        if len(self.buffers) < BUFFERS:  # parts of a run have one shape
            self.turn = len(self.buffers)
            self.buffers.append((pixels.to(self.device), labels.to(self.device)))
            self.read.append(cuda.Event())
            self.stream.wait_stream(compute)  # the buffer's memory may have been something else's
        with cuda.stream(self.stream):
            self.stream.wait_event(self.read[self.turn])
            for buffer, source in zip(self.buffers[self.turn], (pixels, labels), strict=True):
                buffer.copy_(source, non_blocking=True)
        compute.wait_stream(self.stream)
        return self.buffers[self.turn]


def compile_failed(error: BaseException, network: nn.Module) -> bool:
    """Whether `torch.compile` failed on a network; it is then no longer compiled."""
    dynamo = sys.modules.get("torch._dynamo.exc")
    compiled: Any = network
    if dynamo is None or not isinstance(error, dynamo.TorchDynamoException) or compiled._compiled_call_impl is None:
        return False
    compiled._compiled_call_impl = None
    return True


def forget_device_peak(device: torch.device) -> None:
    """Let `device_peak` start again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_peak(device: torch.device) -> int | None:
    """The most bytes that torch's tensors took on a CUDA GPU; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
