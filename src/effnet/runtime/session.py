"""Sessions: the protocol of models that are ready to run, and the class that builds one from an engine's graphs.

A Backend says how a model is run. OpenVINO and ONNX Runtime compile a graph for a certain number of images, so a
full batch goes through as a whole or in parts of a few images, several parts side by side. Needs no engine, no torch.

A forked process, as with gunicorn --preload, has only the thread that forked; threads of engines and pools are missing,
and waiting for them never ends. So a session starts anew there: lock, threads and graphs. The old graphs are never
released, because that would wait for their threads (ONNX Runtime 1.32) or crash (OpenVINO 2026.4).
A fork waits until no session computes, so that no engine holds a lock of its own in the new process (torch's MKL does).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, Protocol, Self, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from effnet.errors import ArgumentError
from effnet.fields import one_of, positive_int, write_count
from effnet.runtime.options import EngineName, EnginePrecision

T = TypeVar("T")

Pixels = NDArray[np.uint8]  # (N, size, size, C)
Logits = NDArray[np.float32]  # (N, K)
Maps = NDArray[np.float32]  # (N, C, h, w), which the classifier averages
Run = Callable[[Pixels], Logits]
RunMaps = Callable[[Pixels], tuple[Logits, Maps]]
Compile = Callable[[int, int], Run]  # images of a graph (0: any number), requests side by side -> the graph
CompileMaps = Callable[[int, int], RunMaps]
Arrays = tuple[NDArray[np.float32], ...]  # logits, or logits and maps

TITLES: dict[EngineName, str] = {
    "torch": "torch",
    "native": "native",  # effnet's own
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
}
BF16_ENGINES: tuple[EngineName, ...] = ("native", "openvino")
LONGEST_CALL = 10.0  # seconds that a fork waits for sessions
FEW = 4  # images: up to here, those left over go one by one, each on all threads, rather than in a padded part


@dataclass(frozen=True)
class Backend:
    """How to run a model.

    Attributes:
        engine: the engine.
        precision: of computing; weights are stored in fp32 unless this is int8.
        threads: maximum number of threads; None: one per core.
        part: images of one request; None: a full batch.
        streams: concurrent requests, each on its share of the threads.
        device: torch's device; the other engines support only the CPU.
    """

    engine: EngineName
    precision: EnginePrecision = "fp32"
    threads: int | None = None
    part: int | None = None
    streams: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        one_of("engine", self.engine, EngineName)
        one_of("precision", self.precision, EnginePrecision)
        for name, value in (("threads", self.threads), ("part", self.part), ("streams", self.streams)):
            if value is not None:
                positive_int(name, value)
        if self.streams > 1 and self.part is None:
            raise ArgumentError("streams", self.streams, "needs `part`, the images of each request.")
        if self.device != "cpu" and self.engine != "torch":
            raise ArgumentError("device", self.device, f"needs engine torch; {self.engine} computes on the CPU.")
        if self.precision == "bf16" and self.engine not in BF16_ENGINES and self.device == "cpu":
            rule = f"needs engine {' or '.join(BF16_ENGINES)}; {self.engine} does not have it."
            raise ArgumentError("precision", self.precision, rule)
        if self.precision == "int8" and self.engine == "native":
            raise ArgumentError("precision", self.precision, "needs an artifact; native does not have it.")

    def __str__(self) -> str:
        pieces = [TITLES[self.engine], *([] if self.device == "cpu" else [self.device]), self.precision]
        if self.part is not None:
            streams = "parts" if self.streams == 1 else f"{self.streams} streams"
            pieces.append(f"{streams} of {write_count(self.part, 'image')}")
        if self.threads is not None:
            pieces.append(write_count(self.threads, "thread"))
        return ", ".join(pieces)


class Linear(NamedTuple):
    """The layer after the average: logits are weight @ mean(map) + bias."""

    weight: NDArray[np.float32]  # (K, C)
    bias: NDArray[np.float32]  # (K,)


class Compiler(NamedTuple):
    """What compiles a model's graphs; one that gives its last feature maps too is compiled only when it is asked."""

    logits: Compile
    maps: CompileMaps
    linear: Callable[[], Linear]


