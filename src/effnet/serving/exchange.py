"""Exchange: what every request for an answer goes through: its body, a place, an answer unless the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile

from effnet.errors import ImageError
from effnet.runtime.session import Pixels
from effnet.serving.batcher import Full
from effnet.serving.catalogue import Catalogue
from effnet.serving.door import LEFT, RETRY
from effnet.serving.engine import Reply, Wish

T = TypeVar("T")

PATIENCE = 60.0  # seconds that a body may take
MOST_FILES = 1000  # of one request


async def read_body(request: Request) -> bytes:
    """The whole body; the door limits its size."""
    return await _in_time(request.body())


async def read_photos(request: Request) -> tuple[list[str], list[bytes]]:
    """Names and bytes of the photos in a body: its files where it is multipart, else itself, without a name."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return [""], [await read_body(request)]
    form = await _in_time(request.form(max_files=MOST_FILES))
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        photos = [await file.read() for file in files]
    finally:
        await form.close()
    if not photos:
        raise HTTPException(422, "the form holds no file")
    return [file.filename or "" for file in files], photos


async def ask(
    request: Request, catalogue: Catalogue, model: str, images: Sequence[bytes | Pixels], wish: Wish
) -> list[Reply | ImageError]:
    """The model's answers, in order. Once the client has left, nothing more is computed for it."""
    engine = catalogue.engine(model)
    try:
        with engine.batcher.place():
            answers = await _unless_left(request, engine.answer(images, wish))
    except Full:
        reason = "there are more images than can be answered in time: try again"
        raise HTTPException(429, reason, RETRY) from None
    for answer in answers:
        prediction = None if isinstance(answer, ImageError) else answer.prediction
        catalogue.counters.count(model or catalogue.first, prediction)
    return answers


async def _in_time(reading: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(PATIENCE):
            return await reading
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {PATIENCE:.0f} seconds") from None


async def _unless_left(request: Request, answering: Awaitable[T]) -> T:
    """The result, unless the client leaves; its body was read, so that is the only message that can come."""
    answer, left = asyncio.ensure_future(answering), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HTTPException(LEFT, "the client has left")
        return answer.result()
    finally:
        for task in (answer, left):
            task.cancel()
