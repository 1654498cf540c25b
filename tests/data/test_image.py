"""preprocess: equal to torchvision's and timm's evaluation transforms, bit for bit, at every size and shape."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from prepared import normalise, preprocess
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from effnet.arch.spec import InputSpec
from effnet.data import image as module
from effnet.data.image import colour_mode, fit_photo, load_pixels, views
from effnet.errors import ArgumentError

PHOTOS = sorted((Path(module.__file__).parent / "photos").glob("*.png"))
KINDS = ("nearest", "bilinear", "bicubic", "lanczos")
GREY = {"mean": (0.5,), "std": (0.25,)}
SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 90))  # width, height


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Black and white noise, where resizing overshoots the most."""
    bits = np.random.default_rng(width * 4099 + height).integers(0, 2, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(bits * 255).convert(mode)


def torchvision_pixels(photo: Image.Image, spec: InputSpec) -> np.ndarray:
    preset = ImageClassification(
        crop_size=spec.size,
        resize_size=spec.resize,
        mean=spec.mean,
        std=spec.std,
        interpolation=InterpolationMode(spec.interpolation),
    )
    return preset(photo).numpy()


def timm_pixels(photo: Image.Image, spec: InputSpec, crop_mode: str, crop_pct: float) -> np.ndarray:
    transform = timm.data.create_transform(
        input_size=(spec.channels, spec.size, spec.size),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        is_training=False,
    )
    return transform(photo).numpy()


def equal(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype == np.float32 and np.array_equal(found, expected)


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("size", "crop_pct", "kind"), [(224, 0.875, "bicubic"), (240, 0.882, "bilinear"), (380, 0.922, "lanczos")]
)
def test_photos_equal_torchvision_and_timm(path: Path, size: int, crop_pct: float, kind: Any) -> None:
    half = (0.5,) * 3
    spec = InputSpec(size=size, resize=math.floor(size / crop_pct), interpolation=kind, mean=half, std=half)
    photo = Image.open(path)
    assert equal(preprocess(path, spec), torchvision_pixels(photo, spec))
    assert equal(preprocess(path, spec), timm_pixels(photo, spec, "center", crop_pct))
    assert equal(preprocess(path, replace(spec, fit="squash")), timm_pixels(photo, spec, "squash", 1.0))
    assert equal(preprocess(path, replace(spec, fit="pad")), timm_pixels(photo, spec, "border", 1.0))


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, size=st.integers(1, 64), extra=st.integers(0, 33), kind=st.sampled_from(KINDS), grey=st.booleans())
@example(shape=(1, 1), size=224, extra=32, kind="bicubic", grey=False)
@example(shape=(3, 90), size=7, extra=0, kind="lanczos", grey=True)
def test_crop_equals_torchvision(shape: tuple[int, int], size: int, extra: int, kind: Any, grey: bool) -> None:
    spec = InputSpec(size=size, resize=size + extra, interpolation=kind, **GREY if grey else {})
    photo = noise(*shape, colour_mode(spec))
    assert equal(preprocess(photo, spec), torchvision_pixels(photo, spec))


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, size=st.integers(1, 64), kind=st.sampled_from(KINDS), grey=st.booleans())
@example(shape=(41, 90), size=45, kind="bicubic", grey=False)  # 20.5 pixels: rounded to even
def test_squash_and_pad_equal_timm(shape: tuple[int, int], size: int, kind: Any, grey: bool) -> None:
    spec = InputSpec(size=size, interpolation=kind, fit="squash", **GREY if grey else {})
    photo = noise(*shape, colour_mode(spec))
    assert equal(preprocess(photo, spec), timm_pixels(photo, spec, "squash", 1.0))
    if round(min(shape) * size / max(shape)):  # timm fails where the shorter side rounds to 0
        assert equal(preprocess(photo, replace(spec, fit="pad")), timm_pixels(photo, spec, "border", 1.0))


def test_pad_keeps_a_line_of_a_photo_that_would_vanish() -> None:
    spec = InputSpec(size=224, fit="pad")
    with pytest.raises(ValueError, match="must be > 0"):
        timm_pixels(noise(3000, 2), spec, "border", 1.0)
    pixels = fit_photo(Image.new("RGB", (3000, 2), "red"), spec)
    assert (pixels[111] == (255, 0, 0)).all()
    border = np.delete(pixels, 111, axis=0)
    assert (border == (124, 116, 104)).all()  # 255 times ImageNet's mean


