"""Noise photos, and files with them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
GREY, RGB, RGBA = NOISE[..., 0], NOISE[..., :3], NOISE
# Formats of Pillow, with the options that keep every pixel
LOSSLESS = {"PNG": {}, "BMP": {}, "PPM": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG2000": {}, "TGA": {}}
LOSSY = {"JPEG": {}, "AVIF": {}, "GIF": {}}


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> io.BytesIO:
    """The bytes of a file that Pillow writes for an image or its pixels."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> io.BytesIO:
    """A PNG of any bit depth, which Pillow cannot write: each row starts with a 0."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    )
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + body)