class Session(Protocol):
    """A model that is ready to run. Thread-safe."""

    @property
    def backend(self) -> Backend:
        """How the model is run."""

    @property
    def batch(self) -> int:
        """Images of a full batch: multiples of it are computed fastest."""

    def __call__(self, pixels: Pixels, /) -> Logits:
        """Logits (N, K) float32 of pixels (N, size, size, C) uint8, not normalised; N is at least 1."""

    def maps(self, pixels: Pixels, /) -> tuple[Logits, Maps]:
        """Logits, and the maps (N, C, h, w) float32 that the classifier averages; see Linear."""

    @property
    def linear(self) -> Linear:
        """The classifier, which makes logits of averaged maps."""

    def close(self) -> None:
        """Release the engine's graphs, threads and memory; a with statement does so, too."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class BatchedSession:
    """A session for any number of images, made of graphs that are compiled when they are first needed.

    Images go through in waves of `backend.streams` parts. A few that are left over go through the smallest graph one
    by one, more of them through padded parts. One call is computed at a time.

    Args:
        compile: gives the graph for a number of images; called once for the same two numbers. A graph for several
            streams may be called by as many threads at once. A function gives only logits, a Compiler maps as well.
        backend: how the model is run.
        batch: images of a full batch, rounded down to whole waves.
        least: images of the smallest graph; 0: one graph takes any number of images.
    """

    def __init__(self, compile: Compile | Compiler, backend: Backend, batch: int, *, least: int = 1) -> None:
        self.backend, self._least = backend, least
        self._part = backend.part or batch
        self._wave = self._part * backend.streams
        self.batch = max(self._wave, batch - batch % self._wave)
        whole = compile if isinstance(compile, Compiler) else Compiler(compile, _only_logits, _only_logits)
        self._compile: Compiler | None = whole
        self._linear: Linear | None = None
        self.begin()
        with _FORKING:
            _SESSIONS.add(self)

    def begin(self) -> None:
        """Begin without graphs and threads, which are made when they are first needed, and with a lock that is free."""
        self._graphs: dict[tuple[int, int, bool], Callable[[Pixels], Arrays]] = {}
        self._pool = ThreadPoolExecutor(self.backend.streams) if self.backend.streams > 1 else None
        self._caller = ThreadPoolExecutor(1) if _FORKED else None  # see `in_live_thread`
        self._lock = threading.Lock()

    def __call__(self, pixels: Pixels, /) -> Logits:
        """See Session.

        Raises:
            ArgumentError: the session is closed.
        """
        (logits,) = self._in_caller(lambda: self._answer(pixels, maps=False))
        return logits

    def maps(self, pixels: Pixels, /) -> tuple[Logits, Maps]:
        """See Session.

        Raises:
            ArgumentError: the session is closed, or was made of a function that gives only logits.
            ArtifactError: the graph of the artifact is not one that effnet exports.
        """
        logits, maps = self._in_caller(lambda: self._answer(pixels, maps=True))
        return logits, maps

    @property
    def linear(self) -> Linear:
        """See Session; for errors see `maps`."""
        if self._linear is None:
            self._linear = self._in_caller(self._read_linear)
        return self._linear

    def _read_linear(self) -> Linear:
        with self._lock:  # an engine may compute it
            return self._compiler().linear()

    def _in_caller(self, function: Callable[[], T]) -> T:
        return self._caller.submit(function).result() if self._caller else function()

    def _compiler(self) -> Compiler:
        if self._compile is None:
            raise ArgumentError("session", "closed", "cannot answer any more.")
        return self._compile

    def _answer(self, pixels: Pixels, *, maps: bool) -> Arrays:
        rest = len(pixels) % self._wave if self._least else 0
        whole, found = len(pixels) - rest, []
        with _FORKING:
            pass  # a fork that waits for this session goes first
        with self._lock:
            if whole:
                found.append(self._run(pixels[:whole], self._part, self.backend.streams, maps))
            if rest:
                few = rest <= max(FEW, self._least)
                size, streams = (self._least, 1) if few else (self._part, self.backend.streams)
                padding = np.zeros((-rest % size, *pixels.shape[1:]), np.uint8)
                padded = self._run(np.concatenate([pixels[whole:], padding]), size, streams, maps)
                found.append(tuple(array[:rest] for array in padded))
        return _joined(found)

    def prepare(self) -> None:
        """Compile in a thread of its own, while the first photos are read; only where one graph takes any number.

        Not torch: OpenMP would keep threads for each thread that called it. What fails is tried again, and raised, by
        the first call.
        """
        if not self._least and not self._caller and self.backend.engine != "torch":
            threading.Thread(target=self._prepare).start()

    def _prepare(self) -> None:
        with _FORKING:
            pass
        with self._lock, suppress(Exception):
            self._graph(0, self.backend.streams, maps=False)

    def close(self) -> None:
        """See Session."""
        with self._lock:
            self._compile = None
            self._graphs.clear()
            if self._pool:
                self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, pixels: Pixels, images: int, streams: int, maps: bool) -> Arrays:
        graph = self._graph(images if self._least else 0, streams, maps)
        parts = [np.ascontiguousarray(pixels[start : start + images]) for start in range(0, len(pixels), images)]
        mapped = self._pool.map if self._pool and streams > 1 and len(parts) > 1 else map
        return _joined([*mapped(graph, parts)])

    def _graph(self, images: int, streams: int, maps: bool) -> Callable[[Pixels], Arrays]:
        compiler, key = self._compiler(), (images, streams, maps)
        if key not in self._graphs:
            if maps:
                self._graphs[key] = compiler.maps(images, streams)
            else:
                run = compiler.logits(images, streams)
                self._graphs[key] = lambda pixels: (run(pixels),)
        return self._graphs[key]


def _only_logits(*_: object) -> NoReturn:
    raise ArgumentError("session", "a function", "gives only logits; open a model for its maps.")


def in_live_thread(function: Callable[[], T]) -> T:
    """The result of `function`; in a forked process a thread of its own calls it.

    torch computes with OpenMP, which would wait for the threads that the calling thread had before the fork.
    """
    if not _FORKED:
        return function()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _before_fork() -> None:
    _FORKING.acquire()
    end = time.monotonic() + LONGEST_CALL
    _HELD.extend(s._lock for s in _SESSIONS if s._lock.acquire(timeout=max(0.0, end - time.monotonic())))


def _after_fork() -> None:
    for lock in _HELD:
        lock.release()
    _HELD.clear()
    _FORKING.release()


def _begin_anew() -> None:
    """In a forked process, before anything else runs there."""
    _after_fork()
    _FORKED.append(os.getpid())
    for session in _SESSIONS:
        if session._graphs:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session._graphs))  # not even the interpreter's end releases it
            with suppress(AttributeError):  # only glibc has it
                libc = ctypes.CDLL(None)
                libc.on_exit(libc._exit, None)  # leave before ONNX Runtime's own exit handler, which waits as well
        session.begin()


_SESSIONS: WeakSet[BatchedSession] = WeakSet()
_FORKING = threading.Lock()  # held while the process forks: no session is added, none begins to compute
_HELD: list[threading.Lock] = []  # of sessions, while the process forks
_FORKED: list[int] = []  # the number of this process, where it was forked from one that had imported this module
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_begin_anew)


def _joined(found: list[Arrays]) -> Arrays:
    return found[0] if len(found) == 1 else tuple(map(np.concatenate, zip(*found, strict=True)))
