"""A photo from anywhere: a file, a stream, a Pillow image or an array becomes a decoded upright 8-bit image.

    what the file holds        what comes out
    EXIF orientation           applied, and forgotten; where the EXIF is unreadable the pixels stay as they are stored
    transparency               composed over white, as paper shows it
    CMYK, YCbCr, LAB, palette  converted to RGB by Pillow, which also knows Adobe's inverted CMYK
    16 bits per channel        the high byte: exact whether 8 bits were widened by x 256 or by x 257
    32-bit integers, floats    scaled from the smallest usual range that holds every value (RANGES); others are refused
    an animation               its first frame; of a TIFF its first page

Departures from torchvision's and timm's readers, which call Pillow's `convert("RGB")` and nothing else:
- they see photos of phones lying on their side, because `convert` ignores the EXIF orientation;
- they drop the alpha channel and show the colour hidden beneath it, mostly black: up to 255 of 255 levels away from the
  white here where a pixel is transparent, and 0 where it is opaque;
- they clip 16-bit, 32-bit and float pixels at 255 instead of scaling them: 99.6 % of the 16-bit values become white.
As there, colour profiles (ICC) are ignored, and of a 16-bit RGB PNG the one transparent colour, which Pillow misses.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile

from effnet.errors import ArgumentError, ImageError
from effnet.fields import one_of

ColourMode = Literal["RGB", "L"]
Shrink = Callable[[int, int], int]
PhotoSource = str | PathLike[str] | BinaryIO | Image.Image | npt.NDArray[np.uint8]

PIXEL_LIMIT = 178_956_970  # where Pillow too stops warning and refuses: 0.7 GB once decoded
RANGES = {"I": (255, 65535), "F": (1, 255, 65535)}  # the usual highest values, by Pillow's mode
HALVINGS = 3  # a JPEG's blocks of 8 x 8 pixels shrink to one
UNREAD = ("EPS",)  # Pillow would start Ghostscript, a program, on it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


def open_photo(source: PhotoSource, mode: ColourMode = "RGB", *, shrink: Shrink | None = None) -> Image.Image:
    """The photo in `source`, decoded in full, upright, 8 bits per channel; the module's docstring says how.

    Args:
        source: a path, an open binary file (read from its start where it can seek), a Pillow image, or an array
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8: grey, grey, RGB or RGBA.
        mode: "RGB", or "L" for greyscale (ITU-R 601 luma).
        shrink: how often the size of a photo (width, height) may be halved; so often, at most three times, a JPEG is
            halved while it is decoded, which takes a fraction of the time. None: decoded in full.

    Returns:
        An image of that mode; `source` itself if it is one already and upright.

    Raises:
        ImageError: the photo cannot be read; the message is the reason without the file's name.
        ArgumentError: `mode` is unknown, or `source` is no photo at all, such as an array of another shape.
    """
    one_of("mode", mode, ColourMode)
    try:
        if isinstance(source, np.ndarray):
            return _flatten(_from_array(source), mode)
        if isinstance(source, Image.Image):
            return _upright(source, mode)
        if isinstance(source, (str, PathLike)):
            with Path(source).open("rb") as file:
                return _upright(_shrunk(identify(file), shrink), mode)
        if hasattr(source, "read"):
            return _upright(_shrunk(identify(source), shrink), mode)
    except (ImageError, ArgumentError):
        raise
    except Exception as error:  # decoders meet arbitrary bytes, and fail with whatever comes up
        raise ImageError(_reason(error)) from error
    raise ArgumentError("source", source, "must be a path, an open binary file, a Pillow image or an array.")


def _from_array(pixels: npt.NDArray[Any]) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not pixels.size or pixels.shape[2:] not in ((), (3,), (4,)) or pixels.ndim < 2:
        found = f"array of {pixels.dtype}, shape {pixels.shape}"
        raise ArgumentError("source", found, "must be uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).")
    return Image.fromarray(pixels)


def identify(file: BinaryIO) -> ImageFile.ImageFile:
    """The image in `file`, not yet decoded: `Image.open`, without its warning about large images and without UNREAD.

    That warning can only be silenced for all threads at once; and without a file's name Pillow maps no memory onto it,
    so a file that shrinks later cannot crash the process.
    """
    if not file.seekable():
        file = io.BytesIO(file.read())
    file.seek(0)
    prefix, complaint = file.read(16), "is not an image, or of a kind that Pillow cannot read."
    if not prefix:
        raise ImageError("is empty: 0 bytes.")
    Image.preinit()  # the five commonest kinds are asked first
    Image.init()
    for name in [name for name in Image.ID if name not in UNREAD]:
        factory, accepts = Image.OPEN[name]
        try:
            file.seek(0)
            if accepts is None or accepts(prefix.ljust(16, b"\0")) is True:
                return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            if accepts:  # its signature is right
                complaint = f"is a damaged {name} file ({error})."
    raise ImageError(complaint)


def _shrunk(image: ImageFile.ImageFile, shrink: Shrink | None) -> ImageFile.ImageFile:
    """The same, to be halved while it is decoded where its format can.

    Only as long as both sides stay whole, as those of cameras do: the decoder rounds up, which moves the photo.
    """
    if shrink is not None and image.format == "JPEG":
        width, height = image.size
        whole = ((width | height) & -(width | height)).bit_length() - 1
        halvings = min(HALVINGS, whole, shrink(width, height))
        if halvings > 0:
            image.draft(None, (width >> halvings, height >> halvings))
    return image


def _upright(image: Image.Image, mode: ColourMode) -> Image.Image:
    width, height = image.size
    if not 0 < width * height <= PIXEL_LIMIT:
        raise ImageError(f"has {width} x {height} pixels; from 1 to {PIXEL_LIMIT} are read.")
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # cameras and editors write broken EXIF beside sound pixels
        turn = None
    photo = _flatten(image, mode)
    if turn is not None:
        photo = photo.transpose(turn)
        photo.info.clear()  # its EXIF would turn it again
    return photo


def _flatten(image: Image.Image, mode: ColourMode) -> Image.Image:
    if image.mode in RANGES or image.mode.startswith("I;16"):
        image = _narrow(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        image = canvas
    if image.mode != mode and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # LAB knows no other way
    return image if image.mode == mode else image.convert(mode)


def _narrow(image: Image.Image) -> Image.Image:
    """Mode I;16*, I or F to L or, where one value stands for transparent, to LA."""
    values = np.asarray(image)
    high, low = values.max(), values.min()
    ranges = RANGES.get(image.mode, (65535,))
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    if top is None:
        usual = ", ".join(f"0 ... {top}" for top in ranges)
        raise ImageError(f"holds values from {low} to {high}; a photo's lie in one of {usual}.")
    grey = np.rint(values / top * 255) if image.mode == "F" else values // ((top + 1) // 256)
    channels = [grey.astype(np.uint8)]
    if "transparency" in image.info:
        channels.append(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("LA"[: len(channels)], [Image.fromarray(channel) for channel in channels])


def _reason(error: Exception) -> str:
    """In plain words, why `error` kept an image from being read."""
    match error:
        case FileNotFoundError():
            return "does not exist."
        case IsADirectoryError():
            return "is a folder, not an image."
        case PermissionError():
            return "cannot be opened: permission denied."
        case MemoryError():
            return "needs more memory than there is."
        case Image.DecompressionBombError():
            return f"has more than {PIXEL_LIMIT} pixels."
        case OSError() if error.strerror:
            return f"cannot be read: {error.strerror}."
        case _:
            return f"is damaged or cut short ({str(error) or type(error).__name__})."
