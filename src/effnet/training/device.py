"""A run's device: number formats, copying of images, and memory use.

On the CPU none of these functions does anything.

formats     float32 outside autocast is TF32 unless the run is in fp32 (`float32_of`); cuDNN chooses kernels by its own
            rule and only deterministic ones, so that a resumed run can equal an uninterrupted one
images      pinned by the loader, and copied on a separate stream into two alternating buffers, while the network
            computes on the other: see Feed
compiling   `torch.compile` of the network in place, which keeps the names of its tensors
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effnet.machine import StepPrecision
from effnet.process import any_start_method
from effnet.runtime.torch import to_device
from effnet.training.execution import float32_of

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the others compute in float32
BUFFERS = 2


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed a step's random draws: dropout, stochastic depth, mixing."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # faster than torch.manual_seed
    else:
        torch.manual_seed(seed)  # seeds every device


@contextmanager
def callers_torch() -> Iterator[None]:
    """Restore torch's threads and random numbers afterwards, since the caller's results may depend on them.

    A GPU that was not in use has no random numbers yet. The start method of processes stays the caller's to choose.
    """
    before = torch.get_num_threads()
    cuda: Any = torch.cuda
    devices = range(cuda.device_count()) if cuda.is_initialized() else ()
    try:
        with any_start_method(), torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def number_formats(device: torch.device, precision: StepPrecision) -> Iterator[None]:
    """Around steps on a CUDA GPU: sets float32 precision as `float32_of` says, and deterministic kernels only."""
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
    """Copies parts of a batch to the device.

    On a CUDA GPU a part is copied while the network computes on the previous one: on a separate stream, into one of
    BUFFERS buffers, once the steps that read that buffer are finished. So copies take the memory of two parts, however
    far ahead the processor is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda: Any = torch.cuda
        self.stream = cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.read: list[Any] = []  # for each buffer, the event that its reader has finished
        self.turn = 0

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and labels on the device, valid until two more parts were requested."""
        if self.stream is None:
            return to_device(pixels, self.device), to_device(labels, self.device)
        cuda: Any = torch.cuda
        compute = cuda.current_stream(self.device)
        if self.buffers:
            self.read[self.turn].record(compute)  # everything that reads the previous part is queued by now
            self.turn = (self.turn + 1) % len(self.buffers)
        if len(self.buffers) < BUFFERS:  # all parts of a run have the same shape
            self.turn = len(self.buffers)
            self.buffers.append((pixels.to(self.device), labels.to(self.device)))
            self.read.append(cuda.Event())
            self.stream.wait_stream(compute)  # the buffer's memory may have been in use before
        with cuda.stream(self.stream):
            self.stream.wait_event(self.read[self.turn])
            for buffer, source in zip(self.buffers[self.turn], (pixels, labels), strict=True):
                buffer.copy_(source, non_blocking=True)
        compute.wait_stream(self.stream)
        return self.buffers[self.turn]


def compile_failed(error: BaseException, network: nn.Module) -> bool:
    """Whether an error came from `torch.compile`; if so, the network is used uncompiled from now on."""
    dynamo = sys.modules.get("torch._dynamo.exc")
    compiled: Any = network
    if dynamo is None or not isinstance(error, dynamo.TorchDynamoException) or compiled._compiled_call_impl is None:
        return False
    compiled._compiled_call_impl = None
    return True


def forget_device_peak(device: torch.device) -> None:
    """Reset `device_peak`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_peak(device: torch.device) -> int | None:
    """Peak bytes of torch's tensors on a CUDA GPU; None on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
