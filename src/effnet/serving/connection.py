"""Connection: uvicorn's, with bounds on what a client may send or leave unread before it is cut off.

uvicorn keeps a connection that has sent nothing, or the first half of a head, for ever; it collects heads of any size
in memory, and waits for ever for a client that does not read its answers. Of several requests that were sent at once it
tells only the last that the client has left, so the one that is being answered fails.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_HEAD = 64 * 2**10  # bytes of a head, and of what follows a body
IDLE = 75  # seconds between two requests, or for a head: longer than load balancers keep idle connections


class Connection(HttpToolsProtocol):
    """A connection that ends when its client is silent, endless or deaf."""

    _head = 0  # bytes that came since the last of a body
    _busy = 0.0  # when a request was last under way, of time.monotonic()
    _deaf: float | None = None  # since when the client reads nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """A client has come."""
        self._busy = time.monotonic()
        self._cycles = deque[RequestResponseCycle]()  # requests that are not answered, in order
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left."""
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # after a reset its timer would keep all of this for IDLE seconds

    def data_received(self, data: bytes) -> None:
        """Take what a client sends, unless its head has too many bytes."""
        self._head += len(data)
        super().data_received(data)  # calls the methods below
        if self._head > MOST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The head of a request may have {MOST_HEAD} bytes.")

    def on_headers_complete(self) -> None:
        """A head has come."""
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """A part of a body has come, whose size Admission limits."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come."""
        self._head = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client does not read."""
        self._deaf = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        self._deaf = None
        super().resume_writing()

    def end_if_idle(self) -> None:
        """End it where no request was under way for IDLE seconds, or the client has read nothing of an answer."""
        now = time.monotonic()
        if self.cycle is not None and not self.cycle.response_complete:
            self._busy = now
        if now - min(self._busy, self._deaf or now) > IDLE:
            self.transport.abort()
