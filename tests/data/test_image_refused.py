"""open_photo refuses damaged, malicious and missing files with a plain reason, before they take memory."""

from __future__ import annotations

import io
import os
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_files import LOSSLESS, LOSSY, RGB, encode, png
from PIL import Image

from effnet.data import image as module
from effnet.data.duplicates import find_duplicates
from effnet.data.fingerprint import read_fingerprint
from effnet.data.image import PIXEL_LIMIT, open_photo
from effnet.data.paths import expand
from effnet.data.shards import FILE_LIMIT
from effnet.errors import ArgumentError, ImageError


@pytest.mark.skipif(sys.platform == "win32", reason="it has no named pipes in folders")
def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(ImageError, match="is a pipe"):
        open_photo(tmp_path / "x.jpg")
    with pytest.raises(ArgumentError, match="without an image"):
        list(expand([str(tmp_path)]))
    assert isinstance(find_duplicates([tmp_path / "x.jpg"]).fingerprints[0], ImageError)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no devices in folders")
def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    """A manifest may name a device; and the sha256 that check takes of a file reads all of it."""
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(FILE_LIMIT + 1)  # of holes, which take no space
    for path, words in ((Path("/dev/zero"), "is a device"), (tmp_path / "x.png", "at most 2,147,483,648 are read")):
        with pytest.raises(ImageError, match=words):
            open_photo(path)
        with pytest.raises(ImageError, match=words):
            read_fingerprint(path)


def test_a_decoder_s_reason_is_one_line(tmp_path: Path) -> None:
    """libheif ends its reasons with a line feed."""
    pillow_heif.from_pillow(Image.fromarray(np.tile(RGB, (10, 10, 1)))).save(tmp_path / "x.heic")
    (tmp_path / "x.heic").write_bytes((tmp_path / "x.heic").read_bytes()[:-200])
    with pytest.raises(ImageError, match="damaged") as caught:
        open_photo(tmp_path / "x.heic")
    assert "\n" not in str(caught.value)


def scans_of(count: int) -> bytes:
    """A progressive JPEG whose first scan is there that often."""
    whole = encode(np.zeros((64, 64), np.uint8), "JPEG", progressive=True).getvalue()
    start = whole.index(b"\xff\xda")
    end = whole.index(b"\xff\xc4", start)
    return whole[:start] + (count - 1) * whole[start:end] + whole[start:]


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    """Each takes a few bytes, and as long as decoding all blocks."""
    usual = encode(RGB, "JPEG", progressive=True).getvalue()
    assert 1 < usual.count(b"\xff\xda") < 20
    behind = io.BytesIO(usual + 200 * b"\xff\xda")  # its end: a film, perhaps
    assert np.asarray(open_photo(behind)).shape == RGB.shape
    assert open_photo(io.BytesIO(scans_of(50))).size == (64, 64)
    with pytest.raises(ImageError, match="with more than 100 scans"):
        open_photo(io.BytesIO(scans_of(200)))
    plain = encode(RGB, "JPEG").getvalue()
    behind = io.BytesIO(plain + 200 * plain[plain.index(b"\xff\xda") :])  # which nobody reads
    assert np.asarray(open_photo(behind)).shape == RGB.shape


def test_reasons_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "tiny.jpg").write_bytes(b"\xff")
    (tmp_path / "text.jpg").write_text("This is no image, only a text of some length.")
    (tmp_path / "short.png").write_bytes(encode(RGB).getvalue()[:60])
    (tmp_path / "header.png").write_bytes(encode(RGB).getvalue()[:31])
    (tmp_path / "vector.eps").write_bytes(encode(RGB, "EPS").getvalue())
    for name, reason in {
        "empty.jpg": "is empty",
        "tiny.jpg": "is not an image",
        "text.jpg": "is not an image",
        "short.png": r"is damaged or cut short \(image file is truncated",
        "header.png": "is a damaged PNG file",
        "vector.eps": "is not an image",
        "missing.jpg": "^does not exist$",
        ".": "is a folder",
        "a\0b": "null",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(ImageError, match=reason) as caught:
            open_photo(str(tmp_path / name))
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(PermissionError(13, "Permission denied"), "permission denied"), (MemoryError(), "more memory")],
)
def test_reasons_that_need_a_troubled_machine(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ImageError, match=reason):
        open_photo("photo.jpg")


@pytest.mark.parametrize("side", [13378, 60000])  # just above the limit, where Pillow raises, and far above
def test_bombs_are_refused_before_they_are_decoded(side: int) -> None:
    before, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with pytest.raises(ImageError, match=f"has {side} x {side} pixels; from 1 to {PIXEL_LIMIT} are read"):
        open_photo(png(side, side, 8, 2, b"\0"))
    webp = encode(RGB, "WEBP", lossless=True).getvalue()
    wide = webp[:21] + struct.pack("<I", 16383 | 16383 << 14) + webp[25:]  # 14 bits of width - 1, 14 of height - 1
    with pytest.raises(ImageError, match=f"more than {PIXEL_LIMIT} pixels"):
        open_photo(io.BytesIO(wide))
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == (before, filters)


def test_large_photos_raise_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow warns above, RGB has 54
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(encode(RGB))
    assert (np.asarray(open_photo(encode(RGB))) == RGB).all()
    monkeypatch.setattr(module, "PIXEL_LIMIT", 53)
    for source in (encode(RGB), Image.fromarray(RGB)):
        with pytest.raises(ImageError, match="has 9 x 6 pixels; from 1 to 53"):
            open_photo(source)


KINDS = [*LOSSLESS, *LOSSY, "MPO", "ICO", "PCX", "SGI", "DDS", "QOI"]


def read_or_refuse(data: bytes) -> bool:
    try:
        assert open_photo(io.BytesIO(data)).mode == "RGB"
    except ImageError as error:
        assert str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files_are_refused_or_read_and_raise_nothing_else(kind: str) -> None:
    data = encode(RGB, kind).getvalue()
    assert read_or_refuse(data)
    assert not any(read_or_refuse(data[:length]) for length in range(min(len(data) // 2, 60)))
    for length in range(60, len(data), max(1, len(data) // 50)):
        read_or_refuse(data[:length])


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1))
def test_damaged_files_raise_nothing_but_image_errors(kind: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encode(RGB, kind).getvalue())
    for position, value in changes:
        data[position % len(data)] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIXEL_LIMIT", 10**6)  # a damaged header may announce any size
        read_or_refuse(bytes(data))
