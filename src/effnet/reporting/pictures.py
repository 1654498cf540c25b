"""The pictures of a page: small WebP images as data URIs, no more bytes than the page has room for."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from effnet.data.image import open_photo
from effnet.errors import ImageError

SIDE, LARGE = 112, 160  # pixels of the longer side: in rows of pictures, and for a mistake and its maps
TINY = 64  # pictures of up to this many pixels a side are shown enlarged, without smoothing
QUALITY, QUALITY_OF_TINY = 60, 85  # of WebP


class Picture(NamedTuple):
    """A picture on a page."""

    source: str  # a data URI
    width: int  # as shown, in CSS pixels
    height: int
    tiny: bool  # whether it is enlarged


class Pictures:
    """Encodes pictures while there is room; `room` is the number of bytes left."""

    def __init__(self, room: int) -> None:
        self.room = room

    def file(self, path: Path, side: int = SIDE) -> Picture | None:
        """The photo in a file, its longer side `side` pixels; None if it cannot be read or the page is full."""
        try:
            return self.image(open_photo(path, least=2.0 * side), side) if self.room > 0 else None
        except (ImageError, OSError):  # deleted or changed since it was evaluated
            return None

    def image(self, image: Image.Image, side: int = SIDE) -> Picture | None:
        """A picture, its longer side `side` pixels; None if the page is full."""
        tiny = max(image.size) <= TINY
        if not tiny:
            image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
        scale = side / max(image.size)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "WEBP", quality=QUALITY_OF_TINY if tiny else QUALITY, method=4)
        source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(source) > self.room:
            return None
        self.room -= len(source)
        width, height = (max(1, round(scale * length)) for length in image.size)
        return Picture(source, width, height, tiny)
