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
    """The port to listen at; 0: any that is free."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0: all of this machine's."""
    latency: Amount = "50ms"
    """The time in which nine of ten answers come; batches and the number of images that are let in follow from it."""
    token: str | None = None
    """What clients must send as Authorization: Bearer TOKEN. Default: $EFFNET_TOKEN, or no token."""
    max_upload: Amount = "20MB"
    """The largest body of a request."""
    allow_origin: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    """A web page of another address that may ask, such as https://shop.example; may be repeated."""

    grace: Amount = "2s"
    """The time between SIGTERM, from which on it is not ready, and the last request that is let in."""

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
        models: MODEL or NAME=MODEL, as effnet predict takes it; requests that name none are answered by the first.
    """
    from effnet.serving.catalogue import name_models  # with FastAPI and numpy

    named = name_models(models)
    token = os.environ.get(TOKEN, "") if options.token is None else options.token
    if not token.isascii():
        raise ArgumentError("token", "...", "must be ASCII, as HTTP headers are.")
    _run(named, options, token, asdict(load))
    return OK


def _run(named: dict[str, str], options: ServeOptions, token: str, load: dict[str, Any]) -> None:
    """Serve until a signal comes."""
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
        log_level="error",  # a line for each request that is none would be a stranger's way to fill the disk
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=PATIENCE,
    )
    server = Server(config, catalogue, parse_seconds("grace", options.grace))
    console.remark(f"Opening {', '.join(named.values())} at {url}")
    if not token and not _is_loopback(host):
        console.remark("Whoever reaches this address may ask: --token or EFFNET_TOKEN lets only those in who know it.")
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


def _introduce(catalogue: Any, url: str) -> None:
    """Say what is served, how, and how to ask."""
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
                f"{name}: an image takes {1e3 * pace.times[1]:.0f} ms, so {milliseconds:.0f} ms will not be kept "
                f"where two come at once; --latency {least / 0.8:.0f}ms could be"
            )
    console.remark(f"Serving at {url}; Ctrl-C ends it")
    console.remark(f"Next: curl --data-binary @PHOTO {url}/predict")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
