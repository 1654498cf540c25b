"""torch: a network in memory, and a torch.export program, which is the network's graph as torch stores it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effnet.arch.spec import InputSpec
from effnet.errors import ArgumentError, ArtifactError
from effnet.fields import positive_int
from effnet.files import MARK
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.artifact import Model
from effnet.runtime.session import Backend, Compile, Logits, Pixels, Run, in_live_thread
from effnet.weights.bundle import Bundle

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load reads it
READING = threading.Lock()  # torch.export reads one program at a time, and all threads share the environment


def compiler(model: Model, backend: Backend) -> Compile:
    """See runtime.select.compiler. There is one graph, whatever the number of images.

    A network is in eval mode and in channels_last afterwards.
    """
    if isinstance(model, Bundle):
        network = in_live_thread(lambda: model.network.eval().to(memory_format=torch.channels_last))
        run = compile_network(network, model.config.input, backend.threads)
    else:
        run = compile_artifact(model.path, backend.threads)
    return lambda images, streams: run


def compile_network(network: EfficientNet, input_spec: InputSpec, threads: int | None = None) -> Run:
    """A network on the device where its parameters are; pixels are normalised there. It takes any number of images.

    Args:
        network: in eval mode.
        input_spec: how images are prepared.
        threads: of torch while it computes; None: torch's own number. The number belongs to the process: another thread
            that begins to use torch meanwhile inherits it.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (input_spec.mean, input_spec.std))

    @torch.inference_mode()
    def run(pixels: Pixels) -> Logits:
        weight = network.classifier.weight
        images = _tensor(pixels).to(weight.device).permute(0, 3, 1, 2)  # a view, which makes it channels_last
        with torch_threads(threads):
            images = images.to(torch.float32).div_(255).sub_(mean.to(weight.device)).div_(std.to(weight.device))
            logits: Logits = network(images.to(weight.dtype)).float().cpu().numpy()
        return logits

    return run


def compile_artifact(file: Path, threads: int | None = None) -> Run:
    """A torch.export program; it takes as many images as it was exported for.

    Raises:
        ArtifactError: it is not a torch.export program, or it would run code while it is read.
    """
    try:
        with _weights_only():
            module = torch.export.load(file).module()
    except Exception as error:  # zip files, JSON and torch's schema have no common exception
        raise ArtifactError(f"{file} cannot be read by torch.export: {str(error).splitlines()[0]}") from error

    @torch.inference_mode()
    def run(pixels: Pixels) -> Logits:
        with torch_threads(threads):
            logits: Logits = module(_tensor(pixels)).numpy()
        return logits

    return run


class FromPixels(nn.Module):
    """A network that takes pixels (N, size, size, C) uint8 and normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: EfficientNet, input_spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(input_spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(input_spec.std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K) float32."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32)
        logits: Tensor = self.network((images / 255 - self.mean) / self.std)
        return logits


def write(
    network: EfficientNet, input_spec: InputSpec, batch: int | None, metadata: Mapping[str, Any], file: Path
) -> None:
    """Write the network as a torch.export program for `batch` images (None: any number), with its metadata."""
    network.to(memory_format=torch.contiguous_format)  # torch.export.save loses weights in channels_last
    module = FromPixels(network, input_spec).eval()
    size = input_spec.size
    example = torch.zeros(batch or 2, size, size, input_spec.channels, dtype=torch.uint8)
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    torch.export.save(program, file, extra_files={MARK: json.dumps(metadata)})


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Torch with that many threads, and with its former number afterwards; None: as it is.

    Raises:
        ArgumentError: `threads` is not a positive whole number, or more than the machine's cores.
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


def _tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))  # torch warns of arrays that are read-only


@contextmanager
def _weights_only() -> Iterator[None]:
    """Without pickles that run code: torch.export.load follows a file that asks for one, unless this forbids it."""
    with READING:
        before = os.environ.get(WEIGHTS_ONLY)
        os.environ[WEIGHTS_ONLY] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[WEIGHTS_ONLY]
            else:
                os.environ[WEIGHTS_ONLY] = before
