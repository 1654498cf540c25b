"""Images of 10 to 16 bits, and floats: the range that they are scaled from, and what check reports."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, TiffImagePlugin

from effnet.checking.findings import check
from effnet.data.bit_depth import pixel_range
from effnet.data.dataset import read_data
from effnet.data.fingerprint import read_fingerprint
from effnet.data.image import identify, open_photo


def png(values: np.ndarray, stated: int | None = None) -> bytes:
    """A 16-bit PNG of grey (H, W), colour (H, W, 3) or colour with alpha (H, W, 4)."""
    (height, width), kind = values.shape[:2], {2: 0, 3: 2, 4: 6}[values.ndim if values.ndim == 2 else values.shape[2]]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)) + chunk(
        b"gAMA", struct.pack(">I", 45455)
    )
    bits = chunk(b"sBIT", bytes([stated]) * (1 if values.ndim == 2 else values.shape[2])) if stated else b""
    return b"\x89PNG\r\n\x1a\n" + head + bits + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def read(data: bytes, mode: str = "L") -> np.ndarray:
    return np.asarray(open_photo(io.BytesIO(data), mode))


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3), (16, 16, 4)])
def test_the_brightest_level_of_any_depth_is_white(bits: int, shape: tuple[int, ...]) -> None:
    ramp = np.arange(256).reshape(16, 16)
    values = (ramp << bits - 8 | ramp >> 16 - bits).astype(np.uint16)
    if len(shape) == 3:
        values = np.stack([values] * shape[2], axis=-1)
        values[..., 3:] = (1 << bits) - 1
        assert (read(png(values), "RGB") == ramp[..., None]).all()
    else:
        assert (read(png(values)) == ramp).all()


@pytest.mark.parametrize(
    ("stated", "highest", "top"),
    [
        (None, 900, 1023),
        (12, 900, 4095),  # a dark image whose file says its depth
        (12, 4095, 4095),
        (12, 40000, 65535),  # scaled up, as the PNG specification wants it
        (16, 900, 65535),
        (8, 900, 1023),
        (None, 5000, 16383),
        (None, 20000, 65535),
    ],
)
def test_what_the_file_says_comes_first(stated: int | None, highest: int, top: int) -> None:
    values = np.full((4, 4), highest, np.uint16)
    assert pixel_range(identify(io.BytesIO(png(values, stated)))) == top
    assert (read(png(values, stated)) == highest * 256 // (top + 1)).all()
    colours = np.stack([values] * 3, axis=-1)
    assert (read(png(colours, stated), "RGB") == highest * 256 // (top + 1)).all()


@pytest.mark.parametrize("factor", [256, 257])
@pytest.mark.parametrize("highest", [0, 3, 59, 255])
def test_dark_images_of_8_bits_in_16_stay_dark(factor: int, highest: int) -> None:
    ramp = np.linspace(0, highest, 256).astype(np.uint16).reshape(16, 16)
    tiff, colours = io.BytesIO(), np.stack([ramp] * 3, axis=-1)
    Image.fromarray(ramp * np.uint16(factor)).save(tiff, "TIFF")
    for data in (png(ramp * factor), tiff.getvalue()):
        assert (read(data) == ramp).all()
    for data in (png(colours * factor), colour_tiff(colours * factor, "<", deflate=False)):
        assert (read(data, "RGB") == colours).all()


@pytest.mark.parametrize(("highest", "top"), [(900, 1023), (5000, 16383), (40000, 65535)])
@pytest.mark.parametrize("turn", [1, 6])
def test_the_range_of_colours_is_known(tmp_path: Path, highest: int, top: int, turn: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    data = png(np.full((4, 4, 3), highest))
    chunk = b"eXIf" + exif.tobytes()[6:]  # before the last chunk, IEND, of 12 bytes
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "1.png").write_bytes(data[:-12] + chunk + data[-12:])
    found = read_fingerprint(tmp_path / "1.png")
    assert (found.range, found.turned) == (top, turn == 6)


def test_a_tiff_says_its_depth() -> None:
    for highest, level in ((4095, 50), (3000, 50), (65535, 3), (None, 200)):
        file, tags = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
        if highest:
            tags[281] = highest
        Image.fromarray(np.full((4, 4), 800, np.uint16)).save(file, "TIFF", tiffinfo=tags)
        assert (read(file.getvalue()) == level).all()


def test_formats_that_always_say_their_depth() -> None:
    dark = np.full((4, 4), 900)
    assert (read(b"P5 4 4 4095\n" + dark.astype(">u2").tobytes()) == round(900 / 4095 * 255)).all()
    file = io.BytesIO()
    Image.fromarray(dark.astype(np.uint16)).save(file, "JPEG2000")
    assert (read(file.getvalue()) == 3).all()


def colour_tiff(values: np.ndarray, order: str, *, deflate: bool) -> bytes:
    """A 16-bit TIFF of colour (H, W, 3), which Pillow reads but does not write."""
    data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if deflate else data
    height, width, _ = values.shape
    entries = {256: width, 257: height, 258: 0, 259: 8 if deflate else 1, 262: 2, 273: 0, 277: 3, 278: height}
    entries |= {279: len(data)}
    bits_at = 8 + 2 + 12 * len(entries) + 4
    entries |= {258: bits_at, 273: bits_at + 6}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    lines = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries.items()]
    lines[2] = struct.pack(f"{order}HHII", 258, 3, 3, bits_at)
    return head + b"".join(lines) + struct.pack(f"{order}IHHH", 0, 16, 16, 16) + data


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("top", [4095, 65535])
def test_colours_of_a_tiff(order: str, deflate: bool, top: int) -> None:
    values = np.random.default_rng(0).integers(0, top + 1, (9, 7, 3))
    values[0, 0] = top
    assert (read(colour_tiff(values, order, deflate=deflate), "RGB") == values // ((top + 1) // 256)).all()


@pytest.mark.parametrize(("over", "level"), [(1.0, 255), (1.0000001, 255), (1.003, 255), (0.0, 0), (-0.003, 0)])
def test_floats_that_overshoot_by_a_hair(over: float, level: int) -> None:
    values = np.array([[0.5, over, 1.0, 0.0]], np.float32)
    assert np.asarray(open_photo(Image.fromarray(values), "L")).tolist() == [[128, level, 255, 0]]


def test_integers_of_12_bits_in_32() -> None:
    values = Image.fromarray(np.array([[0, 2048, 4095]], np.int32))
    assert np.asarray(open_photo(values, "L")).tolist() == [[0, 128, 255]]


def test_check_says_the_range(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(12):
            values = noise.integers(0, 900 if number == 3 else 4096, (64, 64)).astype(np.uint16)
            values[0, 0] = 899 if number == 3 else 4095
            (tmp_path / label / f"{number:02}.png").write_bytes(png(values))
    findings = check(read_data(tmp_path))
    assert {finding.message for finding in findings.of("deep")} == {
        "I;16 pixels, read from 0 ... 4,095",
        "I;16 pixels, read from 0 ... 1,023",
    }
    (mixed,) = findings.of("ranges")
    assert mixed.message == "0 ... 4,095 in 22 images, 0 ... 1,023 in 2 images"
    assert mixed.files == ("a/00.png", "a/03.png")
