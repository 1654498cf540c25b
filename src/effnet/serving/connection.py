"""uvicorn's connection, with limits on what a client may send or leave unread before it is disconnected.

uvicorn keeps a connection that has sent nothing, or half a header, forever; it collects headers of any size in memory,
and waits forever for a client that does not read its answers. Of several pipelined requests it only tells the last one
that the client has disconnected, so the one that is being answered fails.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_HEAD = 64 * 2**10  # bytes of a header, and of what follows a body
IDLE = 75  # seconds between two requests, or for a header: longer than load balancers keep idle connections


class Connection(HttpToolsProtocol):
    """A connection that ends if its client sends nothing, sends too much, or does not read."""

    _head = 0  # bytes received since the end of the last body
    _busy = 0.0  # when a request was last under way, by time.monotonic()
    _deaf: float | None = None  # since when the client has not been reading

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """A client has connected."""
        self._busy = time.monotonic()
        self._cycles = deque[RequestResponseCycle]()  # unanswered requests, in order
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has disconnected."""
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # after a reset its timer would keep all of this alive for IDLE seconds

    def data_received(self, data: bytes) -> None:
        """Receive data, unless the header has too many bytes."""
        self._head += len(data)
        super().data_received(data)  # calls the methods below
        if self._head > MOST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The header of a request may have at most {MOST_HEAD} bytes.")

    def on_headers_complete(self) -> None:
        """A header is complete."""
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Part of a body has arrived; Admission limits its size."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        self._head = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client has stopped reading."""
        self._deaf = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client is reading again."""
        self._deaf = None
        super().resume_writing()

    def end_if_idle(self) -> None:
        """Close if no request was under way for IDLE seconds, or the client has not read an answer for as long."""
        now = time.monotonic()
        if self.cycle is not None and not self.cycle.response_complete:
            self._busy = now
        if now - min(self._busy, self._deaf or now) > IDLE:
            self.transport.abort()
