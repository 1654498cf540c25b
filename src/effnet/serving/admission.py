"""Admission: checks tokens, and answers 413, 429 and 503 before a body is read or a route is found."""

from __future__ import annotations

import hmac
import json
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from effnet.errors import EffnetError
from effnet.serving.catalogue import Catalogue

CLOSED = ("/predict", "/metrics", "/v2")  # protected by the token
HEALTH = ("/v2/health/live", "/v2/health/ready")  # not protected
INFER = re.compile(r"/v2/models/([^/]+)/(?:versions/[^/]+/)?infer")
MOST_HELD = 256 * 2**20  # bytes of all bodies in memory
RETRY = {"retry-after": "1"}  # seconds
FULL = "there are more images than can be answered in time: try again"
LEFT = 499  # nginx's status for a client that has disconnected


class Admission:
    """The outermost ASGI middleware.

    Args:
        app: the application behind it.
        catalogue: the models and the server's state.
        token: the token that clients must send; "" for none.
        most: most bytes of a body.
    """

    def __init__(self, app: ASGIApp, catalogue: Catalogue, token: str, most: int) -> None:
        self._app, self._catalogue, self._token, self._most = app, catalogue, token.encode(), most
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit a request, or refuse it with the reason."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, began, status = scope["path"], time.perf_counter(), LEFT
        leaving = self._catalogue.state in ("leaving", "draining")

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if leaving:  # the client's next request should go to another server
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        headers = dict(scope["headers"])
        posted = scope["method"] == "POST"
        if path.startswith(CLOSED) and path not in HEALTH and not self._knows(headers):
            await refuse(tell, 401, "a token is needed: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
        elif posted and (why := self._why_not(scope, headers)):
            await refuse(tell, *why)
        elif posted:
            await self._hold(scope, receive, tell)
        else:
            await self._app(scope, receive, tell)
        if posted:
            endpoint = "infer" if path.startswith("/v2") else "predict" if path == "/predict" else "other"
            self._catalogue.counters.requests.labels(endpoint, status).inc()
            if status == 200:
                self._catalogue.counters.seconds.labels(endpoint).observe(time.perf_counter() - began)

    def _knows(self, headers: Mapping[bytes, bytes]) -> bool:
        kind, _, shown = headers.get(b"authorization", b"").partition(b" ")
        known = hmac.compare_digest(shown.strip(), self._token)  # in constant time
        return not self._token or (known and kind.lower() == b"bearer")

    def _why_not(self, scope: Scope, headers: Mapping[bytes, bytes]) -> tuple[int, str, Mapping[str, str]] | None:
        """Status, reason and headers of a refusal."""
        state = self._catalogue.state
        if state in ("loading", "draining"):
            return 503, "the models are being loaded" if state == "loading" else "the server is shutting down", RETRY
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            return 413, self._too_large(), {}
        try:
            full = self._catalogue.engine(model_of(scope)).batcher.full
        except EffnetError:
            return None  # the route answers 404
        if full or self._held > MOST_HELD:
            return 429, FULL, RETRY
        return None

    async def _hold(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit a request; its body is counted while it is read."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            length = len(message.get("body", b""))
            size, self._held = size + length, self._held + length
            if size > self._most:
                raise HTTPException(413, self._too_large())
            if self._held > MOST_HELD:
                raise HTTPException(429, FULL, RETRY)
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            self._held -= size

    def _too_large(self) -> str:
        return f"the body has more than {self._most:,} bytes"


def model_of(scope: Scope) -> str:
    """The name of the model that a request is for, "" for the first."""
    if found := INFER.fullmatch(scope["path"]):
        return found[1]
    query = scope["query_string"]
    return parse_qs(query.decode("latin-1")).get("model", [""])[0] if b"model=" in query else ""


async def refuse(send: Send, status: int, reason: str, headers: Mapping[str, str]) -> None:
    """Reply with a reason: {"error": reason}."""
    body = json.dumps({"error": reason}).encode()
    named: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in headers.items()),
    ]
    start: dict[str, Any] = {"type": "http.response.start", "status": status, "headers": named}
    await send(start)
    await send({"type": "http.response.body", "body": body})
