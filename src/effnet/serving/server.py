"""uvicorn's server with draining: after SIGTERM it keeps answering for a while but reports not ready, and then ends.

uvicorn itself closes its listener at once, so clients that were sent here a moment ago cannot connect, and exits with
the signal's exit code. SIGHUP reloads the models.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

import uvicorn

from effnet.errors import ArgumentError
from effnet.serving.catalogue import Catalogue
from effnet.serving.connection import Connection

PATIENCE = 30  # seconds that the last answers may take
TICKS = 10  # between checks for idle connections: one second
BACKLOG = 2048  # connections waiting to be accepted


class Server(uvicorn.Server):
    """A server that drains.

    Args:
        config: uvicorn's.
        catalogue: the models.
        grace: seconds for load balancers to see that it is not ready.
    """

    def __init__(self, config: uvicorn.Config, catalogue: Catalogue, grace: float) -> None:
        super().__init__(config)
        self._grace = grace
        self._catalogue = catalogue
        self._end = float("inf")
        self._reloads: set[asyncio.Task[None]] = set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own signals, and SIGHUP where there is one."""
        with _called_at_hangup(self._reload) if hasattr(signal, "SIGHUP") else nullcontext(), super().capture_signals():
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM: end after `grace`; Ctrl-C or a second signal: once requests in flight are answered."""
        if sig == signal.SIGTERM and self._catalogue.state in ("loading", "ready"):
            self._catalogue.state, self._end = "leaving", time.monotonic() + self._grace
        elif self._catalogue.state != "draining":
            self._end = 0.0
        else:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times per second: closes idle connections, and returns whether to end."""
        if time.monotonic() >= self._end:
            self._catalogue.state, self.should_exit = "draining", True
        if counter % TICKS == 0:
            for each in [*self.server_state.connections]:
                if isinstance(each, Connection):
                    each.end_if_idle()
        return await super().on_tick(counter)

    def _reload(self) -> None:
        if self._catalogue.state == "ready":
            task = asyncio.create_task(self._catalogue.reload())
            self._reloads.add(task)
            task.add_done_callback(self._reloads.discard)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ArgumentError: the port is in use or invalid, or the host is not one of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        what = "host" if isinstance(error, socket.gaierror) else "port"
        rule = f"cannot be listened on: {error}."
        raise ArgumentError(what, host if what == "host" else port, rule) from error


@contextmanager
def _called_at_hangup(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` for each SIGHUP; the program's own handler is in place again afterwards."""
    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGHUP)
    loop.add_signal_handler(signal.SIGHUP, act)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, before or signal.SIG_DFL)
