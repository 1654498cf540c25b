"""effnet serve: models over HTTP."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from effnet import console
from effnet.console import OK, Amount
from effnet.errors import ArgumentError
from effnet.fields import parse_bytes, parse_seconds
from effnet.runtime.options import LoadOptions

TOKEN = "EFFNET_TOKEN"


@dataclass(frozen=True)
class ServeOptions:
    """Where and how models are served."""

    port: int = 8000
    """Port to listen on; 0: any free one."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all of this machine's."""
    latency: Amount = "50ms"
    """Latency that nine of ten answers meet; determines batch sizes and the number of images admitted."""
    token: str | None = None
    """Token that clients must send as Authorization: Bearer TOKEN. Default: $EFFNET_TOKEN, or no token."""
    max_upload: Amount = "20MB"
    """Largest request body."""
    allow_origin: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    """Another origin whose web pages may send requests, such as https://shop.example; may be repeated."""

    grace: Amount = "2s"
    """How long requests are still admitted after SIGTERM, while the server reports not ready."""

    def __post_init__(self) -> None:
        parse_seconds("latency", self.latency)
        parse_seconds("grace", self.grace)
        parse_bytes("max_upload", self.max_upload)


SERVED, OPENED = ServeOptions(), LoadOptions()


def serve(
    *models: str,
    options: Annotated[ServeOptions, Parameter(name="*")] = SERVED,
    load: Annotated[LoadOptions, Parameter(name="*")] = OPENED,
) -> int:
    """Serve models over HTTP: a page at /, POST /predict, KServe v2 at /v2, /metrics and /docs.

    Args:
        models: MODEL as in effnet predict, or NAME=MODEL; the first one answers requests that name none.
    """
    from effnet.serving.catalogue import name_models  # imports FastAPI and numpy

    named = name_models(models)
    token = os.environ.get(TOKEN, "") if options.token is None else options.token
    if not token.isascii():
        raise ArgumentError("token", "...", "must be ASCII, as HTTP headers are.")
    _run(named, options, token, asdict(load))
    return OK


def _run(named: dict[str, str], options: ServeOptions, token: str, load: dict[str, Any]) -> None:
    """Serve until a signal arrives."""
    import uvicorn

    from effnet.serving.app import build_app
    from effnet.serving.catalogue import Catalogue
    from effnet.serving.connection import IDLE, Connection
    from effnet.serving.counters import Counters
    from effnet.serving.server import PATIENCE, Server, listen

    budget = parse_seconds("latency", options.latency)
    catalogue = Catalogue(named, budget, load, Counters(), console.remark)
    listener = listen(options.host, options.port)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    failures: list[Exception] = []

    async def open_models() -> None:
        try:
            await catalogue.load()
        except Exception as error:
            failures.append(error)
            server.should_exit = True
            return
        _introduce(catalogue, url)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        loading = asyncio.create_task(open_models())
        yield
        await loading
        await catalogue.close()

    app = build_app(
        catalogue,
        token=token,
        most=parse_bytes("max_upload", options.max_upload),
        origins=options.allow_origin,
        lifespan=lifespan,
    )
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        log_level="error",  # a line for each invalid request would let strangers fill the disk
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=PATIENCE,
    )
    server = Server(config, catalogue, parse_seconds("grace", options.grace))
    console.remark(f"Opening {', '.join(named.values())} at {url}")
    if not token and not _is_loopback(host):
        console.remark("Anyone who reaches this address may send requests: restrict that with --token or EFFNET_TOKEN.")
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


def _introduce(catalogue: Any, url: str) -> None:
    """Print what is served, how, and how to send a request."""
    milliseconds = 1e3 * catalogue.budget
    for name, engine in catalogue.engines.items():
        pace = engine.batcher.pace
        console.remark(f"{name}: {engine.classifier.selection}")
        console.remark(
            f"{name}: batches of at most {pace.batch}, {pace.places} images in flight for {milliseconds:.0f} ms, "
            f"about {pace.rate:.0f} images a second"
        )
        if not pace.keeps:
            least = 2e3 * pace.times[1]
            console.remark(
                f"{name}: an image takes {1e3 * pace.times[1]:.0f} ms, so {milliseconds:.0f} ms will be missed "
                f"if two arrive at once; --latency {least / 0.8:.0f}ms is possible"
            )
    console.remark(f"Serving at {url}; Ctrl-C stops it")
    console.remark(f"Next: curl --data-binary @PHOTO {url}/predict")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
