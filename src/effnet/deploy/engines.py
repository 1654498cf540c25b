"""The engines that run a network in memory: torch, OpenVINO, ONNX Runtime; any number of images on each.

OpenVINO and ONNX Runtime compile a graph for one batch size. A network is compiled for full batches and for single
images, each when it is first needed; what the batches leave over goes one by one, or padded to a batch where it is more
than a quarter of one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import one_of, positive_int
from effnet.deploy.graph import Array, Network
from effnet.errors import ArgumentError

if TYPE_CHECKING:
    from effnet.weights.bundle import Bundle

EngineName = Literal["torch", "openvino", "onnxruntime"]
Precision = Literal["fp32", "bf16", "int8"]
Run = Callable[[NDArray[np.uint8]], Array]
Rest = Literal["one by one", "padded", "together"]

NAMES = {"torch": "torch", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
BATCH = 16  # images of a full batch, where nothing else is said
FEW = 1 / 4  # of a batch, up to which the rest goes one by one


@dataclass(frozen=True)
class Way:
    """How a network is run."""

    engine: EngineName
    precision: Precision = "fp32"
    streams: int = 1  # parts of a full batch that are computed side by side, each by its share of the threads

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is unknown or outside its range, or the engine cannot compute so.
        """
        one_of("engine", self.engine, EngineName)
        one_of("precision", self.precision, Precision)
        positive_int("streams", self.streams)
        if self.precision == "bf16" and self.engine != "openvino":
            raise ArgumentError(
                "precision", self.precision, f"is OpenVINO's alone: name engine openvino, not {self.engine}."
            )

    def __str__(self) -> str:
        words = [NAMES[self.engine], self.precision]
        return ", ".join(words + [f"{self.streams} streams"] * (self.streams > 1))


class Batches:
    """A function from any number of images to their logits, made of sessions for certain numbers of images.

    Threads may share it: an engine's request runs once at a time.

    Args:
        open: a session for a number of images, called once for each; 0: any number.
        batch: images of a full batch.
        rest: what the batches leave over goes one by one or padded, see above; always padded, `step` at a time; or
            together, where a session takes any number.
        step: images that the smallest session takes.
    """

    def __init__(self, open: Callable[[int], Run], batch: int, *, rest: Rest = "one by one", step: int = 1) -> None:
        self._open, self.batch, self._rest, self._step = open, batch, rest, step
        self._sessions: dict[int, Run] = {}
        self._lock = threading.Lock()

    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Logits (N, K) float32 of pixels (N, size, size, C) uint8, N at least 1.

        Raises:
            ArgumentError: it is closed.
        """
        full = len(pixels) - len(pixels) % self.batch
        rest = pixels[full:]
        parts = [self._run(pixels[start : start + self.batch]) for start in range(0, full, self.batch)]
        if len(rest):
            parts += self._run_rest(rest)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Let the engine's sessions, their threads and their memory go."""
        with self._lock:
            self._open = _gone
            self._sessions.clear()

    def _run_rest(self, rest: NDArray[np.uint8]) -> list[Array]:
        if self._rest == "together":
            return [self._run(rest)]
        few = self._rest == "padded" or len(rest) <= max(1, FEW * self.batch)
        step = self._step if few else self.batch
        padding = np.zeros((-len(rest) % step, *rest.shape[1:]), np.uint8)
        padded = np.concatenate([rest, padding]) if len(padding) else rest
        parts = [self._run(padded[start : start + step]) for start in range(0, len(padded), step)]
        return [*parts[:-1], parts[-1][: step - len(padding)]]

    def _run(self, pixels: NDArray[np.uint8]) -> Array:
        size = len(pixels) if self._rest != "together" or len(pixels) == self.batch else 0
        with self._lock:
            if size not in self._sessions:
                self._sessions[size] = self._open(size)
            return self._sessions[size](np.ascontiguousarray(pixels))


def _gone(images: int) -> Run:
    raise ArgumentError("classifier", "closed", "cannot be asked any more.")


def engine(bundle: Bundle, way: Way, *, batch: int = BATCH, threads: int | None = None) -> Batches:
    """A network in an engine: a function from pixels (N, size, size, C) uint8 to logits (N, K) float32.

    Args:
        bundle: the network with its context.
        way: engine, precision and streams.
        batch: images of a full batch.
        threads: how many it may use; None: one for each core.

    Raises:
        MissingExtraError: the engine is not installed.
    """
    if way.engine == "torch":
        from effnet.deploy.runtime import torch_engine

        run = torch_engine(bundle.network, bundle.config.input, threads)
        return Batches(lambda _: run, batch, rest="together")
    return Batches(compiler(network_of(bundle), way, threads=threads), batch)


def compiler(
    network: Network, way: Way, *, threads: int | None = None, recording: bool = False
) -> Callable[[int], Any]:
    """What makes a session of OpenVINO or ONNX Runtime for a number of images.

    Args:
        network: what the graph is made of.
        way: engine, precision and streams.
        threads: how many it may use; None: one for each core.
        recording: whether it remembers how long each node took.

    Raises:
        MissingExtraError: the engine is not installed.
    """
    if way.engine == "openvino":
        from effnet.deploy import openvino

        openvino.require()

        def compiled(images: int) -> openvino.OpenVinoSession:
            streams = way.streams if images % way.streams == 0 else 1
            how: Any = {"precision": way.precision, "streams": streams, "recording": recording}
            return openvino.OpenVinoSession(openvino.make(network, images // streams, {}), threads, **how)

        return compiled
    from effnet.deploy import onnx

    onnx.require()
    return lambda images: onnx.OnnxSession(onnx.make(network, images, {}), threads, recording=recording)


def network_of(bundle: Bundle) -> Network:
    """What the graph of a bundle's network is made of."""
    config = bundle.config
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in bundle.network.state_dict().items()}
    return Network(config.spec, config.policy, config.input, weights)