@pytest.fixture
def areas(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pixels of every image that Pillow is asked to make by resizing."""
    seen: list[int] = []
    resize = Image.Image.resize

    def record(image: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        seen.append(size[0] * size[1])
        return resize(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", record)
    return seen


@pytest.mark.parametrize("shape", [(3000, 2), (1, 500_000), (700_000, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_for_any_shape(shape: tuple[int, int], kind: Any, areas: list[int]) -> None:
    spec = InputSpec(interpolation=kind)
    red = preprocess(Image.new("RGB", shape, "red"), spec)
    assert (red == normalise(np.full((224, 224, 3), (255, 0, 0), np.uint8), spec)).all()
    assert max(areas) < 10**6


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(30, 3000), st.booleans(), st.integers(0, 29), st.sampled_from(KINDS[1:]))
def test_the_way_around_stays_within_two_levels(short: int, long: int, tall: bool, cut: int, kind: Any) -> None:
    photo = noise(*((short, long) if tall else (long, short)))
    spec = InputSpec(size=30 - cut, resize=30, interpolation=kind)
    plain = fit_photo(photo, spec).astype(int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "UNCUT_LIMIT", 0)
        assert np.abs(fit_photo(photo, spec) - plain).max() <= 2


def test_another_mode_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"`photo\.mode` .*'RGBA'.* must be 'RGB' for 3 channels"):
        fit_photo(Image.new("RGBA", (9, 9)), InputSpec())


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("grey", [False, True])
def test_steps_agree_and_pixels_may_be_written(fit: Any, grey: bool) -> None:
    spec = InputSpec(size=20, resize=24, fit=fit, **GREY if grey else {})
    source = np.asarray(noise(33, 21))
    pixels = load_pixels(source, spec)
    assert (pixels.shape, pixels.dtype) == ((20, 20, spec.channels), np.uint8)
    assert (pixels == fit_photo(noise(33, 21, colour_mode(spec)), spec)).all()
    torch.from_numpy(pixels)  # warns of an array that may not be written
    assert (np.asarray(noise(33, 21)) == source).all()


def jpeg(folder: Path, width: int, height: int) -> Path:
    """A smooth photo of that size, in a file."""
    photo = Image.open(PHOTOS[0]).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    photo.save(folder / "photo.jpg", quality=95)
    return folder / "photo.jpg"


@pytest.mark.parametrize(
    ("size", "fit", "spare", "halved"),
    [
        ((1024, 512), "crop", 1, (512, 256)),  # the shorter side decides: 512 / 256
        ((1024, 512), "crop", 2, (1024, 512)),
        ((1024, 512), "pad", 2, (512, 256)),  # the longer: 1024 / 224
        ((4096, 2048), "crop", 1, (512, 256)),
        ((4096, 2048), "crop", 4, (2048, 1024)),
        ((2050, 2046), "crop", 1, (1025, 1023)),  # as long as both sides are whole
        ((2049, 2048), "crop", 1, (2049, 2048)),
    ],
)
def test_large_jpegs_are_halved(tmp_path: Path, monkeypatch, size, fit: str, spare: float, halved) -> None:
    see, file, sizes = InputSpec(224, 256, fit=fit), jpeg(tmp_path, *size), []
    monkeypatch.setattr(module, "fit_photo", lambda photo, *how: sizes.append(photo.size) or fit_photo(photo, *how))
    exact, fast = load_pixels(file, see), load_pixels(file, see, spare=spare)
    assert sizes == [size, halved]
    assert np.abs(exact.astype(int) - fast).mean() < 2
    if halved == size:
        assert np.array_equal(exact, fast)
    Image.open(file).save(tmp_path / "photo.bmp")
    assert np.array_equal(load_pixels(tmp_path / "photo.bmp", see, spare=spare), exact)  # only JPEGs are halved


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize(("size", "reduced"), [((1700, 1300), True), ((400, 301), False), ((100, 60), False)])
def test_photos_are_averaged_first(tmp_path: Path, monkeypatch, fit: Any, size: tuple[int, int], reduced: bool) -> None:
    file, see, calls = jpeg(tmp_path, *size), InputSpec(120, 136, fit=fit), []
    exact = load_pixels(file, see).astype(int)

    def spy(name: str) -> Any:
        method = getattr(Image.Image, name)
        return lambda *how, **more: calls.append(name) or method(*how, **more)

    for name in ("reduce", "crop"):
        monkeypatch.setattr(Image.Image, name, spy(name))
    fast = load_pixels(file, see, gap=2)
    assert calls == ["reduce"] * reduced  # and nothing is cut off after it was resized
    assert 0 <= np.abs(exact - fast).max() <= 5
    assert np.abs(exact - fast).mean() < 0.5


def test_views_differ_and_are_always_the_same() -> None:
    input_spec = InputSpec(size=32, resize=32)
    found = views(input_spec, 9)
    assert (found.shape, found.dtype) == ((9, 32, 32, 3), np.uint8)
    assert np.array_equal(found, views(input_spec, 9))
    assert len({view.tobytes() for view in found}) == 9
    assert views(input_spec.with_channels(1), 2).shape == (2, 32, 32, 1)
    assert views(input_spec.with_channels(5), 2).shape == (2, 32, 32, 5)
