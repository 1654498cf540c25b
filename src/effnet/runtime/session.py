"""Sessions: the protocol of every model that is ready to answer, and the class that builds one from an engine's graphs.

A Backend says how a model is run. OpenVINO and ONNX Runtime compile a graph for a certain number of images, so a
full batch goes through as a whole or in parts of a few images, several parts side by side. Needs no engine, no torch.

A process that is forked, as by gunicorn --preload, has only the thread that forked; those of engines and pools are
missing, and whoever waits for them waits for ever. So a session begins anew there: lock, threads and graphs. The old
graphs are never released, because that would wait for their threads (ONNX Runtime 1.32) or crash (OpenVINO 2026.4).
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
from typing import Protocol, Self, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from effnet.errors import ArgumentError
from effnet.fields import one_of, positive_int
from effnet.runtime.options import EngineName, EnginePrecision

T = TypeVar("T")

Pixels = NDArray[np.uint8]  # (N, size, size, C)
Logits = NDArray[np.float32]  # (N, K)
Run = Callable[[Pixels], Logits]
Compile = Callable[[int, int], Run]  # images of a graph (0: any number), requests side by side -> the graph

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
    """How a model is run.

    Attributes:
        engine: what computes.
        precision: what it computes with; weights are stored in fp32 unless this is int8.
        threads: the most that it may use; None: one for each core.
        part: images of one request; None: a full batch.
        streams: requests that are computed side by side, each on its share of the threads.
    """

    engine: EngineName
    precision: EnginePrecision = "fp32"
    threads: int | None = None
    part: int | None = None
    streams: int = 1

    def __post_init__(self) -> None:
        one_of("engine", self.engine, EngineName)
        one_of("precision", self.precision, EnginePrecision)
        for name, value in (("threads", self.threads), ("part", self.part), ("streams", self.streams)):
            if value is not None:
                positive_int(name, value)
        if self.streams > 1 and self.part is None:
            raise ArgumentError("streams", self.streams, "needs `part`, the images of each request.")
        if self.precision == "bf16" and self.engine not in BF16_ENGINES:
            rule = f"needs engine {' or '.join(BF16_ENGINES)}; {self.engine} does not have it."
            raise ArgumentError("precision", self.precision, rule)
        if self.precision == "int8" and self.engine == "native":
            raise ArgumentError("precision", self.precision, "needs an artifact; native does not have it.")

    def __str__(self) -> str:
        pieces = [TITLES[self.engine], self.precision]
        if self.part is not None:
            streams = "parts" if self.streams == 1 else f"{self.streams} streams"
            pieces.append(f"{streams} of {self.part} image{'' if self.part == 1 else 's'}")
        if self.threads is not None:
            pieces.append(f"{self.threads} thread{'' if self.threads == 1 else 's'}")
        return ", ".join(pieces)


class Session(Protocol):
    """A model that is ready to answer. Threads may share one."""

    @property
    def backend(self) -> Backend:
        """How the model is run."""

    @property
    def batch(self) -> int:
        """Images of a full batch: multiples of it are computed fastest."""

    def __call__(self, pixels: Pixels, /) -> Logits:
        """Logits (N, K) float32 of pixels (N, size, size, C) uint8, not normalised; N is at least 1."""

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
            streams may be called by as many threads at once.
        backend: how the model is run.
        batch: images of a full batch, rounded down to whole waves.
        least: images of the smallest graph; 0: one graph takes any number of images.
    """

    def __init__(self, compile: Compile, backend: Backend, batch: int, *, least: int = 1) -> None:
        self.backend, self._least = backend, least
        self._part = backend.part or batch
        self._wave = self._part * backend.streams
        self.batch = max(self._wave, batch - batch % self._wave)
        self._compile: Compile | None = compile
        self.begin()
        with _FORKING:
            _SESSIONS.add(self)

    def begin(self) -> None:
        """Begin without graphs and threads, which are made when they are first needed, and with a lock that is free."""
        self._graphs: dict[tuple[int, int], Run] = {}
        self._pool = ThreadPoolExecutor(self.backend.streams) if self.backend.streams > 1 else None
        self._caller = ThreadPoolExecutor(1) if _FORKED else None  # see `in_live_thread`
        self._lock = threading.Lock()

    def __call__(self, pixels: Pixels, /) -> Logits:
        """See Session.

        Raises:
            ArgumentError: the session is closed.
        """
        return self._caller.submit(self._answer, pixels).result() if self._caller else self._answer(pixels)

    def _answer(self, pixels: Pixels) -> Logits:
        rest = len(pixels) % self._wave if self._least else 0
        whole, logits = len(pixels) - rest, []
        with _FORKING:
            pass  # a fork that waits for this session goes first
        with self._lock:
            if whole:
                logits.append(self._run(pixels[:whole], self._part, self.backend.streams))
            if rest:
                few = rest <= max(FEW, self._least)
                size, streams = (self._least, 1) if few else (self._part, self.backend.streams)
                padding = np.zeros((-rest % size, *pixels.shape[1:]), np.uint8)
                logits.append(self._run(np.concatenate([pixels[whole:], padding]), size, streams)[:rest])
        return _joined(logits)

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
            self._graph(0, self.backend.streams)

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

    def _run(self, pixels: Pixels, images: int, streams: int) -> Logits:
        graph = self._graph(images if self._least else 0, streams)
        parts = [np.ascontiguousarray(pixels[start : start + images]) for start in range(0, len(pixels), images)]
        mapped = self._pool.map if self._pool and streams > 1 and len(parts) > 1 else map
        return _joined([*mapped(graph, parts)])

    def _graph(self, images: int, streams: int) -> Run:
        if self._compile is None:
            raise ArgumentError("session", "closed", "cannot answer any more.")
        if (images, streams) not in self._graphs:
            self._graphs[images, streams] = self._compile(images, streams)
        return self._graphs[images, streams]


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


def _joined(logits: list[Logits]) -> Logits:
    return logits[0] if len(logits) == 1 else np.concatenate(logits)
