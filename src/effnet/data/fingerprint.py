"""One look at an image file: what it is, and what its copies have in common with it.

A file is read and decoded once. A large JPEG is decoded at a half, a quarter or an eighth of its size, which its format
allows, so a photo of 12 megapixels takes a fifth of the time.

    sha256       of the bytes: the same file, twice
    hashes       ImageHash's pHash of the photo and of its mirror image, 64 bits each: the signs of its coarsest 8 x 8
                 frequencies. Copies differ in few bits, and so do many photos that are none: a hash proposes
    thumbnail    32 x 32 grey levels, by which `duplicates` decides
    colours      8 x 8 values of blue and red chroma
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from effnet.data.image import PIXEL_LIMIT, TURNS, identify, open_photo
from effnet.errors import ImageError, MissingExtraError

SIDE = 32  # pixels of a thumbnail, as many as pHash looks at
COLOUR_SIDE = 8
DRAFT = 4  # times as many pixels a side as are wanted are decoded of a JPEG, at least; less would show
WHAT, EXTRA = "finding near-duplicates", "train"
LYING = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclass(frozen=True)
class Fingerprint:
    """What one file holds."""

    sha256: str
    size_bytes: int
    kind: str  # Pillow's name of the format: JPEG, PNG
    mode: str  # Pillow's name of the pixels' type as they are stored: RGB, CMYK, I;16
    width: int  # upright
    height: int
    turned: bool  # by its EXIF orientation
    frames: int
    spread: float  # standard deviation of the thumbnail's colours, of the channel that varies most, in levels of 255
    hash: int
    mirrored_hash: int
    thumbnail: bytes  # (SIDE, SIDE) uint8
    colours: bytes  # (COLOUR_SIDE, COLOUR_SIDE, 2) uint8


def require_hashing() -> None:
    """Refuse before a long run what would fail in its first second.

    Raises:
        MissingExtraError: ImageHash is not installed.
    """
    if find_spec("imagehash") is None:
        raise MissingExtraError(WHAT, EXTRA)


def fingerprint(file: Path) -> Fingerprint:
    """The fingerprint of one image file.

    Raises:
        ImageError: it cannot be read; the message is the reason without the file's name.
        MissingExtraError: ImageHash is not installed.
    """
    try:
        data = file.read_bytes()
    except OSError:
        open_photo(file)  # says why
        raise
    image = _identified(data)
    kind, mode, (width, height) = image.format or "", image.mode, image.size
    photo = _decoded(image, SIDE)
    orientation, frames = 1, 1
    with suppress(Exception):  # cameras and editors write broken EXIF beside sound pixels, as `open_photo` knows
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    with suppress(Exception):
        frames = int(getattr(image, "n_frames", 1))
    if orientation in LYING:
        width, height = height, width
    small = photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    grey = small.convert("L")
    colours = small.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX).convert("YCbCr")
    return Fingerprint(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        kind=kind,
        mode=mode,
        width=width,
        height=height,
        turned=orientation in TURNS,
        frames=frames,
        spread=float(np.asarray(small, np.float32).std(axis=(0, 1)).max()),
        hash=_hash(grey),
        mirrored_hash=_hash(ImageOps.mirror(grey)),
        thumbnail=grey.tobytes(),
        colours=np.asarray(colours)[..., 1:].tobytes(),
    )


def read_small(file: Path, side: int) -> Image.Image:
    """A photo of which at least `side` pixels a side are wanted, no larger than its format makes easy.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        return _decoded(_identified(file.read_bytes()), side)
    except OSError:
        return open_photo(file)  # or says why not


def _decoded(image: Image.Image, side: int) -> Image.Image:
    if image.format in ("JPEG", "MPO") and image.width * image.height <= PIXEL_LIMIT:
        image.draft(None, (DRAFT * side, DRAFT * side))
    return open_photo(image)


def _identified(data: bytes) -> Image.Image:
    try:
        return identify(BytesIO(data))
    except ImageError:
        raise
    except Exception:  # whatever a decoder makes of arbitrary bytes
        open_photo(BytesIO(data))  # says it in plain words
        raise


def _hash(grey: Image.Image) -> int:
    try:
        import imagehash
    except ImportError as error:
        raise MissingExtraError(WHAT, EXTRA) from error
    return int.from_bytes(np.packbits(imagehash.phash(grey).hash).tobytes(), "big")
