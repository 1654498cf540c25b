"""Fingerprints to compare images by: a file's sha256, type and size, and a thumbnail with colours. No torch."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from effnet.data.bit_depth import pixel_range
from effnet.data.image import PIXEL_LIMIT, QUARTERS, explain_error, identify, open_photo, turn_of
from effnet.data.shards import open_file
from effnet.errors import ImageError

SIDE, COLOUR_SIDE = 32, 8  # pixels of a thumbnail and of its colours
MOST_FRAMES = 1_000_000
MOST_PAGES = 1000  # counted in a TIFF, at 0.2 ms per page; only its first one is read
DRAFT = 4  # a JPEG is decoded at least this many times larger than the thumbnail; less would change the thumbnail


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of an image file."""

    sha256: str
    size_bytes: int
    format: str  # Pillow's name: JPEG, PNG
    mode: str  # Pillow's mode of the stored pixels: RGB, CMYK, I;16
    width: int  # when upright
    height: int
    turned: bool  # rotated or mirrored by its EXIF orientation
    frames: int
    range: int | None  # the highest value of the range that its pixels are scaled from; None: 8 bits
    spread: float  # standard deviation of the thumbnail's most varied channel, in levels of 255
    thumbnail: bytes  # (SIDE, SIDE) uint8
    colours: bytes  # (COLOUR_SIDE, COLOUR_SIDE, 2) uint8: chroma, 128 for none


def count_frames(image: ImageFile.ImageFile) -> int:
    """The number of frames; at most MOST_PAGES for a TIFF, whose pages have to be counted one by one."""
    if image.format != "TIFF":
        return min(int(getattr(image, "n_frames", 1)), MOST_FRAMES)
    for page in range(1, MOST_PAGES):
        try:
            image.seek(page)
        except EOFError:
            return page
    return MOST_PAGES


def read_fingerprint(file: Path) -> Fingerprint:
    """The fingerprint of one image file.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        with open_file(file) as opened:
            data = opened.read()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise ImageError(explain_error(error)) from error
    image = identify(BytesIO(data))
    format, mode, (width, height) = image.format or "", image.mode, image.size
    if format in ("JPEG", "MPO") and width * height <= PIXEL_LIMIT:
        image.draft(None, (DRAFT * SIDE, DRAFT * SIDE))
    photo = open_photo(image)
    small = photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    turn, top, frames = turn_of(image), pixel_range(image), 1
    with suppress(Exception):  # last, since it seeks to another frame
        frames = count_frames(image)
    if turn in QUARTERS:
        width, height = height, width
    colours = small.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX).convert("YCbCr")
    return Fingerprint(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        format=format,
        mode=mode,
        width=width,
        height=height,
        turned=turn is not None,
        frames=frames,
        range=top,
        spread=float(np.asarray(small, np.float32).std(axis=(0, 1)).max()),
        thumbnail=small.convert("L").tobytes(),
        colours=np.asarray(colours)[..., 1:].tobytes(),
    )
