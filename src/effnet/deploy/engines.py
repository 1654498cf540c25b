"""The engines that run a network in memory: torch, OpenVINO, ONNX Runtime; any number of images on each.

OpenVINO and ONNX Runtime compile a graph for one batch size. A network is compiled for full batches and for single
images, each when it is first needed; what the batches leave over goes one by one, or padded to a batch where it is more
than a quarter of one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import one_of, positive_int
from effnet.deploy.graph import Array, Network, Session
from effnet.errors import ArgumentError

if TYPE_CHECKING:
    from effnet.weights.bundle import Bundle

EngineName = Literal["torch", "openvino", "onnxruntime"]
Rest = Literal["one by one", "padded", "together"]

BATCH = 16  # images of a full batch, where nothing else is said
FEW = 1 / 4  # of a batch, up to which the rest goes one by one
TORCH_S = "is no matter of torch's engine: set OMP_NUM_THREADS."  # what is wrong with threads


class Batches:
    """A function from any number of images to their logits, made of sessions for certain batch sizes.

    Threads may share it: an engine's request runs once at a time.

    Args:
        open: a session for a batch size, called once for each.
        batch: images of a full batch.
        rest: what the batches leave over goes one by one or padded, see above; always padded; or together, where a
            session takes any number.
    """

    def __init__(self, open: Callable[[int], Session], batch: int, *, rest: Rest = "one by one") -> None:
        self._open, self.batch, self._rest = open, batch, rest
        self._sessions: dict[int, Session] = {}
        self._lock = threading.Lock()

    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Logits (N, K) float32 of pixels (N, size, size, C) uint8, N at least 1."""
        full = len(pixels) - len(pixels) % self.batch
        rest = pixels[full:]
        parts = [self._run(pixels[start : start + self.batch]) for start in range(0, full, self.batch)]
        if not len(rest):
            pass
        elif self._rest == "together":
            parts.append(self._run(rest))
        elif self._rest == "one by one" and len(rest) <= max(1, FEW * self.batch):
            parts += [self._run(rest[place : place + 1]) for place in range(len(rest))]
        else:
            missing = np.zeros((self.batch - len(rest), *rest.shape[1:]), np.uint8)
            parts.append(self._run(np.concatenate([rest, missing]))[: len(rest)])
        return np.concatenate(parts)

    def _run(self, pixels: NDArray[np.uint8]) -> Array:
        size = len(pixels)
        with self._lock:
            if size not in self._sessions:
                self._sessions[size] = self._open(size)
            return np.array(self._sessions[size](np.ascontiguousarray(pixels)))  # a copy: engines reuse their output


def engine(
    bundle: Bundle, name: EngineName, *, batch: int | None = None, threads: int | None = None
) -> Callable[[NDArray[np.uint8]], Array]:
    """A network in an engine: a function from pixels (N, size, size, C) uint8 to logits (N, K) float32.

    Args:
        bundle: the network with its context.
        name: torch, openvino or onnxruntime.
        batch: images of a full batch; None: BATCH. Torch takes what comes.
        threads: how many it may use; None: one for each core. Torch's are the whole process's.

    Raises:
        ArgumentError: a value is outside its range.
        MissingExtraError: the engine is not installed.
    """
    one_of("engine", name, EngineName)
    size = BATCH if batch is None else positive_int("batch", batch)
    threads = None if threads is None else positive_int("threads", threads)
    if name == "torch":
        if threads is not None:
            raise ArgumentError("threads", threads, TORCH_S)
        from effnet.deploy.runtime import torch_engine

        return torch_engine(bundle.network, bundle.config.input)
    network = network_of(bundle)
    if name == "openvino":
        from effnet.deploy import openvino

        openvino.require()
        return Batches(lambda images: openvino.OpenVinoSession(openvino.make(network, images, {}), threads), size)
    from effnet.deploy import onnx

    onnx.require()
    return Batches(lambda images: onnx.OnnxSession(onnx.make(network, images, {}), threads), size)


def network_of(bundle: Bundle) -> Network:
    """What the graph of a bundle's network is made of."""
    config = bundle.config
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in bundle.network.state_dict().items()}
    return Network(config.spec, config.policy, config.input, weights)
