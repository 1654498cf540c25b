"""Exchange: the steps of a prediction request: read the body, take a place, answer unless the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TypeVar

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from effnet.errors import ImageError
from effnet.runtime.session import Pixels
from effnet.serving.admission import FULL, LEFT, RETRY
from effnet.serving.batcher import FullError
from effnet.serving.catalogue import Catalogue
from effnet.serving.engine import Engine, PredictOptions, Reply

T = TypeVar("T")

PATIENCE = 60.0  # seconds that a body may take
MOST_FILES = 1000  # per request


async def read_body(request: Request) -> bytes:
    """The whole body; Admission limits its size."""
    return await _in_time(request.body())


async def read_photos(request: Request) -> tuple[list[str], list[bytes]]:
    """Names and bytes of the photos in a body: its files if it is multipart, else the body itself, without a name."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return [""], [await read_body(request)]
    try:
        async with aclosing(request.stream()) as stream:
            form = await _in_time(_Form(request.headers, stream, max_files=MOST_FILES).parse())
    except MultiPartException as error:
        raise HTTPException(400, error.message) from error
    try:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        photos = [await file.read() for file in files]
    finally:
        await form.close()
    if not photos:
        raise HTTPException(422, "the form holds no file")
    return [file.filename or "" for file in files], photos


@contextmanager
def enter(catalogue: Catalogue, model: str) -> Iterator[Engine]:
    """Take a place with an engine, which stays open as long as a place is taken."""
    engine = catalogue.engine(model)
    try:
        with engine.batcher.place():
            yield engine
    except FullError:
        raise HTTPException(429, FULL, RETRY) from None


async def ask(
    request: Request, engine: Engine, images: Sequence[bytes | Pixels], options: PredictOptions
) -> list[Reply | ImageError]:
    """The answers, in order; the caller must have a place. Stops computing once the client has disconnected."""
    # The body has been read, so the only message that can follow is a disconnect.
    answer, left = asyncio.ensure_future(engine.answer(images, options)), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HTTPException(LEFT, "the client has disconnected")
        return answer.result()
    finally:
        for task in (answer, left):
            task.cancel()


class _Form(MultiPartParser):
    spool_max_size = 2**40  # photos stay in memory, like single-photo bodies: the disk may be full or not private


async def _in_time(reading: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(PATIENCE):
            return await reading
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {PATIENCE:.0f} seconds") from None
