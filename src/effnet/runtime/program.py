"""A torch.export program: a network's graph as torch itself keeps it."""

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
from numpy.typing import NDArray
from torch import Tensor, nn

from effnet.arch.spec import InputSpec
from effnet.errors import ArtifactError
from effnet.files import MARK
from effnet.metrics.timing import torch_threads
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.graph import Array

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load reads it
READING = threading.Lock()  # torch.export reads one program at a time, and the environment is everybody's


class FromPixels(nn.Module):
    """A network that takes pixels (N, size, size, C) uint8 and normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: EfficientNet, see: InputSpec) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(see.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(see.std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K) float32."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32)
        logits: Tensor = self.network((images / 255 - self.mean) / self.std)
        return logits


def write(network: EfficientNet, see: InputSpec, batch: int | None, about: Mapping[str, Any], file: Path) -> None:
    """Write the network as a torch.export program that says what `about` says."""
    module = FromPixels(network, see).eval()
    example = torch.zeros(batch or 2, see.size, see.size, see.channels, dtype=torch.uint8)
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    torch.export.save(program, file, extra_files={MARK: json.dumps(about)})


class ProgramSession:
    """A torch.export program in torch.

    Args:
        file: the file .pt2.
        threads: how many torch may use while it computes; None: as many as it takes by itself.

    Raises:
        ArtifactError: it is no such file, or it would have code run while it is read.
    """

    def __init__(self, file: Path, threads: int | None = None) -> None:
        extra = {MARK: ""}
        try:
            with _weights_only():
                self._module = torch.export.load(file, extra_files=extra).module()
        except Exception as error:  # of zip files, of JSON, of torch's schema: there is no common kind
            raise ArtifactError(f"{file} cannot be read by torch.export: {str(error).splitlines()[0]}") from error
        self.about, self._threads = extra[MARK], threads

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Logits (N, K) of pixels (N, size, size, C), as many as its batch."""
        with torch_threads(self._threads):
            logits: Array = self._module(torch.from_numpy(np.require(pixels, requirements=["C", "W"]))).numpy()
        return logits


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
