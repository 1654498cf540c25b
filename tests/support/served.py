"""A server in a thread, with a function instead of an engine, which tests can hold back."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

import effnet
from effnet.arch.spec import InputSpec
from effnet.runtime.classifier import Classifier
from effnet.runtime.session import Logits, Pixels
from effnet.serving import catalogue as module
from effnet.serving.app import build_app
from effnet.serving.catalogue import Catalogue
from effnet.serving.counters import Counters
from effnet.serving.pace import Pace
from effnet.weights.bundle import BundleConfig

SIZE = 32
COLOURS = ("red", "green", "blue")
LOGIT = 5.0  # of the right colour; the others have 0


class Colours:
    """Tells which colour an image has most of; `go` is cleared to hold it back."""

    def __init__(self, classes: tuple[str, ...] = COLOURS, **limits: Any) -> None:
        self.go, self.batches, self.closed = threading.Event(), list[int](), False
        self.fails = False
        self.go.set()
        spec = effnet.spec("b0", resolution=SIZE, num_classes=3)
        images = InputSpec(SIZE, SIZE)
        self.classifier = Classifier(self, BundleConfig(spec, effnet.NumericPolicy(), images, classes, **limits))

    def __call__(self, pixels: Pixels) -> Logits:
        self.batches.append(len(pixels))
        assert self.go.wait(30)
        if self.fails:
            raise ArithmeticError("the engine failed")
        means = pixels.mean((1, 2))
        logits: Logits = (LOGIT * (means == means.max(1, keepdims=True))).astype(np.float32)
        return logits

    def close(self) -> None:
        self.closed = True


class Served:
    """What a test sees of a server."""

    def __init__(self, catalogue: Catalogue, url: str, engine: Colours) -> None:
        self.catalogue, self.url, self.engine = catalogue, url, engine
        self.http = httpx.Client(base_url=url, timeout=30, verify=False)  # no certificates are read
        self.stop: Callable[[], object] = lambda: None

    @property
    def taken(self) -> int:
        return self.catalogue.engine().batcher.taken

    def number(self, name: str, **labels: str) -> float:
        """A number of /metrics; 0 where it is not there."""
        return self.catalogue.counters.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def serving(
    *engines: Colours, places: int = 100, loading: threading.Event | None = None, **options: Any
) -> Iterator[Served]:
    """A server of models named colours, colours1 ..."""
    models = {f"colours{n or ''}": str(n) for n in range(len(engines))}

    def open_engine(model: str, *_: object) -> tuple[Classifier, Pace]:
        assert loading is None or loading.wait(30)
        pace = Pace(1.0, {1: 0.001}, 4)
        pace.rate = places / 0.8
        return engines[int(model)].classifier, pace

    found: list[Catalogue] = []

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        task = asyncio.create_task(found[0].load())
        yield
        await task
        await found[0].close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_engine", open_engine)
        found.append(Catalogue(models, 1.0, {}, Counters(), print))
        app = build_app(found[0], lifespan=lifespan, **options)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run)
        thread.start()
        wait_until(lambda: server.started and (loading is not None or found[0].state == "ready"))
        host, port = server.servers[0].sockets[0].getsockname()

        served = Served(found[0], f"http://{host}:{port}", engines[0])

        def stop() -> None:
            for engine in engines:
                engine.go.set()
            server.should_exit = True
            thread.join(30)

        served.stop = stop
        try:
            with served.http:
                yield served
        finally:
            stop()
    assert not thread.is_alive()


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def photo(colour: str, format: str = "PNG") -> bytes:
    """A photo of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(buffer, format)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 60 kB that says it has 90 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 9_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(60_000_000), 9)) + chunk(b"IEND", b"")
