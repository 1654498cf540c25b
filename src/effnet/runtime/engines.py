"""The engines that run a network in memory: torch, OpenVINO, ONNX Runtime; any number of images on each.

OpenVINO and ONNX Runtime compile a graph for a number of images. A full batch goes through them as a whole, or in parts
of a few images whose maps stay in the cache, several parts side by side: a wave. What the waves leave over goes one by
one through a graph for single images, or padded where it is more than a few. Each graph is compiled when it is first
needed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from effnet.errors import ArgumentError
from effnet.fields import one_of, positive_int
from effnet.machine import this_machine
from effnet.runtime.graph import Array, Network

if TYPE_CHECKING:
    from effnet.weights.bundle import Bundle

EngineName = Literal["torch", "openvino", "onnxruntime"]
Precision = Literal["fp32", "bf16", "int8"]
Run = Callable[[NDArray[np.uint8]], Array]
Open = Callable[[int, int], Run]  # images of a request, requests side by side -> what takes multiples of the first
Rest = Literal["one by one", "padded", "together"]

NAMES = {"torch": "torch", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
BATCH = 16  # images of a full batch, where nothing else is said
FEW = 4  # images, up to which what is left over goes one by one
PART = 2  # images of a request where a batch is divided and nothing was measured


@dataclass(frozen=True)
class Way:
    """How a network is run."""

    engine: EngineName
    precision: Precision = "fp32"
    streams: int = 1  # requests that are computed side by side, each by its share of the threads
    part: int | None = None  # images of a request; None: a full batch

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is unknown or outside its range, or the engine cannot compute so.
        """
        one_of("engine", self.engine, EngineName)
        one_of("precision", self.precision, Precision)
        positive_int("streams", self.streams)
        if self.part is not None:
            positive_int("part", self.part)
            if self.engine == "torch":
                raise ArgumentError("part", self.part, "cannot be said of torch, which takes batches as a whole.")
        elif self.streams > 1:
            raise ArgumentError("streams", self.streams, "needs `part`, the images of each request.")
        if self.precision == "bf16" and self.engine != "openvino":
            raise ArgumentError(
                "precision", self.precision, f"is OpenVINO's alone: name engine openvino, not {self.engine}."
            )

    def __str__(self) -> str:
        words = f"{NAMES[self.engine]}, {self.precision}"
        if self.part is None:
            return words
        images = f"{self.part} image{'' if self.part == 1 else 's'}"
        return f"{words}, {f'{self.streams} streams' if self.streams > 1 else 'parts'} of {images}"

    def divided(self, batch: int, *, step: int = 1, threads: int | None = None, fixed: bool = False) -> list[Way]:
        """The same for full batches: in parts side by side, one for each core; first as a whole where those are few.

        Args:
            batch: images of a full batch.
            step: the smallest part.
            threads: that it may use; None: one for each core.
            fixed: whether there is no other part.
        """
        if self.engine == "torch" or batch <= step:
            return [self]
        cores = min(threads or this_machine().cores, this_machine().cores)
        many = batch >= 2 * PART * step * cores
        part = PART * step if many and not fixed else step
        parts = dataclasses.replace(self, streams=min(cores, batch // part), part=part)
        return [parts] if many else [self, parts] if cores > 1 else [self]


class Batches:
    """A function from any number of images to their logits, made of sessions for certain numbers of images.

    Threads may share it: one batch is computed at a time.

    Args:
        open: see Open, called once for the same two numbers; images 0: any number.
        batch: images of a full batch.
        part: images of a request; None: the batch.
        streams: requests that are computed side by side.
        rest: what the waves leave over goes one by one or padded, see above; always padded, `step` at a time; or
            together, where a session takes any number.
        step: images that the smallest session takes.
    """

    def __init__(
        self,
        open: Open,
        batch: int,
        *,
        part: int | None = None,
        streams: int = 1,
        rest: Rest = "one by one",
        step: int = 1,
    ) -> None:
        self._open, self._rest, self._step = open, rest, step
        self._part, self._streams = part or batch, streams
        self._wave = self._part * streams
        self.batch = max(self._wave, batch - batch % self._wave)
        self._sessions: dict[tuple[int, int], Run] = {}
        self._lock = threading.Lock()

    def __call__(self, pixels: NDArray[np.uint8]) -> Array:
        """Logits (N, K) float32 of pixels (N, size, size, C) uint8, N at least 1.

        Raises:
            ArgumentError: it is closed.
        """
        full = len(pixels) - len(pixels) % self._wave
        batches = [pixels[start : min(start + self.batch, full)] for start in range(0, full, self.batch)]
        parts = [self._run(batch, self._part, self._streams) for batch in batches]
        if full < len(pixels):
            parts.append(self._run_rest(pixels[full:]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Let the engine's sessions, their threads and their memory go."""
        with self._lock:
            self._open = _gone
            self._sessions.clear()

    def _run_rest(self, rest: NDArray[np.uint8]) -> Array:
        if self._rest == "together":
            return self._run(rest, 0)
        few = self._rest == "padded" or len(rest) <= FEW
        images, streams = (self._step, 1) if few else (self._part, self._streams)
        padding = np.zeros((-len(rest) % images, *rest.shape[1:]), np.uint8)
        return self._run(np.concatenate([rest, padding]) if len(padding) else rest, images, streams)[: len(rest)]

    def _run(self, pixels: NDArray[np.uint8], images: int, streams: int = 1) -> Array:
        with self._lock:
            if (images, streams) not in self._sessions:
                self._sessions[images, streams] = self._open(images, streams)
            return self._sessions[images, streams](np.ascontiguousarray(pixels))


def in_parts(run: Run, pixels: NDArray[np.uint8], images: int | None, pool: Executor | None) -> Array:
    """What `run` answers to parts of so many images, None: to all at once; whoever in `pool` is free takes the next."""
    images = images or len(pixels)
    parts = [pixels[start : start + images] for start in range(0, len(pixels), images)]
    logits = [*(pool.map if pool and len(parts) > 1 else map)(run, parts)]
    return logits[0] if len(logits) == 1 else np.concatenate(logits)


def _gone(images: int, streams: int) -> Run:
    raise ArgumentError("classifier", "closed", "cannot be asked any more.")


def engine(bundle: Bundle, way: Way, *, batch: int = BATCH, threads: int | None = None) -> Batches:
    """A network in an engine: a function from pixels (N, size, size, C) uint8 to logits (N, K) float32.

    Args:
        bundle: the network with its context.
        way: engine, precision, streams and parts.
        batch: images of a full batch.
        threads: how many it may use; None: one for each core.

    Raises:
        MissingExtraError: the engine is not installed.
    """
    if way.engine == "torch":
        from effnet.runtime.classifier import torch_engine

        run = torch_engine(bundle.network, bundle.config.input, threads)
        return Batches(lambda *_: run, batch, rest="together")
    opener = compiler(network_of(bundle), way, threads=threads)
    return Batches(opener, batch, part=way.part, streams=way.streams)


def compiler(network: Network, way: Way, *, threads: int | None = None, recording: bool = False) -> Callable[..., Any]:
    """What makes OpenVINO's or ONNX Runtime's sessions of a network, as Batches opens them.

    Args:
        network: what the graph is made of.
        way: engine and precision.
        threads: how many a session may use; None: one for each core.
        recording: whether it remembers how long each node took.

    Raises:
        MissingExtraError: the engine is not installed.
    """
    if way.engine == "openvino":
        from effnet.runtime import openvino

        openvino.require()
        how: Any = {"precision": way.precision, "recording": recording}
        return lambda images, streams=1: openvino.OpenVinoSession(
            openvino.make(network, images, {}), threads, streams=streams, **how
        )
    from effnet.runtime import onnx

    onnx.require()
    return lambda images, streams=1: onnx.OnnxSession(
        onnx.make(network, images, {}), threads, streams=streams, recording=recording
    )


def network_of(bundle: Bundle) -> Network:
    """What the graph of a bundle's network is made of."""
    config = bundle.config
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in bundle.network.state_dict().items()}
    return Network(config.spec, config.policy, config.input, weights)
