"""Decompression bombs: small files with, or claiming, very many pixels, frames, scans, directories or chunks."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

from attacks.photos import PNG
from PIL import Image

LARGEST = 13_300  # pixels a side, about the limit of what is read


def bomb(draw: random.Random) -> tuple[str, bytes]:
    """The suffix and the bytes of a random kind of bomb."""
    return draw.choice(BOMBS)(draw)


def _side(draw: random.Random, least: int = 500, most: int = LARGEST) -> int:
    """Pixels a side, log-uniform."""
    return round(least * (most / least) ** draw.random())


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, depth: int, colour: int, content: bytes, more: bytes = b"") -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    palette = _chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    return PNG + head + palette + more + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def _zeros(count: int) -> bytes:
    """Compressed."""
    packer, block = zlib.compressobj(1), bytes(1 << 20)
    pieces = [packer.compress(block) for _ in range(count >> 20)] + [packer.compress(bytes(count & (1 << 20) - 1))]
    return b"".join((*pieces, packer.flush()))


def _large_png(draw: random.Random) -> tuple[str, bytes]:
    """Complete, with pixels that compress to almost nothing."""
    side = _side(draw)
    depth, colour = draw.choice(((8, 2), (8, 6), (8, 3), (16, 0), (16, 2), (16, 4), (16, 6), (1, 0)))
    row = 1 + (side * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth + 7) // 8
    more = _chunk(b"tRNS", bytes({0: 2, 2: 6, 3: 1}[colour])) if colour in (0, 2, 3) and draw.random() < 0.5 else b""
    return "png", _png(side, side, depth, colour, _zeros(side * row), more)


def _huge_png(draw: random.Random) -> tuple[str, bytes]:
    """Only claims to be this large."""
    width, height = (draw.choice((1, 13_000, 65_535, 1 << 20, 0x7FFFFFFF)) for _ in range(2))
    return "png", _png(width, height, 8, 2, zlib.compress(bytes(1000)))


def _text_png(draw: random.Random) -> tuple[str, bytes]:
    packed = _zeros(100_000_000)
    more = draw.choice((_chunk(b"zTXt", b"a\0\0" + packed), _chunk(b"iCCP", b"a\0\0" + packed)))
    return "png", _png(1, 1, 8, 2, zlib.compress(bytes(4)), more * draw.choice((1, 50)))


def _many_chunks(draw: random.Random) -> tuple[str, bytes]:
    return "png", _png(
        1, 1, 8, 2, zlib.compress(bytes(4)), _chunk(draw.choice((b"prIv", b"IDAT", b"tEXt")), b"") * 100_000
    )


def _frames_png(draw: random.Random) -> tuple[str, bytes]:
    more = _chunk(b"acTL", struct.pack(">II", draw.choice((2, 1 << 16, (1 << 31) - 1)), 0))
    return "png", _png(1, 1, 8, 2, zlib.compress(bytes(4)), more)


def _frames_gif(draw: random.Random) -> tuple[str, bytes]:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    side = draw.choice((1, 65_535))
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    return "gif", head + frame * draw.choice((1, 20_000, 200_000)) + b";"


def _pages_tiff(draw: random.Random) -> tuple[str, bytes]:
    """Many directories, each linking to the next, the last perhaps to the first."""
    pages = draw.choice((2, 20_000))
    entries = ((256, 1), (257, 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1))
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    size, start = len(body) + 4, 12
    nexts = [start + size * (page + 1) for page in range(pages)]
    nexts[-1] = draw.choice((0, start))
    content = b"".join(body + struct.pack("<I", following) for following in nexts)
    return "tiff", b"II*\0" + struct.pack("<I", start) + bytes(4) + content


def _large_tiff(draw: random.Random) -> tuple[str, bytes]:
    """Integers or floats, with every strip the same few bytes."""
    side, strip = _side(draw), 64
    bits, format = draw.choice(((32, 3), (32, 1), (16, 1), (8, 1)))
    packed, strips = _zeros(side * strip * bits // 8), -(-side // strip)
    entries = [(256, 1, side), (257, 1, side), (258, 1, bits), (259, 1, 8), (262, 1, 1), (277, 1, 1), (278, 1, strip)]
    count, behind = len(entries) + 3, 8 + 2 + 12 * (len(entries) + 3) + 4
    entries += [(273, strips, behind), (279, strips, behind + 4 * strips), (339, 1, format)]
    directory = struct.pack("<H", count)
    directory += b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, number, value in sorted(entries))
    place = behind + 8 * strips
    table = struct.pack(f"<{2 * strips}I", *([place] * strips), *([len(packed)] * strips))
    return "tiff", b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + table + packed


def _scans_jpeg(draw: random.Random) -> tuple[str, bytes]:
    """Progressive, with very many scans of a few bytes over large dimensions."""
    side = _side(draw)
    stream = io.BytesIO()
    Image.new("L", (64, 64)).save(stream, "JPEG", progressive=True)
    small = stream.getvalue()
    frame = small.index(b"\xff\xc2")
    first = small.index(b"\xff\xda")
    head = small[: frame + 5] + struct.pack(">HH", side, side) + small[frame + 9 : first]
    scan = small[first : small.index(b"\xff", first + 2)]
    return "jpeg", head + scan * draw.choice((10, 1000, 10_000)) + b"\xff\xd9"


def _segments_jpeg(draw: random.Random) -> tuple[str, bytes]:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    content = stream.getvalue()
    marker = draw.choice((b"\xff\xe1", b"\xff\xe2", b"\xff\xed", b"\xff\xfe", b"\xff\xdb"))
    body = draw.choice(
        (b"Exif\0\0II*\0\x08\0\0\0", b"ICC_PROFILE\0\1\xff", b"Photoshop 3.0\0", b"MPF\0II*\0\x08\0\0\0")
    )
    return "jpeg", content[:2] + (marker + struct.pack(">H", len(body) + 2) + body) * 20_000 + content[2:]


def _wide_webp(draw: random.Random) -> tuple[str, bytes]:
    """A lossless single-colour image, as large as WebP allows, in a few bytes."""
    stream = io.BytesIO()
    side = _side(draw, most=4000)
    Image.new("RGBA", (side, side), (1, 2, 3, draw.choice((0, 255)))).save(stream, "WEBP", lossless=True, quality=0)
    return "webp", stream.getvalue()


def _huge_webp(draw: random.Random) -> tuple[str, bytes]:
    body = b"VP8X" + struct.pack("<I", 10) + bytes([draw.choice((0, 2, 16, 18)), 0, 0, 0]) + b"\xff" * 6
    return "webp", b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _huge_bmp(draw: random.Random) -> tuple[str, bytes]:
    """Run lengths, or no data at all, for very many pixels."""
    side, packing = draw.choice((1000, 8000, 13_000, 65_535, 0x7FFFFFFF)), draw.choice((0, 1, 2))
    head = struct.pack("<IiiHHIIiiII", 40, side, draw.choice((side, -side)) % (1 << 31), 1, 8, packing, 0, 0, 0, 256, 0)
    body = bytes(1024) + draw.choice((b"", b"\xff\x01" * 50_000, b"\0\2\xff\xff" * 50_000))
    return "bmp", b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54 + 1024) + head + body


def _huge_others(draw: random.Random) -> tuple[str, bytes]:
    """Formats that give their size in a few letters."""
    side = draw.choice((1000, 13_000, 99_999, 1 << 30))
    return draw.choice(
        (
            ("ppm", b"P6 %d %d 255\n" % (side, side)),
            ("ppm", b"P2 %d %d 65535\n" % (side, side) + b"1 " * 1000),
            ("pbm", b"P1 " + b"#" * 100_000 + b"\n%d %d\n" % (side, side)),
            ("jpg", b"#define a_width %d\n#define a_height %d\nstatic char a_bits[] = {\n" % (side, side)),
            ("jpg", b'/* XPM */\nstatic char *a[] = {\n"%d %d 2 1",\n' % (side, side) + b'"a c #000000",\n' * 10),
            ("jpg", b"\x0a\x05\x01\x08" + struct.pack("<4H", 0, 0, side & 0xFFFF, side & 0xFFFF) + bytes(116)),
            (
                "jpg",
                bytes([0, 0, 10]) + bytes(9) + struct.pack("<HHBB", side & 0xFFFF, side & 0xFFFF, 24, 0) + b"\xff" * 99,
            ),
            ("jpg", b"qoif" + struct.pack(">II", side, side) + b"\x03\0" + b"\xfd" * 1000),
            ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile\n"),
            ("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        )
    )


BOMBS: tuple[Callable[[random.Random], tuple[str, bytes]], ...] = (
    *(_large_png, _huge_png, _text_png, _many_chunks, _frames_png, _frames_gif, _pages_tiff, _large_tiff),
    *(_scans_jpeg, _segments_jpeg, _wide_webp, _huge_webp, _huge_bmp, _huge_others, _huge_others),
)
