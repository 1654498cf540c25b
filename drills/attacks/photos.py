"""Damaged and malicious image files, with wrong lengths, counts, orders and checksums of each format's pieces.

A file is split into the pieces of its format (JPEG segments, PNG and WebP chunks, GIF blocks, TIFF entries, BMP fields,
AVIF and HEIC boxes), something is changed, and it is joined again, mostly with correct sizes and checksums, so that the
damage gets past the first checks.
"""

from __future__ import annotations

import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from effnet.data.image import PHOTOS

Pieces = list[bytearray]

INTEGERS = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 1000, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)
PNG, KILOBYTE = b"\x89PNG\r\n\x1a\n", 1000
CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0}


def seeds() -> dict[str, list[bytes]]:
    """Valid files of each format and variant; the first part of a name is the suffix."""
    photo = Image.open(sorted(PHOTOS.glob("*.png"))[0]).convert("RGB").resize((300, 200))
    alpha = photo.convert("RGBA")
    alpha.putalpha(photo.convert("L"))
    grey, wide = photo.convert("L"), photo.convert("L").convert("I;16")
    real = Image.fromarray(np.asarray(grey, np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "drill"
    profile = bytes(36) + b"acsp" + bytes(3000)
    known: Any = {"exif": exif.tobytes(), "icc_profile": profile}
    frames: Any = {"save_all": True, "append_images": [photo.rotate(90 * turn) for turn in (1, 2, 3)]}
    found: dict[str, list[bytes]] = {}

    def add(format: str, image: Image.Image, suffix: str = "", **options: Any) -> None:
        stream = io.BytesIO()
        if "append_images" in options:  # copies, since saving as JPEG leaves settings in an image
            options["append_images"] = [each.copy() for each in options["append_images"]]
        image.copy().save(stream, format, **options)
        found.setdefault(suffix or format.lower(), []).append(stream.getvalue())

    for image, options in (
        (photo, known),
        (photo, {"progressive": True, "restart_marker_blocks": 8}),
        (grey, {}),
        (photo.convert("CMYK"), {"quality": 95}),
        (photo.resize((1600, 1200)), {"subsampling": 0}),
    ):
        add("JPEG", image, **options)
    add("MPO", photo, "jpeg", **frames)
    for image, options in (
        (photo, known),
        (alpha, {}),
        (photo.quantize(16), {"transparency": 3}),
        (wide, {}),
        (photo.convert("1"), {}),
        (alpha, frames),
    ):
        add("PNG", image, **options)
    for options in (known, {"lossless": True, "exact": True}, frames):
        add("WEBP", alpha, **options)
    for options in ({}, {"transparency": 0}, frames):
        add("GIF", photo.quantize(32), **options)
    for image, options in (
        (photo, known),
        (photo, {"compression": "tiff_lzw"}),
        (photo, {"compression": "jpeg"}),
        (photo.convert("1"), {"compression": "group4"}),
        (wide, {"compression": "tiff_adobe_deflate"}),
        (real, {}),
        (alpha, {"compression": "packbits"}),
        (photo, frames),
    ):
        add("TIFF", image, **options)
    for image in (photo, photo.quantize(200), photo.convert("1"), alpha, grey):
        add("BMP", image)
    add("AVIF", photo, **known)
    add("AVIF", alpha, quality=40)
    for format, image, suffix in (
        ("JPEG2000", photo, "jp2"),
        ("PPM", photo, "ppm"),
        ("ICO", alpha, "jpg"),
        ("TGA", alpha, "jpg"),
        ("PCX", photo, "jpg"),
        ("SGI", photo, "jpg"),
        ("DDS", alpha, "jpg"),
        ("ICNS", alpha, "jpg"),
        ("IM", photo, "jpg"),
        ("XBM", photo.convert("1"), "jpg"),
    ):
        add(format, image, suffix)
    try:
        from pillow_heif import from_pillow
    except ImportError:
        return found
    stream = io.BytesIO()
    from_pillow(photo).save(stream)
    found["heic"] = [stream.getvalue()]
    return found


def cuts(files: dict[str, list[bytes]]) -> list[tuple[str, bytes]]:
    """Every file, truncated at every kilobyte."""
    return [
        (name, file[:end])
        for name, variants in files.items()
        for file in variants
        for end in range(0, len(file), KILOBYTE)
    ]


def change(name: str, file: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A file with changed pieces, then perhaps changed bytes."""
    pieces = split(file)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        draw.choice(PIECEWISE if len(pieces) > 2 else (_field,))(pieces, others, draw)
    changed = bytearray(join(file, pieces, lies=draw.random() < 0.2, draw=draw))
    if draw.random() < 0.25:
        draw.choice(BYTEWISE)(changed, draw)
    return bytes(changed)


def split(file: bytes) -> Pieces:
    """The pieces of a file; a file of an unknown format is one piece."""
    for mark, parse in SPLITS.items():
        if file.startswith(mark) or (mark == b"ftyp" and file[4:8] == mark):
            return [bytearray(piece) for piece in parse(file)]
    return [bytearray(file[start : start + 64]) for start in range(0, len(file), 64)]


def join(file: bytes, pieces: Pieces, *, lies: bool, draw: random.Random) -> bytes:
    """Join pieces to a file with correct lengths and checksums, or with a wrong one if `lies`."""
    liar = draw.randrange(len(pieces)) if lies and pieces else -1
    if file.startswith(b"\xff\xd8"):
        return b"".join(_segment(piece, draw if number == liar else None) for number, piece in enumerate(pieces))
    if file.startswith(PNG):
        return PNG + b"".join(_chunk(piece, draw if number == liar else None) for number, piece in enumerate(pieces))
    if file.startswith(b"RIFF"):
        body = b"".join(_riff(piece, draw if number == liar else None) for number, piece in enumerate(pieces))
        return b"RIFF" + struct.pack("<I", len(body) + 4 if liar < 0 else draw.choice(INTEGERS)) + b"WEBP" + body
    return b"".join(pieces)


def _jpeg(file: bytes) -> Iterator[bytes]:
    """Markers with their content; the coded data after the start of a scan is a piece of its own."""
    place = 0
    while place + 2 <= len(file):
        marker = file[place + 1]
        length = 2 if marker in (0xD8, 0xD9) else 2 + int.from_bytes(file[place + 2 : place + 4], "big")
        yield file[place : place + length]
        place += length
        if marker == 0xDA:
            end = place
            while end < len(file) - 1 and not (file[end] == 0xFF and file[end + 1] not in (0, *range(0xD0, 0xD8))):
                end += 1
            yield file[place:end]
            place = end


def _png(file: bytes) -> Iterator[bytes]:
    place = len(PNG)
    while place + 8 <= len(file):
        length = int.from_bytes(file[place : place + 4], "big")
        yield file[place + 4 : place + 8 + length]  # its name and content
        place += 12 + length


def _webp(file: bytes) -> Iterator[bytes]:
    place = 12
    while place + 8 <= len(file):
        length = int.from_bytes(file[place + 4 : place + 8], "little")
        yield file[place : place + 4] + file[place + 8 : place + 8 + length]
        place += 8 + length + length % 2


def _gif(file: bytes) -> Iterator[bytes]:
    """The header with its colours, then each block with its data."""
    place = 13 + (3 << (file[10] & 7) + 1 if file[10] & 128 else 0)
    yield file[:place]
    while place < len(file) and file[place] in (0x21, 0x2C):
        start = place
        if file[place] == 0x21:
            place += 2
        else:
            place += 11 + (3 << (file[place + 9] & 7) + 1 if file[place + 9] & 128 else 0)
        while place < len(file) and file[place]:
            place += 1 + file[place]
        place += 1
        yield file[start:place]
    yield file[place:]


def _tiff(file: bytes) -> Iterator[bytes]:
    """The entries of the first directory, and the bytes before and after them, whose positions must not change."""
    start = int.from_bytes(file[4:8], "little")
    count = int.from_bytes(file[start : start + 2], "little")
    ends = [0, 4, 8, start, start + 2, *(start + 2 + 12 * (number + 1) for number in range(count)), len(file)]
    ends = sorted({*ends, start + 6 + 12 * count})
    yield from (file[begin:end] for begin, end in itertools.pairwise(ends))


def _bmp(file: bytes) -> Iterator[bytes]:
    ends = (0, 2, 6, 10, 14, 18, 22, 26, 28, 30, 34, 38, 42, 46, 50, 54, len(file))
    yield from (file[begin:end] for begin, end in itertools.pairwise(ends))


def _boxes(file: bytes, place: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Headers of boxes that contain boxes, and other boxes whole."""
    end = len(file) if end is None else end
    while place + 8 <= end:
        length = int.from_bytes(file[place : place + 4], "big") or end - place
        kind = file[place + 4 : place + 8]
        if kind in CONTAINERS and length > 8:
            inside = place + 8 + CONTAINERS[kind]
            yield file[place:inside]
            yield from _boxes(file, inside, place + length)
        else:
            yield file[place : place + length]
        place += max(8, length)


SPLITS: dict[bytes, Callable[[bytes], Iterator[bytes]]] = {
    **{b"\xff\xd8": _jpeg, PNG: _png, b"RIFF": _webp, b"GIF8": _gif},
    **{b"II*\0": _tiff, b"BM": _bmp, b"ftyp": _boxes},
}


def _segment(piece: bytearray, draw: random.Random | None) -> bytes:
    if len(piece) > 4 and piece[0] == 0xFF and piece[1] not in (0xD8, 0xD9, 0, *range(0xD0, 0xD8)):
        length = draw.choice(INTEGERS) & 0xFFFF if draw else min(0xFFFF, len(piece) - 2)
        return bytes(piece[:2]) + struct.pack(">H", length) + bytes(piece[4:])
    return bytes(piece)


def _chunk(piece: bytearray, draw: random.Random | None) -> bytes:
    length, checksum = len(piece) - 4, zlib.crc32(piece)
    if draw:
        length, checksum = draw.choice(((draw.choice(INTEGERS), checksum), (length, draw.getrandbits(32))))
    return struct.pack(">i" if length < 0 else ">I", length) + bytes(piece) + struct.pack(">I", checksum)


def _riff(piece: bytearray, draw: random.Random | None) -> bytes:
    length = draw.choice(INTEGERS) if draw else max(0, len(piece) - 4)
    return bytes(piece[:4]) + struct.pack("<I", length) + bytes(piece[4:]) + b"\0" * (len(piece) % 2)


# Changes of pieces


def _drop(pieces: Pieces, others: list[bytes], draw: random.Random) -> None:
    del pieces[draw.randrange(len(pieces))]


def _swap(pieces: Pieces, others: list[bytes], draw: random.Random) -> None:
    a, b = (draw.randrange(len(pieces)) for _ in range(2))
    pieces[a], pieces[b] = pieces[b], pieces[a]


def _repeat(pieces: Pieces, others: list[bytes], draw: random.Random) -> None:
    place = draw.randrange(len(pieces))
    times = min(draw.choice((1, 1, 2, 10, 300)), 1 + 200_000 // max(1, len(pieces[place])))
    pieces[place:place] = [bytearray(pieces[place]) for _ in range(times)]


def _shorten(pieces: Pieces, others: list[bytes], draw: random.Random) -> None:
    piece = draw.choice(pieces)
    del piece[draw.randrange(len(piece) + 1) :]


def _lengthen(pieces: Pieces, others: list[bytes], draw: random.Random) -> None:
    draw.choice(pieces).extend(draw.randbytes(draw.choice((1, 2, 100, 5000))))


def _field(pieces: Pieces, others: list[bytes], draw: random.Random) -> None:
    """Replace a number in a piece, usually near its beginning, by an extreme one."""
    piece = draw.choice(pieces[: draw.choice((4, 20, len(pieces)))] or pieces)
    if len(piece) < 5:
        return
    width, order = draw.choice((1, 2, 2, 4)), draw.choice(("little", "big"))
    place = draw.randrange(draw.choice((min(24, len(piece)), len(piece))))
    value = draw.choice((*INTEGERS, draw.getrandbits(32))) & ((1 << 8 * width) - 1)
    piece[place : place + width] = value.to_bytes(width, order)  # one of the two


def _flip(pieces: Pieces, others: list[bytes], draw: random.Random) -> None:
    piece = draw.choice(pieces)
    for _ in range(draw.choice((1, 3, 30))):
        if piece:
            piece[draw.randrange(len(piece))] ^= 1 << draw.randrange(8)


def _splice(pieces: Pieces, others: list[bytes], draw: random.Random) -> None:
    """Insert a piece of another file of the same format."""
    strange = split(draw.choice(others))
    pieces.insert(draw.randrange(len(pieces) + 1), bytearray(draw.choice(strange)))


PIECEWISE = (_drop, _swap, _repeat, _shorten, _lengthen, _field, _field, _field, _flip, _flip, _splice)


# Changes of bytes


def _cut(file: bytearray, draw: random.Random) -> None:
    del file[draw.randrange(len(file) + 1) :]


def _append(file: bytearray, draw: random.Random) -> None:
    file += draw.choice((b"\0" * 1000, draw.randbytes(500), bytes(file)))


def _noise(file: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 10, 200))):
        if file:
            file[draw.randrange(len(file))] = draw.randrange(256)


def _hole(file: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(file) + 1)
    file[start : start + draw.choice((16, 512, 4096))] = b""


BYTEWISE = (_cut, _append, _noise, _hole)
