"""open_photo: every kind of file that Pillow writes, upright and in 8 bits. What it refuses: test_image_refused.py."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from photo_files import GREY, LOSSLESS, LOSSY, RGB, RGBA, encode, png
from PIL import ExifTags, Image

from effnet.data.image import open_photo
from effnet.data.paths import is_image
from effnet.errors import ArgumentError, ImageError

TURNED = {  # EXIF orientation: how the stored pixels become upright (EXIF 2.3, tag 0x0112)
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.swapaxes(pixels, 0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(np.swapaxes(pixels, 0, 1), 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


def pixels(source: object, mode: str = "RGB") -> np.ndarray:
    result = open_photo(source, mode)  # type: ignore[arg-type]
    assert result.mode == mode
    return np.asarray(result)


def over_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :-1].astype(float), rgba[..., -1:] / 255
    return np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_kinds_give_the_very_pixels(kind: str, tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(encode(RGB, kind, **LOSSLESS[kind]).getvalue())
    assert (pixels(tmp_path / "photo") == RGB).all()
    assert (pixels(str(tmp_path / "photo"), "L") == np.asarray(Image.fromarray(RGB).convert("L"))).all()


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_kinds_give_what_pillow_decodes(kind: str) -> None:
    file = encode(RGB, kind)
    assert (pixels(file) == np.asarray(Image.open(file).convert("RGB"))).all()


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (8, 5), colour) for colour in ("red", "lime", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("MPO", {})):
        file = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        with Image.open(file) as image:
            assert image.n_frames == 3, kind
        assert np.abs(pixels(file).astype(int) - (255, 0, 0)).max() <= 2, kind


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"subsampling": 0}}.get(kind, {})
    stored = np.asarray(Image.open(encode(RGB, kind, **options)).convert("RGB"))
    photo = open_photo(encode(RGB, kind, exif=exif, **options))
    assert (np.asarray(photo) == TURNED[orientation](stored)).all()
    assert (pixels(photo) == np.asarray(photo)).all()  # read again it is not turned again


def test_an_open_pillow_image_is_turned_and_left_alone() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(encode(RGBA, exif=exif))
    assert (pixels(image) == over_white(np.rot90(RGBA, -1))).all()
    assert (np.asarray(image) == RGBA).all()
    assert image.getexif()[ExifTags.Base.Orientation] == 6


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x05\0"]
)
def test_unreadable_exif_leaves_the_pixels_as_stored(exif: bytes) -> None:
    assert (pixels(encode(RGB, exif=exif)) == RGB).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composed_over_white(kind: str) -> None:
    options = {"WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    assert (pixels(encode(RGBA, kind, **options)) == over_white(RGBA)).all()
    assert pixels(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).min() == 255


def test_grey_with_alpha() -> None:
    file = encode(Image.merge("LA", [Image.fromarray(GREY)] * 2))
    assert (pixels(file, "L") == over_white(np.stack([GREY, GREY], axis=-1))[..., 0]).all()


def test_palettes() -> None:
    paletted = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(paletted.convert("RGB"))
    index = np.asarray(paletted)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert (pixels(encode(paletted, kind)) == expected).all(), kind
    for kind in ("PNG", "GIF"):
        see_through = np.where((index == 3)[..., None], 255, expected)
        assert (pixels(encode(paletted, kind, transparency=3)) == see_through).all(), kind
    alphas = np.arange(0, 160, 10, dtype=np.uint8)  # one a colour
    rgba = np.concatenate([expected, alphas[index][..., None]], axis=-1)
    assert (pixels(encode(paletted, transparency=alphas.tobytes())) == over_white(rgba)).all()


def test_one_transparent_colour() -> None:
    key = tuple(RGB[2, 3].tolist())
    seen = np.where(np.equal(RGB, key).all(-1, keepdims=True), 255, RGB)
    assert (pixels(encode(RGB, transparency=key)) == seen).all()
    seen = np.where(np.equal(GREY, GREY[0, 0]), 255, GREY)
    for levels in (GREY, GREY.astype(np.uint16) * 257):
        assert (pixels(encode(levels, transparency=int(levels[0, 0])), "L") == seen).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])  # Pillow's CMYK JPEGs are Adobe's, stored inverted
def test_cmyk(kind: str) -> None:
    for cmyk, rgb in {(0, 255, 255, 0): (255, 0, 0), (255, 0, 255, 0): (0, 255, 0), (0, 0, 0, 255): (0, 0, 0)}.items():
        found = pixels(encode(Image.new("CMYK", (8, 8), cmyk), kind)).astype(int)
        assert np.abs(found - rgb).max() <= 2
    assert pixels(encode(Image.new("CMYK", (8, 8)), kind), "L").min() >= 253


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_of_pillow(mode: str) -> None:
    image = Image.new("RGB", (4, 3), "white").convert("L" if mode in ("1", "LA") else "RGB").convert(mode)
    assert np.abs(pixels(image).astype(int) - 255).max() <= 1
    assert np.abs(pixels(image, "L").astype(int) - 255).max() <= 1


@pytest.mark.parametrize("factor", [256, 257])  # the two ways in which 8 bits are widened to 16
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_is_scaled_exactly(kind: str, factor: int) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    file = encode(ramp * factor, kind)
    assert Image.open(file).mode in ("I;16", "I")
    assert (pixels(file, "L") == ramp).all()


def test_16_bit_colour_agrees_with_16_bit_grey() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    grey = pixels(png(64, 1, 16, 0, b"\0" + ramp.astype(">u2").tobytes()))
    colour = pixels(png(64, 1, 16, 2, b"\0" + np.repeat(ramp, 3).astype(">u2").tobytes()))
    assert (grey == colour).all()
    assert (grey[0, :, 0] == ramp >> 8).all()
    opaque = np.stack([ramp, np.full_like(ramp, 65535)], axis=-1)
    assert (pixels(png(64, 1, 16, 4, b"\0" + opaque.astype(">u2").tobytes())) == grey).all()


def test_big_endian_16_bit_tiff() -> None:
    values = Image.fromarray(GREY.astype(np.uint16) * 257).tobytes()
    swapped = Image.frombytes("I;16B", (9, 6), np.frombuffer(values, np.uint16).astype(">u2").tobytes())
    assert (pixels(encode(swapped, "TIFF"), "L") == GREY).all()


@pytest.mark.parametrize(("dtype", "top"), [(np.int32, 255), (np.int32, 65535), (np.float32, 1), (np.float32, 255)])
def test_32_bit_images_use_the_smallest_usual_range(dtype: type, top: int) -> None:
    ramp = np.arange(256).reshape(16, 16)
    file = encode((ramp * (top / 255)).astype(dtype), "TIFF")
    assert Image.open(file).mode == ("I" if dtype is np.int32 else "F")
    assert (pixels(file, "L") == ramp).all()


def test_floats_are_rounded_and_bits_are_black_or_white() -> None:
    assert pixels(Image.fromarray(np.array([[0, 0.001, 0.003, 0.5, 1]], np.float32)), "L").tolist() == [
        [0, 0, 1, 128, 255]
    ]
    assert (pixels(encode(Image.fromarray(GREY > 127)), "L") == (GREY > 127) * 255).all()


@pytest.mark.parametrize("value", [-1, 70000, float("nan")])
def test_values_of_no_usual_range_are_refused(value: float) -> None:
    with pytest.raises(ImageError, match="holds values from"):
        open_photo(Image.fromarray(np.array([[0, value]], np.float32)))


def test_arrays() -> None:
    assert (pixels(GREY, "L") == GREY).all()
    assert (pixels(GREY[..., None]) == GREY[..., None]).all()
    assert (pixels(RGB[::-1, ::2]) == RGB[::-1, ::2]).all()  # strided
    assert (pixels(RGBA) == over_white(RGBA)).all()


@pytest.mark.parametrize("shape", [(5,), (4, 5, 2), (3, 4, 5), (1, 4, 5, 3), (0, 5, 3), ()])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_is_not_a_photo_is_refused(shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(ArgumentError, match=r"`mode` .*RGBA"):
        open_photo(RGB, "RGBA")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="has 0 x 3 pixels"):
        open_photo(Image.new("RGB", (0, 3)))
    with pytest.raises(ArgumentError, match=rf"`source` .*{np.dtype(dtype)}, shape \(.*uint8 of shape \(H, W\)"):
        open_photo(np.zeros(shape, dtype))


def test_photos_of_phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif.register_heif_opener()
    top = np.zeros((64, 96, 3), np.uint8)
    top[:32] = 255
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 3
    Image.fromarray(top).save(tmp_path / "IMG_1.HEIC", "HEIF", quality=95, exif=turned)
    photo = np.asarray(open_photo(tmp_path / "IMG_1.HEIC"))
    assert photo.shape == (64, 96, 3)
    assert photo[-24:].mean() < 10 < 245 < photo[:24].mean()  # HEIC is turned by entries of its own, not by its EXIF
    assert is_image("IMG_1.HEIC")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"is a HEIC image; .*pip install 'effnet\[heif\]'"):
        open_photo(tmp_path / "IMG_1.HEIC")


def test_an_avif_of_a_general_brand_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(RGB, "AVIF").getvalue()
    assert data[4:12] == b"ftypavif"
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert (pixels(io.BytesIO(data[:8] + b"mif1" + data[12:])) == pixels(io.BytesIO(data))).all()


def test_streams_stay_open_and_need_not_seek() -> None:
    file = encode(RGB)
    file.seek(30)  # where somebody else stopped
    assert (pixels(file) == RGB).all()
    assert not file.closed
    reading, writing = os.pipe()
    os.write(writing, file.getvalue())
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert (pixels(pipe) == RGB).all()


def test_the_result_does_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "photo.tif"  # uncompressed grey: what Pillow maps into memory where it knows the file's name
    path.write_bytes(encode(GREY, "TIFF").getvalue())
    photo = open_photo(path, "L")
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert (np.asarray(photo) == GREY).all()
