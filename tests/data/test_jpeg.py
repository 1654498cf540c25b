"""Photos for training: the pixels of `open_photo`, whichever decoder gives them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from effnet.data import jpeg
from effnet.data.image import PHOTOS, ColourMode, open_photo
from effnet.data.jpeg import read_pixels
from effnet.errors import ImageError

PHOTO = Image.open(min(PHOTOS.glob("*.png"))).convert("RGB").resize((203, 151))
TURNED = Image.Exif()
TURNED[0x0112] = 6


def jpeg_of(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


USUAL = {
    "4:2:0": jpeg_of(PHOTO, quality=75),
    "4:4:4": jpeg_of(PHOTO, quality=95, subsampling=0),
    "4:2:2": jpeg_of(PHOTO, subsampling=1),
    "progressive": jpeg_of(PHOTO, progressive=True),
    "RGB": jpeg_of(PHOTO, keep_rgb=True),
    "upright": jpeg_of(PHOTO, exif=Image.Exif()),
}
OTHERS = {
    "turned": jpeg_of(PHOTO, exif=TURNED),
    "broken EXIF": jpeg_of(PHOTO, exif=b"Exif\0\0broken"),
    "CMYK": jpeg_of(PHOTO.convert("CMYK")),
    "grey": jpeg_of(PHOTO.convert("L")),
}


def expected(path: Path, mode: ColourMode = "RGB", least: float | None = None) -> np.ndarray:
    photo = np.asarray(open_photo(path, mode, least=least))
    return photo if mode == "RGB" else photo[:, :, None]


@pytest.mark.parametrize("kind", USUAL)
def test_usual_jpegs_have_pillows_pixels_without_pillow(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "photo").write_bytes(USUAL[kind])
    wanted = expected(file)
    monkeypatch.setattr(jpeg, "open_photo", None)
    found = read_pixels(file)
    assert found.flags.c_contiguous
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", [*USUAL, *OTHERS])
def test_every_jpeg_has_pillows_pixels(kind: str, mode: ColourMode, tmp_path: Path) -> None:
    (file := tmp_path / "photo").write_bytes((USUAL | OTHERS)[kind])
    assert np.array_equal(read_pixels(file, mode), expected(file, mode))


def test_it_needs_no_simplejpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    (file := tmp_path / "photo").write_bytes(USUAL["4:2:0"])
    assert np.array_equal(read_pixels(file), expected(file))


def test_other_formats(tmp_path: Path) -> None:
    PHOTO.save(file := tmp_path / "photo.png")
    assert np.array_equal(read_pixels(file), np.asarray(PHOTO))


def test_large_jpegs_are_halved(tmp_path: Path) -> None:
    (file := tmp_path / "photo").write_bytes(jpeg_of(PHOTO.resize((200, 160))))
    assert [read_pixels(file, least=least).shape for least in (80, 81)] == [(80, 100, 3), (160, 200, 3)]
    assert np.array_equal(read_pixels(file, least=80), expected(file, least=80))


@pytest.mark.parametrize("data", [b"", b"no image", USUAL["4:2:0"][:-500], USUAL["4:2:0"][:600]])
def test_what_is_wrong_with_a_file_is_said(data: bytes, tmp_path: Path) -> None:
    (file := tmp_path / "photo.jpg").write_bytes(data)
    with pytest.raises(ImageError) as known:
        open_photo(file)
    with pytest.raises(ImageError) as found:
        read_pixels(file)
    assert str(found.value) == str(known.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ImageError, match=reason):
            read_pixels(path)
