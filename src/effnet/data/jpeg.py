"""A photo's pixels in an array, for training: identical to those of `open_photo`.

simplejpeg, if installed, uses the same decoder as Pillow, libjpeg-turbo, but decodes straight into the array: a JPEG of
500 x 375 takes three quarters of the time. It only gets ordinary JPEGs. Everything else, and whatever it refuses, goes
to `open_photo`, which handles all formats and explains what is wrong with a file.
"""

from __future__ import annotations

import math
from contextlib import suppress
from os import PathLike
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags

from effnet.data.image import PIXEL_LIMIT, ColourMode, explain_error, identify, open_photo
from effnet.data.shards import open_file
from effnet.errors import ImageError

SIGNATURE = b"\xff\xd8"
COLOURS = {"RGB": "RGB", "L": "GRAY"}  # simplejpeg's names


def read_pixels(
    path: str | PathLike[str], mode: ColourMode = "RGB", *, least: float | None = None
) -> npt.NDArray[np.uint8]:
    """The photo in a file: (H, W, C) uint8, upright, C 3 for "RGB" and 1 for "L".

    Args:
        path: the file.
        mode: see `open_photo`.
        least: see `open_photo`.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        file = open_file(path)
    except OSError as error:
        raise ImageError(explain_error(error)) from error
    with file:
        with suppress(Exception):  # not installed, or refused; decoders may raise anything
            if (pixels := _decode(file, mode, least)) is not None:
                return pixels
        photo = open_photo(file, mode, least=least)
    return np.array(photo).reshape(photo.height, photo.width, -1)


def _decode(file: BinaryIO, mode: ColourMode, least: float | None) -> npt.NDArray[np.uint8] | None:
    """The pixels of a JPEG that is upright, has this mode and is too small to be halved; else None."""
    import simplejpeg

    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        return None
    header = identify(file)
    upright = header.getexif().get(ExifTags.Base.Orientation, 1) == 1
    large = math.prod(header.size) > PIXEL_LIMIT or (least is not None and min(header.size) >= 2 * least)
    if header.format != "JPEG" or header.mode != mode or not upright or large:
        return None
    file.seek(0)
    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(file.read(), COLOURS[mode])
    return pixels
